"""Bytes of tokens to text, piece by piece: characters and stop texts that are not whole yet wait.

The joined pieces are the text that decoding all bytes at once gives, cut before the stop text that
is complete first (of several that end at the same place, the one that starts first). Where the
stream is cut into tokens makes no difference.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of successive tokens into text that can be shown at once."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Returns the text that `data` makes certain; sets `stopped` at a complete stop text."""
        return "" if self.stopped else self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """Returns what was held back, once no more bytes come; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        text = self._held + new
        cut = self._first_stop(text)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        wait = self._possible_stop(text)
        self._held = text[len(text) - wait :]
        return text[: len(text) - wait]

    def _first_stop(self, text: str) -> int | None:
        """Returns where the stop text starts that is complete first, None where none is."""
        # What is held back is always less than a stop text, so each stop's first occurrence is new.
        found = [(text.find(stop), stop) for stop in self._stop]
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        return min(ends)[1] if ends else None

    def _possible_stop(self, text: str) -> int:
        """Returns the length of the longest end of `text` that begins a stop text."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stop), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

"""Prompts that have been run, kept so that one that begins alike need not run its beginning.

A beginning is taken over in whole chunks: then each of the remaining tokens is computed in the
chunk in which it would be computed without it. The very same prompt is taken over whole.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from meshlm.serving.runner import Prefilled


class Match(NamedTuple):
    """The longest usable beginning that there is."""

    prefilled: Prefilled
    num_tokens: int


class PrefixCache:
    """Prompts and their keys and values, the latest used last."""

    def __init__(self, *, max_bytes: int, chunk: int) -> None:
        """Makes an empty cache.

        Args:
            max_bytes: the least recently used prompts go when their keys and values are more.
            chunk: tokens of a whole chunk.
        """
        self._max_bytes = max_bytes
        self._chunk = chunk
        self._entries: OrderedDict[tuple[int, ...], Prefilled] = OrderedDict()
        self.num_bytes = 0

    def find(self, prompt: tuple[int, ...]) -> Match | None:
        """Returns the entry that shares most whole chunks with the prompt, or all of it."""
        best: tuple[int, tuple[int, ...]] | None = None
        for tokens in self._entries:
            shared = self._shared(tokens, prompt)
            if shared and (best is None or shared > best[0]):
                best = shared, tokens
        if best is None:
            return None
        self._entries.move_to_end(best[1])
        return Match(self._entries[best[1]], best[0])

    def add(self, prompt: tuple[int, ...], prefilled: Prefilled) -> None:
        """Keeps a prompt that has been run whole; others go for it. The latest always stays.

        So several samples of one prompt run it once, whatever the bound.
        """
        if prompt in self._entries:
            return
        self._entries[prompt] = prefilled
        self.num_bytes += prefilled.num_bytes
        while self.num_bytes > self._max_bytes and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def _shared(self, tokens: Sequence[int], prompt: Sequence[int]) -> int:
        """Returns how many tokens of the prompt can be taken over from `tokens`."""
        length = 0
        for ours, theirs in zip(tokens, prompt, strict=False):
            if ours != theirs:
                break
            length += 1
        if length == len(prompt) == len(tokens):
            return length
        # The last token of a prompt has to run: what follows is predicted from it.
        return min(length, len(prompt) - 1) // self._chunk * self._chunk

"""Log-probabilities as OpenAI's two APIs tell them."""

import codecs
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from meshlm.data.tokenizer import Tokenizer
from meshlm.serving.requests import TokenScore

# JSON has no infinity; this is what other servers write for it.
LEAST = -9999.0
_ESCAPE = "bytes:"


@functools.lru_cache(maxsize=1 << 16)
def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Returns the token's text, or `bytes:\\xNN...` where its bytes are no whole characters.

    Two tokens never have one name: a text that begins as an escape does is escaped too.
    """
    data = tokenizer.token_bytes(token)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = _ESCAPE
    if text.startswith(_ESCAPE):
        return _ESCAPE + "".join(f"\\x{byte:02x}" for byte in data)
    return text


class CompletionLogprobs:
    """Builds the `logprobs` of one choice of /v1/completions, part by part."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begins at the first character of the choice's text."""
        self._tokenizer = tokenizer
        self._offset = 0
        self._start_text()

    def prompt(
        self, tokens: Sequence[int], text: str, scores: Sequence[TokenScore]
    ) -> dict[str, list[Any]]:
        """Returns the part of an echoed prompt, whose first token has no probability."""
        first = _part(
            [token_name(self._tokenizer, tokens[0])], [None], [None], self._places(tokens)
        )
        rest = self._scored(scores)
        first["tokens"] += rest["tokens"]
        first["token_logprobs"] += rest["token_logprobs"]
        first["top_logprobs"] += rest["top_logprobs"]
        self._start_text()
        self._offset = len(text)
        return first

    def output(self, scores: Sequence[TokenScore]) -> dict[str, list[Any]]:
        """Returns the part of tokens that were generated."""
        part = self._scored(scores)
        part["text_offset"] = self._places([score.token for score in scores])
        return part

    def _scored(self, scores: Iterable[TokenScore]) -> dict[str, list[Any]]:
        part = _part([], [], [], [])
        for score in scores:
            name = token_name(self._tokenizer, score.token)
            top = {token_name(self._tokenizer, token): max(p, LEAST) for token, p in score.top}
            # The same float in both places, whichever computation gave the other one.
            top[name] = log_prob = max(score.log_prob, LEAST)
            part["tokens"].append(name)
            part["token_logprobs"].append(log_prob)
            part["top_logprobs"].append(top)
        return part

    def _start_text(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _places(self, tokens: Iterable[int]) -> list[int]:
        """Returns the character at which each token begins, or which it goes on with."""
        places = []
        for token in tokens:
            places.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return places


def chat_logprobs(tokenizer: Tokenizer, scores: Iterable[TokenScore]) -> list[dict[str, Any]]:
    """Returns the `content` of the log-probabilities of a chat's answer."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        return {
            "token": token_name(tokenizer, token),
            "logprob": max(log_prob, LEAST),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    return [
        entry(score.token, score.log_prob)
        | {"top_logprobs": [entry(token, log_prob) for token, log_prob in score.top]}
        for score in scores
    ]


def _part(
    tokens: list[str],
    token_logprobs: list[float | None],
    top_logprobs: list[dict[str, float] | None],
    text_offset: list[int],
) -> dict[str, list[Any]]:
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offset,
    }

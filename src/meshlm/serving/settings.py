"""What requests ask for, as arrays with one row each.

Dim letters: B rows, V vocabulary rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from meshlm.generation.config import split_seed
from meshlm.generation.sampling import RowOptions
from meshlm.serving.requests import Request
from meshlm.serving.steps import RowSettings

# What a row without a request computes with: greedy, which costs least.
_NOBODY = Request(prompt=(0,), temperature=0.0)
# What a bias of -100 or less adds: no penalty brings a logit back from there. Finite, so that a row
# of which everything is forbidden still has numbers.
_FORBIDDEN = -1e9


def row_settings(requests: Sequence[Request | None], vocab_size: int) -> RowSettings:
    """Returns the settings of each row; None is a row that nobody waits for."""
    rows = [_NOBODY if request is None else request for request in requests]

    def column(values: Sequence[Any], dtype: type) -> Any:
        return np.array(values, dtype)

    seeds = [split_seed(request.seed) for request in rows]
    return RowSettings(
        options=RowOptions(
            seed=column([low for low, _ in seeds], np.uint32),
            seed_high=column([high for _, high in seeds], np.uint32),
            prompt_index=column([r.prompt_index for r in rows], np.int32),
            sample_index=column([r.sample_index for r in rows], np.int32),
            temperature=column([r.temperature for r in rows], np.float32),
            top_k=column([min(r.top_k or vocab_size, vocab_size) for r in rows], np.int32),
            top_p=column([1.0 if r.top_p is None else r.top_p for r in rows], np.float32),
            min_p=column([r.min_p or 0.0 for r in rows], np.float32),
            repetition_penalty=column([r.repetition_penalty for r in rows], np.float32),
        ),
        presence=column([r.presence_penalty for r in rows], np.float32),
        frequency=column([r.frequency_penalty for r in rows], np.float32),
        has_bias=column([bool(r.logit_bias) for r in rows], bool),
    )


def seen_row(request: Request, vocab_size: int) -> Bool[np.ndarray, "1 V"]:
    """Returns which tokens the prompt has."""
    seen = np.zeros((1, vocab_size), bool)
    seen[0, list(request.prompt)] = True
    return seen


def bias_row(request: Request, vocab_size: int) -> Float[np.ndarray, "1 V"]:
    """Returns what is added to each logit; OpenAI's API has -100 forbid a token."""
    bias = np.zeros((1, vocab_size), np.float32)
    for token, value in request.logit_bias.items():
        bias[0, token] = value if value > -100 else _FORBIDDEN
    return bias

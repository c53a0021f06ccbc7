"""lm_eval through `local-completions`, over a socket: equal to `Model.loglikelihood`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from apps import CONTEXT, MODEL_ID, app, listening, model, tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FOX = "the quick brown fox"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(app()) as found:
        yield f"{found}/v1/completions"


def connect(address: str, **options: Any) -> LocalCompletionsAPI:
    # Nothing says how to tokenize: lm_eval has to find out that the server does it.
    return LocalCompletionsAPI(
        base_url=address, model=MODEL_ID, max_length=CONTEXT, max_retries=1, **options
    )


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 4}, {"num_concurrent": 3}], ids=["one", "batch", "concurrent"]
)
def test_loglikelihood(address: str, options: dict[str, Any]) -> None:
    greedy = model().generate([FOX, "the dog"], temperature=0, n=2, max_tokens=12)[0].tokens
    # Only text that its own tokenization gives back can be asked for.
    greedy_text = tokenizer().decode(greedy[:1])
    pairs = [
        (FOX, " jumps over"),
        (FOX, " é \U0001f600"),
        ("", "the fox"),
        (FOX, " the lazy dog " * 8),
        (FOX, greedy_text),
        ("a", "b"),
    ]
    found = connect(address, **options).loglikelihood(ask("loglikelihood", *pairs))
    wanted = [model().loglikelihood(*pair) for pair in pairs]
    np.testing.assert_allclose([x[0] for x in found], [x[0] for x in wanted], atol=1e-4, rtol=1e-6)
    assert [x[1] for x in found] == [x[1] for x in wanted]
    assert {x[1] for x in wanted} == {False, True}


def test_token_ids(address: str) -> None:
    """Tokens that no text gives, so that undecodable bytes come too, up to the context's end."""
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, tokenizer().vocab_size, n).tolist() for n in (2, 30, CONTEXT - 1)]
    requests = [(("", ""), tokens[:1], tokens[1:]) for tokens in drawn]
    for _, before, _ in requests[1:]:
        greedy = model().generate([before, "the dog"], temperature=0, n=2, max_tokens=12)
        requests.append((("", ""), before, greedy[0].tokens))
    found = connect(address)._loglikelihood_tokens(requests)
    wanted = [model().loglikelihood(before, after) for _, before, after in requests]
    np.testing.assert_allclose([x[0] for x in found], [x[0] for x in wanted], atol=1e-4, rtol=1e-6)
    assert [x[1] for x in found] == [x[1] for x in wanted]
    assert [x[1] for x in wanted] == [False] * 3 + [True] * 2


def test_rolling(address: str) -> None:
    """Perplexity of a text: its first token is given an end-of-text, whose id lm_eval asks for."""
    text = "the lazy dog sleeps. é " * 3
    (found,) = connect(address).loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(model().score([text])[0].total, abs=1e-3)


def test_generate_until(address: str) -> None:
    options = {"until": ["e"], "max_gen_toks": 12, "temperature": 0}
    found = connect(address).generate_until(ask("generate_until", (FOX, options)))
    wanted = model().generate([FOX, "the dog"], temperature=0, n=2, max_tokens=12, stop=["e", END])
    assert found == [wanted[0].text]

"""`meshlm.load(...)` and `meshlm.train(...)` as a Python program uses them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshlm
from meshlm.core.tree import from_named, to_named
from meshlm.model.params import abstract_params
from meshlm.model.transformer import Compute, forward
from runs import arrays, assert_same_run

pytestmark = pytest.mark.timeout(600)
TEXT = "import json\n\ndef dumps(obj):\n    return None"


@pytest.fixture(scope="module")
def model(run_of_10) -> meshlm.Model:
    return meshlm.load(run_of_10, dtype="float32")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def log_probs_of(model: meshlm.Model, tokens: list[int]) -> np.ndarray:
    """Of each token given end-of-text and those before it, in float64 from the logits."""
    sequence = [model.tokenizer.end_of_text_id, *tokens]
    table = log_softmax(model.logits(np.asarray([sequence]))[0])
    return table[np.arange(len(tokens)), tokens]


def test_logits_are_those_of_the_forward_pass(model, run_of_10):
    stored = arrays(run_of_10 / "checkpoints" / "step_10")
    abstract = abstract_params(model.config, model.mesh)
    params = from_named(
        abstract, {n: jnp.asarray(stored[f"params.{n}"]) for n in to_named(abstract)}
    )
    tokens = np.random.default_rng(0).integers(0, model.tokenizer.vocab_size, (3, 21))
    direct = forward(params, model.config, tokens, Compute(dtype="float32"))
    found = model.logits(tokens)
    assert found.dtype == np.float32
    assert found.shape == (3, 21, model.config.vocab_size)
    assert np.abs(found - np.asarray(direct)).max() <= 1e-5 * np.abs(direct).max()
    assert np.array_equal(model.logits(tokens.tolist()), found)


def test_the_forms_of_generate(model):
    options = {"max_tokens": 5, "temperature": 0}
    one = model.generate("def ", **options)
    assert len(one) == 1
    assert one.text == one[0].text
    assert one.tokens == one[0].tokens
    assert one.logprobs == one[0].logprobs
    assert one.finish_reason == "length"
    ids = model.tokenizer.encode("def ")
    for same in (["def "], ids, [ids], np.asarray(ids)):
        assert model.generate(same, **options).tokens == one.tokens
    both = model.generate(["def ", "import json"], n=2, **options)
    assert [sample.tokens for sample in both[:2]] == [one.tokens] * 2
    assert len(both) == 4
    with pytest.raises(ValueError, match="4 samples"):
        _ = both.text
    stop = one.text[1:3]
    stopped = model.generate("def ", stop=stop, **options)
    assert stopped.finish_reason == "stop"
    assert stopped.text == one.text[: one.text.index(stop)]
    assert model.generate("def ", stop=[stop], **options).text == stopped.text


def test_generated_logprobs_are_those_of_the_logits(model):
    prompt = model.tokenizer.encode("class ")
    sample = model.generate(prompt, max_tokens=8, temperature=1.0, seed=3)[0]
    table = log_softmax(model.logits([prompt + sample.tokens])[0])
    wanted = table[np.arange(8) + len(prompt) - 1, sample.tokens]
    assert np.allclose(sample.logprobs, wanted, atol=1e-4)


def test_score(model):
    scores = model.score([TEXT, "x", ""])
    for text, score in zip([TEXT, "x", ""], scores, strict=True):
        assert score.tokens == model.tokenizer.encode(text)
        assert np.allclose(score.logprobs, log_probs_of(model, score.tokens), atol=1e-4)
        assert score.total == pytest.approx(sum(score.logprobs))
    assert model.score(TEXT)[0].tokens == scores[0].tokens


def test_loglikelihood(model):
    tokens = model.tokenizer.encode
    before, after = tokens(TEXT), tokens(" and more")
    table = log_softmax(model.logits([before + after])[0, len(before) - 1 : -1])
    wanted = table[np.arange(len(after)), after].sum()
    found, greedy = model.loglikelihood(TEXT, " and more")
    assert found == pytest.approx(wanted, abs=1e-3)
    assert greedy is False
    # Spaces at the end of the context count as the continuation's.
    assert model.loglikelihood(TEXT + " ", "and more")[0] == pytest.approx(wanted, abs=1e-3)
    assert model.loglikelihood(tokens(TEXT), tokens(" and more"))[0] == pytest.approx(found)
    empty = log_probs_of(model, tokens("def")).sum()
    assert model.loglikelihood("", "def")[0] == pytest.approx(empty, abs=1e-3)
    best = model.generate(TEXT, max_tokens=4, temperature=0).tokens
    assert model.loglikelihood(tokens(TEXT), best)[1] is True
    # The probabilities of all single tokens add up to 1, padding rows included.
    table = log_softmax(model.logits([tokens(TEXT)])[0, -1])
    assert np.exp(table).sum() == pytest.approx(1)


def test_dtypes(model, run_of_10):
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
    stored = meshlm.load(run_of_10)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored.params)} == {"float32"}
    assert stored.compute.dtype == "float32"
    half = meshlm.load(run_of_10, dtype="bfloat16")
    assert half.compute.dtype == "bfloat16"
    tokens = [model.tokenizer.encode(TEXT)]
    exact, rough = model.logits(tokens), half.logits(tokens)
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()


def test_mesh(model, run_of_10):
    split = meshlm.load(run_of_10, dtype="float32", mesh=meshlm.MeshConfig(data=2, model=4))
    tokens = [model.tokenizer.encode(TEXT)] * 2
    exact, found = model.logits(tokens), split.logits(tokens)
    assert np.abs(exact - found).max() <= 1e-5 * np.abs(exact).max()
    assert split.generate("def ", temperature=0, max_tokens=6).tokens == (
        model.generate("def ", temperature=0, max_tokens=6).tokens
    )


def test_mistakes(model, tmp_path, run_of_10):
    with pytest.raises(ValueError, match="nothing at this path"):
        meshlm.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="give integers"):
        model.logits([1, 2, 3])
    with pytest.raises(ValueError, match="token id 512"):
        model.logits([[512]])
    with pytest.raises(ValueError, match="129 tokens"):
        model.logits(np.zeros((1, 129), int))
    with pytest.raises(ValueError, match="continuation is empty"):
        model.loglikelihood("a", "")
    with pytest.raises(ValueError, match="temperature"):
        model.generate("a", temperature=-1)


def test_train_from_python(store, tmp_path, run_of_10):
    config = meshlm.TrainConfig(
        run=tmp_path / "run",
        data=(str(store),),
        preset="test",
        steps=10,
        batch_size=8,
        seq_len=32,
        checkpoint_every=4,
        eval_every=5,
        sample_every=0,
    )
    result = meshlm.train(config)
    assert (result.step, result.run) == (10, config.run)
    assert result.parameters == 165_376
    assert result.metrics["val_loss"] > 0
    # The command line gives the same run.
    assert_same_run(config.run, run_of_10, 10)

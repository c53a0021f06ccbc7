"""What is measured on held-out text while a run trains, and the samples it writes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from meshlm.core.errors import UsageError
from meshlm.data.loader import eval_batches
from meshlm.data.special_tokens import SpecialTokens, check_rows
from meshlm.data.store import TokenStore
from meshlm.data.tokenizer import Tokenizer
from meshlm.generation import DecodeModel, Generator, SamplingConfig
from meshlm.model.params import Params
from meshlm.model.transformer import Compute
from meshlm.step import StepConfig, eval_step
from meshlm.training.batches import local_rows, put_rows, to_device
from meshlm.training.config import RunConfig, TrainConfig

_SAMPLE_TEMPERATURE = 0.8
_SAMPLE_TOP_P = 0.95


class Validator:
    """Measures the loss on the `val` splits of a run's stores."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        record: RunConfig,
        step_config: StepConfig,
        mesh: Mesh,
        max_tokens: int,
    ) -> None:
        self._stores = [(s, data) for s, data in zip(stores, record.data, strict=True)]
        self._record, self._mesh, self._max_tokens = record, mesh, max_tokens
        self._batch_size = record.batch_size // record.accumulate
        self._eval = jax.jit(lambda params, batch: eval_step(params, batch, step_config))
        self._add = jax.jit(jnp.sum)

    def measure(self, params: Params) -> dict[str, Any]:
        """Returns val_loss (nats a token), val_perplexity and val_bits_per_byte.

        Several stores share the tokens by their weights. Where no store has held-out text the
        result is empty.
        """
        nll, tokens, size = 0.0, 0.0, 0.0
        for store, data in self._stores:
            share = max(1, int(self._max_tokens * data.weight))
            for sums in self._batches(params, store, share):
                nll, tokens, size = (
                    a + b for a, b in zip((nll, tokens, size), map(float, sums), strict=True)
                )
        if not tokens:
            return {}
        loss = nll / tokens
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, 700.0)),
            "val_bits_per_byte": nll / math.log(2) / size if size else None,
        }

    def _batches(self, params: Params, store: TokenStore, max_tokens: int):
        rows = local_rows(self._mesh, self._batch_size)
        for part in eval_batches(
            store,
            "val",
            seq_len=self._record.seq_len,
            batch_size=self._batch_size,
            max_tokens=max_tokens,
            document_mask=self._record.document_mask,
            rows=rows,
        ):
            batch = to_device(part.batch, self._mesh, self._batch_size)
            sums = self._eval(params, batch)
            num_bytes = put_rows(part.bytes_of_rows, rows, self._mesh, self._batch_size)
            yield sums.nll, sums.tokens, self._add(num_bytes)


def sample_texts(
    params: Params,
    record: RunConfig,
    tokenizer: Tokenizer,
    config: TrainConfig,
    step: int,
) -> list[tuple[str, str]]:
    """Returns pairs of prompt and sampled continuation; the seed is the step. In the run's mesh."""
    special_tokens = record.special_tokens or SpecialTokens.of(tokenizer)
    prompts = [tokenizer.encode(prompt, special_tokens.mode) for prompt in config.sample_prompts]
    allowed = min(tokenizer.vocab_size, record.model.vocab_size)
    model = DecodeModel.prepare(
        params,
        record.model,
        Compute(dtype=record.compute_dtype),
        allowed_vocab=allowed,
        sampled_vocab=min(tokenizer.text_vocab_size, allowed),
    )
    generator = Generator(
        model,
        end_ids=special_tokens.end_ids(tokenizer),
        start_id=special_tokens.start_id(tokenizer, record.model.vocab_size),
        token_bytes=tokenizer.token_bytes,
    )
    sampling = SamplingConfig(
        max_tokens=config.sample_tokens,
        temperature=_SAMPLE_TEMPERATURE,
        top_p=_SAMPLE_TOP_P,
        seed=step,
    )
    texts = generator.generate(prompts, sampling)
    return [(p, done[0].text) for p, done in zip(config.sample_prompts, texts, strict=True)]


def check_sample_prompts(config: TrainConfig, record: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises UsageError where a prompt and its sample do not fit the context together."""
    context = record.model.context_length
    mode = "text" if record.special_tokens is None else record.special_tokens.mode
    for prompt in config.sample_prompts if config.sample_every else ():
        tokens = tokenizer.encode(prompt, mode)
        check_rows(tokens, tokenizer, record.model.vocab_size)
        length = len(tokens)
        if length + config.sample_tokens > context:
            raise UsageError(
                f"--sample-prompts: {prompt[:40]!r} has {length} tokens, and with --sample-tokens "
                f"{config.sample_tokens} they do not fit the context of {context}: shorten either"
            )

"""The first weights of a run that begins from a checkpoint, in any format."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from meshlm.conversion.loading import load_stacked
from meshlm.conversion.opening import open_source
from meshlm.conversion.source import Source
from meshlm.core.errors import UsageError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.store import TokenStore
from meshlm.data.tokenizer import Tokenizer
from meshlm.model.config import ModelConfig
from meshlm.model.presets import vocab_rows
from meshlm.step import StepConfig, TrainState, begin_state, init_state
from meshlm.training.config import Origin, RunConfig, TrainConfig


def open_origin(config: TrainConfig) -> Source | None:
    """Returns the checkpoint of --init or --resume-from, opened; None where neither is given.

    Raises:
        UsageError: it is not there, or has no optimizer's state to go on with.
        BadInputError: it cannot be used.
    """
    path = config.init or config.resume_from
    if path is None:
        return None
    source = open_source(
        path,
        config=config.init_config,
        allow_pickle=config.allow_pickle,
        verify=config.verify,
    )
    if config.resume_from is not None:
        if set(source.groups) != {"params", "mu", "nu"} or source.step is None:
            raise UsageError(
                f"--resume-from {path} has weights, and no moments of Adam: "
                "give --init to begin with them"
            )
        schedule = source.counts["schedule"]
        if schedule != source.step:
            raise UsageError(
                f"--resume-from {path}: its learning rate is at step {schedule:,} and its weights "
                f"at {source.step:,}, as a fine-tuned checkpoint's are: give --init"
            )
    return source


def describe_origin(config: TrainConfig, source: Source) -> Origin:
    """Returns the record of where a run's first weights come from."""
    path = config.init or config.resume_from
    assert path is not None
    return Origin(
        path=str(Path(path).absolute()),
        format=source.kind,
        step=source.step,
        goes_on=config.resume_from is not None,
        shards=source.shards,
    )


def check_tokenizer(source: Source, ours: Tokenizer) -> None:
    """Raises UsageError where the data's ids are not those that the weights know."""
    theirs, size = source.tokenizer, ours.text_vocab_size
    same = (
        theirs is None
        or theirs.fingerprint == ours.fingerprint
        or (
            theirs.text_vocab_size == size
            and all(theirs.token_bytes(token) == ours.token_bytes(token) for token in range(size))
        )
    )
    ends = source.special_tokens.eos_token_ids
    if not same or any(ours.vocab_size <= end < source.model.vocab_size for end in ends):
        raise UsageError(
            f"the data was prepared with {ours}, and the weights of {source.path} with "
            f"{theirs or f'another one, whose texts end with tokens {list(ends)}'}: "
            "prepare it again with the tokenizer of the weights"
        )


def check_ids(source: Source, stores: Sequence[TokenStore]) -> None:
    """Raises UsageError where the data has a token that the weights have no row for."""
    rows = source.model.vocab_size
    for store in stores:
        if store.tokenizer.vocab_size > rows and (largest := store.largest_token()) >= rows:
            raise UsageError(
                f"{store.path} has {store.tokenizer.decode([largest])!r}, token {largest}, and the "
                f"weights of {source.path} have {rows} rows: prepare it without that token"
            )


def rows_needed(stores: Sequence[TokenStore], model: ModelConfig | None) -> int:
    """Returns the size of the vocabulary that a run's data needs.

    Args:
        model: of the weights to begin with, which have rows for all of the data's tokens.
    """
    tokenizer = stores[0].tokenizer
    size = tokenizer.text_vocab_size
    parses = any(store.manifest.tokenizer.special_tokens == "parse" for store in stores)
    if parses and tokenizer.vocab_size > vocab_rows(size):
        size = tokenizer.vocab_size
    return size if model is None else min(size, model.vocab_size)


def special_tokens_of(source: Source | None, stores: Sequence[TokenStore]) -> SpecialTokens | None:
    """Returns those of the weights to begin with, spelled in texts as in the data.

    None where that is the tokenizer's end of text alone, which no text spells.
    """
    tokenizer = stores[0].tokenizer
    modes = {store.manifest.tokenizer.special_tokens for store in stores}
    own = SpecialTokens.of(tokenizer) if source is None else source.special_tokens
    found = dataclasses.replace(own, mode="parse" if "parse" in modes else "text")
    return None if found == SpecialTokens.of(tokenizer) else found


def first_state(
    record: RunConfig,
    config: TrainConfig,
    step_config: StepConfig,
    abstract: TrainState,
    say: Callable[[str], None],
) -> TrainState:
    """Returns the state in which a run begins: drawn, or from a checkpoint; call it in the mesh.

    Args:
        abstract: its shapes and shardings.
        say: told where the weights come from.
    """
    origin = record.origin
    if origin is None:
        return jax.jit(lambda: init_state(step_config, record.seed))()
    source = open_source(origin.path, config=config.init_config, allow_pickle=config.allow_pickle)
    begin = jax.jit(lambda params: begin_state(step_config, params), donate_argnums=0)
    state = begin(load_stacked(source, "params", abstract.params))
    whole = f"{origin.path} ({origin.format})"
    if source.sidecar is not None:
        say("what each shard of the original has of its own is not kept: the weights will change")
    if not origin.goes_on:
        say(f"weights of {whole}; the optimizer begins anew")
        return state
    say(f"going on from step {origin.step:,} of {whole}, with its optimizer's state")
    step, count = (np.asarray(n, np.int32) for n in (origin.step, source.counts["adam"]))
    optimizer = state.optimizer.copy()
    adam = optimizer["adam"]
    for group in ("mu", "nu"):
        moments = load_stacked(source, group, abstract.params)
        adam = adam._replace(**{group: moments})
    optimizer["adam"] = adam._replace(count=jax.device_put(count, adam.count.sharding))
    return dataclasses.replace(
        state, step=jax.device_put(step, state.step.sharding), optimizer=optimizer
    )

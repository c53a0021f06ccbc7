"""The first weights of a run that begins from a checkpoint, in any format."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from meshlm.conversion.loading import load_stacked
from meshlm.conversion.opening import open_source
from meshlm.conversion.tensors import Source
from meshlm.core.errors import UsageError
from meshlm.data.tokenizer import Tokenizer
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


def check_tokenizer(path: str, theirs: Tokenizer | None, ours: Tokenizer) -> None:
    """Raises UsageError where the data's ids are not those that the weights know."""
    if theirs is None or theirs.fingerprint == ours.fingerprint:
        return
    size = ours.text_vocab_size
    same = theirs.text_vocab_size == size and all(
        theirs.token_bytes(token) == ours.token_bytes(token) for token in range(size)
    )
    if not same:
        raise UsageError(
            f"the data was prepared with {ours}, and the weights of {path} with {theirs}: "
            "prepare it again with the tokenizer of the weights"
        )


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

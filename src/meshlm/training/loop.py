"""The training loop: from a configuration to a run folder, stopped and resumed at any step."""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from meshlm.checkpoint import (
    Checkpointer,
    Restored,
    check_free_disk,
    restore_latest,
    step_path,
)
from meshlm.checkpoint.folder import ASIDE_NAME, steps_in
from meshlm.core import processes
from meshlm.core.errors import BadInputError, MeshLMError, StoppedError, UsageError
from meshlm.core.platform import device_facts
from meshlm.core.sharding import use_mesh, use_rules
from meshlm.core.tree import from_named, to_named
from meshlm.data.loader import BatchSource
from meshlm.data.store import TokenStore
from meshlm.model.flops import flops_per_token, mfu
from meshlm.model.params import count_params
from meshlm.planning.checking import check_here
from meshlm.step import (
    StepBatch,
    StepMetrics,
    TrainState,
    abstract_state,
    compile_train_step,
    num_micro_batches,
)
from meshlm.training.announcing import announce
from meshlm.training.batches import local_rows, to_device
from meshlm.training.config import RunConfig, TrainConfig
from meshlm.training.continuing import first_difference
from meshlm.training.memory import setup_of_run
from meshlm.training.metrics import NoiseScale, update_noise_scale, why_skipped
from meshlm.training.origin import first_state
from meshlm.training.out_of_memory import told_out_of_memory
from meshlm.training.output import RunOutput
from meshlm.training.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    parse_config,
    write_config,
)
from meshlm.training.saved import refuse_not_finite, saved_files, saved_noise
from meshlm.training.signals import StopSignals
from meshlm.training.start import held_folder, pick_attention, refuse_other_options, resolve
from meshlm.training.validation import Validator, check_sample_prompts, sample_texts

_MAX_SKIPPED_IN_A_ROW = 10
# The checks of the disk look so far into the run: enough for any --keep that fits.
_MOST_SAVES_AHEAD = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run has come to."""

    run: Path
    step: int
    parameters: int
    metrics: Mapping[str, Any]
    """The last line of metrics.jsonl that this start wrote; empty where it had nothing to do."""


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Trains until the steps asked for are done, and returns what came out.

    Raises:
        UsageError: an option is wrong, does not fit the others, or would change the run's past.
        BadInputError: a store or every checkpoint of the run is damaged.
        BusyError: another process trains in this folder.
        StoppedError: SIGTERM or SIGINT came; the state is saved.
        MeshLMError: ten steps in a row were skipped, or the last save failed.
    """
    processes.join(config.processes)
    try:
        config = config.on_devices(jax.devices())
        with use_rules(config.rules), held_folder(config):
            record, stores, mesh = processes.together(
                lambda: resolve(config), f"opening the run {config.run} and its stores"
            )
            refuse_other_options(config, record)
            with use_mesh(mesh):
                return _Run(config, record, stores, mesh, console or Console()).train()
    except BaseException as error:
        processes.say_failed(error)
        raise


class _Pending(NamedTuple):
    """A step that was sent to the devices and whose line is not written yet."""

    step: int
    metrics: StepMetrics
    began_s: float
    waited_s: float
    done_s: float | None
    """When it was done, where that was seen when it was sent."""

    def done_before(self, next_done_s: float | None, last_done_s: float) -> "_Pending":
        """Returns it with half of the time of both, where the next one is done already."""
        if self.done_s is not None or next_done_s is None:
            return self
        return self._replace(done_s=(max(self.began_s, last_done_s) + next_done_s) / 2)


class _Run:
    """One start of a run; lives inside the run's lock and mesh."""

    def __init__(
        self,
        config: TrainConfig,
        record: RunConfig,
        stores: list[TokenStore],
        mesh: jax.sharding.Mesh,
        console: Console,
    ) -> None:
        self.config, self.record, self.mesh, self.console = config, record, mesh, console
        self.tokenizer = stores[0].tokenizer
        check_sample_prompts(config, record, self.tokenizer)
        self.source = BatchSource(
            [(store, data.weight) for store, data in zip(stores, record.data, strict=True)],
            seq_len=record.seq_len,
            batch_size=record.batch_size,
            seed=record.seed,
            document_mask=record.document_mask,
        )
        attention = pick_attention(config, record, mesh)
        self.setup = setup_of_run(record, config.mesh, config.remat, attention, config.reduce_dtype)
        self.step_config = self.setup.step
        self.validator = Validator(stores, record, self.step_config, mesh, config.eval_tokens)
        self.abstract = abstract_state(self.step_config, mesh)
        self.checkpoints = config.run / CHECKPOINTS_FOLDER
        self.noise = NoiseScale()
        self.flops_per_token = flops_per_token(record.model, record.seq_len)
        facts = device_facts()
        devices = config.mesh.num_devices
        self.peak_flops = None if facts.peak_flops is None else facts.peak_flops * devices
        self.plan_check = check_here(self.setup)
        self.last_line: dict[str, Any] = {}
        self.last_done_s = 0.0
        self.passed_over: str | None = None

    def train(self) -> TrainResult:
        """Restores or begins, trains to the end, and leaves a report."""
        with told_out_of_memory(self.setup):
            state, start = self._restore()
        if start > self.record.steps:
            raise UsageError(
                f"--steps {self.record.steps} is less than the {start} steps that the run "
                f"{self.config.run} has done: give more, or leave it out"
            )
        self._check_disk(start)
        self.checkpointer = Checkpointer(
            self.checkpoints,
            keep=self.config.keep,
            keep_every=self.config.keep_every,
            resumed=start,
        )
        config_json = write_config(self.config.run, self.record, self.config)
        self.files = {CONFIG_FILE: config_json, "tokenizer.json": self.tokenizer.to_json()}
        self.output = RunOutput(
            self.config.run, self.console, start=start, total=self.record.steps, begins=not start
        )
        # The checkpointer ends its work before the folder's lock is given up, whatever happens.
        with self.output, self.checkpointer, StopSignals() as signals:
            announce(self.output, self.config, self.record, self.step_config, self.source, start)
            self._say_what_was_before(start)
            try:
                with told_out_of_memory(self.setup):
                    step = self._loop(state, start, signals)
            except BaseException as error:
                processes.say_failed(error)  # before anything here waits for the others
                self._note(error, start)
                raise
            finally:
                self.output.report()
        return TrainResult(
            run=self.config.run,
            step=step,
            parameters=count_params(self.record.model),
            metrics=self.last_line,
        )

    def _restore(self) -> tuple[TrainState, int]:
        restored = restore_latest(self.checkpoints, to_named(self.abstract))
        if restored is None:
            state = first_state(
                self.record, self.config, self.step_config, self.abstract, self._print
            )
            return state, self.record.first_step
        self.noise = saved_noise(restored.files, str(restored.path))
        self._refuse_other_past(restored)
        refuse_not_finite(restored)
        later = [step for step in steps_in(self.checkpoints) if step > restored.step]
        if later:
            self.passed_over = (
                f"checkpoints of steps {', '.join(map(str, later))} are damaged: going on from "
                f"step {restored.step}; the next save moves them to {self.checkpoints / ASIDE_NAME}"
            )
        return from_named(self.abstract, restored.arrays), restored.step

    def _print(self, text: str) -> None:
        if processes.is_first():
            self.console.print(text)

    def _note(self, error: BaseException, start: int) -> None:
        if isinstance(error, MeshLMError):
            kind = "stopped" if isinstance(error, StoppedError) else "failed"
            self.output.incident(self.last_line.get("step", start), kind, str(error))

    def _say_what_was_before(self, start: int) -> None:
        if self.passed_over:
            self.output.say(self.passed_over)
            self.output.incident(start, "damaged", self.passed_over)
        if self.record.first_step < start < self.record.steps:
            self.output.say(f"resumed from {step_path(self.checkpoints, start)}")
            self.output.incident(start, "resumed", f"resumed from step {start}")
        if start >= self.record.steps:
            self.output.say(
                f"step {start} of {self.record.steps} is done already: give --steps more to go on"
            )

    def _refuse_other_past(self, restored: Restored) -> None:
        where = restored.path / CONFIG_FILE
        difference = first_difference(
            parse_config(restored.files[CONFIG_FILE], str(where)), self.record
        )
        if difference is not None:
            raise BadInputError(
                f"{difference} in {where} and in {self.config.run / CONFIG_FILE}: one of them was "
                "changed; copy the first over the second to go on as the checkpoint was trained"
            )

    def _check_disk(self, start: int) -> None:
        every, last = self.config.checkpoint_every, self.record.steps
        saves = range((start // every + 1) * every, last, every)[:_MOST_SAVES_AHEAD]
        check_free_disk(
            self.checkpoints,
            to_named(self.abstract),
            [*saves, *([last] if last > start else [])],
            keep=self.config.keep,
            keep_every=self.config.keep_every,
            resumed=start,
        )

    def _loop(self, state: TrainState, start: int, signals: StopSignals) -> int:
        """Trains from `start` on; reads the metrics of a step once the next one is under way."""
        step_function = compile_train_step(self.step_config)
        pending: _Pending | None = None
        stop = processes.Stop()
        with contextlib.closing(self._batches(start)) as batches:
            for step in range(start + 1, self.record.steps + 1):
                began_s = time.monotonic()
                batch = next(batches)
                waited_s = time.monotonic() - began_s
                state, metrics = step_function(state, batch)
                # A CPU may have computed the step before it returned from the call.
                loss: Any = metrics.loss
                done_s = time.monotonic() if loss.is_ready() else None
                if pending:
                    self._finish(pending.done_before(done_s, self.last_done_s))
                pending = _Pending(step, metrics, began_s, waited_s, done_s)
                exit_code = stop.code_after(step, signals.exit_code)
                if exit_code is not None or self._is_due(step):
                    self._finish(pending, state)
                    pending = None
                if exit_code is not None:
                    self._stop(state, step, exit_code)
        self._wait_for_save()
        return max(start, self.record.steps)

    def _batches(self, start: int) -> Generator[StepBatch, None, None]:
        rows = local_rows(self.mesh, self.record.batch_size)
        for batch in self.source.iterate(start, rows):
            yield to_device(batch, self.mesh, self.record.batch_size)

    def _is_due(self, step: int) -> bool:
        config = self.config
        intervals = (config.checkpoint_every, config.eval_every, config.sample_every)
        return step == self.record.steps or any(n and step % n == 0 for n in intervals)

    def _finish(self, pending: "_Pending", state: TrainState | None = None) -> None:
        """Writes a step's line; with the state given, also does what is due at this step."""
        step, metrics = pending.step, jax.device_get(pending.metrics)
        values = self._line(pending, metrics)
        if state is not None:
            if step % self.config.eval_every == 0 or step == self.record.steps:
                values |= self.validator.measure(state.params)
            self._write_line(step, values)
            self._save_and_sample(step, state)
        else:
            self._write_line(step, values)
        in_a_row = int(metrics.skipped_in_a_row)
        if in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise MeshLMError(
                f"{in_a_row} steps in a row were skipped, the last, {step}, because "
                f"{why_skipped(values)}: {self._after_skipping(step - in_a_row)}"
            )

    def _after_skipping(self, last_good: int) -> str:
        """Returns what to do after a row of skipped steps."""
        origin = self.record.origin
        if origin is not None and last_good == self.record.first_step:
            # Not even the first batch; the weights are finite, or nothing had begun.
            return (
                f"not one step could be taken from the weights of {origin.path}: it is the weights "
                "and not the data; begin with another checkpoint"
            )
        return "the weights are as before; lower --learning-rate in a new run, or look at the data"

    def _write_line(self, step: int, values: dict[str, Any]) -> None:
        self.last_line = {"step": step, **values}
        self.output.line(step, values)
        if told := self.plan_check.add(values["step_s"]):
            self.output.say(told)

    def _line(self, pending: "_Pending", metrics: StepMetrics) -> dict[str, Any]:
        done_s = time.monotonic() if pending.done_s is None else pending.done_s
        # On an accelerator a step is sent off while the one before it still runs.
        step_s = done_s - max(pending.began_s, self.last_done_s)
        self.last_done_s = done_s
        tokens = self.record.batch_size * self.record.seq_len
        if not metrics.skipped_in_a_row:
            self.noise = update_noise_scale(
                self.noise,
                micro_norm_squared=float(metrics.micro_grad_square),
                macro_norm_squared=float(metrics.grad_norm) ** 2,
                batch_size=self.record.batch_size,
                accumulate=num_micro_batches(self.step_config),
            )
        return {
            "loss": _finite(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": _finite(metrics.grad_norm),
            "tokens": pending.step * tokens,
            "tokens_per_s": tokens / step_s,
            "step_s": step_s,
            "data_wait_s": pending.waited_s,
            "mfu": mfu(tokens / step_s, self.flops_per_token, self.peak_flops),
            "grad_noise_scale": self.noise.value,
            "skipped": int(metrics.skipped_in_a_row > 0),
        }

    def _save_and_sample(self, step: int, state: TrainState) -> None:
        config, last = self.config, self.record.steps
        if step % config.checkpoint_every == 0 or step == last:
            self._save(step, state)
        if config.sample_every and (step % config.sample_every == 0 or step == last):
            self._sample(step, state)
        self.output.report()

    def _sample(self, step: int, state: TrainState) -> None:
        try:
            texts = sample_texts(state.params, self.record, self.tokenizer, self.config, step)
        except BadInputError as error:
            # A run ends by its losses, not by its samples.
            self.output.incident(step, "no samples", str(error))
            self.output.say(f"step {step}: no samples: {error}")
            return
        self.output.samples(step, texts)

    def _save(self, step: int, state: TrainState) -> None:
        files = saved_files(self.files, step, self.record, self.noise)
        try:
            self.checkpointer.save(step, to_named(state), files)
        except MeshLMError as error:
            self.output.incident(step, "checkpoint failed", str(error))
            self.output.say(f"step {step}: {error}")

    def _wait_for_save(self) -> None:
        """Raises MeshLMError where the last save failed: such a run has not ended well."""
        self.checkpointer.wait()
        if self.checkpointer.last_error is not None:
            raise self.checkpointer.last_error

    def _stop(self, state: TrainState, step: int, exit_code: int) -> None:
        if step != self.record.steps and step % self.config.checkpoint_every != 0:
            self._save(step, state)
        self._wait_for_save()
        error = StoppedError(
            f"stopped by a signal after step {step}, saved in "
            f"{step_path(self.checkpoints, step)}: run the same command to go on",
            exit_code,
        )
        raise processes.agree(error)


def _finite(x: Any) -> float | None:
    value = float(x)
    return value if value - value == 0 else None

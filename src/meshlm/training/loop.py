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
from meshlm.checkpoint.folder import steps_in
from meshlm.core.errors import BadInputError, MeshLMError, StoppedError, UsageError
from meshlm.core.platform import device_facts
from meshlm.core.sharding import use_mesh
from meshlm.core.tree import from_named, to_named
from meshlm.data.loader import BatchSource
from meshlm.data.store import TokenStore
from meshlm.model.flops import flops_per_token, mfu
from meshlm.model.params import count_params
from meshlm.step import (
    StepBatch,
    StepMetrics,
    TrainState,
    abstract_state,
    compile_train_step,
)
from meshlm.training.batches import local_rows, to_device
from meshlm.training.config import RunConfig, TrainConfig
from meshlm.training.continuing import first_difference
from meshlm.training.lock import RunLock
from meshlm.training.metrics import (
    MetricsLog,
    NoiseScale,
    update_noise_scale,
)
from meshlm.training.origin import first_state
from meshlm.training.progress import TrainingProgress
from meshlm.training.report import write_report
from meshlm.training.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    add_incident,
    parse_config,
    write_config,
    write_samples,
)
from meshlm.training.saved import saved_files, saved_noise
from meshlm.training.signals import StopSignals
from meshlm.training.start import make_folder, refuse_foreign_folder, resolve
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
        MeshLMError: ten losses or gradients in a row were not finite, or the last save failed.
    """
    console = console or Console()
    refuse_foreign_folder(config.run)
    if not config.run.exists():
        resolve(config)  # so that a mistake leaves no folder behind
        make_folder(config.run)
    with RunLock(config.run):
        record, stores, mesh = resolve(config)
        with use_mesh(mesh):
            return _Run(config, record, stores, mesh, console).train()


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
        self.step_config = record.step_config(config.remat, config.mesh)
        self.validator = Validator(stores, record, self.step_config, mesh, config.eval_tokens)
        self.abstract = abstract_state(self.step_config, mesh)
        self.checkpoints = config.run / CHECKPOINTS_FOLDER
        self.checkpointer = Checkpointer(
            self.checkpoints, keep=config.keep, keep_every=config.keep_every
        )
        self.noise = NoiseScale()
        self.flops_per_token = flops_per_token(record.model, record.seq_len)
        facts = device_facts()
        devices = config.mesh.num_devices
        self.peak_flops = None if facts.peak_flops is None else facts.peak_flops * devices
        self.last_line: dict[str, Any] = {}
        self.last_done_s = 0.0
        self.passed_over: str | None = None

    def train(self) -> TrainResult:
        """Restores or begins, trains to the end, and leaves a report."""
        state, start = self._restore()
        if start > self.record.steps:
            raise UsageError(
                f"--steps {self.record.steps} is less than the {start} steps that the run "
                f"{self.config.run} has done: give more, or leave it out"
            )
        self._check_disk(start)
        config_json = write_config(self.config.run, self.record, self.config)
        self.files = {CONFIG_FILE: config_json, "tokenizer.json": self.tokenizer.to_json()}
        log = MetricsLog(self.config.run, resume_step=start or None)
        progress = TrainingProgress(
            self.config.run, self.console, start=start, total=self.record.steps
        )
        # The checkpointer ends its work before the folder's lock is given up, whatever happens.
        with log, progress, self.checkpointer, StopSignals() as signals:
            self.log, self.progress = log, progress
            self._announce(start)
            try:
                step = self._loop(state, start, signals)
            except MeshLMError as error:
                kind = "stopped" if isinstance(error, StoppedError) else "failed"
                add_incident(self.config.run, self.last_line.get("step", start), kind, str(error))
                raise
            finally:
                write_report(self.config.run)
        return TrainResult(
            run=self.config.run,
            step=step,
            parameters=count_params(self.record.model),
            metrics=self.last_line,
        )

    def _restore(self) -> tuple[TrainState, int]:
        named = to_named(self.abstract)
        restored = restore_latest(self.checkpoints, named)
        if restored is None:
            state = first_state(
                self.record, self.config, self.step_config, self.abstract, self.console.print
            )
            return state, self.record.first_step
        self.noise = saved_noise(restored.files, str(restored.path))
        self._refuse_other_past(restored)
        later = [step for step in steps_in(self.checkpoints) if step > restored.step]
        if later:
            self.passed_over = (
                f"checkpoints of steps {', '.join(map(str, later))} are damaged: going on from "
                f"step {restored.step}"
            )
        return from_named(self.abstract, restored.arrays), restored.step

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
        )

    def _announce(self, start: int) -> None:
        record, mesh = self.record, self.config.mesh
        tokens = record.batch_size * record.seq_len
        for line in (
            f"{record.preset}: {count_params(record.model):,} parameters, "
            f"{self.flops_per_token / 1e9:,.3f} GFLOP a token",
            f"{record.batch_size} x {record.seq_len} = {tokens:,} tokens a step in "
            f"{record.accumulate} part(s), {record.steps:,} steps, "
            f"{tokens * record.steps:,} tokens",
            f"mesh replica {mesh.replica} x data {mesh.data} x model {mesh.model} on "
            f"{device_facts().kind}; {record.compute_dtype} products, "
            f"remat {self.step_config.compute.remat}",
            f"learning rate {record.optimizer.learning_rate:g} -> "
            f"{record.optimizer.end_learning_rate:g}, warm-up {record.optimizer.warmup_steps}, "
            f"anneal {record.optimizer.anneal_steps}; everything: "
            f"{self.config.run / 'config.json'}",
        ):
            self.progress.say(line)
        epochs = tokens * record.steps / (sum(self.source.num_windows) * record.seq_len)
        self.progress.say(
            f"data: {sum(self.source.num_windows):,} sequences, {epochs:,.2f} times over"
        )
        idle = jax.device_count() - mesh.num_devices
        if idle:
            self.progress.say(f"{idle} of {jax.device_count()} devices are idle: see --mesh.data")
        scheduled = record.optimizer.warmup_steps + record.optimizer.anneal_steps
        if record.steps > scheduled:
            self.progress.say(
                f"the anneal ends at step {scheduled}: from there on the learning rate stays "
                f"{record.optimizer.end_learning_rate:g}"
            )
        if self.passed_over:
            self.progress.say(self.passed_over)
            add_incident(self.config.run, start, "damaged", self.passed_over)
        if record.first_step < start < record.steps:
            self.progress.say(f"resumed from {step_path(self.checkpoints, start)}")
            add_incident(self.config.run, start, "resumed", f"resumed from step {start}")
        if start >= record.steps:
            self.progress.say(
                f"step {start} of {record.steps} is done already: give --steps more to go on"
            )

    def _loop(self, state: TrainState, start: int, signals: StopSignals) -> int:
        """Trains from `start` on; reads the metrics of a step once the next one is under way."""
        step_function = compile_train_step(self.step_config)
        pending: _Pending | None = None
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
                if signals.exit_code is not None or self._is_due(step):
                    self._finish(pending, state)
                    pending = None
                if signals.exit_code is not None:
                    self._stop(state, step, signals.exit_code)
        self._wait_for_save()
        return max(start, self.record.steps)

    def _batches(self, start: int) -> Generator[StepBatch, None, None]:
        first, last = local_rows(self.mesh, self.record.batch_size)
        for batch in self.source.iterate(start, first, last):
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
                f"loss or gradient was not finite {in_a_row} steps in a row, at step {step}: the "
                "weights are as before; lower --learning-rate in a new run, or look at the data"
            )

    def _write_line(self, step: int, values: dict[str, Any]) -> None:
        self.log.write(step, **values)
        self.last_line = {"step": step, **values}
        self.progress.step(step, values)
        if values.get("val_loss") is not None:
            self.progress.say(
                f"step {step}: held-out loss {values['val_loss']:.4f}, perplexity "
                f"{values['val_perplexity']:,.2f}, {values['val_bits_per_byte']:.4f} bits per byte"
            )
        if values["skipped"]:
            self.progress.say(f"step {step}: loss or gradient not finite, weights left as before")

    def _line(self, pending: "_Pending", metrics: StepMetrics) -> dict[str, Any]:
        done_s = time.monotonic() if pending.done_s is None else pending.done_s
        # On an accelerator a step is sent off while the one before it still runs.
        step_s = done_s - max(pending.began_s, self.last_done_s)
        self.last_done_s = done_s
        tokens = self.record.batch_size * self.record.seq_len
        self.noise = update_noise_scale(
            self.noise,
            micro_norm_squared=float(metrics.micro_grad_square),
            macro_norm_squared=float(metrics.grad_norm) ** 2,
            batch_size=self.record.batch_size,
            accumulate=self.record.accumulate,
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
            samples = sample_texts(state.params, self.record, self.tokenizer, config, step)
            write_samples(config.run, step, samples)
            prompt, text = samples[0]
            self.progress.say(f"step {step}: {(prompt + text)!r}")
        write_report(config.run)

    def _save(self, step: int, state: TrainState) -> None:
        files = saved_files(self.files, step, self.record, self.noise)
        try:
            self.checkpointer.save(step, to_named(state), files)
        except MeshLMError as error:
            add_incident(self.config.run, step, "checkpoint failed", str(error))
            self.progress.say(f"step {step}: {error}")

    def _wait_for_save(self) -> None:
        """Raises MeshLMError where the last save failed: such a run has not ended well."""
        self.checkpointer.wait()
        if self.checkpointer.last_error is not None:
            raise self.checkpointer.last_error

    def _stop(self, state: TrainState, step: int, exit_code: int) -> None:
        if step != self.record.steps and step % self.config.checkpoint_every != 0:
            self._save(step, state)
        self._wait_for_save()
        raise StoppedError(
            f"stopped by a signal after step {step}, saved in "
            f"{step_path(self.checkpoints, step)}: run the same command to go on",
            exit_code,
        )


def _finite(x: Any) -> float | None:
    value = float(x)
    return value if value - value == 0 else None

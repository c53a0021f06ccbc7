"""What a run is: the options of `meshlm train`, and the one record of them that the run keeps.

An option that shapes the run's past has no default in `TrainConfig`: left out, it is what the run
in the folder has, or in a new run what `new_run.py` makes of it. Given, it must be what the run
has.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

from meshlm.core.config import from_dict
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.place import ProcessConfig
from meshlm.core.sharding import (
    DEFAULT_RULES,
    RULES,
    MeshConfig,
    Rules,
    ShardingName,
    current_rules,
    whole_mesh,
)
from meshlm.data.special_tokens import SpecialTokens
from meshlm.model.compute import ReduceDtype, Remat, choose_compute
from meshlm.model.config import ModelConfig
from meshlm.model.families import check_supported, upgrade_record
from meshlm.model.params import check_divides
from meshlm.ops.fast_attention import AttentionName
from meshlm.optim import OptimizerConfig, OptimizerName
from meshlm.planning.setup import check_batch_divides
from meshlm.step import StepConfig

Recipe = Literal["mtj-2021"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a GPT-J. The same command again goes on where the run stopped."""

    run: Path
    """Folder of the run: configuration, metrics, checkpoints, samples, report."""
    data: tuple[str, ...] | None = None
    """Token stores, as PATH or PATH=WEIGHT each."""
    config: Path | None = None
    """Options in a JSON file, as `meshlm convert-config` writes them; those given here win."""
    init: Path | None = None
    """Weights to begin with, in any format that `meshlm convert` reads; the optimizer is fresh."""
    resume_from: Path | None = None
    """A checkpoint with its optimizer's state, MeshLM's or the original's: go on from it."""
    init_config: str | None = None
    """The original's JSON config or a preset, where none lies beside the weights to begin with."""
    allow_pickle: bool = False
    """Begin with a pytorch_model.bin, read as weights alone by torch in a process of its own."""
    verify: bool = False
    """First hold every byte of --init or --resume-from against certificate.json, or the download's
    checksums, beside it."""
    recipe: Recipe | None = None
    """mtj-2021: train exactly as the original did, its summed biases and bfloat16 included."""
    recipe_shards: int | None = None
    """Shards of the run that --recipe mtj-2021 carries on. [as in the checkpoint; 8]"""
    preset: str | None = None
    """Shape of the model: test, demo, 125m, 350m, 1.3b, 2.7b, gpt-j-6b, 23b. [demo]"""
    steps: int | None = None
    """Train up to this step; more than before continues a finished run. [1000]"""
    batch_size: int | None = None
    """Sequences in one step, over all devices and accumulated parts. [8]"""
    seq_len: int | None = None
    """Tokens in a sequence. [the preset's context length]"""
    seed: int | None = None
    """Decides the initial weights and the order of the data. [0]"""
    vocab_size: int | None = None
    """Rows of the embedding and head. [the tokenizer's size, padded]"""
    document_mask: bool | None = None
    """Tokens see only their own document; the original let them see the whole window. [False]"""
    optimizer: OptimizerName | None = None
    """adafactor needs half of adamw's memory for weights, gradients and optimizer. [adamw]"""
    learning_rate: float | None = None
    """Peak learning rate. [by the model's size]"""
    end_learning_rate: float | None = None
    """Learning rate after the anneal. [a tenth of the peak]"""
    warmup_steps: int | None = None
    """Steps of linear rise to the peak. [a twentieth of the steps, at most 3000]"""
    anneal_steps: int | None = None
    """Steps of cosine fall after the warm-up. [the rest of the steps]"""
    weight_decay: float | None = None
    """Pull on matrices towards 0. [0.1]"""
    clip_norm: float | None = None
    """Gradients of a larger global norm are scaled down to it. [1.0]"""
    accumulate: int | None = None
    """Parts into which a step's batch is cut to save memory. [1]"""
    z_loss: float | None = None
    """Weight of the original's penalty on the log-sum-exp; the original's value is 1e-4. [0]"""
    skip_spikes: float | None = None
    """Standard deviations above the mean of the last 128 losses from which on a step changes
    nothing; 6 is usual, 4 the least. [none is skipped]"""
    compute_dtype: Literal["bfloat16", "float32"] | None = None
    """Operands of the matrix products; weights and sums are float32. [bfloat16]"""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    sharding: ShardingName | None = None
    """How batch and weights are split over the mesh (docs/parallelism.md); given without --mesh.*,
    it takes all devices. [fsdp-tensor]"""
    attention: AttentionName | None = None
    """Form of attention. [the fastest that compiles on these devices: splash, cudnn, else chunked;
    plain on a CPU]"""
    reduce_dtype: ReduceDtype = "float32"
    """Gradients of matrices but the embedding's are summed over devices in it; bfloat16 halves what
    they send."""
    remat: Remat | None = None
    """What is computed again to save memory. [none; minimal for split weights; full from 1e9]"""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept for good."""
    eval_every: int = 100
    """Steps between measurements on the held-out split."""
    eval_tokens: int = 65_536
    """Held-out tokens in one measurement, spread over the split."""
    sample_every: int = 500
    """Steps between sample generations; 0 turns them off."""
    sample_prompts: tuple[str, ...] = ("The ", "def is_even(i):", "In 2021 ")
    """Prompts of the samples."""
    sample_tokens: int = 48
    """Tokens of one sample."""
    processes: Annotated[ProcessConfig, OmitArgPrefixes] = dataclasses.field(
        default_factory=ProcessConfig
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        if self.init is not None and self.resume_from is not None:
            raise UsageError(
                "--init and --resume-from: give one, with a fresh optimizer or its own"
            )
        if self.verify and self.init is None and self.resume_from is None:
            raise UsageError("--verify is for the weights of --init or --resume-from: give one")
        for name, (least, most) in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                wanted = f"{least} or more" if value < least else f"{most} or less"
                raise UsageError(f"--{flag(name)} {value}: give {wanted}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"--{flag(name)} {value:g}: give 0 or more, and finite")
        if self.clip_norm == 0:
            raise UsageError("--clip-norm 0: give more than 0; 1e9 turns clipping off")
        if self.skip_spikes is not None and self.skip_spikes < _LEAST_SIGMAS:
            raise UsageError(
                f"--skip-spikes {self.skip_spikes:g}: give {_LEAST_SIGMAS} or more, or leave it "
                "out to skip none"
            )
        if self.sample_every and not self.sample_prompts:
            raise UsageError("--sample-prompts is empty: give a text, or --sample-every 0")

    @property
    def rules(self) -> Rules:
        """How arrays are split over the mesh."""
        return RULES[self.sharding] if self.sharding else DEFAULT_RULES

    def on_devices(self, devices: Sequence[Any]) -> "TrainConfig":
        """Returns it with a mesh of all devices where the way to split is given and no mesh."""
        if self.sharding is None or self.mesh != MeshConfig():
            return self
        return dataclasses.replace(self, mesh=whole_mesh(self.sharding, devices))


# With less, more than ten steps of a new level are skipped before it is taken for one.
_LEAST_SIGMAS = 4
# What the devices count with: a step is an int32, a seed a uint32.
_MOST = 2**31 - 1
_WHOLE_NUMBERS = {
    "steps": (1, _MOST),
    "batch_size": (1, _MOST),
    "seq_len": (1, _MOST),
    "seed": (0, 2**32 - 1),
    "vocab_size": (1, _MOST),
    "warmup_steps": (0, _MOST),
    "anneal_steps": (0, _MOST),
    "accumulate": (1, _MOST),
    "recipe_shards": (1, 4096),
    "checkpoint_every": (1, _MOST),
    "keep": (1, _MOST),
    "keep_every": (1, _MOST),
    "eval_every": (1, _MOST),
    "eval_tokens": (1, _MOST),
    "sample_every": (0, _MOST),
    "sample_tokens": (1, _MOST),
}
_NUMBERS = (
    "learning_rate",
    "end_learning_rate",
    "weight_decay",
    "clip_norm",
    "z_loss",
    "skip_spikes",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreRecord:
    """A token store as the run saw it."""

    path: str
    weight: float
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a run's first weights come from."""

    path: str
    format: str
    """meshlm, hf or mtj."""
    step: int | None
    """Steps of training behind it, where it says so."""
    goes_on: bool
    """Its optimizer's state and its step are the run's too."""
    shards: int | None
    """Shards of an original checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run's past in full: what may not change when it goes on, but `steps`."""

    preset: str
    model: ModelConfig
    optimizer: OptimizerConfig
    data: tuple[StoreRecord, ...]
    tokenizer: str
    """Fingerprint of the tokenizer."""
    steps: int
    batch_size: int
    seq_len: int
    seed: int
    document_mask: bool
    accumulate: int
    z_loss: float
    compute_dtype: Literal["bfloat16", "float32"]
    origin: Origin | None = None
    """None: the first weights were drawn."""
    recipe: Recipe | None = None
    skip_spikes: float | None = None
    special_tokens: SpecialTokens | None = None
    """Those of the weights that the run began with and of its stores; None: the tokenizer's end of
    text is all there is, and no text spells it."""

    @property
    def first_step(self) -> int:
        """The step that the run begins after."""
        return self.origin.step or 0 if self.origin is not None and self.origin.goes_on else 0

    def step_config(
        self,
        remat: Remat | None,
        mesh: MeshConfig,
        attention: AttentionName = "plain",
        reduce_dtype: ReduceDtype = "float32",
    ) -> StepConfig:
        """Returns what the compiled step depends on."""
        compute = choose_compute(
            self.model, mesh, dtype=self.compute_dtype, remat=remat, reduce_dtype=reduce_dtype
        )
        compute = dataclasses.replace(compute, attention=attention)
        return StepConfig(
            model=self.model,
            optimizer=self.optimizer,
            compute=compute,
            accumulate=self.accumulate,
            z_loss=self.z_loss,
            skip_spikes=self.skip_spikes,
            weight_dtype="float32" if self.recipe is None else "bfloat16",
        )


def check_batch(record: RunConfig, mesh: MeshConfig) -> None:
    """Raises UsageError where batch, accumulation and mesh do not divide."""
    check_divides(record.model, mesh)
    check_batch_divides(record.batch_size, record.accumulate, mesh, current_rules())


def read_run_config(content: Any, where: str) -> RunConfig:
    """Returns the record in a run's or a checkpoint's config.json.

    Raises:
        BadInputError: it is not one, or has settings that this version does not know.
    """
    run = content.get("run") if isinstance(content, dict) else None
    if isinstance(run, dict) and "model" in run:
        run = run | {"model": upgrade_record(run["model"])}
    record = from_dict(RunConfig, run, f"{where} (run)")
    try:
        check_supported(record.model)
    except UsageError as error:
        raise BadInputError(f"{where} (run): {error}") from None
    return record


def flag(name: str) -> str:
    """Returns an option's name as it is typed, without the dashes."""
    return name.replace("_", "-")

"""Is the prediction to be believed? Published runs, and what the same formulas say of them.

    python -m meshlm.planning.calibration        # the table, as Markdown

The one fitted number, `PRODUCT_EFFICIENCY`, was chosen on the four runs marked `fitted`; the others
were looked at afterwards, and so were those on several slices. The runs were of other programs than
ours, and their models are stated as the GPT-J shape with the same products: a gated feed-forward of
width F as one of 3/2 F (as many weights and as much traffic), heads that share keys as a narrower
feed-forward. What else differs is in `_as_published`.
"""

import dataclasses
import math

from meshlm.core.sharding import MeshConfig, ShardingName
from meshlm.model.compute import Compute, Remat
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j
from meshlm.model.flops import matmul_params
from meshlm.optim import OptimizerConfig
from meshlm.planning.memory import stretch
from meshlm.planning.prediction import Prediction, predict_work
from meshlm.planning.setup import Setup
from meshlm.planning.topology import find_topology
from meshlm.planning.work import FORMS, AttentionForm, Transfer, Work, count_work
from meshlm.step import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A training run that others have measured, and how it was computed."""

    name: str
    source: str
    topology: str
    mfu: float
    """As published, by the publisher's own count: attention counted whole, not its causal half."""
    model: ModelConfig
    """The GPT-J shape with the same products."""
    mesh: MeshConfig
    sharding: ShardingName = "fsdp"
    remat: Remat
    rows_per_device: int
    form: AttentionForm
    again: float = 0.0
    """Weights of a layer that are multiplied once more in the backward pass, beyond `remat`."""
    overlaps: bool = True
    """Weights and gradients travel beside products: their scripts set the compiler's flags so."""
    fitted: bool = False

    @property
    def setup(self) -> Setup:
        """The run as a setup of ours."""
        still = OptimizerConfig(
            learning_rate=0.0, end_learning_rate=0.0, warmup_steps=0, anneal_steps=0
        )
        return Setup(
            step=StepConfig(model=self.model, optimizer=still, compute=Compute(remat=self.remat)),
            mesh=self.mesh,
            sharding=self.sharding,
            batch_size=self.rows_per_device * self.mesh.num_devices,
            seq_len=self.model.context_length,
        )

    def published_flops(self) -> float:
        """Returns FLOPs a token by the publishers' count: 6 a weight, and whole squares."""
        model = self.model
        squares = model.num_layers * model.context_length * model.num_heads * model.head_dim
        return 6.0 * matmul_params(model) + 12.0 * squares


def _shape(
    num_layers: int, d_model: int, num_heads: int, d_ff: int, vocab_size: int, length: int
) -> ModelConfig:
    """Returns a shape with heads of 128, as all of these models have."""
    return gpt_j(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=128,
        d_ff=d_ff,
        vocab_size=vocab_size,
        context_length=length,
        rotary_dim=128,
    )


_MAXTEXT = "MaxText, configs/{}/README.md and {}.sh"
_RECIPES = "Google tpu-recipes, training/trillium/{}"
_LEVANTER = "Levanter 1.0 release (2023), config/gpt2_7b.yaml"
# Feed-forward 14,336 gated; 8 of 32 heads have keys and values of their own, which are 2 x 3,072
# columns less of D, so many as half of them less of a feed-forward's two matrices.
_GROUPED_FF = 14_336 * 3 // 2 - 3_072
# The kernel that all but the first use keeps no scores, skips blocks of keys that a query does not
# see, and is computed again in the backward pass.
_AGAIN: dict[Remat, int] = {"none": 0, "minimal": 2, "feed-forward": 2, "full": 2}
_FLASH = AttentionForm(backward=5, again=_AGAIN, chunk=512)
_FLASH_2048 = AttentionForm(backward=5, again=_AGAIN, chunk=2048)
# Their recipes keep queries, keys, values and outputs, and compute the gated pair again.
_GATED_PAIR = 2 * 14_336 * 4_096

RUNS = (
    PublishedRun(
        name="GPT-2 6.7B, FSDP",
        source=_LEVANTER,
        topology="v3:16x8",
        mfu=0.473,
        model=_shape(32, 4096, 32, 4 * 4096, 50_432, 2048),
        mesh=MeshConfig(data=256),
        remat="full",
        rows_per_device=4,
        form=FORMS["plain"],
        overlaps=False,
        fitted=True,
    ),
    PublishedRun(
        name="MaxText 16B, FSDP",
        source=_MAXTEXT.format("v5e", "16b"),
        topology="v5e:16x16",
        mfu=0.611,
        model=_shape(32, 4096, 64, 43_008, 32_000, 2048),
        mesh=MeshConfig(data=256),
        remat="full",
        rows_per_device=6,
        form=_FLASH,
        fitted=True,
    ),
    PublishedRun(
        name="MaxText 32B, FSDP 16 x tensor 4",
        source=_MAXTEXT.format("v5p", "32b"),
        topology="v5p:4x4x4",
        mfu=0.7147,
        model=_shape(32, 8192, 64, 43_008, 32_000, 2048),
        mesh=MeshConfig(data=16, model=4),
        sharding="fsdp-tensor",
        remat="minimal",
        rows_per_device=6,
        form=_FLASH,
        fitted=True,
    ),
    PublishedRun(
        name="Mistral-7B, FSDP",
        source=_RECIPES.format("Mistral-7B-MaxText"),
        topology="v6e:2x4",
        mfu=0.4706,
        model=_shape(32, 4096, 32, _GROUPED_FF, 32_000, 8192),
        mesh=MeshConfig(data=8),
        remat="minimal",
        rows_per_device=6,
        form=_FLASH_2048,
        again=_GATED_PAIR,
        fitted=True,
    ),
    PublishedRun(
        name="MaxText 32B, FSDP",
        source=_MAXTEXT.format("v5e", "32b"),
        topology="v5e:16x16",
        mfu=0.6686,
        model=_shape(32, 8192, 64, 43_008, 32_000, 2048),
        mesh=MeshConfig(data=256),
        remat="full",
        rows_per_device=4,
        form=_FLASH,
    ),
    PublishedRun(
        name="MaxText 64B, FSDP",
        source=_MAXTEXT.format("v5e", "64b"),
        topology="v5e:16x16",
        mfu=0.5990,
        model=_shape(64, 8192, 64, 43_008, 32_000, 2048),
        mesh=MeshConfig(data=256),
        remat="full",
        rows_per_device=2,
        form=_FLASH,
    ),
    PublishedRun(
        name="MaxText 128B, FSDP 16 x tensor 16",
        source=_MAXTEXT.format("v5e", "128b"),
        topology="v5e:16x16",
        mfu=0.5606,
        model=_shape(64, 8192, 128, 86_016, 32_000, 2048),
        mesh=MeshConfig(data=16, model=16),
        sharding="fsdp-tensor",
        remat="minimal",
        rows_per_device=1,
        form=_FLASH,
    ),
    PublishedRun(
        name="MaxText 64B, FSDP 16 x tensor 4",
        source=_MAXTEXT.format("v5p", "64b"),
        topology="v5p:4x4x4",
        mfu=0.7031,
        model=_shape(64, 8192, 64, 43_008, 32_000, 2048),
        mesh=MeshConfig(data=16, model=4),
        sharding="fsdp-tensor",
        remat="minimal",
        rows_per_device=3,
        form=_FLASH,
    ),
    PublishedRun(
        name="MaxText 128B, FSDP 16 x tensor 8",
        source=_MAXTEXT.format("v5p", "128b"),
        topology="v5p:4x4x8",
        mfu=0.6868,
        model=_shape(64, 8192, 128, 86_016, 32_000, 2048),
        mesh=MeshConfig(data=16, model=8),
        sharding="fsdp-tensor",
        remat="minimal",
        rows_per_device=1,
        form=_FLASH,
    ),
    PublishedRun(
        name="Llama-3.1-8B, FSDP",
        source=_RECIPES.format("Llama3.1-8B-MaxText/v6e-8"),
        topology="v6e:2x4",
        mfu=0.4504,
        model=_shape(32, 4096, 32, _GROUPED_FF, 128_256, 8192),
        mesh=MeshConfig(data=8),
        remat="minimal",
        rows_per_device=3,
        form=_FLASH_2048,
        again=_GATED_PAIR,
    ),
    PublishedRun(
        name="Llama-3.1-8B, FSDP",
        source=_RECIPES.format("Llama3.1-8B-MaxText/v6e-256"),
        topology="v6e:16x16",
        mfu=0.4547,
        model=_shape(32, 4096, 32, _GROUPED_FF, 128_256, 8192),
        mesh=MeshConfig(data=256),
        remat="minimal",
        rows_per_device=4,
        form=_FLASH_2048,
        again=_GATED_PAIR,
    ),
)


def _on_slices(run: PublishedRun, slices: int, mfu: float) -> PublishedRun:
    """Returns the run with a copy of its weights in each of several slices."""
    return dataclasses.replace(
        run,
        source="AI-Hypercomputer/maxtext, README.md",
        topology=f"{slices}x{run.topology}",
        mfu=mfu,
        mesh=dataclasses.replace(run.mesh, replica=slices),
        sharding="replica-fsdp" if run.sharding == "fsdp" else run.sharding,
        fitted=False,
    )


# The four models of MaxText's on v5e, on as many pods.
_ON_V5E = (RUNS[1], RUNS[4], RUNS[5], RUNS[6])
_MFU_ON_SLICES = {
    2: (0.5937, 0.6481, 0.5666, 0.5582),
    8: (0.5827, 0.6367, 0.5496, 0.5293),
    32: (0.5465, 0.6040, 0.5018, 0.4625),
}
SLICED_RUNS = tuple(
    _on_slices(run, slices, mfu)
    for slices, published in _MFU_ON_SLICES.items()
    for run, mfu in zip(_ON_V5E, published, strict=True)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A published run next to what is predicted for it."""

    run: PublishedRun
    prediction: Prediction
    mfu: float
    """Predicted, by the publisher's count of FLOPs."""

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.mfu / self.run.mfu - 1


def calibrate(run: PublishedRun) -> Calibrated:
    """Returns a run with its prediction, by the formulas that `meshlm plan` uses."""
    setup = run.setup
    work = _as_published(run, count_work(setup, run.form))
    prediction = predict_work(setup, find_topology(run.topology), work)
    a_device = run.published_flops() * setup.tokens / setup.mesh.num_devices
    mfu = a_device / (prediction.step_s * prediction.peak_flops_per_s)
    return Calibrated(run=run, prediction=prediction, mfu=mfu)


def _as_published(run: PublishedRun, work: Work) -> Work:
    """Returns our step's work changed into that of a block whose halves follow one another.

    Under tensor parallelism it sums activations twice a layer each way, in bfloat16; and computed
    again it needs the attention's output, for the feed-forward reads it. Logits are made once.
    """
    setup, model = run.setup, run.model
    again = run.again
    if run.remat == "full":
        again += model.d_model * model.num_heads * model.head_dim
    head = model.vocab_size * model.d_model if stretch(setup) < setup.seq_len else 0
    added = model.num_layers * again - head
    flops = 2.0 * setup.tokens / setup.mesh.num_devices * added
    stream = 2.0 * setup.rows * setup.seq_len * model.d_model

    def change(transfer: Transfer) -> Transfer:
        if transfer.of != "activations":
            return dataclasses.replace(transfer, overlapped=run.overlaps)
        if transfer.op != "all-reduce":
            return transfer
        return dataclasses.replace(transfer, bytes=stream, count=2 * transfer.count)

    return dataclasses.replace(
        work,
        product_flops=work.product_flops + flops,
        transfers=tuple(map(change, work.transfers)),
    )


def mean_error(runs: tuple[PublishedRun, ...]) -> float:
    """Returns the geometric mean of predicted over published MFU, less 1."""
    logs = [math.log1p(calibrate(run).error) for run in runs]
    return math.expm1(math.fsum(logs) / len(logs))


def calibration_table(runs: tuple[PublishedRun, ...] = RUNS) -> str:
    """Returns runs and their predictions as a Markdown table."""
    head = "| run | devices | MFU published | predicted | error | fitted | source |"
    rows = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for run in runs:
        found = calibrate(run)
        fitted = "yes" if run.fitted else "no"
        rows.append(
            f"| {run.name} | {run.topology} | {run.mfu:.1%} | {found.mfu:.1%} | "
            f"{found.error:+.0%} | {fitted} | {run.source} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(calibration_table())
    for kind, fitted in (("fitted", True), ("other", False)):
        off = mean_error(tuple(run for run in RUNS if run.fitted is fitted))
        print(f"\nmean error of the {kind} runs: {off:+.1%}")
    print("\n" + calibration_table(SLICED_RUNS))

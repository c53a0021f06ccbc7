"""What a plan is made of: one training step, and how it is split over devices."""

import dataclasses

from meshlm.core.errors import UsageError
from meshlm.core.sharding import RULES, MeshConfig, Rules, ShardingName
from meshlm.model.params import check_divides
from meshlm.step import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """One training step on some mesh: all that its memory, FLOPs and traffic depend on."""

    step: StepConfig
    """The model, the optimizer, how both are computed, and the parts of a step's batch."""
    mesh: MeshConfig
    sharding: ShardingName = "fsdp-tensor"
    batch_size: int
    """Sequences in a step, over all devices and parts."""
    seq_len: int
    """Tokens in a sequence."""
    document_mask: bool = False
    """Tokens see only their own document: the batch has a third array of ids."""

    @property
    def rules(self) -> Rules:
        """The rules that `sharding` names."""
        return RULES[self.sharding]

    @property
    def tokens(self) -> int:
        """Tokens in a step, over all devices and parts."""
        return self.batch_size * self.seq_len

    @property
    def rows(self) -> int:
        """Sequences that one device has in one part of a step."""
        return self.batch_size // (self.mesh.shards(self.rules.batch) * self.step.accumulate)


def check_setup(setup: Setup) -> None:
    """Raises UsageError where model, batch, parts and mesh do not divide."""
    check_divides(setup.step.model, setup.mesh, setup.rules)
    context = setup.step.model.context_length
    if not 1 <= setup.seq_len <= context:
        raise UsageError(f"--seq-len {setup.seq_len}: the model's context is {context}: give less")
    check_batch_divides(setup.batch_size, setup.step.accumulate, setup.mesh, setup.rules)


def check_batch_divides(batch_size: int, accumulate: int, mesh: MeshConfig, rules: Rules) -> None:
    """Raises UsageError where a batch does not divide among devices and parts."""
    devices = mesh.shards(rules.batch)
    shards = devices * accumulate
    if batch_size < 1 or batch_size % shards:
        raise UsageError(
            f"--batch-size {batch_size} does not divide among {devices} devices times "
            f"--accumulate {accumulate}: give a multiple of {shards}"
        )

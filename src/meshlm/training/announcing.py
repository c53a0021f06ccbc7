"""What a run says of itself before its first step."""

import jax

from meshlm.core.platform import device_facts
from meshlm.core.processes import count, measure_all_reduce
from meshlm.core.sharding import current_rules
from meshlm.data.loader import BatchSource
from meshlm.model.flops import flops_per_token
from meshlm.model.params import count_params
from meshlm.step import StepConfig
from meshlm.training.config import RunConfig, TrainConfig
from meshlm.training.output import RunOutput


def announce(
    output: RunOutput,
    config: TrainConfig,
    record: RunConfig,
    step_config: StepConfig,
    source: BatchSource,
    start: int,
) -> None:
    """Says what is trained, on what, and what the numbers come to; tests that processes can add.

    Raises:
        MeshLMError: a sum over the devices of all processes is wrong.
    """
    mesh, tokens = config.mesh, record.batch_size * record.seq_len
    for line in (
        f"{record.preset}: {count_params(record.model):,} parameters, "
        f"{flops_per_token(record.model, record.seq_len) / 1e9:,.3f} GFLOP a token",
        f"{record.batch_size} x {record.seq_len} = {tokens:,} tokens a step in "
        f"{record.accumulate} part(s), {record.steps:,} steps, "
        f"{tokens * record.steps:,} tokens",
        f"mesh replica {mesh.replica} x data {mesh.data} x model {mesh.model} on "
        f"{device_facts().kind}, split by the rules {config.rules.name}; "
        f"{record.compute_dtype} products, gradients summed in "
        f"{step_config.compute.reduce_dtype}, {step_config.compute.attention} attention, "
        f"remat {step_config.compute.remat}",
        f"learning rate {record.optimizer.learning_rate:g} -> "
        f"{record.optimizer.end_learning_rate:g}, warm-up {record.optimizer.warmup_steps}, "
        f"anneal {record.optimizer.anneal_steps}; everything: "
        f"{config.run / 'config.json'}",
    ):
        output.say(line)
    windows = sum(source.num_windows)
    epochs = tokens * record.steps / (windows * record.seq_len)
    output.say(f"data: {windows:,} sequences, {epochs:,.2f} times over")
    idle = jax.device_count() - mesh.num_devices
    if idle:
        output.say(f"{idle} of {jax.device_count()} devices are idle: see --mesh.data")
    scheduled = record.optimizer.warmup_steps + record.optimizer.anneal_steps
    if record.steps > scheduled:
        output.say(
            f"the anneal ends at step {scheduled}: from there on the learning rate stays "
            f"{record.optimizer.end_learning_rate:g}"
        )
    if count() > 1:
        _announce_processes(output, config, record)


def _announce_processes(output: RunOutput, config: TrainConfig, record: RunConfig) -> None:
    batch = record.batch_size
    shards = config.mesh.shards(current_rules().batch)
    each = batch // shards // record.accumulate
    output.say(
        f"{count()} processes x {jax.local_device_count()} devices = {jax.device_count()}; "
        f"{batch} sequences a step = {shards} shares of the batch x {record.accumulate} part(s) x "
        f"{each}"
    )
    took_s = measure_all_reduce()
    assert took_s is not None
    output.say(
        f"self-test: a sum over all {jax.device_count()} devices is right and took "
        f"{took_s * 1e3:,.1f} ms; a process that gives no sign of life for "
        f"{config.processes.heartbeat_timeout_s} s ends the run"
    )

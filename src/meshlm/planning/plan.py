"""A plan: what a training step needs and takes on devices, by formula and by the compiler."""

import dataclasses
from typing import Any

from meshlm.model.flops import flops_per_token
from meshlm.model.params import count_params
from meshlm.planning.compiling import Compiled, compile_setup
from meshlm.planning.memory import MemoryEstimate, estimate_memory
from meshlm.planning.prediction import Prediction, executed_flops, predict
from meshlm.planning.setup import Setup, check_setup
from meshlm.planning.topology import Topology, check_devices
from meshlm.planning.work import Work, count_work

# What a program finds free of a device's memory; the compiler for v3 states 15.48 of 16 GiB.
_FREE_SHARE = 0.96


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One setup on one topology: what it needs, whether that is there, how long a step will take.

    Bytes and FLOPs are of one device and one step. Times and MFU are predictions.
    """

    setup: Setup
    topology: Topology
    memory: MemoryEstimate
    work: Work
    """By formula."""
    compiled: Compiled | None
    """None where nothing was compiled."""
    prediction: Prediction | None
    """None where the device's data sheet is not known."""

    @property
    def model_flops(self) -> float:
        """One device's share of the model's FLOPs in a step, without recomputation."""
        setup = self.setup
        a_token = flops_per_token(setup.step.model, setup.seq_len)
        return a_token * setup.tokens / setup.mesh.num_devices

    @property
    def available_bytes(self) -> int | None:
        """What a program may use of a device's memory; None where that is not known."""
        if self.compiled is not None and self.compiled.available_bytes is not None:
            return self.compiled.available_bytes
        there = self.topology.facts.memory_bytes
        return None if there is None else int(_FREE_SHARE * there)

    @property
    def peak_bytes(self) -> int:
        """The most that is there at once: the compiler's figure, or the formula's."""
        if self.compiled is not None and self.compiled.fits:
            return self.compiled.peak_bytes
        return self.memory.total_bytes

    @property
    def fits(self) -> bool | None:
        """The compiler's verdict, or the formula's; None where the memory is not known."""
        if self.compiled is not None and not self.compiled.fits:
            return False
        if self.available_bytes is None:
            return None
        return self.peak_bytes <= self.available_bytes

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as one JSON object; all figures are of one device and one step."""
        setup, step, compiled = self.setup, self.setup.step, self.compiled
        by_compiler = compiled is not None and compiled.fits
        return {
            "topology": self.topology.name,
            "devices": setup.mesh.num_devices,
            "device_kind": self.topology.device_kind,
            "mesh": dataclasses.asdict(setup.mesh),
            "sharding": setup.sharding,
            "compute": dataclasses.asdict(step.compute),
            "optimizer": step.optimizer.name,
            "batch_size": setup.batch_size,
            "seq_len": setup.seq_len,
            "accumulate": step.accumulate,
            "tokens": setup.tokens,
            "model_flops": self.model_flops,
            "parameters": count_params(step.model),
            "fits": self.fits,
            "figures_from": "compiler" if by_compiler else "formula",
            "message": "" if compiled is None else compiled.message,
            "available_bytes": self.available_bytes,
            "peak_bytes": self.peak_bytes,
            **self._bytes(),
            "formula": {
                **dataclasses.asdict(self.memory),
                "activations_bytes": self.memory.activations_bytes,
                "total_bytes": self.memory.total_bytes,
            },
            "compile_s": None if compiled is None else compiled.compile_s,
            "lower_s": None if compiled is None else compiled.lower_s,
            "jax": None if compiled is None else compiled.jax_version,
            "libtpu": None if compiled is None else compiled.libtpu_version,
            "collectives": self._collectives(),
            **self._predicted(),
        }

    def _bytes(self) -> dict[str, Any]:
        compiled = self.compiled
        flops = executed_flops(self.setup, self.work, compiled)
        if compiled is not None and compiled.fits:
            return {
                "argument_bytes": compiled.argument_bytes,
                "temp_bytes": compiled.temp_bytes,
                "flops": flops,
                "bytes_accessed": compiled.bytes_accessed,
            }
        return {
            "argument_bytes": self.memory.state_bytes,
            "temp_bytes": self.memory.gradients_bytes + self.memory.activations_bytes,
            "flops": flops,
            "bytes_accessed": None,
        }

    def _collectives(self) -> list[dict[str, Any]]:
        if self.compiled is not None and self.compiled.fits:
            return [dataclasses.asdict(found) for found in self.compiled.collectives]
        return [
            {"op": t.op, "axes": t.axes, "bytes": round(t.bytes), "count": round(t.count)}
            for t in self.work.transfers
        ]

    def _predicted(self) -> dict[str, Any]:
        found = self.prediction
        if found is None:
            return {"predicted_step_s": None, "predicted_mfu": None}
        return {
            "predicted_step_s": found.step_s,
            "predicted_mfu": found.mfu,
            "predicted_tokens_per_s": found.tokens_per_s,
            "predicted_compute_s": found.compute_s,
            "predicted_hbm_s": found.hbm_s,
            "predicted_interconnect_s": found.interconnect_s,
            "predicted_exposed_s": found.exposed_s,
            "peak_flops_per_s": found.peak_flops_per_s,
            "assumptions": list(found.assumptions),
        }


def make_plan(setup: Setup, topology: Topology, *, compile: bool = True) -> Plan:
    """Returns the plan of a setup; what cannot be compiled for is planned by formula.

    Args:
        setup: the step.
        topology: the devices.
        compile: ask the compiler too, which takes from seconds to minutes.

    Raises:
        UsageError: setup and topology do not fit each other, or there is no compiler for it here.
        MeshLMError: the compiler failed.
    """
    check_devices(setup.mesh, topology)
    check_setup(setup)
    compiled = compile_setup(setup, topology) if compile and topology.compiles else None
    return Plan(
        setup=setup,
        topology=topology,
        memory=estimate_memory(setup),
        work=count_work(setup),
        compiled=compiled,
        prediction=_prediction(setup, topology, compiled),
    )


def _prediction(setup: Setup, topology: Topology, compiled: Compiled | None) -> Prediction | None:
    facts = topology.facts
    if facts.peak_flops is None or facts.bandwidth_bytes_per_s is None:
        return None
    return predict(setup, topology, compiled)

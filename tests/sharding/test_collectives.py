"""What the compiled program sends between devices, counted in its text."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

import jax
import pytest

from meshlm.core.sharding import RULES, sharding_of, use_mesh
from meshlm.model.params import abstract_params
from meshlm.model.transformer import Compute, embed
from meshlm.ops import loss
from meshlm.planning.hlo import read_program
from meshlm.step import StepBatch, loss_and_grads
from tiny import DIVISIBLE, mesh_of, step_config

B, T = 8, 12
# No other dim is as long as the vocabulary or its share, so that a shape tells whose it is.
CONFIG = dataclasses.replace(DIVISIBLE, num_layers=3, vocab_size=8 * 29, d_ff=48)
D, V = CONFIG.d_model, CONFIG.vocab_size
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Of the results; several where XLA has joined them."""

    def sizes(self) -> Iterator[int]:
        for shape in self.shapes:
            size = 1
            for dim in shape:
                size *= dim
            yield size


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation in the program's text."""
    found, name = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line).group(1)
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def collectives(lines: list[str]) -> list[Collective]:
    """The collectives that these lines hold themselves."""
    found = []
    for line in lines:
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match.group(1))
            dims = tuple(tuple(int(d) for d in shape.split(",") if d) for shape in shapes)
            found.append(Collective(match.group(2), dims))
    return found


def loop_bodies(text: str) -> list[list[Collective]]:
    """The collectives in the body of each loop, the computations it calls taken in."""
    parts = computations(text)

    def within(name: str) -> list[Collective]:
        lines = parts[name]
        called = re.findall(
            r"(?:calls|to_apply|body|branch_computations)=\{?%?([\w.\-]+)", "\n".join(lines)
        )
        return collectives(lines) + [c for other in called if other in parts for c in within(other)]

    return [within(name) for name in re.findall(r" while\(.*body=%?([\w.\-]+)", text)]


def everywhere(text: str) -> list[Collective]:
    return collectives(text.splitlines())


def abstract_batch(mesh, num_rows: int = B) -> StepBatch:
    rows = sharding_of(mesh, "batch", None)
    tokens = jax.ShapeDtypeStruct((num_rows, T), "int32", sharding=rows)
    mask = jax.ShapeDtypeStruct((num_rows, T), "float32", sharding=rows)
    return StepBatch(tokens=tokens, targets=tokens, loss_mask=mask, segment_ids=None)


@functools.cache
def compiled(sizes: tuple[int, int, int], remat: str) -> str:
    """The text of loss and gradients, compiled for this mesh."""
    mesh = mesh_of(*sizes)
    config = step_config(CONFIG, compute=Compute(dtype="float32", remat=remat))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda p, b: loss_and_grads(p, b, config)[:2])
        lowered = program.lower(abstract_params(CONFIG, mesh), abstract_batch(mesh))
        return lowered.compile().as_text()


@pytest.mark.parametrize("remat", ["none", "minimal", "feed-forward", "full"])
def test_tensor_parallelism_costs_one_reduction_a_layer_each_way(remat):
    """One sum of activations forward and one backward, and recomputation repeats neither."""
    bodies = loop_bodies(compiled((1, 1, 8), remat))
    assert len(bodies) == 2  # the layers forward and the layers backward
    for body in bodies:
        assert [c.kind for c in body] == ["all-reduce"]
        assert list(body[0].sizes()) == [B * T * D]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_outside_of_the_layers_no_collective_has_the_size_of_logits_or_weights(remat):
    """The embedding's gather, the head's sum, and the losses' rows are all there is."""
    found = everywhere(compiled((1, 1, 8), remat))
    assert max(size for c in found for size in c.sizes()) <= B * T * D
    assert len(found) <= 10


@pytest.mark.parametrize("sizes", [(1, 1, 8), (1, 2, 4), (2, 2, 2)], ids=str)
def test_logits_are_never_gathered_over_the_vocabulary(sizes):
    replica, data, model = sizes
    rows = B // (replica * data)
    for c in everywhere(compiled(sizes, "full")):
        for shape in c.shapes:
            is_logits = V in shape or V // model in shape
            assert not (is_logits and (rows in shape or T in shape or rows * T in shape)), c


@functools.cache
def accumulated(sizes: tuple[int, int, int], rules: str) -> tuple:
    """What a step of two parts sends, its loss in stretches."""
    mesh = mesh_of(*sizes)
    config = step_config(CONFIG, compute=Compute(dtype="float32", remat="full"), accumulate=2)
    with use_mesh(mesh, RULES[rules]):
        program = jax.jit(lambda p, b: loss_and_grads(p, b, config)[:2])
        lowered = program.lower(abstract_params(CONFIG, mesh), abstract_batch(mesh, 2 * B))
        return read_program(lowered.compile().as_text(), dict(mesh.shape)).collectives


@pytest.mark.parametrize(
    ("sizes", "rules", "copies"),
    [
        ((2, 2, 2), "data", ("replica", "data", "model")),
        ((2, 2, 2), "fsdp-tensor", ("replica",)),
        ((2, 1, 4), "tensor", ("replica",)),
        ((2, 4, 1), "replica-fsdp", ("replica",)),
    ],
    ids=str,
)
def test_copies_add_their_accumulated_gradients_once(monkeypatch, sizes, rules, copies):
    monkeypatch.setattr(loss, "STRETCH_ROWS", 2)
    sent = [c for c in accumulated(sizes, rules) if set(copies) & set(c.axes)]
    assert sent
    assert {c.count for c in sent} == {1}
    shards = 1
    for axis, size in zip(("replica", "data", "model"), sizes, strict=True):
        shards *= 1 if axis in copies else size
    own = sum(4 * weight.size for weight in jax.tree.leaves(abstract_params(CONFIG)))
    # Weights in shards, whole vectors, and a few scalars.
    assert own / shards <= sum(c.bytes for c in sent) <= 1.2 * own / shards + 64


def lower_embed(mesh):
    compute = Compute(dtype="float32")
    return jax.jit(lambda params, tokens: embed(params.embedding, tokens, compute)).lower(
        abstract_params(CONFIG, mesh), abstract_batch(mesh).tokens
    )


@pytest.mark.parametrize(
    ("sizes", "most"), [((1, 1, 8), 1), ((8, 1, 1), 0), ((1, 1, 1), 0)], ids=str
)
def test_a_lookup_costs_at_most_one_collective(sizes, most):
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        program = lower_embed(mesh)
        found = everywhere(program.compile().as_text())
    assert len(found) <= most
    for c in found:
        assert list(c.sizes()) == [B * T * D]


def test_a_lookup_of_a_sharded_table_gathers_it_once_over_data():
    mesh = mesh_of(1, 2, 4)
    with jax.set_mesh(mesh):
        program = lower_embed(mesh)
        found = everywhere(program.compile().as_text())
    sizes = sorted(size for c in found for size in c.sizes())
    assert sizes == sorted([V * D // 4, B * T * D // 2])


@pytest.mark.parametrize("remat", ["minimal", "feed-forward", "full"])
def test_sharded_weights_are_gathered_one_layer_at_a_time(remat):
    """Under `data` alone: no collective of activations, none as large as two layers' weights."""
    text = compiled((1, 8, 1), remat)
    largest = max(
        weight.size // CONFIG.num_layers
        for weight in jax.tree.leaves(abstract_params(CONFIG).blocks)
    )
    bodies = loop_bodies(text)
    assert len(bodies) == 2
    for body in bodies:
        assert sum(c.kind == "all-gather" for c in body) >= 6
        for c in body:
            assert max(c.sizes()) <= largest
    for c in everywhere(text):
        assert max(c.sizes()) <= max(V * D, largest)


def test_one_device_sends_nothing():
    assert everywhere(compiled((1, 1, 1), "full")) == []


@pytest.mark.parametrize("remat", ["none", "full"])
def test_whole_copies_send_gradients_alone_and_once(remat):
    """Under `replica`: nothing in the layers forward; each gradient is summed once."""
    text = compiled((8, 1, 1), remat)
    found = everywhere(text)
    assert {c.kind for c in found} == {"all-reduce"}
    assert loop_bodies(text)[0] == []
    names = abstract_params(CONFIG)
    # Each weight's gradient, and two scalars or so: the loss and its count.
    whole = sum(weight.size for weight in jax.tree.leaves(names))
    times = sum(size for c in found for size in c.sizes())
    in_layers = sum(weight.size for weight in jax.tree.leaves(names.blocks))
    once_a_layer = whole - in_layers + in_layers // CONFIG.num_layers
    assert times in range(once_a_layer, once_a_layer + 8) or times in range(whole, whole + 8)

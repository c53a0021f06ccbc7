"""What a training step does on one device, counted by formula: FLOPs, memory traffic, transfers.

The traffic outside of the products is counted in passes: how often a float32 array of a token is
written or read while it is there. Their numbers were counted in compiled steps (the class below).
"""

import dataclasses
import math
from typing import Literal

import jax

from meshlm.core.sharding import AXES, Axes
from meshlm.model.params import describe
from meshlm.planning.memory import elements, layer_elements, part_tokens, widths
from meshlm.planning.setup import Setup

# How a row of queries meets its keys: all squares in memory, or a kernel that keeps none.
Squares = Literal["stored", "kernel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """Times that a float32 array is written or read outside of the products, a layer and token.

    Counted in steps compiled for v3 and v5e (JAX 0.12, full remat), squares with theirs: 12 to 21
    passes of the residual stream, 54 to 60 of the heads, 10 to 12 of the attention's squares.
    """

    stream: float = 16
    heads: float = 56
    squares: float = 11
    logits: float = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of exchange between devices."""

    op: str
    axes: Axes
    bytes: float
    """The whole array on one device, as in `Collective`."""
    count: float
    """Executions in a step."""
    hidden: bool
    """Of weights or gradients, which nothing waits for if they come in time; not of activations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one step does on one device."""

    product_flops: float
    """Of the products with weights, what is computed again included."""
    attention_flops: float
    """Of queries with keys and weights with values, what is computed again included."""
    head_dim: int
    """Their contracted or written width, which a matrix unit may be wider than."""
    traffic_bytes: float
    """Read from and written to memory outside of the products."""
    transfers: tuple[Transfer, ...]


def count_work(setup: Setup, squares: Squares = "stored", passes: Passes | None = None) -> Work:
    """Returns what one step does on one device, by formula."""
    return Work(
        product_flops=_product_flops(setup),
        attention_flops=_attention_flops(setup, squares),
        head_dim=setup.step.model.head_dim,
        traffic_bytes=_traffic(setup, squares, passes or Passes()),
        transfers=tuple(t for t in _transfers(setup) if setup.mesh.shards(t.axes) > 1 and t.count),
    )


def _tokens(setup: Setup) -> int:
    return part_tokens(setup) * setup.step.accumulate


def _product_flops(setup: Setup) -> float:
    """Forward once, backward twice, and of a layer that is computed again all but its outputs.

    Nothing in the backward pass asks for the results of the two products that write to the stream.
    """
    stream, heads, ff = widths(setup)
    model, remat = setup.step.model, setup.step.compute.remat
    layer = stream * (4 * heads + 2 * ff)
    again = stream * (3 * heads + ff) if remat == "full" else 0
    head = elements(describe(model).head, setup, gathered=True)
    return 2.0 * _tokens(setup) * (model.num_layers * (3 * layer + again) + 3 * head)


def _attention_flops(setup: Setup, squares: Squares) -> float:
    """Two products forward and four backward, five in a kernel that has the squares no more.

    With stored squares every query meets every key, in a kernel half of them.
    """
    _, heads, _ = widths(setup)
    again = 0 if setup.step.compute.remat == "none" else 2
    products = again + (6 if squares == "stored" else 7)
    keys = setup.seq_len if squares == "stored" else setup.seq_len / 2
    return 2.0 * _tokens(setup) * setup.step.model.num_layers * products * keys * heads


def _traffic(setup: Setup, squares: Squares, passes: Passes) -> float:
    model, parts = setup.step.model, setup.step.accumulate
    stream, heads, _ = widths(setup)
    vocab = elements(describe(model).head, setup, gathered=True) / model.d_model
    token = passes.stream * stream + passes.heads * heads
    if squares == "stored":
        token += passes.squares * heads / model.head_dim * setup.seq_len
    activations = _tokens(setup) * (model.num_layers * token + passes.logits * vocab)
    # The optimizer reads and writes weights and two moments and reads the gradient twice, once for
    # its norm; each part's gradient is read, and read and written where it is added.
    own = sum(elements(weight, setup) for weight in jax.tree.leaves(describe(model)))
    return 4.0 * (activations + own * (8 + (3 * parts if parts > 1 else 0)))


def _transfers(setup: Setup) -> tuple[Transfer, ...]:
    return (*_of_weights(setup), *_of_embedding(setup), *_of_activations(setup), *_of_copies(setup))


def _of_weights(setup: Setup) -> tuple[Transfer, ...]:
    """Gathered before use, once more for a backward pass that did not keep them.

    Their gradients are reduced in float32, as the products leave them.
    """
    parts, model, axes = setup.step.accumulate, setup.step.model, setup.rules.embed
    gathers = 1 if setup.step.compute.remat == "none" else 2
    layer, head = layer_elements(setup), elements(describe(model).head, setup, gathered=True)

    def of(op: str, size: float, count: float) -> Transfer:
        return Transfer(op=op, axes=axes, bytes=size, count=count, hidden=True)

    return (
        of("all-gather", _operand(setup) * layer, parts * gathers * model.num_layers),
        of("reduce-scatter", 4.0 * layer, parts * model.num_layers),
        of("all-gather", _operand(setup) * head, parts),
        of("reduce-scatter", 4.0 * head, parts),
    )


def _operand(setup: Setup) -> int:
    return 2 if setup.step.compute.dtype == "bfloat16" else 4


def _of_embedding(setup: Setup) -> tuple[Transfer, ...]:
    """The table is gathered in float32; columns split over `model` are joined after the lookup."""
    rules, parts = setup.rules, setup.step.accumulate
    table = 4.0 * elements(describe(setup.step.model).embedding, setup, gathered=True)
    axes = tuple(axis for axis in rules.table_embed if axis in rules.embed)
    joined = tuple(axis for axis in rules.table_embed if axis not in rules.embed)
    looked_up = 4.0 * part_tokens(setup) * setup.step.model.d_model
    return (
        Transfer(op="all-gather", axes=axes, bytes=table, count=parts, hidden=True),
        Transfer(op="reduce-scatter", axes=axes, bytes=table, count=parts, hidden=True),
        Transfer(op="all-gather", axes=joined, bytes=looked_up, count=parts, hidden=False),
    )


def _of_activations(setup: Setup) -> tuple[Transfer, ...]:
    """One sum of float32 forward and one of operands backward a layer; the head's input once."""
    axes, count = setup.rules.heads, setup.step.accumulate * setup.step.model.num_layers
    stream = part_tokens(setup) * setup.step.model.d_model
    backward = _operand(setup) * stream
    return (
        Transfer(op="all-reduce", axes=axes, bytes=4.0 * stream, count=count, hidden=False),
        Transfer(op="all-reduce", axes=axes, bytes=backward, count=count, hidden=False),
        Transfer(
            op="all-reduce",
            axes=setup.rules.vocab,
            bytes=backward,
            count=setup.step.accumulate,
            hidden=False,
        ),
    )


def _of_copies(setup: Setup) -> tuple[Transfer, ...]:
    """Gradients are summed over whole copies of the weights, once a step."""
    rules = setup.rules
    axes = tuple(axis for axis in AXES if axis in rules.batch and axis not in rules.embed)
    weights = jax.tree.leaves(describe(setup.step.model))
    own = 4.0 * sum(elements(weight, setup) for weight in weights)
    return (Transfer(op="all-reduce", axes=axes, bytes=own, count=1, hidden=True),)


def wire_bytes(op: str, size: float, group: int) -> float:
    """Returns the bytes that one device takes in by a ring or torus, of an array of `size` bytes.

    An all-reduce is a reduce-scatter and an all-gather.
    """
    if group <= 1:
        return 0.0
    if op == "collective-permute":
        return size
    return (2.0 if op == "all-reduce" else 1.0) * size * (group - 1) / group


def total_wire_bytes(work: Work, setup: Setup) -> float:
    """Returns the bytes that one device takes in during a step."""
    return math.fsum(
        t.count * wire_bytes(t.op, t.bytes, setup.mesh.shards(t.axes)) for t in work.transfers
    )

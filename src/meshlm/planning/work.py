"""What a training step does on one device, counted by formula: FLOPs, memory traffic, transfers.

The traffic outside of the products is counted in passes: how often a float32 array of a token is
written or read while it is there. Their numbers were counted in compiled steps (the class below).
"""

import dataclasses
from typing import Literal

import jax

from meshlm.core.errors import UsageError
from meshlm.core.sharding import AXES, Axes
from meshlm.core.tree import PyTree
from meshlm.model.compute import Remat
from meshlm.model.params import Weight, weight_table, weight_tree
from meshlm.ops.fast_attention import (
    MAX_CHUNKS,
    MIN_CHUNK,
    SPLASH_BLOCK,
    WISHES,
    AttentionName,
)
from meshlm.planning.memory import elements, layer_elements, part_tokens, stretch, widths
from meshlm.planning.setup import Setup
from meshlm.planning.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """What a form of attention computes (ops/fast_attention.py). A product is of all queries with
    their keys, or of all weights with their values."""

    backward: int
    """Products of the backward pass; a form that keeps no scores computes them again in it."""
    again: dict[Remat, int]
    """Products that recomputing a layer adds: those of results that were not kept."""
    chunk: int | None = None
    """Keys that are skipped together where a query sees none of them; None: no key is skipped."""
    most_chunks: int | None = None
    """In longer sequences the chunks are longer."""
    stores_scores: bool = False
    """Scores and weights pass through memory."""
    passes: float = 56
    """Times that an array as wide as all heads is written or read, rotary embedding included."""

    def keys(self, length: int) -> float:
        """Returns the keys that a query meets, on average."""
        if self.chunk is None:
            return length
        chunk = max(self.chunk, -(-length // self.most_chunks) if self.most_chunks else 0)
        return (length + min(chunk, length)) / 2


_KEPT: dict[Remat, int] = {"none": 0, "minimal": 0, "feed-forward": 2, "full": 2}
_SCORES_AGAIN: dict[Remat, int] = {"none": 0, "minimal": 1, "feed-forward": 2, "full": 2}
FORMS: dict[AttentionName, AttentionForm] = {
    "plain": AttentionForm(backward=4, again=_SCORES_AGAIN, stores_scores=True),
    "chunked": AttentionForm(
        backward=5, again=_KEPT, chunk=MIN_CHUNK, most_chunks=MAX_CHUNKS, stores_scores=True
    ),
    # Two kernels go backward, one for queries and one for keys and values; both need the scores.
    # Their sums of a row are written as wide as 128 lanes.
    "splash": AttentionForm(backward=7, again=_KEPT, chunk=SPLASH_BLOCK, passes=90),
    "cudnn": AttentionForm(backward=5, again=_KEPT, chunk=128),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended:
    """What a form of attention is asked to do."""

    head_dim: int
    dtype: str = "bfloat16"
    documents: bool = False


def best_attention(topology: Topology, asked: Attended) -> AttentionName:
    """Returns the form of attention that a run chooses on these devices.

    A run finds it by compiling each (`ops.fast_attention.choose_attention`); what then comes out is
    known.
    """
    for name in WISHES.get(topology.facts.platform, ()):
        if not _obstacle(name, topology, asked):
            return name
    return "chunked"


def check_form(name: AttentionName, topology: Topology, asked: Attended) -> None:
    """Raises UsageError where a form of attention is known not to compile for these devices."""
    obstacle = _obstacle(name, topology, asked)
    if obstacle:
        raise UsageError(
            f"--attention {name}: its kernel is {obstacle}, and {topology.name} is "
            f"{topology.device_kind}: leave it out, and the best that does is chosen"
        )


def _obstacle(name: AttentionName, topology: Topology, asked: Attended) -> str:
    """Returns what a form would need and does not have here; empty where nothing is missing."""
    platform, kind = topology.facts.platform, topology.device_kind
    needs: dict[AttentionName, dict[str, bool]] = {
        "splash": {
            "for TPUs from v4 on": platform == "tpu" and kind not in ("TPU v2", "TPU v3"),
            f"for heads of whole lanes of 128, not {asked.head_dim}": asked.head_dim % 128 == 0,
        },
        "cudnn": {
            "for NVIDIA's GPUs": platform == "gpu",
            "for bfloat16": asked.dtype == "bfloat16",
            "without a document mask": not asked.documents,
            f"for heads up to 128 before Hopper, not {asked.head_dim}": (
                "A100" not in kind or asked.head_dim <= 128
            ),
        },
    }
    return next((need for need, met in needs.get(name, {}).items() if not met), "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """Times that a float32 array is written or read outside of the products, a layer and token.

    Counted in steps compiled for v3 and v5e (JAX 0.12, full remat), scores with theirs: 12 to 21
    passes of the residual stream, 54 to 60 of the heads and 90 with the TPUs' kernel, 10 to 12 of
    the attention's scores.
    """

    stream: float = 16
    scores: float = 11
    logits: float = 6


PASSES = Passes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """One kind of exchange between devices."""

    op: str
    axes: Axes
    bytes: float
    """The whole array on one device, as in `Collective`."""
    count: float
    """Executions in a step."""
    of: Literal["weights", "gradients", "activations"]
    overlapped: bool | None = None
    """It runs beside products; None where no compiled program tells."""
    group: int | None = None
    """Devices that take part together; None: all along the axes."""
    between_slices: bool = False
    """As in `Collective`."""


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


def count_work(setup: Setup, form: AttentionForm | None = None) -> Work:
    """Returns what one step does on one device, by formula.

    Args:
        setup: the step.
        form: of attention; None takes the step's own.
    """
    form = form or FORMS[setup.step.compute.attention]
    return Work(
        product_flops=_product_flops(setup),
        attention_flops=_attention_flops(setup, form),
        head_dim=setup.step.model.head_dim,
        traffic_bytes=_traffic(setup, form),
        transfers=tuple(t for t in _transfers(setup) if setup.mesh.shards(t.axes) > 1 and t.count),
    )


def _tokens(setup: Setup) -> int:
    return part_tokens(setup) * setup.step.accumulate


def _product_flops(setup: Setup) -> float:
    """Forward once, backward twice, and of a layer that is computed again all but its outputs.

    Nothing in the backward pass asks for the results of the two products that write to the stream.
    """
    model, remat = setup.step.model, setup.step.compute.remat
    block = weight_tree(model).blocks
    written = (block.attention.out, block.feed_forward.down)
    kept = {"feed-forward": (*written, block.feed_forward.up), "full": written}
    layer = _product_elements(block, setup)
    again = layer - _product_elements(kept[remat], setup) if remat in kept else 0
    head = _product_elements(weight_tree(model).head, setup)
    # Logits of a stretch of the sequence are made again backward.
    of_head = 3 if stretch(setup) == setup.seq_len else 4
    return 2.0 * _tokens(setup) * (3 * layer + again + of_head * head)


def _product_elements(weights: PyTree, setup: Setup) -> int:
    """Returns the elements on one device, gathered, of the weights that products take."""
    leaves: list[Weight] = jax.tree.leaves(weights)
    return sum(elements(w, setup, gathered=True) for w in leaves if "product" in w.uses)


def _attention_flops(setup: Setup, form: AttentionForm) -> float:
    """Two products forward; backward as many as the form takes."""
    _, heads, _ = widths(setup)
    model, keys = setup.step.model, form.keys(setup.seq_len)
    products = 2 + form.backward + form.again[setup.step.compute.remat]
    return 2.0 * _tokens(setup) * model.num_layers * products * keys * heads


def _traffic(setup: Setup, form: AttentionForm) -> float:
    model, parts, passes = setup.step.model, setup.step.accumulate, PASSES
    stream, heads, _ = widths(setup)
    vocab = elements(weight_tree(model).head.weight, setup, gathered=True) / model.d_model
    token = passes.stream * stream + form.passes * heads
    if form.stores_scores:
        token += passes.scores * heads / model.head_dim * form.keys(setup.seq_len)
    activations = _tokens(setup) * (model.num_layers * token + passes.logits * vocab)
    # The optimizer reads and writes weights and two moments and reads the gradient twice, once for
    # its norm; each part's gradient is read, and read and written where it is added.
    own = sum(elements(weight, setup) for weight in weight_table(model).values())
    return 4.0 * (activations + own * (8 + (3 * parts if parts > 1 else 0)))


def _transfers(setup: Setup) -> tuple[Transfer, ...]:
    return (*_of_weights(setup), *_of_embedding(setup), *_of_activations(setup), *_of_copies(setup))


def _of_weights(setup: Setup) -> tuple[Transfer, ...]:
    """Gathered before use, once more for a backward pass that did not keep them.

    Their gradients are summed as they are scattered.
    """
    parts, model, axes = setup.step.accumulate, setup.step.model, setup.rules.embed
    gathers = 1 if setup.step.compute.remat == "none" else 2
    layer = layer_elements(setup)
    head = elements(weight_tree(model).head.weight, setup, gathered=True)

    def gather(size: float, count: float) -> Transfer:
        size *= _operand(setup)
        return Transfer(op="all-gather", axes=axes, bytes=size, count=count, of="weights")

    def reduce(size: float, count: float) -> Transfer:
        size *= _BYTES[setup.step.compute.reduce_dtype]
        return Transfer(op="reduce-scatter", axes=axes, bytes=size, count=count, of="gradients")

    return (
        gather(layer, parts * gathers * model.num_layers),
        reduce(layer, parts * model.num_layers),
        gather(head, parts),
        reduce(head, parts),
    )


_BYTES = {"bfloat16": 2, "float32": 4}


def _operand(setup: Setup) -> int:
    return _BYTES[setup.step.compute.dtype]


def _of_embedding(setup: Setup) -> tuple[Transfer, ...]:
    """The table is gathered in float32; columns split over `model` are joined after the lookup."""
    rules, parts = setup.rules, setup.step.accumulate
    table = 4.0 * elements(weight_tree(setup.step.model).embedding.tokens, setup, gathered=True)
    axes = tuple(axis for axis in rules.table_embed if axis in rules.embed)
    joined = tuple(axis for axis in rules.table_embed if axis not in rules.embed)
    looked_up = 4.0 * part_tokens(setup) * setup.step.model.d_model
    return (
        Transfer(op="all-gather", axes=axes, bytes=table, count=parts, of="weights"),
        Transfer(op="reduce-scatter", axes=axes, bytes=table, count=parts, of="gradients"),
        Transfer(op="all-gather", axes=joined, bytes=looked_up, count=parts, of="activations"),
    )


def _of_activations(setup: Setup) -> tuple[Transfer, ...]:
    """One sum of float32 forward and one of operands backward a layer; the head's input once."""
    axes, count = setup.rules.heads, setup.step.accumulate * setup.step.model.num_layers
    stream = part_tokens(setup) * setup.step.model.d_model
    backward = _operand(setup) * stream
    return (
        Transfer(op="all-reduce", axes=axes, bytes=4.0 * stream, count=count, of="activations"),
        Transfer(op="all-reduce", axes=axes, bytes=backward, count=count, of="activations"),
        Transfer(
            op="all-reduce",
            axes=setup.rules.vocab,
            bytes=backward,
            count=setup.step.accumulate,
            of="activations",
        ),
    )


def _of_copies(setup: Setup) -> tuple[Transfer, ...]:
    """Gradients are summed over whole copies of the weights, once a step."""
    rules = setup.rules
    axes = tuple(axis for axis in AXES if axis in rules.batch and axis not in rules.embed)
    # Added up over parts they are float32.
    each = _BYTES[setup.step.compute.reduce_dtype] if setup.step.accumulate == 1 else 4
    model = weight_tree(setup.step.model)
    summed: list[Weight] = jax.tree.leaves((model.blocks, model.head.weight))
    own = 4.0 * elements(model.embedding.tokens, setup)
    own += 1.0 * each * sum(elements(weight, setup) for weight in summed)
    return (Transfer(op="all-reduce", axes=axes, bytes=own, count=1, of="gradients"),)


def wire_bytes(op: str, size: float, group: int) -> float:
    """Returns the bytes that one device takes in by a ring or torus, of an array of `size` bytes.

    An all-reduce is a reduce-scatter and an all-gather.
    """
    if group <= 1:
        return 0.0
    if op == "collective-permute":
        return size
    return (2.0 if op == "all-reduce" else 1.0) * size * (group - 1) / group

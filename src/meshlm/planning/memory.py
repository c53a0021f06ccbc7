"""What a training step needs of one device's memory: a formula, before anything is compiled.

The state is exact. Activations are those that the forward pass keeps for the backward pass, and
the largest of three moments on top: the backward pass of a layer, the head with its logits, the
embedding. Dim letters as in model/params.py, and T tokens of one device in one part of a step.
"""

import dataclasses
import math

import jax

from meshlm.core.sharding import Axes
from meshlm.model.params import Weight, weight_table, weight_tree
from meshlm.ops.fast_attention import MAX_CHUNKS
from meshlm.ops.loss import CHUNK_ROWS, MAX_STRETCHES, STRETCH_ROWS
from meshlm.optim import LEAST_FACTORED
from meshlm.planning.setup import Setup

_FLOAT = 4
_INT = 4
# Share of the scores of a sequence that exist at once: one chunk of queries', or none.
_SCORES_AT_ONCE = {"plain": 1.0, "chunked": 1 / MAX_CHUNKS, "splash": 0.0, "cudnn": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one device, by formula."""

    weights_bytes: int
    """Float32, in shards."""
    optimizer_bytes: int
    batch_bytes: int
    """Tokens, targets and mask of a whole step."""
    gradients_bytes: int
    """In shards; twice where they are added up over parts."""
    kept_bytes: int
    """Activations that the forward pass of all layers leaves for the backward pass."""
    layer_bytes: int
    """The backward pass of one layer: its activations, gathered weights and their gradients."""
    head_bytes: int
    """The head: logits, gathered weights and their gradients."""
    embedding_bytes: int
    """The gathered embedding table and its gradient."""

    @property
    def state_bytes(self) -> int:
        """What lies there between steps too, and the batch: the arguments of the step."""
        return self.weights_bytes + self.optimizer_bytes + self.batch_bytes

    @property
    def activations_bytes(self) -> int:
        """What is kept, and the largest of the moments on top of it."""
        return self.kept_bytes + max(self.layer_bytes, self.head_bytes, self.embedding_bytes)

    @property
    def total_bytes(self) -> int:
        """The most that is there at once."""
        return self.state_bytes + self.gradients_bytes + self.activations_bytes


def estimate_memory(setup: Setup) -> MemoryEstimate:
    """Returns the bytes that the step needs on each device, by formula."""
    weights = weight_table(setup.step.model).values()
    one_copy = _FLOAT * sum(elements(weight, setup) for weight in weights)
    moments = sum(_moments(weight, setup) for weight in weights)
    rows = setup.rows * setup.step.accumulate
    return MemoryEstimate(
        weights_bytes=one_copy,
        optimizer_bytes=_FLOAT * moments,
        batch_bytes=_INT * rows * setup.seq_len * (4 if setup.document_mask else 3),
        gradients_bytes=one_copy * (1 if setup.step.accumulate == 1 else 2),
        kept_bytes=_kept_bytes(setup),
        layer_bytes=_layer_bytes(setup),
        head_bytes=_head_bytes(setup),
        embedding_bytes=_embedding_bytes(setup),
    )


def elements(weight: Weight, setup: Setup, *, gathered: bool = False) -> int:
    """Returns the elements of a weight on one device; `gathered`: as a product takes it."""
    return math.prod(
        size // setup.mesh.shards(_axes(dim, setup, gathered))
        for size, dim in zip(weight.shape, weight.dims, strict=True)
    )


def _axes(dim: str | None, setup: Setup, gathered: bool) -> Axes:
    rules = setup.rules
    dropped = rules.embed if gathered else ()
    return tuple(axis for axis in rules.axes(dim) if axis not in dropped)


def _moments(weight: Weight, setup: Setup) -> int:
    """Returns the numbers that the optimizer keeps of one weight on one device."""
    if setup.step.optimizer.name == "adamw":
        return 2 * elements(weight, setup)
    sizes = sorted(range(len(weight.shape)), key=weight.shape.__getitem__)
    if len(sizes) < 2 or weight.shape[sizes[-2]] < LEAST_FACTORED:
        return elements(weight, setup)
    # The means over each of its two longest dims.
    return sum(elements(_without(weight, dim), setup) for dim in sizes[-2:])


def _without(weight: Weight, dim: int) -> Weight:
    def drop(values: tuple) -> tuple:
        return values[:dim] + values[dim + 1 :]

    return dataclasses.replace(weight, shape=drop(weight.shape), dims=drop(weight.dims))


def widths(setup: Setup) -> tuple[float, float, float]:
    """Returns (D, N H, F) of one device: heads and feed-forward are split, the stream is not."""
    model, rules = setup.step.model, setup.rules
    heads = model.num_heads * model.head_dim / setup.mesh.shards(rules.heads)
    return model.d_model, heads, model.d_ff / setup.mesh.shards(rules.ff)


def _operand_bytes(setup: Setup) -> int:
    return 2 if setup.step.compute.dtype == "bfloat16" else _FLOAT


def _scores_bytes(setup: Setup, numbers: int) -> float:
    """Returns the bytes of `numbers` of the attention's float32 scores, for a token of a layer."""
    share = _SCORES_AT_ONCE[setup.step.compute.attention]
    heads = setup.step.model.num_heads / setup.mesh.shards(setup.rules.heads)
    return _FLOAT * numbers * share * heads * setup.seq_len


def _forward_bytes(setup: Setup) -> float:
    """Returns the bytes a token that the forward pass of a layer makes, its squares aside."""
    operand = _operand_bytes(setup)
    stream, heads, ff = widths(setup)
    # The stream, its norm, the update; q, k, v and the mix, float32 and as operands; two of F.
    return (
        stream * (2 * _FLOAT + operand) + 4 * heads * (_FLOAT + operand) + ff * (_FLOAT + operand)
    )


def _kept_bytes(setup: Setup) -> int:
    compute, operand = setup.step.compute, _operand_bytes(setup)
    stream, heads, ff = widths(setup)
    token, weights = _FLOAT * stream, 0
    if compute.remat == "minimal":
        # q, k, v and the mix and the feed-forward's first result, as operands.
        token += operand * (4 * heads + ff)
    elif compute.remat == "feed-forward":
        token += operand * ff
    elif compute.remat == "none":
        token = _forward_bytes(setup)
        if compute.attention == "plain":
            token += _scores_bytes(setup, 2)
        if layer_elements(setup) > layer_elements(setup, gathered=False):
            weights = operand * layer_elements(setup)
    return round(setup.step.model.num_layers * (part_tokens(setup) * token + weights))


def part_tokens(setup: Setup) -> int:
    return setup.rows * setup.seq_len


def layer_elements(setup: Setup, *, gathered: bool = True) -> int:
    model = setup.step.model
    blocks: list[Weight] = jax.tree.leaves(weight_tree(model).blocks)
    total = sum(elements(weight, setup, gathered=gathered) for weight in blocks)
    return total // model.num_layers


def _layer_bytes(setup: Setup) -> int:
    """The next layer's weights are gathered while this one's are used."""
    activations = 1.5 * _forward_bytes(setup) + _scores_bytes(setup, 3)
    weights = layer_elements(setup) * 3 * _operand_bytes(setup)
    return round(part_tokens(setup) * activations + weights)


def _head_bytes(setup: Setup) -> int:
    head = weight_tree(setup.step.model).head.weight
    vocab = elements(head, setup, gathered=True) // setup.step.model.d_model
    # Logits, their exponentials and their gradient.
    logits = 3 * _FLOAT * vocab * setup.rows * stretch(setup)
    weights = elements(head, setup, gathered=True) * (_operand_bytes(setup) + _FLOAT)
    # The head's input and its gradient are there for all tokens.
    return logits + weights + 2 * _FLOAT * part_tokens(setup) * setup.step.model.d_model


def stretch(setup: Setup) -> int:
    """Returns the tokens of a sequence whose logits exist together (ops/loss.py)."""
    length = setup.seq_len
    return min(length, max(-(-length // MAX_STRETCHES), STRETCH_ROWS // setup.rows, 1))


def _embedding_bytes(setup: Setup) -> int:
    table = weight_tree(setup.step.model).embedding.tokens
    return 2 * _FLOAT * elements(table, setup, gathered=True)


def least_memory(setup: Setup) -> tuple[int, int]:
    """Returns bytes of one device without which no way to compute the step can do.

    They are (state and one gradient, activations): the stream before each layer and the logits of
    a chunk. What needs no more may still not fit.
    """
    estimate = estimate_memory(setup)
    model, tokens = setup.step.model, part_tokens(setup)
    vocab = model.vocab_size // setup.mesh.shards(setup.rules.vocab)
    kept = _FLOAT * tokens * model.num_layers * model.d_model
    logits = _FLOAT * min(tokens, CHUNK_ROWS) * vocab
    return estimate.state_bytes + estimate.weights_bytes, kept + logits

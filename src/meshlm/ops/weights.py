"""Weights of products and look-ups: one protocol, and an implementation for each stored form.

    Dense   a plain array
    Int8    whole numbers, with a scale for each output

A parameter tree keeps a dense weight as the plain array itself and every other form as the object
that holds its arrays. `as_matrix` turns either into a `Matrix`; nothing else asks which form a
weight has. To add a form, write a subclass here, and in model/quantize.py the function that makes
it from a dense weight.

Dim letters: B batch, T time, D width of a table, M rows (batch and time flattened), K contracted,
N out. A weight is [out..., in...]; a product contracts the trailing dims of both operands.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from meshlm.core.sharding import axes_of, gather_reduced, reshard, spec
from meshlm.core.tree import pytree
from meshlm.ops.cpu import xla


class Matrix(abc.ABC):
    """A weight [out..., in...] as products take it, or a table [rows, D] as a look-up takes it."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, whatever the arrays that stand for it."""

    @property
    def ndim(self) -> int:
        """The number of the weight's dims."""
        return len(self.shape)

    @property
    @abc.abstractmethod
    def operand_dtype(self) -> Any:
        """The dtype of the activations in a product; None for any, which the product rounds."""

    @abc.abstractmethod
    def gathered(self, *dims: str | None, dtype: Any, reduced: bool = False) -> "Matrix":
        """Returns the weight as products take it: whole over the axes that it is stored over.

        Args:
            dims: the weight's logical dims.
            dtype: of the products; a form that has its own keeps it.
            reduced: sum the gradients over devices in `dtype`, not in that of the stored weight.
        """

    @abc.abstractmethod
    def plain_dot(self, x: jax.Array, *, contract: int = 1, partial: bool = False) -> jax.Array:
        """Returns what `dot` does, by XLA on any device: the reference of every faster form."""

    def dot(self, x: jax.Array, *, contract: int = 1, partial: bool = False) -> jax.Array:
        """Returns x [..., in] times the weight, accumulated in float32 and of float32.

        Args:
            x: activations in `operand_dtype`; the last `contract` dims are contracted.
            contract: the number of dims to contract.
            partial: leave the sum over the axes of `heads` to the caller, who adds several such
                products and then reduces once (`core.sharding.reshard`).
        """
        return self.plain_dot(x, contract=contract, partial=partial)

    @abc.abstractmethod
    def streamed_operands(self, x_MK: jax.Array, contract: int) -> tuple[jax.Array, ...]:
        """Returns a product's operands as `ops.cpu.streamed.products` takes them."""

    @abc.abstractmethod
    def rows(self, tokens_BT: jax.Array, *dims: str | None) -> jax.Array:
        """Returns the rows of a table for each token [B, T, D] in float32, D split as `dims` say.

        Args:
            tokens_BT: indices of rows.
            dims: the table's logical dims, of which the rows' may not be split.
        """

    @abc.abstractmethod
    def to_array(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the weight as one array of `dtype`."""

    @abc.abstractmethod
    def narrowed(self, dtype: Any) -> "Array | Matrix":
        """Returns the leaf that a model keeps whose products are of `dtype`: cast if it is wider.

        Numbers of products stay the same, for `gathered` casts to the same dtype.
        """


def as_matrix(leaf: Array | Matrix) -> Matrix:
    """Returns a leaf of a parameter tree, a plain array or another form, as a `Matrix`."""
    return leaf if isinstance(leaf, Matrix) else Dense(leaf)


@dataclasses.dataclass(frozen=True)
class Dense(Matrix):
    """A weight that is one floating-point array. Trees of parameters hold the array itself."""

    array: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    @property
    def operand_dtype(self) -> Any:
        """The array's dtype: bfloat16 operands give a float32 result."""
        return self.array.dtype

    def gathered(self, *dims: str | None, dtype: Any, reduced: bool = False) -> "Dense":
        """Returns the weight in `dtype`, whole over the axes that it is stored over."""
        array = self.array.astype(dtype)
        gather = gather_reduced if reduced else _gather
        return Dense(gather(array, *dims))

    def dot(self, x: jax.Array, *, contract: int = 1, partial: bool = False) -> jax.Array:
        """Returns the product in the form that is fast on the platform."""
        if not xla.is_faster(x.dtype):
            return self.plain_dot(x, contract=contract, partial=partial)
        rows, outs = _kept(x, contract), _kept(self, contract)
        inner = math.prod(x.shape[len(rows) :])
        y_MN = xla.dot(x.reshape(-1, inner), self.array.reshape(-1, inner))
        return y_MN.reshape(*rows, *outs)

    def plain_dot(self, x: jax.Array, *, contract: int = 1, partial: bool = False) -> jax.Array:
        """Returns the product as one operation, on any device and mesh."""
        dims_x = tuple(range(x.ndim - contract, x.ndim))
        dims_w = tuple(range(self.ndim - contract, self.ndim))
        return jax.lax.dot_general(
            x,
            self.array,
            ((dims_x, dims_w), ((), ())),
            preferred_element_type=jnp.float32,
            out_sharding=_dot_sharding(x, self.array, contract, partial),
        )

    def streamed_operands(self, x_MK: jax.Array, contract: int) -> tuple[jax.Array, ...]:
        """Returns x and the weight [N, K], both in the weight's dtype."""
        assert x_MK.dtype == self.array.dtype
        assert x_MK.dtype in (jnp.float32, jnp.bfloat16)
        return x_MK, self.array.reshape(math.prod(_kept(self, contract)), -1)

    def rows(self, tokens_BT: jax.Array, *dims: str | None) -> jax.Array:
        """Returns the rows of a table that is gathered first, all but the axes of its width."""
        table = reshard(self.array, *dims, gathered=True).astype(jnp.float32)
        return table.at[tokens_BT].get(out_sharding=spec("batch", None, dims[-1], gathered=True))

    def to_array(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the array in `dtype`."""
        return self.array.astype(dtype)

    def narrowed(self, dtype: Any) -> Array:
        """Returns the plain array, in `dtype` where that takes fewer bytes."""
        is_wider = self.array.dtype.itemsize > jnp.dtype(dtype).itemsize
        return self.array.astype(dtype) if is_wider else self.array


@pytree
class Int8(Matrix):
    """A weight in int8, with a scale for each output; products round the activations too.

    Both are rounded to whole numbers from -127 to 127, the largest of its row; their products and
    sums are exact in int32. Nothing is learned or calibrated.
    """

    values: Int[Array, "..."]
    """[out..., in...], int8."""
    scale: Float[Array, "..."]
    """[out...], float32: what one unit stands for in this output."""

    @classmethod
    def from_array(cls, array: Float[Array, "..."], contract: int = 1) -> "Int8":
        """Returns a weight in int8; its last `contract` dims are those that a product contracts."""
        outs = array.shape[: array.ndim - contract]
        values, scale = round_rows(array.reshape(math.prod(outs), -1))
        return cls(values=values.reshape(array.shape), scale=scale.reshape(outs))

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.values.shape

    @property
    def operand_dtype(self) -> None:
        """None: a product rounds the activations, of whatever dtype, to int8."""
        return None

    def gathered(self, *dims: str | None, dtype: Any, reduced: bool = False) -> "Int8":
        """Returns the weight in int8, whole over the axes that it is stored over."""
        outs = dims[: self.scale.ndim]
        return Int8(values=_gather(self.values, *dims), scale=_gather(self.scale, *outs))

    def plain_dot(self, x: jax.Array, *, contract: int = 1, partial: bool = False) -> jax.Array:
        """Returns the float32 product, with x rounded row by row. One device only."""
        rows, outs = _kept(x, contract), _kept(self, contract)
        x_MK = x.reshape(-1, math.prod(x.shape[len(rows) :]))
        num_rows = x_MK.shape[0]
        values_NK = self.values.reshape(math.prod(outs), -1)
        rounded_MK, scale_M = round_rows(x_MK)
        if num_rows == 1:
            # XLA on CPUs converts all weights to int32 for a single row.
            rounded_MK = jnp.pad(rounded_MK, ((0, 1), (0, 0)))
        sums_MN: Int[Array, "M N"] = jax.lax.dot_general(
            rounded_MK, values_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )[:num_rows]
        scale_MN = scale_M[:, None] * self.scale.reshape(-1)[None]
        return (sums_MN.astype(jnp.float32) * scale_MN).reshape(*rows, *outs)

    def streamed_operands(self, x_MK: jax.Array, contract: int) -> tuple[jax.Array, ...]:
        """Returns x in float32, which the kernel rounds, and the weight [N, K] with its scales."""
        values_NK = self.values.reshape(math.prod(_kept(self, contract)), -1)
        return x_MK.astype(jnp.float32), values_NK, self.scale.reshape(-1)

    def rows(self, tokens_BT: jax.Array, *dims: str | None) -> jax.Array:
        """Returns the rows that were asked for, and those alone, in float32."""
        values = _gather(self.values, *dims)
        rows_BTD = values.at[tokens_BT].get(
            out_sharding=spec("batch", None, dims[-1], gathered=True)
        )
        scale = _gather(self.scale, *dims[:1])
        scale_BT = scale.at[tokens_BT].get(out_sharding=spec("batch", None, gathered=True))
        return rows_BTD.astype(jnp.float32) * scale_BT[..., None]

    def to_array(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the weight that the whole numbers stand for."""
        outs = self.scale.shape
        scale = self.scale.reshape(*outs, *([1] * (self.ndim - len(outs))))
        return (self.values.astype(jnp.float32) * scale).astype(dtype)

    def narrowed(self, dtype: Any) -> "Int8":
        """Returns the weight itself."""
        return self


_LARGEST = 127.0
# XLA compiles the division by 127 as this product; the kernel does the same, with the same bits.
_UNIT = float(np.float32(1) / np.float32(127))


def round_rows(x_MK: Float[Array, "M K"]) -> tuple[Int[Array, "M K"], Float[Array, "M"]]:
    """Returns each row in int8, and what one unit stands for in it.

    A row of zeros stays one; one that is not finite has a scale that is not.
    """
    x_MK = x_MK.astype(jnp.float32)
    largest_M = jnp.max(jnp.abs(x_MK), axis=-1)
    factor_M = jnp.where(largest_M > 0, _LARGEST / largest_M, 0.0)
    factor_M = jnp.where(jnp.isfinite(factor_M), factor_M, 0.0)
    whole_MK = jnp.nan_to_num(jnp.round(x_MK * factor_M[:, None]))
    return whole_MK.astype(jnp.int8), largest_M * _UNIT


def _kept(operand: Array | Matrix, contract: int) -> tuple[int, ...]:
    """Returns the sizes of the dims that a product does not contract."""
    return operand.shape[: operand.ndim - contract]


def _gather(x: jax.Array, *dims: str | None) -> jax.Array:
    return reshard(x, *dims, gathered=True)


def _dot_sharding(
    x: jax.Array, weight: jax.Array, contract: int, partial: bool
) -> PartitionSpec | None:
    if jax.sharding.get_abstract_mesh().empty:
        return None
    x_spec, w_spec = (jax.typeof(a).sharding.spec.partitions for a in (x, weight))
    parts = (*x_spec[: x.ndim - contract], *w_spec[: weight.ndim - contract])
    # The contracted dims are split as heads and feed-forward are.
    return PartitionSpec(*parts, unreduced=axes_of("heads") if partial else frozenset())

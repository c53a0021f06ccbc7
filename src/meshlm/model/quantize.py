"""Weights in int8: which of a model's arrays are kept so, and how each is made."""

import dataclasses
import functools
from typing import Any

import jax

from meshlm.core.tree import map_named
from meshlm.model.params import PRODUCT_WEIGHTS, Params
from meshlm.ops.weights import Int8

# How many dims a product contracts, where it is not the last one alone.
_CONTRACTED = {"attention_out": 2}


@functools.partial(jax.jit, static_argnames="contract")
def _quantise(weight: jax.Array, *, contract: int) -> Int8:
    return Int8.from_array(weight, contract)


def quantise_weight(name: str, weight: jax.Array) -> Any:
    """Returns a layer's weight, or one outside of the layers, as a model in int8 keeps it.

    The matrices of products become int8; the embedding, which is looked up, the biases and the
    norms stay as they are.

    Args:
        name: dotted; the last part says which weight it is.
    """
    field = name.split(".")[-1]
    if field not in PRODUCT_WEIGHTS:
        return weight
    return _quantise(weight, contract=_CONTRACTED.get(field, 1))


def quantise_params(params: Params) -> Params:
    """Returns weights with one block a layer, their matrices in int8."""
    outer = map_named(quantise_weight, dataclasses.replace(params, blocks=()))
    blocks = tuple(map_named(quantise_weight, block) for block in params.blocks)
    return dataclasses.replace(outer, blocks=blocks)

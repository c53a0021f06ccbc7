"""Weights in int8: which of a model's arrays are kept so, and how each is made."""

import functools
from typing import Any

import jax

from meshlm.model.config import ModelConfig
from meshlm.model.params import Params, Weight, map_weights
from meshlm.ops.weights import Int8


@functools.partial(jax.jit, static_argnames="contract")
def _quantise(value: jax.Array, *, contract: int) -> Int8:
    return Int8.from_array(value, contract)


def quantise_weight(weight: Weight, value: jax.Array) -> Any:
    """Returns a layer's array, or one outside of the layers, as a model in int8 keeps it.

    The matrices of products become int8. Tables that are looked up, biases and norms stay as they
    are.
    """
    return _quantise(value, contract=weight.contract) if "product" in weight.uses else value


def quantise_params(config: ModelConfig, params: Params) -> Params:
    """Returns weights with one block a layer, their matrices in int8."""
    return map_weights(quantise_weight, config, params)

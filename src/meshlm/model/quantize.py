"""Quantisation: which parameters are quantised, and how, by the name of the form."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from meshlm.model.config import ModelConfig
from meshlm.model.params import Params, Weight, map_weights
from meshlm.ops.weights import Int8


@functools.partial(jax.jit, static_argnames="contract")
def _quantise(value: jax.Array, *, contract: int) -> Int8:
    return Int8.from_array(value, contract)


def quantise_weight(weight: Weight, value: jax.Array) -> Any:
    """Returns one parameter, of one layer if it is in a block, as a model in int8 keeps it.

    The matrices of products become int8. Tables that are looked up, biases and norms stay as they
    are.
    """
    return _quantise(value, contract=weight.contract) if "product" in weight.uses else value


FORMS: dict[str, Callable[[Weight, jax.Array], Any]] = {"int8": quantise_weight}
"""What makes each form of a model's parameters, by its name in `--quantize`."""


def quantise_params(config: ModelConfig, params: Params) -> Params:
    """Returns weights with one block per layer, their matrices in int8."""
    return map_weights(quantise_weight, config, params)

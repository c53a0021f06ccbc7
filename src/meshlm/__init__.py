"""MeshLM: train, sample and evaluate GPT-J on one CPU, one GPU or a mesh of devices.

model = meshlm.load("runs/mine")
print(model.generate("def is_even(i):", temperature=0).text)
"""

import importlib
from typing import TYPE_CHECKING, Any

from meshlm.core import platform as _platform

_platform.configure()

if TYPE_CHECKING:
    from meshlm.api import Generations, Model, Score, load
    from meshlm.core.sharding import MeshConfig
    from meshlm.model.config import ModelConfig
    from meshlm.model.families import gpt_j
    from meshlm.model.presets import PRESETS
    from meshlm.training.config import TrainConfig
    from meshlm.training.loop import train

__all__ = [
    "PRESETS",
    "Generations",
    "MeshConfig",
    "Model",
    "ModelConfig",
    "Score",
    "TrainConfig",
    "gpt_j",
    "load",
    "train",
]

# Looked up when first used: the command line and the workers of `data prepare` start without JAX.
_HOMES = {
    "Generations": "meshlm.api",
    "Model": "meshlm.api",
    "Score": "meshlm.api",
    "load": "meshlm.api",
    "MeshConfig": "meshlm.core.sharding",
    "PRESETS": "meshlm.model.presets",
    "ModelConfig": "meshlm.model.config",
    "gpt_j": "meshlm.model.families",
    "TrainConfig": "meshlm.training.config",
    "train": "meshlm.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meshlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""MeshLM: train, sample and evaluate GPT-J on one CPU, one GPU or a mesh of devices."""

from meshlm.core import platform as _platform

_platform.configure()

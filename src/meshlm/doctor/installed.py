"""What is installed, against what MeshLM's own package metadata asks for."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence

from packaging.requirements import Requirement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """One of MeshLM's requirements."""

    name: str
    requirement: str
    """Name and versions, as pip takes them."""
    installed: str | None
    satisfied: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extra:
    """An optional set of requirements: `pip install 'meshlm[name]'`."""

    name: str
    libraries: Sequence[Library]

    @property
    def missing(self) -> list[str]:
        """The requirements that are not met."""
        return [one.requirement for one in self.libraries if not one.satisfied]


def read_requirements(distribution: str) -> tuple[list[Library], list[Extra]]:
    """The requirements of an installed distribution: those for all, and those of each extra."""
    try:
        metadata = importlib.metadata.metadata(distribution)
        texts = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return [], []
    requirements = [Requirement(text) for text in texts]

    def applying(extra: str) -> list[Requirement]:
        return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]

    always = applying("")
    extras = [
        Extra(name=name, libraries=[_library(r) for r in applying(name) if r not in always])
        for name in sorted(metadata.get_all("Provides-Extra") or [])
    ]
    return [_library(requirement) for requirement in always], extras


def _library(requirement: Requirement) -> Library:
    installed = version(requirement.name)
    fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    text = f"{requirement.name}{requirement.specifier}"
    return Library(name=requirement.name, requirement=text, installed=installed, satisfied=fits)


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None where it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

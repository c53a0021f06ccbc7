"""Runs the suite in both environments, with one summary: `run.py quick | long [PYTEST ARG...]`.

.venv has the newest Python and JAX and runs everything but the parity tests. .venv-parity has the
oldest, and torch: it runs the parity tests and, where its JAX differs from .venv's, the unit tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit code when it selected none
SLOWEST = 10  # tests that the summary names
FACTS = """
import importlib.metadata as metadata, platform
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return "none"
print(platform.python_version(), version("jax"), version("torch"))
"""


@dataclass(frozen=True, kw_only=True)
class Environment:
    folder: str
    python: str
    jax: str
    torch: str

    def describe(self) -> str:
        return f"{self.folder}: Python {self.python}, JAX {self.jax}, torch {self.torch}"


@dataclass(frozen=True, kw_only=True)
class Counts:
    passed: int
    failed: int
    skipped: int
    seconds: float

    @property
    def outcomes(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    def __str__(self) -> str:
        return f"{self.outcomes} in {self.seconds:.0f}s"


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A test and the seconds that it took, its fixtures included."""

    seconds: float
    name: str
    folder: str

    def __str__(self) -> str:
        return f"{self.seconds:6.1f}s  {self.name} ({self.folder})"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    ok: bool
    line: str
    counts: Counts | None = None
    times: tuple[Timed, ...] = ()


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("quick", "long"):
        print("usage: run.py quick | long [PYTEST ARG...]", file=sys.stderr)
        return 2
    long, extra = arguments[0] == "long", arguments[1:]
    # Files that the caller names take the place of the folders below.
    named = [argument for argument in extra if (ROOT / argument.split("::")[0]).exists()]
    newest, oldest = look_at(".venv"), look_at(".venv-parity")
    assert newest is not None, "make prepares .venv before it starts this file"
    outcomes = []
    if not named or not all(argument.startswith("tests/parity") for argument in named):
        folders = [] if named else ["tests"]
        outcomes.append(run_pytest(newest, folders, select(long, parity=False), long, extra))
    if oldest is None:
        lost = ".venv-parity: no parity tests: no CPU build of torch (see the first lines)"
        outcomes.append(Outcome(ok=not in_ci(), line=f"SKIPPED  {lost}"))
    elif not long or named or has_long_parity_tests():
        twin = long or oldest.jax == newest.jax
        folders = [] if named else ["tests/parity"] if twin else ["tests/unit", "tests/parity"]
        outcomes.append(run_pytest(oldest, folders, select(long, parity=None), long, extra))
    print("\nsummary" + (" of the long tests" if long else ""))
    for outcome in outcomes:
        print("  " + outcome.line)
    times = sorted((timed for outcome in outcomes for timed in outcome.times), key=seconds_of)
    if times:
        print(f"the {min(SLOWEST, len(times))} slowest tests")
    for timed in times[: -SLOWEST - 1 : -1]:
        print(f"  {timed}")
    counts = [outcome.counts for outcome in outcomes if outcome.counts is not None]
    print(f"total: {add_up(counts).outcomes}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def add_up(parts: list[Counts]) -> Counts:
    return Counts(
        passed=sum(part.passed for part in parts),
        failed=sum(part.failed for part in parts),
        skipped=sum(part.skipped for part in parts),
        seconds=sum(part.seconds for part in parts),
    )


def seconds_of(timed: Timed) -> float:
    return timed.seconds


def has_long_parity_tests() -> bool:
    files = (ROOT / "tests" / "parity").glob("test_*.py")
    return any("mark.long" in file.read_text() for file in files)


def in_ci() -> bool:
    return os.environ.get("CI") == "true"


def select(long: bool, *, parity: bool | None) -> str:
    marker = "long" if long else "not long"
    return marker if parity is None else f"{marker} and {'' if parity else 'not '}parity"


def look_at(folder: str) -> Environment | None:
    python = ROOT / folder / "bin" / "python"
    if not python.exists():
        return None
    facts = subprocess.run(
        [python, "-c", FACTS], check=True, capture_output=True, text=True
    ).stdout.split()
    return Environment(folder=folder, python=facts[0], jax=facts[1], torch=facts[2])


def run_pytest(
    environment: Environment, folders: list[str], marker: str, long: bool, extra: list[str]
) -> Outcome:
    """One pytest process; its output goes straight to the terminal, its counts to the outcome."""
    print(f"\n== {environment.describe()}", flush=True)
    workers = min(4, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [
            ROOT / environment.folder / "bin" / "python",
            "-m",
            "pytest",
            *folders,
            "-m",
            marker,
        ]
        command += [
            "-q",
            f"--numprocesses={workers}",
            "--dist=loadfile",
            f"--junitxml={report}",
            *extra,
        ]
        profile = {"HYPOTHESIS_PROFILE": "long"} if long else {}
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **profile}).returncode
        counts, times = read_counts(report), read_times(report, environment.folder)
    # No long tests, or none that the caller's arguments choose, is fine; else none is a broken run.
    ok = code == 0 or (code == NO_TESTS and (long or bool(extra)))
    said = counts or "pytest ended before it could report"
    line = f"{'ok      ' if ok else 'FAILED  '} {environment.describe()}: {said}"
    return Outcome(ok=ok, line=line, counts=counts, times=times)


def read_counts(report: Path) -> Counts | None:
    if not report.exists():
        return None
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "time": 0.0}
    for suite in suites:
        for name in total:
            total[name] += float(suite.get(name, 0))
    failed = total["failures"] + total["errors"]
    return Counts(
        passed=int(total["tests"] - failed - total["skipped"]),
        failed=int(failed),
        skipped=int(total["skipped"]),
        seconds=total["time"],
    )


def read_times(report: Path, folder: str) -> tuple[Timed, ...]:
    if not report.exists():
        return ()
    return tuple(
        Timed(
            seconds=float(case.get("time", 0)),
            name=f"{case.get('classname', '')}::{case.get('name', '')}",
            folder=folder,
        )
        for case in ElementTree.parse(report).getroot().iter("testcase")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

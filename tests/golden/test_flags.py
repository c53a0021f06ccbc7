"""Names that people and files rely on: options, presets, names of checkpoint arrays.

A change here breaks scripts or checkpoints, so it is to be meant. To write the files anew after
such a change, and to see it in the diff:

    .venv/bin/python -m pytest tests/golden/test_flags.py --regenerate-golden
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import pytest

from meshlm.cli.help import command_help
from meshlm.cli.main import COMMANDS
from meshlm.cli.options import options_of
from meshlm.core.tree import to_named
from meshlm.model.params import count_params
from meshlm.model.presets import PRESETS, vocab_rows
from meshlm.optim import OptimizerConfig
from meshlm.step import StepConfig, init_state

HERE = Path(__file__).parent
# A default that is the machine's, not ours.
MACHINE = re.compile(r"(--workers INT.*) \[\d+\]")


def check(path: Path, found: str, regenerate: bool) -> None:
    if regenerate:
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists(), f"{path} is not there: run with --regenerate-golden"
    assert found == path.read_text(), f"{path} differs: see the top of this file"


def options_text(config: type) -> str:
    """A line an option: its names, its value, its default."""
    lines = []
    for option in options_of(config):
        default = " (required)" if option.required else f" [{option.default}]"
        default = "" if option.default is None and not option.required else default
        many = " many" if option.takes_many and "..." not in option.value else ""
        lines.append(f"{', '.join(option.names)} {option.value}".strip() + many + default)
    return MACHINE.sub(r"\1 [CPUs]", "\n".join(sorted(lines))) + "\n"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_options(command, regenerate_golden):
    module = importlib.import_module(f"meshlm.cli.{command.module}")
    path = HERE / "flags" / f"{command.words.replace(' ', '-')}.txt"
    check(path, options_text(module.Config), regenerate_golden)


def test_every_file_is_of_a_command():
    names = {f"{command.words.replace(' ', '-')}.txt" for command in COMMANDS}
    assert {path.name for path in (HERE / "flags").iterdir()} == names


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_help_has_every_option_and_examples_that_exist(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    module = importlib.import_module(f"meshlm.cli.{command.module}")
    text = command_help(module.Config, f"meshlm {command.words}", module.EXAMPLES)
    options = options_of(module.Config)
    names = {name for option in options for name in option.names}
    for option in options:
        assert option.name in text
    assert max(map(len, text.splitlines())) <= 100
    assert module.EXAMPLES
    for example in module.EXAMPLES:
        assert example.startswith(f"meshlm {command.words}")
        used = re.findall(r"(?<= )--?[a-z][\w.-]*", example.split(" -- ")[0])
        assert set(used) <= names, example


def test_presets(regenerate_golden):
    dump = {
        name: {**dataclasses.asdict(config), "parameters": count_params(config)}
        for name, config in PRESETS.items()
    }
    check(HERE / "presets.json", json.dumps(dump, indent=1) + "\n", regenerate_golden)


def test_the_published_size():
    # 6,050,882,784 without the embedding's bias, and DESIGN's padded vocabularies.
    assert count_params(PRESETS["gpt-j-6b"]) == 6_050_882_784
    assert [vocab_rows(size) for size in (50_257, 512, 513, 4096)] == [50_400, 512, 640, 4096]


def test_checkpoint_arrays(regenerate_golden):
    optimizer = OptimizerConfig(
        learning_rate=1e-3, end_learning_rate=1e-4, warmup_steps=1, anneal_steps=1
    )
    model = dataclasses.replace(PRESETS["test"], vocab_size=512)
    shapes = jax.eval_shape(lambda: init_state(StepConfig(model=model, optimizer=optimizer), 0))
    lines = [
        f"{name} {leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        for name, leaf in to_named(shapes).items()
    ]
    check(HERE / "checkpoint_arrays.txt", "\n".join(sorted(lines)) + "\n", regenerate_golden)

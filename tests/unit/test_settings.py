"""Options of `meshlm train` in a file."""

from __future__ import annotations

import json

import pytest

from meshlm.core.config import to_dict
from meshlm.core.errors import BadInputError, UsageError
from meshlm.model.presets import PRESETS
from meshlm.training.settings import expand, read_settings


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "options.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_options_become_values_beside_those_of_the_command_line(write):
    path = write({"steps": 7, "mesh": {"data": 2}, "document_mask": True, "keep_every": None})
    values = {"--config": [str(path)], "--run": ["r"]}
    file = {"--steps": ["7"], "--mesh.data": ["2"], "--document-mask": ["True"]}
    assert expand(values) == file | values


def test_the_command_line_wins(write):
    values = {"--config": [str(write({"steps": 7, "seed": 1}))], "--steps": ["9"]}
    assert expand(values) == {"--seed": ["1"]} | values


def test_lists_are_several_values(write):
    values = {"--config": [str(write({"data": ["a=0.5", "--b"], "sample_prompts": []}))]}
    assert expand(values) == {"--data": ["a=0.5", "--b"]} | values
    # Given on the command line too, the file's are left out, not added to.
    assert expand(values | {"--data": ["c"]}) == values | {"--data": ["c"]}


def test_without_a_file_nothing_changes():
    assert expand({"--run": ["r"]}) == {"--run": ["r"]}


def test_a_model_comes_with_it(write):
    model, options = read_settings(write({"model": to_dict(PRESETS["test"]), "steps": 3}))
    assert model == PRESETS["test"]
    assert options == {"steps": 3}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"stepps": 1}, "did you mean 'steps'"),
        ({"run": "x"}, "unknown option 'run'"),
        ({"config": "x"}, "unknown option 'config'"),
        ({"model": {"num_layers": 1}}, "model"),
        ({"model": {**to_dict(PRESETS["test"]), "layers": 1}}, "layers"),
        ([1], "not a JSON object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_option_is_refused(write, content, said):
    with pytest.raises(BadInputError, match=said):
        read_settings(write(content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        expand({"--config": [str(tmp_path / "none.json")]})

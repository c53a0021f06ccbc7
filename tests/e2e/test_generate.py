"""`meshlm generate` on a run: where prompts come from, what is printed, what is refused."""

from __future__ import annotations

import io
import json
import shutil

import pytest

import meshlm as package
from runs import one_line

pytestmark = pytest.mark.timeout(600)
PROMPT = "def is_even(i):"


def generated(meshlm, run, *words) -> list[dict]:
    code, out, err = meshlm("generate", run, "--json", *words)
    assert code == 0, err
    (line,) = out.splitlines()
    return json.loads(line)["samples"]


def test_text_is_the_prompt_and_what_follows(meshlm, run_of_10):
    words = ("--prompt", PROMPT, "--max-tokens", "8")
    code, out, err = meshlm("generate", run_of_10, *words)
    assert (code, err) == (0, "")
    (sample,) = generated(meshlm, run_of_10, *words)
    assert out == PROMPT + sample["text"] + "\n"
    assert len(sample["tokens"]) == len(sample["logprobs"]) == 8
    assert all(logprob <= 0 for logprob in sample["logprobs"])
    assert sample["finish_reason"] == "length"


def test_prompts_from_files_and_standard_input(meshlm, run_of_10, tmp_path, monkeypatch):
    prompt = "Žluťoučký\r\nkůň, 東京 <|endoftext|>\n"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    wanted = generated(meshlm, run_of_10, "--prompt", prompt, "--max-tokens", "4")
    file = ("--prompt-file", tmp_path / "prompt.txt", "--max-tokens", "4")
    assert generated(meshlm, run_of_10, *file) == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert generated(meshlm, run_of_10, "--prompt-file", "-", "--max-tokens", "4") == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    code, _, err = meshlm("generate", run_of_10, "--prompt-file", "-")
    assert code == 2
    assert "standard input is not UTF-8" in one_line(err)


@pytest.mark.parametrize("prompt", ["", "--json", "-h", "--help", "--verbose", "--- a", " "])
def test_odd_prompts(meshlm, run_of_10, prompt):
    words = ("--max-tokens", "2", "--seed", "-5", "--stop", "--")
    found = generated(meshlm, run_of_10, "--prompt", prompt, *words)
    assert len(found[0]["tokens"]) == 2
    assert generated(meshlm, run_of_10, f"--prompt={prompt}", *words) == found


def test_samples_and_seeds(meshlm, run_of_10):
    words = ("--prompt", PROMPT, "--max-tokens", "8", "--temperature", "1")
    three = generated(meshlm, run_of_10, *words, "-n", "3", "--seed", "5")
    assert len({tuple(sample["tokens"]) for sample in three}) == 3
    assert generated(meshlm, run_of_10, *words, "-n", "3", "--seed", "5") == three
    assert generated(meshlm, run_of_10, *words, "-n", "3", "--seed", "6") != three
    # A sample does not depend on how many others there are.
    assert generated(meshlm, run_of_10, *words, "--seed", "5")[0]["tokens"] == three[0]["tokens"]
    code, out, _ = meshlm("generate", run_of_10, *words, "-n", "3", "--seed", "5")
    assert code == 0
    assert out.count(PROMPT) == 3
    assert "--- 3 of 3, length" in out


def test_logprobs(meshlm, run_of_10):
    words = ("--prompt", PROMPT, "--max-tokens", "3", "--temperature", "0", "--logprobs", "4")
    (sample,) = generated(meshlm, run_of_10, *words)
    assert [len(best) for best in sample["top_logprobs"]] == [4, 4, 4]
    for token, logprob, best in zip(
        sample["tokens"], sample["logprobs"], sample["top_logprobs"], strict=True
    ):
        # Greedy: the token is the most probable one.
        assert max(best, key=lambda name: best[name]) == str(token)
        assert best[str(token)] == pytest.approx(logprob, abs=1e-6)
    code, out, _ = meshlm("generate", run_of_10, *words)
    assert code == 0
    # The text, and a line a token with 4 alternatives.
    assert sum(line.count("  ") >= 4 for line in out.splitlines()) >= 3


def test_stop_texts_end_a_sample_and_are_not_shown(meshlm, run_of_10):
    words = ("--prompt", PROMPT, "--max-tokens", "40", "--temperature", "1")
    (whole,) = generated(meshlm, run_of_10, *words)
    stop = whole["text"][5:7]
    for given in (("--stop", stop), ("--stop", "never\x00", stop), (f"--stop={stop}",)):
        (sample,) = generated(meshlm, run_of_10, *words, *given)
        assert sample["text"] == whole["text"][: whole["text"].index(stop)]
        assert sample["finish_reason"] == "stop"


def test_the_context_ends_a_sample(meshlm, run_of_10):
    model = package.load(run_of_10)
    context = model.config.context_length
    text = PROMPT
    while len(model.tokenizer.encode(text + " and")) < context:
        text += " and"
    room = context - len(model.tokenizer.encode(text))
    (sample,) = generated(meshlm, run_of_10, "--prompt", text, "--max-tokens", "500")
    assert len(sample["tokens"]) == room
    assert sample["finish_reason"] == "length"
    text += " and" * 10
    tokens = len(model.tokenizer.encode(text))
    code, _, err = meshlm("generate", run_of_10, "--json", "--prompt", text)
    assert code == 2
    assert f"{tokens} tokens" in one_line(err)
    assert str(context) in one_line(err)


def test_runs_folders_and_checkpoints(meshlm, run_of_10, tmp_path):
    words = ("--prompt", PROMPT, "--max-tokens", "6", "--temperature", "0")
    folder = run_of_10 / "checkpoints"
    newest = generated(meshlm, run_of_10, *words)
    assert generated(meshlm, folder, *words) == newest
    assert generated(meshlm, folder / "step_10", *words) == newest
    copied = shutil.copytree(folder / "step_10", tmp_path / "model")
    assert generated(meshlm, copied, *words) == newest
    early = generated(meshlm, folder / "step_4", *words)
    assert early[0]["logprobs"] != newest[0]["logprobs"]
    (copied / "tokenizer.json").write_bytes(b"{}")
    code, _, err = meshlm("generate", copied, *words)
    assert code == 3
    assert "tokenizer.json" in one_line(err)


def test_a_run_falls_back_from_a_damaged_checkpoint(meshlm, run_of_10, tmp_path, caplog):
    words = ("--prompt", PROMPT, "--max-tokens", "6", "--temperature", "0")
    run = shutil.copytree(run_of_10, tmp_path / "run")
    (run / "checkpoints" / "step_10" / "position.json").write_bytes(b"{}")
    wanted = generated(meshlm, run_of_10 / "checkpoints" / "step_8", *words)
    assert generated(meshlm, run, *words) == wanted
    assert "step_10 is damaged" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(meshlm, run_of_10, dtype):
    assert generated(meshlm, run_of_10, "--prompt", PROMPT, "--max-tokens", "2", "--dtype", dtype)


def test_generation_ends_with_its_reader(cli, compiled, run_of_10):
    words = ("generate", run_of_10, "--prompt", PROMPT, "--max-tokens", "60", "--temperature", "0")
    process = cli.start(*words, env=compiled)
    assert process.stdout.read(4) == PROMPT[:4]
    process.stdout.close()
    assert process.wait(120) == 141
    assert process.stderr.read() == ""


def test_without_a_terminal(cli, compiled, run_of_10):
    words = ("generate", run_of_10, "--prompt-file", "-", "--max-tokens", "4", "--seed", "3")
    done = cli(*words, stdin=PROMPT, env=compiled)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(PROMPT)
    assert "\x1b" not in done.stdout

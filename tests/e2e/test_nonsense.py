"""Nonsense on the command line: one line that names the option, the right exit code, no trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import SMALL, one_line

NONSENSE = [
    # words, exit code, what the line says
    ("--stepz 5", 2, "unknown option --stepz: did you mean --steps?"),
    ("--mesh.dta 2", 2, "did you mean --mesh.data?"),
    ("--steps", 2, "--steps has no value"),
    ("--steps 0", 2, "--steps 0: give 1 or more"),
    ("--steps -3", 2, "--steps -3"),
    ("--steps ten", 2, "--steps ten: give a whole number"),
    ("--steps 1e3", 2, "--steps 1e3: give a whole number"),
    ("--steps 99999999999999999999", 2, "2147483647 or less"),
    ("--batch-size 0", 2, "--batch-size 0"),
    ("--batch-size -8", 2, "--batch-size -8"),
    ("--batch-size 2000000000", 2, "GB of memory"),
    ("--preset 23b", 2, "GB of memory"),
    ("--batch-size 7 --accumulate 2", 2, "--batch-size 7"),
    ("--accumulate 0", 2, "--accumulate 0"),
    ("--seq-len 0", 2, "--seq-len 0"),
    ("--seq-len 129", 2, "--seq-len 129 is longer than the context of test"),
    ("--preset tset", 2, "did you mean test?"),
    ("--preset 7b", 2, "choose one of test, demo"),
    ("--vocab-size 100", 2, "--vocab-size 100 is less than the 512 tokens"),
    ("--vocab-size 0", 2, "--vocab-size 0"),
    ("--seed -1", 2, "--seed -1"),
    ("--seed 4294967296", 2, "--seed 4294967296"),
    ("--seed 0x10", 2, "--seed 0x10"),
    ("--learning-rate nan", 2, "--learning-rate nan"),
    ("--learning-rate inf", 2, "--learning-rate inf"),
    ("--learning-rate -1", 2, "--learning-rate -1"),
    ("--learning-rate fast", 2, "--learning-rate fast: give a number"),
    ("--end-learning-rate -1", 2, "--end-learning-rate"),
    ("--warmup-steps -1", 2, "--warmup-steps -1"),
    ("--anneal-steps -1", 2, "--anneal-steps -1"),
    ("--weight-decay nan", 2, "--weight-decay nan"),
    ("--clip-norm 0", 2, "--clip-norm 0"),
    ("--skip-spikes 3.9", 2, "--skip-spikes 3.9: give 4 or more, or leave it out"),
    ("--reduce-dtype bfloat16 --compute-dtype float32", 2, "it takes --compute-dtype bfloat16"),
    ("--clip-norm -1", 2, "--clip-norm -1"),
    ("--z-loss -1", 2, "--z-loss -1"),
    ("--checkpoint-every 0", 2, "--checkpoint-every 0"),
    ("--keep 0", 2, "--keep 0"),
    ("--keep-every 0", 2, "--keep-every 0"),
    ("--eval-every 0", 2, "--eval-every 0"),
    ("--eval-tokens -1", 2, "--eval-tokens -1"),
    ("--sample-every -1", 2, "--sample-every -1"),
    ("--sample-every 1 --sample-tokens 200", 2, "do not fit the context of 128"),
    ("--sample-prompts", 2, "--sample-prompts has no value"),
    ("--compute-dtype float16", 2, "did you mean bfloat16?"),
    ("--remat some", 2, "choose one of feed-forward, full, minimal, none"),
    ("--document-mask maybe", 2, "unexpected maybe"),
    ("--mesh.data 0", 2, "--mesh.data is 0"),
    ("--mesh.data -1", 2, "--mesh.data is -1"),
    ("--mesh.data 3", 2, "3 devices cannot share evenly"),
    ("--mesh.data 8 --batch-size 12", 2, "--batch-size 12 does not divide among 8"),
    ("--mesh.data 64 --batch-size 64", 2, "wants 64 devices"),
    ("--mesh.model 3", 2, "3 devices cannot share evenly"),
    ("extra", 2, "unexpected extra"),
    ("-z", 2, "unknown option -z"),
    ("--data nowhere", 2, "nowhere"),
    ("--data STORE=0.5 nowhere=0.5", 2, "nowhere"),
    ("--data STORE=heavy", 2, "'heavy' is not a weight"),
    ("--data STORE=0", 2, "above 0"),
    ("--data STORE=nan", 2, "above 0"),
    ("--data =1", 2, "the path is missing"),
    ("--data STORE STORE", 2, "given twice"),
    ("--data FILE", 2, "file.txt"),
    ("--data EMPTY", 2, "empty"),
    ("--data SHORT", 3, "one sequence needs"),
    ("--run FILE", 2, "is a file"),
    ("--run FOREIGN", 2, "is no run and not empty"),
    ("--run STORE", 2, "is no run and not empty"),
    ("--run FILE/below", 2, "file.txt"),
]


@pytest.fixture
def places(tmp_path, store, meshlm) -> dict[str, str]:
    """What the words in capitals stand for."""
    (tmp_path / "file.txt").write_text("a file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "photo.jpg").write_bytes(b"precious")
    (tmp_path / "empty").mkdir()
    return {
        "STORE": str(store),
        "FILE": str(tmp_path / "file.txt"),
        "FOREIGN": str(tmp_path / "foreign"),
        "EMPTY": str(tmp_path / "empty"),
        "SHORT": str(tmp_path / "short"),
    }


@pytest.mark.parametrize(("words", "wanted", "said"), NONSENSE, ids=[n[0] for n in NONSENSE])
def test_train(meshlm, places, store, tmp_path, words, wanted, said):
    if "SHORT" in words:
        (tmp_path / "short.txt").write_text("tiny")
        paths = ("data", "prepare", tmp_path / "short.txt", "--out", places["SHORT"])
        assert meshlm(*paths)[0] == 0
    for name, path in places.items():
        words = words.replace(name, path)
    given = words.split()
    base = ["train", *SMALL]
    if "--data" not in given:
        base += ["--data", str(store)]
    if "--run" not in given:
        base += ["--run", str(tmp_path / "run")]
    if "--data" in given:  # a list: what is given twice would add up
        base, given = [*base, *given], []
    code, _, err = meshlm(*base, *given)
    assert code == wanted, err
    assert said in one_line(err)
    # Nothing was begun.
    left = {p.name for p in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert left <= {".lock"}
    assert sorted(p.name for p in (tmp_path / "foreign").iterdir()) == ["photo.jpg"]


def test_a_checkpoint_is_no_run(meshlm, run_of_10):
    step = run_of_10 / "checkpoints" / "step_10"
    before = sorted(step.rglob("*"))
    code, _, err = meshlm("train", "--run", step)
    assert code == 2
    assert "is a checkpoint" in one_line(err)
    assert sorted(step.rglob("*")) == before


def test_missing_options(meshlm, tmp_path):
    code, _, err = meshlm("train")
    assert code == 2
    assert "missing --run" in one_line(err)
    code, _, err = meshlm("train", "--run", tmp_path / "run")
    assert code == 2
    assert "--data is missing" in one_line(err)
    assert not (tmp_path / "run").exists()


GENERATE = [
    ("RUN", 2, "give either --prompt TEXT or --prompt-file FILE"),
    ("RUN --prompt a --prompt-file b", 2, "give either"),
    ("RUN --prompt-file nowhere", 2, "nowhere: No such file"),
    ("RUN --prompt-file FOLDER", 2, "Is a directory"),
    ("RUN --prompt-file BYTES", 2, "is not UTF-8"),
    ("RUN --prompt \udcff", 2, "is not UTF-8"),
    ("RUN --prompt a --max-tokens 0", 2, "--max-tokens is 0"),
    ("RUN --prompt a --temperature -1", 2, "--temperature is -1"),
    ("RUN --prompt a --temperature nan", 2, "--temperature is nan"),
    ("RUN --prompt a --top-k 0", 2, "--top-k is 0"),
    ("RUN --prompt a --top-p 0", 2, "--top-p is 0"),
    ("RUN --prompt a --top-p 1.5", 2, "--top-p is 1.5"),
    ("RUN --prompt a --min-p 2", 2, "--min-p is 2"),
    ("RUN --prompt a --repetition-penalty 0", 2, "--repetition-penalty is 0"),
    ("RUN --prompt a --seed 9223372036854775808", 2, "--seed is 9223372036854775808"),
    ("RUN --prompt a -n 0", 2, "-n is 0"),
    ("RUN --prompt a -n many", 2, "--n many: give a whole number"),
    ("RUN --prompt a --logprobs 21", 2, "--logprobs is 21"),
    ("RUN --prompt a --stop", 2, "--stop has no value"),
    ("RUN --prompt a --dtype int8", 2, "choose one of bfloat16, float32"),
    ("RUN --prompt a --mesh.data 64", 2, "64 devices"),
    ("RUN --prompt a --max-tokns 3", 2, "did you mean --max-tokens?"),
    ("--prompt a", 2, "missing PATH"),
    ("nowhere --prompt a", 2, "nowhere: there is nothing at this path"),
    ("FOLDER --prompt a", 2, "is empty"),
    ("BYTES --prompt a", 2, "no weights that are known"),
]


@pytest.mark.parametrize(("words", "wanted", "said"), GENERATE, ids=[ascii(n[0]) for n in GENERATE])
def test_generate(meshlm, run_of_10, tmp_path, words, wanted, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    places = {"RUN": run_of_10, "FOLDER": tmp_path / "folder", "BYTES": tmp_path / "bytes"}
    for name, path in places.items():
        words = words.replace(name, str(path))
    code, out, err = meshlm("generate", *words.split(" "))
    assert code == wanted, err
    assert said in one_line(err)
    assert out == ""


COMMANDS = [
    ("trian", 2, "did you mean `meshlm train`?"),
    ("data prepar", 2, "did you mean `meshlm data prepare`?"),
    ("data", 0, ""),
    ("xyzzy", 2, "see `meshlm --help`"),
    ("verify", 2, "missing PATH"),
    ("verify nowhere", 2, "nothing at this path"),
    ("demo --minutes 0", 2, "--minutes 0"),
    ("demo --minutes nan", 2, "--minutes nan"),
    ("doctor --jsn", 2, "did you mean --json?"),
]


@pytest.mark.parametrize(("words", "wanted", "said"), COMMANDS, ids=[c[0] for c in COMMANDS])
def test_other_commands(meshlm, words, wanted, said):
    code, _, err = meshlm(*words.split())
    assert code == wanted
    if said:
        assert said in one_line(err)


def test_verify_refuses_what_is_neither(meshlm, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a")
    for path in (tmp_path / "folder", tmp_path / "file"):
        code, _, err = meshlm("verify", path)
        assert code == 2, path
        assert str(path) in one_line(err)


def test_the_process_says_one_line(cli, tmp_path):
    done = cli("train", "--run", tmp_path / "run", "--stepz", "5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "meshlm: unknown option --stepz: did you mean --steps?\n"
    assert not Path(tmp_path / "run").exists()

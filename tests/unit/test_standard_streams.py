"""Standard output and standard error: nobody reads, no room, no such character, closed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest

from meshlm.core.errors import MeshLMError, ReaderGoneError
from meshlm.core.standard_streams import _Writer

BEGIN = "import sys; from meshlm.core.standard_streams import open_streams; s = open_streams(); "
MAIN = "import sys; from meshlm.cli.main import main; sys.exit(main())"
CLOSED = "meshlm: standard output is closed: give it a file, a pipe or a terminal\n"
FULL = "standard output cannot be written: No space left on device\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def run(
    code: str, *words: str, redirect: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Python code as a process, with redirections as the shell has them."""
    command = ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, "-c", code, *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True)


def run_unread(code: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Python code whose standard output is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            [sys.executable, "-c", code, *words], stdout=write, stderr=subprocess.PIPE
        )
    finally:
        os.close(write)


# The writer.


def test_result_ends_quietly_when_its_reader_goes(pipe: tuple[int, int]) -> None:
    read, write = pipe
    os.close(read)
    writer = _Writer(write, "standard output", is_closed=False)
    writer.has_result = True
    with pytest.raises(ReaderGoneError) as caught:
        writer.write(b"a")
    assert caught.value.exit_code == 141
    assert writer.write(b"what was buffered") == 17


def test_messages_are_discarded_when_their_reader_goes(pipe: tuple[int, int]) -> None:
    read, write = pipe
    os.close(read)
    writer = _Writer(write, "standard error", is_closed=False)
    assert writer.write(b"abc") == 3
    assert not writer.isatty()


def test_closed_stream_takes_messages_and_no_result() -> None:
    writer = _Writer(1, "standard output", is_closed=True)
    assert writer.write(b"abc") == 3
    writer.has_result = True
    with pytest.raises(MeshLMError, match="standard output is closed"):
        writer.write(b"abc")


def test_all_is_written_where_the_pipe_does_not_block(pipe: tuple[int, int]) -> None:
    read, write = pipe
    fcntl.fcntl(write, fcntl.F_SETFL, os.O_NONBLOCK)
    data = bytes(range(256)) * 4096
    found = bytearray()

    def drain() -> None:
        while part := os.read(read, 1 << 14):
            found.extend(part)

    reader = threading.Thread(target=drain)
    reader.start()
    assert _Writer(write, "standard output", is_closed=False).write(data) == len(data)
    os.close(write)
    reader.join()
    assert found == data


# Processes.


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [("ascii", b"\\xe9 \\u20ac \\udcff\n"), ("latin-1", b"\xe9 \\u20ac \\udcff\n")],
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding: str, wanted: bytes) -> None:
    text = r"'\u00e9 \u20ac \udcff'"
    code = f"{BEGIN} print({text}); print({text}, file=sys.stderr)"
    done = run(code, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted, wanted)


def test_rich_writes_where_there_is_no_character_for_it() -> None:
    code = f"{BEGIN} from rich.console import Console; Console().print('\\u65e5 \\u2588')"
    done = run(code, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"\\u65e5 \\u2588\n")


def test_what_is_closed_is_filled() -> None:
    """Else the next file that is opened becomes standard output, and gets what is printed."""
    code = f"{BEGIN} s.expect_messages(); f = open({__file__!r}); print('x'); sys.exit(f.fileno())"
    done = run(code, redirect="<&- >&- 2>&-")
    assert done.returncode > 2


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_messages_that_cannot_be_written_end_nothing(redirect: str) -> None:
    code = f"{BEGIN} s.expect_messages(); [print(i) for i in range(9999)]; s.flush(); sys.exit(7)"
    done = run(code, redirect=redirect)
    assert done.returncode == 7
    told = b"the work goes on without it" in done.stderr
    assert (told, done.stderr.count(b"\n")) == ((True, 1) if "full" in redirect else (False, 0))


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["data"], ["train", "--help"]])
def test_help_ends_as_its_output_does(words: Sequence[str]) -> None:
    done = run_unread(MAIN, *words)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("redirect", "err"), [(">&-", CLOSED), (">/dev/full", f"meshlm: {FULL}"), (">&- 2>&-", "")]
)
def test_result_that_cannot_be_written_is_one_line(redirect: str, err: str) -> None:
    done = run(MAIN, "--help", redirect=redirect)
    assert (done.returncode, done.stderr.decode()) == (1, err)


def test_result_is_asked_for_before_the_work() -> None:
    done = run(MAIN, "generate", "no-such-folder", "--prompt", "a", redirect=">&-")
    assert (done.returncode, done.stderr.decode()) == (1, CLOSED)


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-"])
def test_error_that_cannot_be_told_keeps_its_exit_code(redirect: str) -> None:
    done = run(MAIN, "no-such-command", redirect=redirect)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")

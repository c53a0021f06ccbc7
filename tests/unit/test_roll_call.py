"""The roll call: all are there, or all are told who is not."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from meshlm.core import roll_call, waiting
from meshlm.core.address import split_address
from meshlm.core.errors import BusyError, MeshLMError, UsageError
from meshlm.core.roll_call import _listen, call_roll
from teams import free_port


def connect(address: str) -> socket.socket:
    """Returns a connection to a process 0 that may only be starting."""
    until_s = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(split_address(address))
        except ConnectionRefusedError:
            assert time.monotonic() < until_s
            time.sleep(0.02)


def meet(*places: tuple[int, int], timeout_s: float = 10) -> dict[int, MeshLMError | None]:
    """What each (process id, number of processes) got, by its place in the list."""
    address = f"127.0.0.1:{free_port()}"
    found: dict[int, MeshLMError | None] = {}

    def one(index: int, number: int, count: int) -> None:
        try:
            call_roll(address, number, count, timeout_s)
            found[index] = None
        except MeshLMError as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(i, *place)) for i, place in enumerate(places)]
    for thread in reversed(threads):  # process 0 comes last
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout_s + 20)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("count", [2, 4, 40])
def test_all_go_when_all_are_there_and_leave_the_port_free(count):
    address = f"127.0.0.1:{free_port()}"
    done = []

    def one(number: int) -> None:
        call_roll(address, number, count, 20)
        done.append(number)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(1, count)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert done == []  # nobody goes before process 0 has come
    call_roll(address, 0, count, 20)
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass
    for thread in threads:
        thread.join(20)
    assert sorted(done) == list(range(1, count))


def test_the_missing_are_named_to_all():
    began_s = time.monotonic()
    found = meet((0, 5), (1, 5), (3, 5), timeout_s=3)
    assert time.monotonic() - began_s < 60
    wanted = "2 of 5 processes did not come within 3 s; missing: 2, 4"
    assert wanted in str(found[0])
    for index in (1, 2):
        assert str(found[index]) == f"process 0: {found[0]}"
        assert found[index].exit_code == 1


def test_process_0_is_missed_too():
    with pytest.raises(MeshLMError, match=r"process 0 did not come to 127.0.0.1:\d+ within 1 s"):
        call_roll(f"127.0.0.1:{free_port()}", 1, 2, 1)


def test_who_counts_otherwise_is_named():
    found = meet((0, 2), (1, 3))
    for error in found.values():
        assert "process 1 was started as one of 3 and process 0 as one of 2" in str(error)
        assert isinstance(error, UsageError)


def test_two_of_one_number_are_refused():
    found = meet((0, 4), (1, 4), (1, 4), timeout_s=5)
    assert "two processes have number 1: give each its own --process-id" in str(found[0])
    assert isinstance(found[0], UsageError)


def test_a_port_that_is_taken_is_told_at_once():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        began_s = time.monotonic()
        with pytest.raises(BusyError, match=f"port {port} cannot be had") as caught:
            call_roll(f"127.0.0.1:{port}", 0, 2, 60)
    assert time.monotonic() - began_s < 30
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        b"meshlm-2 x 2\n",
        b"\xff" * 5000,
        "meshlm-2 \u00b2 2\n".encode(),  # a digit to Python, and no number
        b"meshlm-2 " + b"1" * 5000,
    ],
)
def test_strangers_do_not_disturb(words):
    address = f"127.0.0.1:{free_port()}"
    threads: list[threading.Thread] = []

    def start(work: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=work))
        threads[-1].start()

    start(lambda: call_roll(address, 0, 2, 20))
    with connect(address) as stranger:
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        call_roll(address, 1, 2, 20)
    threads[0].join(20)
    assert not threads[0].is_alive()


def test_silent_strangers_hold_nobody_up():
    address = f"127.0.0.1:{free_port()}"
    first = threading.Thread(target=lambda: call_roll(address, 0, 2, 20))
    first.start()
    with contextlib.ExitStack() as strangers:
        for words in (b"", b"", b"", b"meshlm-2"):
            stranger = strangers.enter_context(connect(address))
            stranger.sendall(words)
        began_s = time.monotonic()
        call_roll(address, 1, 2, 20)
        assert time.monotonic() - began_s < roll_call._LINE_TIMEOUT_S
        first.join(20)
        with socket.create_server(split_address(address)):  # JAX's turn
            pass
    assert not first.is_alive()


@pytest.mark.parametrize(
    ("host", "found"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("node0", "any")]
)
def test_a_loopback_address_is_not_open_to_others(host, found):
    with _listen(f"{host}:{free_port()}") as server:
        bound = server.getsockname()[0]
    assert bound in (("0.0.0.0", "::") if found == "any" else (found,))


def test_a_process_that_died_may_come_again():
    address = f"127.0.0.1:{free_port()}"
    first = threading.Thread(target=lambda: call_roll(address, 0, 3, 20))
    first.start()
    with connect(address) as died:
        died.sendall(b"meshlm-2 1 3\n")
        time.sleep(0.2)
    others = [threading.Thread(target=call_roll, args=(address, n, 3, 20)) for n in (1, 2)]
    for thread in others:
        thread.start()
        time.sleep(0.1)
    for thread in (first, *others):
        thread.join(20)
        assert not thread.is_alive()


# What a wait says while it lasts. It says it sooner here.


@pytest.fixture
def soon(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "_FIRST_S", 0.1)
    caplog.set_level(logging.WARNING)
    return caplog


def fail(address: str, number: int = 1, timeout_s: float = 2) -> MeshLMError:
    with pytest.raises(MeshLMError) as caught:
        call_roll(address, number, 2, timeout_s)
    return caught.value


def no_name(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_name_that_does_not_resolve_is_said_and_named_in_the_end(soon, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    error = fail("no-such-host.invalid:1234")
    said = "the name no-such-host.invalid does not resolve (Name or service not known)"
    assert soon.messages[0].startswith(
        f"process 1 waits for process 0 at no-such-host.invalid:1234: {said}"
    )
    assert re.search(r"\(for 0 s so far, [0-2] s more at most\)$", soon.messages[0])
    assert f"within 2 s ({said}" in str(error)
    assert error.exit_code == 1


def test_a_resolver_that_is_stuck_is_said(soon, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2) or [])
    fail("node0:1234")
    assert "at node0:1234: looking up the name node0 (" in soon.messages[0]


def test_a_port_where_nobody_listens_is_said(soon):
    error = fail(f"127.0.0.1:{free_port()}")
    said = "127.0.0.1: connection refused; that address is this machine's own"
    assert said in soon.messages[0]
    assert said in str(error)


def test_debians_own_name_is_said(soon, monkeypatch):
    """A machine's own name is 127.0.1.1 in Debian's /etc/hosts, also where it is process 0's."""
    port = free_port()
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    said = "127.0.1.1: connection refused; that address is this machine's own"
    assert said in str(fail(f"node0:{port}"))
    soon.clear()
    error = fail(f"node0:{port}", number=0)
    doubt = "here node0 is 127.0.1.1, which is each machine itself: other machines do not reach"
    assert (
        f"process 0 waits at node0:{port} for 1 of 2 processes; missing: 1; {doubt}"
        in (soon.messages[0])
    )
    assert doubt in str(error)


@contextlib.contextmanager
def answering(words: bytes, *, closes: bool = True) -> Iterator[str]:
    """The address of a server that is no process 0, and that answers every guest so."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                guest, _ = server.accept()
                with guest:
                    guest.recv(100)
                    guest.sendall(words)
                    if not closes:
                        guest.recv(100)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        server.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "something else than process 0 answers at 127.0.0.1: 'HTTP/1.1 400 Bad Request'",
        ),
        # A mail server, whose greeting looks like an exit code and a message.
        (b"2 mail.example.org ESMTP\r\n", "something else than process 0 answers at 127.0.0.1"),
        (b"\x1b[2J\xff\x00", "something else than process 0 answers at 127.0.0.1: '?[2J\\ufffd?'"),
        (b"", "127.0.0.1 closed the connection"),
    ],
)
def test_a_stranger_that_answers_is_said(soon, words, said):
    with answering(words) as address:
        error = fail(address)
    assert said in str(error)


def test_a_stranger_that_is_silent_is_said(soon, monkeypatch):
    monkeypatch.setattr(roll_call, "_LINE_TIMEOUT_S", 1)
    with answering(b"", closes=False) as address:
        error = fail(address, timeout_s=3)
    said = "127.0.0.1 takes the connection and says nothing"
    assert said in soon.text
    assert said in str(error)


def test_who_is_there_is_told_for_whom_process_0_waits(soon, monkeypatch):
    monkeypatch.setattr(roll_call, "_TELL_S", 0.1)
    found = meet((0, 4), (1, 4), timeout_s=3)
    assert "missing: 2, 3" in str(found[1])
    assert re.search(
        r"process 1 waits for process 0 at \S+: it is there and waits for 2, 3", soon.text
    )
    assert re.search(r"process 0 waits at \S+ for 2 of 4 processes; missing: 2, 3", soon.text)


def test_who_has_left_again_is_missing(monkeypatch):
    monkeypatch.setattr(roll_call, "_TELL_S", 0.1)
    address = f"127.0.0.1:{free_port()}"
    caught: list[MeshLMError] = []

    def call() -> None:
        try:
            call_roll(address, 0, 3, 4)
        except MeshLMError as error:
            caught.append(error)

    first = threading.Thread(target=call)
    first.start()
    with connect(address) as died:
        died.sendall(b"meshlm-2 1 3\n")
        assert died.recv(100) == b"meshlm-2 wait 2\n"
    first.join(20)
    assert "2 of 3 processes did not come within 4 s; missing: 1, 2" in str(caught[0])


def test_another_version_is_refused():
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        caught: list[MeshLMError] = []
        first = threading.Thread(target=lambda: caught.append(fail(address, 0, 20)))
        first.start()
        time.sleep(0.2)
        other = stack.enter_context(connect(address))
        other.sendall(b"meshlm-1 1 2\n")
        first.join(20)
    assert isinstance(caught[0], UsageError)
    assert "process 1 has another version of MeshLM" in str(caught[0])

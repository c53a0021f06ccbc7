"""The roll call: all are there, or all are told who is not."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import pytest

from meshlm.core.errors import BusyError, MeshLMError, UsageError
from meshlm.core.roll_call import _listen, call_roll, is_loopback, split_address
from teams import free_port


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
    found = meet((0, 5), (1, 5), (3, 5), timeout_s=1)
    assert time.monotonic() - began_s < 10
    wanted = "2 of 5 processes did not come within 1 s; missing: 2, 4"
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
    assert time.monotonic() - began_s < 1
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        b"meshlm-1 x 2\n",
        b"\xff" * 5000,
        "meshlm-1 \u00b2 2\n".encode(),  # a digit to Python, and no number
        b"meshlm-1 " + b"1" * 5000,
    ],
)
def test_strangers_do_not_disturb(words):
    address = f"127.0.0.1:{free_port()}"
    threads: list[threading.Thread] = []

    def start(work: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=work))
        threads[-1].start()

    start(lambda: call_roll(address, 0, 2, 20))
    host, port = split_address(address)
    for _ in range(100):
        try:
            stranger = socket.create_connection((host, port))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    with stranger:
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        call_roll(address, 1, 2, 20)
    threads[0].join(20)
    assert not threads[0].is_alive()


def test_silent_strangers_hold_nobody_up():
    address = f"127.0.0.1:{free_port()}"
    first = threading.Thread(target=lambda: call_roll(address, 0, 2, 20))
    first.start()
    time.sleep(0.2)
    with contextlib.ExitStack() as strangers:
        for words in (b"", b"", b"", b"meshlm-1"):
            stranger = strangers.enter_context(socket.create_connection(split_address(address)))
            stranger.sendall(words)
        began_s = time.monotonic()
        call_roll(address, 1, 2, 20)
        assert time.monotonic() - began_s < 2
        first.join(20)
        with socket.create_server(split_address(address)):  # JAX's turn
            pass
    assert not first.is_alive()


@pytest.mark.parametrize(
    ("host", "found"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("node0", "any")]
)
def test_a_loopback_address_is_not_open_to_others(host, found):
    with _listen(f"{host}:0", host, 0) as server:
        bound = server.getsockname()[0]
    assert bound in (("0.0.0.0", "::") if found == "any" else (found,))


def test_loopback_hosts():
    assert [is_loopback(h) for h in ("127.0.0.2", "::1", "localhost")] == [True] * 3
    assert [is_loopback(h) for h in ("10.0.0.1", "node0", "::", "0.0.0.0")] == [False] * 4


def test_a_process_that_died_may_come_again():
    address = f"127.0.0.1:{free_port()}"
    first = threading.Thread(target=lambda: call_roll(address, 0, 3, 20))
    first.start()
    time.sleep(0.2)
    with socket.create_connection(split_address(address)) as died:
        died.sendall(b"meshlm-1 1 3\n")
        time.sleep(0.2)
    others = [threading.Thread(target=call_roll, args=(address, n, 3, 20)) for n in (1, 2)]
    for thread in others:
        thread.start()
        time.sleep(0.1)
    for thread in (first, *others):
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("address", ["", "host", "host:", ":1234", "host:0", "host:70000", "a:b"])
def test_a_wrong_address_is_refused(address):
    with pytest.raises(UsageError, match="give process 0's HOST:PORT"):
        split_address(address)


def test_addresses():
    assert split_address("node-0.jobs:1234") == ("node-0.jobs", 1234)
    assert split_address("[::1]:99") == ("::1", 99)

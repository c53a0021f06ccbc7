"""HOST:PORT of process 0: what is one, and what is said where it is not reached."""

from __future__ import annotations

import errno
import socket

import pytest

from meshlm.core.address import (
    UnreachableError,
    connect,
    doubt_about,
    is_loopback,
    is_own,
    split_address,
)
from meshlm.core.errors import UsageError


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("node-0.jobs:1234", ("node-0.jobs", 1234)),
        ("meshlm_train_1:80", ("meshlm_train_1", 80)),
        ("node0.example.org.:65535", ("node0.example.org.", 65535)),
        ("10.0.0.7:8476", ("10.0.0.7", 8476)),
        ("[::1]:99", ("::1", 99)),
        ("[fe80::1%eth0]:99", ("fe80::1%eth0", 99)),
        ("[::ffff:10.0.0.7]:99", ("::ffff:10.0.0.7", 99)),
    ],
)
def test_addresses(address, found):
    assert split_address(address) == found


@pytest.mark.parametrize(
    "address",
    [
        *("", "host", "host:", ":1234", "host:0", "host:70000", "a:b", "host:-1", "host:+1"),
        *("host: 1", " host:1", "host:1 ", "host:1\n", "http://host:1", "user@host:1", "host:1/x"),
        *(
            "[]:1",
            "[host]:1",
            "[::1:1",
            "::1]:1",
            "[[::1]]:1",
            "[::1]",
            "[10.0.0.7]:1",
            "[1::2::3]:4",
        ),
        *("h..t:1", ".:1", ".host:1", "x" * 64 + ":1", "x." * 150 + "x:1", "h\u00f6st:1"),
        *("host:\u0661", "host:\u00b2", "host:123456"),
    ],
)
def test_a_wrong_address_is_refused(address):
    with pytest.raises(UsageError, match="give process 0's HOST:PORT"):
        split_address(address)


@pytest.mark.parametrize("address", ["::1:99", "fd00::7:1234", "::1", "fe80::1%eth0:99"])
def test_an_ipv6_address_without_brackets_is_refused_with_the_remedy(address):
    with pytest.raises(UsageError, match=r"stands in brackets, as \[fd00::1\]:1234"):
        split_address(address)


def test_loopback_hosts():
    assert [is_loopback(h) for h in ("127.0.0.2", "::1", "localhost", "LocalHost")] == [True] * 4
    assert [is_loopback(h) for h in ("10.0.0.1", "node0", "::", "0.0.0.0")] == [False] * 4


def test_own_addresses():
    assert is_own("127.0.1.1")
    assert not is_own("203.0.113.7")  # for documentation: nobody has it


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "connection refused"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "no route to host"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "network is unreachable"),
        (TimeoutError("timed out"), "no answer: a firewall, or a machine that is down"),
        (OSError(errno.ETIMEDOUT, "x"), "no answer: a firewall, or a machine that is down"),
    ],
)
def test_every_address_is_tried_and_has_its_reason(monkeypatch, error, said):
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::7", 9, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.7", 9)),
    ]
    tried = []

    def refuse(link: socket.socket, place: tuple) -> None:
        tried.append(place[0])
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    told: list[str] = []
    with pytest.raises(UnreachableError) as caught:
        connect("node0", 9, 5, told.append)
    assert tried == ["2001:db8::7", "203.0.113.7"]
    assert str(caught.value) == f"2001:db8::7: {said}; 203.0.113.7: {said}"
    assert told == ["looking up the name node0", *(f"trying to connect to {a}" for a in tried)]


def test_the_second_address_is_taken_where_the_first_refuses(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = [(socket.AF_INET, 1, 6, "", (ip, port)) for ip in ("127.0.0.9", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        link, place = connect("node0", port, 5, lambda _: None)
        link.close()
    assert place == "127.0.0.1"


def test_what_process_0_doubts_of_its_own_host(monkeypatch):
    assert doubt_about("127.0.0.1").startswith("127.0.0.1 is each machine itself")
    assert (
        doubt_about("203.0.113.7")
        == "203.0.113.7 is 203.0.113.7, which is no address of this machine"
    )

    def no_name(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    reason = "the name node0 does not resolve (Temporary failure in name resolution)"
    assert doubt_about("node0") == f"on this machine too {reason}"

"""The roll call before the processes of a run join: who is missing is named, who is wrong is told.

JAX's own joining ends a process with a dump when somebody is missing, and does not say who. So the
processes first meet here, at the coordinator's port, and leave it free for JAX: each sends a line
with its number, process 0 answers all of them at once with `go`, or with what is wrong.
"""

import contextlib
import ipaddress
import re
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any

from meshlm.core.errors import BusyError, MeshLMError, UsageError

_HELLO = "meshlm-1"
_GO = "go"
_LONGEST_LINE = 1000
_LINE_TIMEOUT_S = 5.0
_RETRY_S = 0.2


def call_roll(address: str, process_id: int, num_processes: int, timeout_s: float) -> None:
    """Returns when every process is at `address` (HOST:PORT, process 0's), the port free again.

    Raises:
        BusyError: the port is in use on process 0's machine.
        UsageError: two processes have one number, or do not agree on how many there are.
        MeshLMError: somebody is missing after `timeout_s`.
    """
    host, port = split_address(address)
    until_s = time.monotonic() + timeout_s
    if process_id == 0:
        with _listen(address, host, port) as server:
            _call(server, num_processes, timeout_s, until_s)
    else:
        _answer(address, (host, port), process_id, num_processes, timeout_s, until_s)


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port; raises UsageError where it is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--coordinator {address}: give process 0's HOST:PORT, as node0:1234")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Returns whether the host is this machine by its very name: nobody comes from elsewhere."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(address: str, host: str, port: int) -> socket.socket:
    """Returns a socket on all interfaces, or on the loopback one alone where that is the host."""
    alone = is_loopback(host)
    both = not alone and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            (host if alone else "", port),
            family=socket.AF_INET6 if both or ":" in host else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=1024,
        )
    except OSError as error:
        raise BusyError(
            f"--coordinator {address}: port {port} cannot be had on this machine "
            f"({error.strerror}); give another one to all processes"
        ) from None


def _call(server: socket.socket, num_processes: int, timeout_s: float, until_s: float) -> None:
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as open_sockets:
        guests = _guests(server, open_sockets, until_s)
        try:
            while len(here) < num_processes - 1:
                came = next(guests, None)
                if came is None:
                    missing = sorted(set(range(1, num_processes)) - here.keys())
                    raise MeshLMError(_absent(missing, num_processes, timeout_s))
                _welcome(*came, here, num_processes)
        except MeshLMError as error:
            for guest in here.values():
                _send(guest, f"{error.exit_code} {error}")
            raise
        for guest in here.values():
            _send(guest, _GO)
        # Whoever closes first keeps the port busy for a while: that is to be the other end.
        for guest in here.values():
            _read_line(guest)


def _guests(
    server: socket.socket, open_sockets: contextlib.ExitStack, until_s: float
) -> Iterator[tuple[socket.socket, str]]:
    """Yields each guest with its line once it has said it: one that is silent holds nobody up."""
    server.setblocking(False)
    lines: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(server, selectors.EVENT_READ)
        while (left_s := until_s - time.monotonic()) > 0:
            for key, _ in ready.select(left_s):
                guest: Any = key.fileobj
                if guest is server:
                    with contextlib.suppress(BlockingIOError, ConnectionError):  # it is gone again
                        guest = open_sockets.enter_context(server.accept()[0])
                        guest.setblocking(False)
                        ready.register(guest, selectors.EVENT_READ)
                        lines[guest] = b""
                    continue
                part = _read_part(guest, _LONGEST_LINE - len(lines[guest]))
                lines[guest] += part
                if not part or part.endswith(b"\n") or len(lines[guest]) == _LONGEST_LINE:
                    ready.unregister(guest)
                    yield guest, lines.pop(guest).decode("utf-8", "replace").strip()


def _read_part(guest: socket.socket, most: int) -> bytes:
    try:
        return guest.recv(most)
    except OSError:
        return b""


def _welcome(
    guest: socket.socket, line: str, here: dict[int, socket.socket], num_processes: int
) -> None:
    """Enters a guest; raises UsageError where it cannot belong. A stranger is not answered."""
    said = re.fullmatch(_HELLO + r" (\d{1,6}) (\d{1,6})", line, re.ASCII)
    if said is None:
        return
    number, count = int(said[1]), int(said[2])
    problem = None
    if count != num_processes:
        problem = (
            f"process {number} was started as one of {count} and process 0 as one of "
            f"{num_processes}: give all the same --num-processes"
        )
    elif not 0 < number < num_processes or (number in here and not _has_left(here[number])):
        problem = f"two processes have number {number}: give each its own --process-id"
    if problem is not None:
        _send(guest, f"{UsageError.exit_code} {problem}")
        raise UsageError(problem)
    here[number] = guest


def _has_left(guest: socket.socket) -> bool:
    """Returns whether the other end is closed: its process has died and may come again."""
    guest.setblocking(False)
    try:
        return guest.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _answer(
    address: str,
    place: tuple[str, int],
    process_id: int,
    num_processes: int,
    timeout_s: float,
    until_s: float,
) -> None:
    while (left_s := until_s - time.monotonic()) > 0:
        try:
            with socket.create_connection(place, timeout=min(left_s, 10)) as link:
                _send(link, f"{_HELLO} {process_id} {num_processes}")
                # Process 0 speaks up at its own time-out, which may have begun later than ours.
                answer = _read_line(link, timeout_s + _LINE_TIMEOUT_S)
        except OSError:
            answer = ""
        if answer == _GO:
            return
        code, _, message = answer.partition(" ")
        if code.isdecimal() and message:
            kind = UsageError if int(code) == UsageError.exit_code else MeshLMError
            raise kind(f"process 0: {message}")
        time.sleep(_RETRY_S)
    raise MeshLMError(
        f"process 0 did not come to {address} within {timeout_s:g} s: look at its log, and that "
        "this machine reaches that port"
    )


def _absent(missing: list[int], num_processes: int, timeout_s: float) -> str:
    shown = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
    return (
        f"{len(missing)} of {num_processes} processes did not come within {timeout_s:g} s; "
        f"missing: {shown}; look at their logs, or give a longer --join-timeout-s"
    )


def _send(link: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):
        link.settimeout(_LINE_TIMEOUT_S)
        link.sendall(line.encode() + b"\n")


def _read_line(link: socket.socket, timeout_s: float = _LINE_TIMEOUT_S) -> str:
    """Returns a line of at most a thousand bytes; empty where none comes."""
    data, until_s = b"", time.monotonic() + timeout_s
    try:
        while not data.endswith(b"\n") and len(data) < _LONGEST_LINE:
            link.settimeout(max(0.001, until_s - time.monotonic()))
            part = link.recv(_LONGEST_LINE - len(data))
            if not part:
                break
            data += part
    except OSError:
        pass
    return data.decode("utf-8", "replace").strip()

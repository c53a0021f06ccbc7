"""The roll call before the processes of a run join: who is missing is named, who is wrong is told.

JAX's own joining ends a process with a dump when somebody is missing, and does not say who. So the
processes first meet here, at the coordinator's port, and leave it free for JAX. Each sends a line
with its number. Process 0 answers `wait` and who is missing, once at first and then every few
seconds, and in the end all of them at once with `go`, or with what is wrong.
"""

import contextlib
import re
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from meshlm.core.address import UnreachableError, connect, doubt_about, is_loopback, split_address
from meshlm.core.errors import BusyError, MeshLMError, UsageError
from meshlm.core.waiting import Waiting

_PROTOCOL = "meshlm-2"
_LONGEST_LINE = 1000
_LINE_TIMEOUT_S = 5.0
_RETRY_S = 0.2
_TELL_S = 3.0
# After which a process 0 that said `wait` counts as gone.
_SILENCE_S = 5 * _TELL_S


def call_roll(address: str, process_id: int, num_processes: int, timeout_s: float) -> bool:
    """Returns when every process is at `address` (HOST:PORT, process 0's), the port free again.

    What is returned is whether this process knows that there is more than one machine.

    Raises:
        BusyError: the port is in use on process 0's machine.
        UsageError: two processes have one number, or do not agree on how many there are.
        MeshLMError: somebody is missing after `timeout_s`.
    """
    split_address(address)
    if process_id == 0:
        return _Host(address, num_processes, timeout_s).call()
    return _Guest(address, process_id, num_processes, timeout_s).call()


class _Host:
    """Process 0's side."""

    def __init__(self, address: str, num_processes: int, timeout_s: float) -> None:
        self._address, self._count, self._timeout_s = address, num_processes, timeout_s
        self._until_s = time.monotonic() + timeout_s
        self._here: dict[int, socket.socket] = {}
        self._is_spread = False
        self._doubt = ""

    def call(self) -> bool:
        with (
            _listen(self._address) as server,
            contextlib.ExitStack() as open_sockets,
            Waiting(self._describe, self._timeout_s),
        ):
            # A name may take the system a minute to look up.
            threading.Thread(target=self._look_at_own_name, daemon=True).start()
            try:
                for came in _guests(server, open_sockets, self._until_s):
                    if came is not None:
                        self._welcome(*came)
                    else:
                        self._forget_who_left()
                        self._tell_missing(self._here.values())
                    if not self._missing() and not self._forget_who_left():
                        break
                else:
                    raise MeshLMError(self._absent())
            except MeshLMError as error:
                for guest in self._here.values():
                    _send(guest, f"error {error.exit_code} {error}")
                raise
            for guest in self._here.values():
                _send(guest, "go")
            # Whoever closes first keeps the port busy for a while: that is to be the other end.
            for guest in self._here.values():
                _Lines(guest).read(_LINE_TIMEOUT_S)
            return self._is_spread

    def _missing(self) -> list[int]:
        return [n for n in range(1, self._count) if n not in self._here]

    def _forget_who_left(self) -> list[int]:
        """Returns the numbers of those that were here and have died; they may come again."""
        left = [n for n, guest in self._here.items() if _has_left(guest)]
        for number in left:
            del self._here[number]
        return left

    def _welcome(self, guest: socket.socket, line: str) -> None:
        """Enters a guest; raises UsageError where it cannot belong. A stranger is not answered."""
        said = re.fullmatch(r"(meshlm-\d+) (\d{1,6}) (\d{1,6})", line, re.ASCII)
        if said is None:
            return
        number, count = int(said[2]), int(said[3])
        problem = None
        if said[1] != _PROTOCOL:
            problem = f"process {number} has another version of MeshLM: give all the same one"
        elif count != self._count:
            problem = (
                f"process {number} was started as one of {count} and process 0 as one of "
                f"{self._count}: give all the same --num-processes"
            )
        elif not 0 < number < count or (number in self._here and not _has_left(self._here[number])):
            problem = f"two processes have number {number}: give each its own --process-id"
        if problem is not None:
            _send(guest, f"error {UsageError.exit_code} {problem}")
            raise UsageError(problem)
        self._here[number] = guest
        self._is_spread |= _is_elsewhere(guest)
        self._tell_missing([guest])

    def _tell_missing(self, guests: Iterable[socket.socket]) -> None:
        text = f"wait {list_numbers(self._missing())}"
        for guest in guests:
            _send(guest, text)

    def _look_at_own_name(self) -> None:
        self._doubt = doubt_about(split_address(self._address)[0])

    def _describe(self) -> str:
        missing = self._missing()
        text = (
            f"process 0 waits at {self._address} for {len(missing)} of {self._count} processes; "
            f"missing: {list_numbers(missing)}"
        )
        return f"{text}; {self._doubt}" if self._doubt else text

    def _absent(self) -> str:
        missing = self._missing()
        return (
            f"{len(missing)} of {self._count} processes did not come within "
            f"{self._timeout_s:g} s; missing: {list_numbers(missing)}; "
            + (f"{self._doubt}; " if self._doubt else "")
            + "look at their logs, or give a longer --join-timeout-s"
        )


class _Guest:
    """The side of every other process."""

    def __init__(self, address: str, number: int, num_processes: int, timeout_s: float) -> None:
        self._address, self._number, self._count = address, number, num_processes
        self._timeout_s = timeout_s
        self._until_s = time.monotonic() + timeout_s
        self._reason = self._trying = ""

    def call(self) -> bool:
        with Waiting(self._describe, self._timeout_s):
            while (left_s := self._until_s - time.monotonic()) > 0:
                try:
                    link, place = connect(*split_address(self._address), left_s, self._try)
                    with link:
                        if self._ask(link, place):
                            return _is_elsewhere(link)
                except UnreachableError as error:
                    self._reason = str(error)
                time.sleep(min(_RETRY_S, max(0.0, self._until_s - time.monotonic())))
        raise MeshLMError(
            f"process 0 did not come to {self._address} within {self._timeout_s:g} s "
            f"({self._reason or self._trying}): look at its log, and that this machine reaches "
            "that port"
        )

    def _try(self, what: str) -> None:
        self._trying = what

    def _describe(self) -> str:
        # What is tried right now is worth telling only until something is known.
        reason = self._reason or self._trying
        return f"process {self._number} waits for process 0 at {self._address}: {reason}"

    def _ask(self, link: socket.socket, place: str) -> bool:
        """Returns True on `go`, False where process 0 is to be tried again.

        It waits as long as process 0 speaks: that one's time-out may have begun later than ours.

        Raises: MeshLMError: process 0 has said what is wrong.
        """
        self._reason = f"{place} takes the connection and says nothing"
        _send(link, f"{self._number} {self._count}")
        lines, patience_s = _Lines(link), _LINE_TIMEOUT_S
        while (line := lines.read(patience_s)) is not None:
            protocol, _, answer = line.partition(" ")
            word, _, rest = answer.partition(" ")
            if protocol != _PROTOCOL:
                shown = ascii(line[:60])
                self._reason = f"something else than process 0 answers at {place}: {shown}"
                return False
            if word == "go":
                return True
            if word == "error":
                code, _, message = rest.partition(" ")
                kind = UsageError if code == str(UsageError.exit_code) else MeshLMError
                raise kind(f"process 0: {message}")
            self._reason = f"it is there and waits for {rest}"
            patience_s = _SILENCE_S
        if lines.is_closed:
            self._reason = f"{place} closed the connection"
        return False


def _listen(address: str) -> socket.socket:
    """Returns a socket on all interfaces, or on the loopback one alone where that is the host."""
    host, port = split_address(address)
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


def _guests(
    server: socket.socket, open_sockets: contextlib.ExitStack, until_s: float
) -> Iterator[tuple[socket.socket, str] | None]:
    """Yields each guest with its line once it has said it, and None every few seconds.

    A guest that says nothing holds nobody up.
    """
    server.setblocking(False)
    lines: dict[socket.socket, bytes] = {}
    tell_s = time.monotonic() + _TELL_S
    with selectors.DefaultSelector() as ready:
        ready.register(server, selectors.EVENT_READ)
        while (now_s := time.monotonic()) < until_s:
            if now_s >= tell_s:
                tell_s = now_s + _TELL_S
                yield None
            for key, _ in ready.select(min(until_s, tell_s) - now_s):
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


def _has_left(guest: socket.socket) -> bool:
    """Returns whether the other end is closed: its process has died and may come again."""
    guest.setblocking(False)
    try:
        return guest.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _is_elsewhere(link: socket.socket) -> bool:
    """Returns whether the other end is on another machine, as far as its address tells."""
    try:
        return link.getpeername()[0] != link.getsockname()[0]
    except OSError:
        return False


def list_numbers(numbers: list[int]) -> str:
    """Returns the first twenty numbers as text."""
    return ", ".join(map(str, numbers[:20])) + (" ..." if len(numbers) > 20 else "")


def _send(link: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):
        link.settimeout(_LINE_TIMEOUT_S)
        link.sendall(f"{_PROTOCOL} {text}\n".encode())


class _Lines:
    """The lines that come over a connection, each of at most a thousand bytes."""

    def __init__(self, link: socket.socket) -> None:
        self._link, self._data = link, b""
        self.is_closed = False

    def read(self, timeout_s: float) -> str | None:
        """Returns the next line, or what there is of it after `timeout_s`; None for nothing."""
        until_s = time.monotonic() + timeout_s
        while b"\n" not in self._data and len(self._data) < _LONGEST_LINE:
            self._link.settimeout(max(0.001, until_s - time.monotonic()))
            try:
                part = self._link.recv(_LONGEST_LINE - len(self._data))
            except TimeoutError:
                break
            except OSError:
                part = b""
            if not part:
                self.is_closed = True
                break
            self._data += part
        line, _, self._data = self._data.partition(b"\n")
        text = line.decode("utf-8", "replace").strip()
        return "".join(c if c.isprintable() else "?" for c in text) or None

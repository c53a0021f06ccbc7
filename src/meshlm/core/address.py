"""Where process 0 is found: its HOST:PORT, and why it is not reached there."""

import errno
import ipaddress
import re
import socket
from collections.abc import Callable

from meshlm.core.errors import UsageError

_CONNECT_TIMEOUT_S = 10.0


class UnreachableError(Exception):
    """Why there is no connection, in a few words."""


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port; raises UsageError where it is not HOST:PORT."""
    found = re.fullmatch(r"(\[[^][]+\]|[\w.-]+):([0-9]{1,5})", address, re.ASCII)
    if found is None or not 0 < int(found[2]) < 65536 or not _is_host(found[1]):
        remedy = "give process 0's HOST:PORT, as node0:1234"
        if address.count(":") > 1:
            remedy += "; an IPv6 address stands in brackets, as [fd00::1]:1234"
        raise UsageError(f"--coordinator {address}: {remedy}")
    return found[1].strip("[]"), int(found[2])


def _is_host(text: str) -> bool:
    if text.startswith("["):
        try:
            return bool(ipaddress.IPv6Address(text.strip("[]")))
        except ValueError:
            return False
    parts = text.removesuffix(".").split(".")
    return len(text) < 254 and all(0 < len(part) < 64 for part in parts)


def is_loopback(host: str) -> bool:
    """Returns whether the host is this machine by its very name: nobody comes from elsewhere."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def look_up(host: str, port: int) -> list[tuple[int, tuple]]:
    """Returns the host's addresses, each as a socket's family and place.

    Raises: UnreachableError: it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = f"the name {host} does not resolve ({error.strerror})"
        raise UnreachableError(reason) from None
    return [(family, place) for family, _, _, _, place in found]


def connect(
    host: str, port: int, timeout_s: float, tell: Callable[[str], None]
) -> tuple[socket.socket, str]:
    """Returns a connection and the numeric address at its other end.

    `tell` is told what is tried, for that may take a while.

    Raises: UnreachableError: each of the host's addresses was tried in vain.
    """
    tell(f"looking up the name {host}")
    reasons = []
    for family, place in look_up(host, port):
        tell(f"trying to connect to {place[0]}")
        link = socket.socket(family, socket.SOCK_STREAM)
        link.settimeout(min(timeout_s, _CONNECT_TIMEOUT_S))
        try:
            link.connect(place)
            return link, place[0]
        except OSError as error:
            link.close()
            reasons.append(f"{place[0]}: {_explain(error, place[0])}")
    raise UnreachableError("; ".join(reasons))


def _explain(error: OSError, address: str) -> str:
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "no answer: a firewall, or a machine that is down"
    reason = (error.strerror or str(error)).lower()
    if is_own(address):
        return f"{reason}; that address is this machine's own"
    return reason


def is_own(address: str) -> bool:
    """Returns whether a numeric address is one of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def doubt_about(host: str) -> str:
    """Returns why other machines may not reach process 0, which this is, by that host; or ""."""
    try:
        addresses = [place[0] for _, place in look_up(host, 0)]
    except UnreachableError as error:
        return f"on this machine too {error}"
    if all(is_loopback(address) for address in addresses):
        here = host if is_loopback(host) else f"here {host} is {addresses[0]}, which"
        return f"{here} is each machine itself: other machines do not reach process 0 by it"
    if not any(is_own(address) for address in addresses):
        return f"{host} is {addresses[0]}, which is no address of this machine"
    return ""

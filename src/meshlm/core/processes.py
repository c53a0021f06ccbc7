"""The processes of one run: joining them, agreeing among them, and ending together.

A run of several processes is JAX's own multi-controller runtime: each process runs the same
program, and `jax.distributed` connects them. What is done here stands around it: the roll call
(`roll_call.py`), the watch that ends all when one has died (`watch.py`), and agreements through
the coordinator's key-value store, so that all raise, stop or go on alike.

In a run of one process everything here does nothing and costs nothing.
"""

import contextlib
import itertools
import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from meshlm.core.address import UnreachableError, is_loopback, look_up, split_address
from meshlm.core.errors import MeshLMError
from meshlm.core.jax_internals import distributed_state
from meshlm.core.place import ProcessConfig, find_place
from meshlm.core.roll_call import call_roll, list_numbers
from meshlm.core.waiting import Waiting
from meshlm.core.watch import Watch

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LONG_MS = 24 * 60 * 60 * 1000
_LAG_STEPS = 3

_watch: Watch | None = None
# The error that the others know of already.
_known: BaseException | None = None
_meetings = itertools.count()


def join(config: ProcessConfig) -> None:
    """Returns when every process of the run is there and connected; call it before JAX starts.

    A program that has called `jax.distributed.initialize` itself is taken as it is.

    Raises:
        UsageError: the settings are not complete or contradict each other.
        BusyError: the coordinator's port is in use.
        MeshLMError: a process is missing; its number is named.
    """
    global _watch
    import jax

    if _watch is not None:
        return
    several_machines = False
    if not jax.distributed.is_initialized():
        place = find_place(config)
        if place is None:
            return
        several_machines = _connect(place, config)
    # Each process tells the others of its devices when JAX starts: none may start alone.
    with Waiting(lambda: f"process {jax.process_index()} waits for the devices of all processes"):
        jax.devices()
    if several_machines and jax.default_backend() == "cpu":
        _warn_of_loopback_name(socket.gethostname())
    state = distributed_state()
    _watch = Watch(
        state.client,
        state.coordinator_address,
        jax.process_index(),
        jax.process_count(),
        config.heartbeat_timeout_s,
    )


def _connect(place: tuple[str, int, int, Any], config: ProcessConfig) -> bool:
    """Connects JAX; returns whether this process knows that there is more than one machine."""
    import jax

    address, count, number, devices = place
    several_machines = call_roll(address, number, count, config.join_timeout_s)
    # SIGTERM is ours: see `Stop`.
    jax.config.update("jax_enable_preemption_service", False)
    host, port = split_address(address)
    alone = is_loopback(host)
    what = f"process {number} waits for JAX to connect all {count} processes at {address}"
    with Waiting(lambda: what, config.join_timeout_s):
        jax.distributed.initialize(
            # Process 0 reaches itself also where its own machine does not know its name.
            f"127.0.0.1:{port}" if number == 0 and not alone else address,
            count,
            number,
            local_device_ids=devices,
            # Else JAX listens on every interface, and takes anybody.
            coordinator_bind_address=address if alone else None,
            cluster_detection_method="deactivate",
            initialization_timeout=config.join_timeout_s,
            # The watch must be first: it says in a line what JAX says in a dump. JAX sends a
            # heartbeat each half of its timeout, so it may notice within that half.
            heartbeat_timeout_seconds=6 * config.heartbeat_timeout_s,
            shutdown_timeout_seconds=config.heartbeat_timeout_s,
        )
    return several_machines


def _warn_of_loopback_name(name: str) -> None:
    """Warns where gloo, JAX's exchange between CPUs, would give other machines a loopback address.

    Debian's /etc/hosts has a machine's own name at 127.0.1.1, and gloo takes the name's address.
    """
    try:
        addresses = [place[0] for _, place in look_up(name, 0)]
    except UnreachableError as error:
        _log.warning("%s: exchanges with other machines will fail; see /etc/hosts", error)
        return
    if all(is_loopback(address) for address in addresses):
        _log.warning(
            "this machine's name %s is %s in /etc/hosts, which other machines do not reach: "
            "exchanges with them will fail; give the name its address on the network there",
            name,
            addresses[0],
        )


def _client() -> Any:
    return distributed_state().client


def is_first() -> bool:
    """Returns whether this process is the one that writes: number 0, or the only one."""
    return _watch is None or _watch.number == 0


def count() -> int:
    """Returns the number of processes."""
    return 1 if _watch is None else _watch.count


def together(work: Callable[[], T], doing: str = "") -> T:
    """Returns what `work` returns here, once it has returned in every process.

    Args:
        doing: what `work` does, such as `opening the store`, for those who wait for it.

    Raises:
        MeshLMError: `work` failed here; or elsewhere, with that process's number and its exit code.
    """
    global _known
    if _watch is None:
        with _working(doing):
            return work()
    key = f"meshlm/meeting/{next(_meetings)}"
    failed: Exception | None = None
    result: Any = None
    try:
        with _working(doing):
            result = work()
    except Exception as error:  # whatever it is, the others must not wait
        failed = error
    said = {} if failed is None else {"exit_code": _code_of(failed), "message": _line_of(failed)}
    client = _client()
    client.key_value_set(f"{key}/{_watch.number}", json.dumps(said))
    with Waiting(lambda: _who_is_missed(key, doing)):
        client.wait_at_barrier(key, _LONG_MS)
    heard = _heard_at(key)
    if failed is None:
        number = next((n for n in sorted(heard) if heard[n]), None)
        if number is None:
            return result
        failed = _PeerError(f"process {number}: {heard[number]['message']}")
        failed.exit_code = heard[number]["exit_code"]
    _known = failed
    raise failed


def _working(doing: str) -> contextlib.AbstractContextManager[object]:
    """Returns a block that says what it does where that takes long: a disk may be stuck."""
    return Waiting(lambda: f"still {doing}") if doing else contextlib.nullcontext()


def _heard_at(key: str) -> dict[int, dict[str, Any]]:
    """Returns what each process has said at a meeting, by number."""
    found = _client().key_value_dir_get(f"{key}/")
    return {int(name.rpartition("/")[2]): json.loads(text) for name, text in found}


def _who_is_missed(key: str, doing: str) -> str:
    assert _watch is not None
    with contextlib.suppress(_jax_error()):
        missing = sorted(set(range(_watch.count)) - _heard_at(key).keys())
        text = f"process {_watch.number} waits for {len(missing)} of {_watch.count} processes"
        text += f" ({list_numbers(missing)})" if missing else ""
        return f"{text}, which are still {doing}" if doing else text
    return f"process {_watch.number} waits for the others"


class _PeerError(MeshLMError):
    """What has failed in another process."""


def _code_of(error: BaseException) -> int:
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


def _line_of(error: BaseException) -> str:
    line = str(error).strip().split("\n")[0]
    return line if isinstance(error, MeshLMError) else f"{type(error).__name__}: {line}"


def share(value: Callable[[], str], doing: str = "") -> str:
    """Returns process 0's text in every process; `value`, which is `doing` that, runs there alone.

    Raises:
        MeshLMError: as `together`.
    """
    text = together(value if is_first() else lambda: "", doing)
    if _watch is None:
        return text
    key = f"meshlm/shared/{next(_meetings)}"
    if is_first():
        _client().key_value_set(key, text)
    return _client().blocking_key_value_get(key, _LONG_MS)


def tell(name: str, text: str) -> None:
    """Leaves a text for the other processes under a name; the first to use a name is heard."""
    if _watch is not None:
        with contextlib.suppress(_jax_error()):
            _client().key_value_set(f"meshlm/told/{name}", text)


def heard(name: str) -> str | None:
    """Returns the text that a process has left under a name, or None so far."""
    if _watch is None:
        return None
    try:
        return _client().key_value_try_get(f"meshlm/told/{name}")
    except _jax_error():
        return None


class Stop:
    """Agrees on the step after which all stop, where one has been told to.

    A step ends nowhere before it has begun everywhere, and a process begins a step after it has
    seen the end of the one before the last. So nobody is more than two steps ahead of the process
    that names a step, and all have looked here before they reach it.
    """

    def __init__(self) -> None:
        self._told = False

    def code_after(self, step: int, told: int | None) -> int | None:
        """Returns the exit code with which to stop after `step`, or None to go on.

        Args:
            step: sent to the devices; the one before it has ended.
            told: this process's own exit code, where a signal has come.
        """
        if _watch is None:
            return told
        client = _client()
        if told is not None and not self._told:
            self._told = True
            with contextlib.suppress(_jax_error()):  # another one was first
                client.key_value_set("meshlm/stop", f"{step + _LAG_STEPS} {told}")
        try:
            last, code = client.key_value_try_get("meshlm/stop").split()
        except _jax_error():
            return None
        return int(code) if step >= int(last) else None


def _jax_error() -> type[Exception]:
    import jax

    return jax.errors.JaxRuntimeError


def agree(error: MeshLMError) -> MeshLMError:
    """Returns the error, noted as one that every process raises: nobody else is told of it."""
    global _known
    _known = error
    return error


def say_failed(error: BaseException) -> None:
    """Tells the others that this process ends with `error`, so that none waits for it."""
    global _known
    if _watch is None or error is _known:
        return
    _known = error
    if isinstance(error, _jax_error()):  # what an exchange raises whose other end is gone
        with contextlib.suppress(Exception):  # it must not take the error's place
            _watch.blame_the_silent()
    _watch.say_failed(_line_of(error), _code_of(error))


def measure_all_reduce() -> float | None:
    """Returns the seconds that a sum over all devices takes; None for one process.

    Raises:
        MeshLMError: the sum is wrong: the devices do not reach each other as they should.
    """
    if _watch is None:
        return None
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("all"))
    numbers = jax.make_array_from_callback(
        (devices,), split, lambda index: np.arange(devices, dtype=np.float32)[index]
    )
    whole = NamedSharding(mesh, PartitionSpec())
    add = jax.jit(lambda x: x.sum(), out_shardings=whole)
    with jax.set_mesh(mesh):
        float(add(numbers))  # compiles
        began_s = time.monotonic()
        found = float(add(numbers))
    if found != devices * (devices - 1) / 2:
        raise MeshLMError(
            f"the self-test's sum over {devices} devices is {found:g} and not "
            f"{devices * (devices - 1) / 2:g}: the devices do not reach each other as they should"
        )
    return time.monotonic() - began_s


def on_host(x: Any) -> Any:
    """Returns a whole array as numpy's, wherever its parts lie; all processes call it together."""
    import numpy as np
    from jax.experimental import multihost_utils

    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def leave() -> None:
    """Returns when every process has come here; ends this one at once where it has failed alone.

    For the end of a program; one that does not call it does so when Python ends.
    """
    if _watch is not None:
        _watch.end()

"""Saving in the background: `Checkpointer`."""

import contextlib
import errno
import functools
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from meshlm.checkpoint.disk import is_superseded, steps_kept
from meshlm.checkpoint.folder import (
    ARRAYS_NAME,
    ASIDE_NAME,
    MANIFEST_NAME,
    clean_leftovers,
    complete_steps,
    delete_step,
    is_own_folder,
    publish,
    remove_tree,
    saving_path,
    set_aside,
    step_path,
    steps_aside,
    steps_in,
)
from meshlm.checkpoint.manifest import (
    ArrayInfo,
    Manifest,
    check_file_names,
    hash_files,
    library_versions,
)
from meshlm.core.errors import MeshLMError, UsageError
from meshlm.core.files import sync_folder, write_new
from meshlm.core.processes import agree, heard, tell, together

_ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_TIMEOUT_S = 4 * 60 * 60
_LOOK_S, _GRACE_S = 1.0, 10.0
MAX_CHUNK_BYTES = 64 << 20

_log = logging.getLogger(__name__)


def is_layer_stack(name: str) -> bool:
    """True for the names whose first dim is the layer: one part of the name is `blocks`."""
    return "blocks" in name.split(".")


@dataclass(eq=False)
class _Save:
    """A save that was begun."""

    step: int
    folder: Path
    """Where it is written; its own."""
    is_decided: bool = False
    """Whether its own thread ends it, or it was given up."""


class Checkpointer:
    """Saves steps into one folder in the background, one at a time, and deletes old ones.

    Only one Checkpointer may write to a folder at a time; the run's lock sees to that.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        resumed: int | None = None,
        is_stacked: Callable[[str], bool] = is_layer_stack,
    ) -> None:
        """Args:
        resumed: the step that the arrays were restored from. Steps above it that are there already
            were passed over: the first save sets them aside. None: those from the first saved on.
        """
        if keep < 1:
            raise UsageError(f"--keep {keep}: at least 1 checkpoint must be kept")
        if keep_every is not None and keep_every < 1:
            raise UsageError(f"--keep-every {keep_every}: give 1 step or more")
        self._folder = folder.absolute()
        self._keep = keep
        self._keep_every = keep_every
        self._resumed = resumed
        self._saved: set[int] = set()
        self._is_stacked = is_stacked
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._newest: _Save | None = None
        self._attempts = 0
        self._unreported: MeshLMError | None = None
        self.last_error: MeshLMError | None = None
        """Why the last finished save failed; None once a later one has succeeded."""

    def save(
        self, step: int, arrays: Mapping[str, jax.Array], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Begins to save a step and returns as soon as the arrays may be donated or overwritten.

        It first waits for the save before it. A step that was there before and is not below this
        one belongs to a past that is being written anew, and may be damaged: it is set aside.

        Raises: MeshLMError when an earlier save failed (this one has begun all the same), or when
        this one could not begin, in every process alike. Either way older checkpoints are as they
        were, and the caller may go on and save again. What only one of several processes cannot do
        is raised as it is: the others wait for it, and the run must end.
        """
        files = dict(files or {})
        check_file_names(files)
        _check_arrays(step, arrays)
        earlier = self._finish()
        self._attempts += 1
        save = _Save(step, saving_path(self._folder, step, self._attempts))
        try:
            kept = together(lambda: self._prepare(save, arrays))
        except Exception as error:
            raise agree(self._cannot_begin(save, error)) from error
        try:
            self._begin(save, kept, files)
        except Exception as error:
            if jax.process_count() > 1:
                raise
            raise self._cannot_begin(save, error) from error
        if earlier is not None:
            raise earlier

    def wait(self) -> None:
        """Returns when no save is under way and the last one is durable.

        Raises: MeshLMError when it failed, once.
        """
        error = self._finish()
        if error is not None:
            raise error

    def close(self) -> None:
        """As `wait`. The Checkpointer may be used again after it."""
        self.wait()

    def steps(self) -> list[int]:
        """The steps that are complete on disk, oldest first."""
        return complete_steps(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and jax.process_count() > 1:
            return  # the others may be gone, and Orbax would wait for them
        failed = self._finish()
        if failed is not None and error is None:
            raise failed

    def _prepare(self, save: _Save, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the arrays as they are now, for which there is a folder."""
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            clean_leftovers(self._folder)
            save.folder.mkdir()
        failpoint("before-arrays")
        return _snapshot(arrays)

    def _cannot_begin(self, save: _Save, error: Exception) -> MeshLMError:
        self._unreported = None
        self.last_error = _not_saved(save.step, error)
        if jax.process_index() == 0:
            remove_tree(save.folder)
        return self.last_error

    def _begin(
        self, save: _Save, arrays: Mapping[str, jax.Array], files: Mapping[str, bytes]
    ) -> None:
        self._newest = save
        with saving_context(self._is_stacked):
            response = ocp.save_async(str(save.folder / ARRAYS_NAME), dict(arrays))
        infos = {n: ArrayInfo(shape=a.shape, dtype=a.dtype.name) for n, a in arrays.items()}
        finish = functools.partial(self._commit, save, response, infos, files)
        self._thread = threading.Thread(
            target=finish, name=f"checkpoint-step-{save.step}", daemon=True
        )
        self._thread.start()

    def _commit(
        self,
        save: _Save,
        response: ocp.AsyncResponse[None],
        arrays: Mapping[str, ArrayInfo],
        files: Mapping[str, bytes],
    ) -> None:
        """The background half. An error is kept for the next `save` or `wait`."""
        step = save.step
        # Orbax returns here in process 0 only after every process has written its part.
        failed = _failure(response)
        if not self._decide(save):
            if jax.process_index() == 0:
                remove_tree(save.folder)
            return
        try:
            if failed is not None:
                raise failed
            if jax.process_index() == 0:
                self._write_rest(save, arrays, files)
            self.last_error = None
        except Exception as error:
            if jax.process_index() == 0:
                remove_tree(save.folder)
            self.last_error = self._unreported = _not_saved(step, error)
            self.last_error.__cause__ = error
            tell(self._failure_key(), str(self.last_error))
            return
        if jax.process_index() == 0:
            self._apply_retention()

    def _decide(self, save: _Save) -> bool:
        """Returns whether the caller is the first to say how a save ends."""
        with self._lock:
            first = not save.is_decided
            save.is_decided = True
        return first

    def _write_rest(
        self, save: _Save, arrays: Mapping[str, ArrayInfo], files: Mapping[str, bytes]
    ) -> None:
        seal(save.folder, save.step, arrays, files)
        failpoint("before-rename")
        self._set_others_aside(save.step)
        publish(self._folder, save.step, save.folder)
        self._saved.add(save.step)
        failpoint("after-rename")

    def _set_others_aside(self, step: int) -> None:
        """Moves steps away that are of no past of this one's; nothing is deleted for a doubt."""
        last = step - 1 if self._resumed is None else self._resumed
        own = step_path(self._folder, step)
        if os.path.lexists(own) and not is_own_folder(own):
            place = set_aside(self._folder, own)
            _log.warning("%s was no folder of this run's: it is now %s", own, place)
        for other in steps_in(self._folder):
            if other > last and other not in self._saved:
                place = set_aside(self._folder, step_path(self._folder, other))
                _log.warning(
                    "the checkpoint of step %d was passed over and is now %s: delete it if you do "
                    "not need it, or it goes once --keep (%d) newer ones are there",
                    other,
                    place,
                    self._keep,
                )

    def _apply_retention(self) -> None:
        rules = {"keep": self._keep, "keep_every": self._keep_every}
        complete = complete_steps(self._folder)
        kept = steps_kept(complete, **rules)
        in_doubt = [
            *((s, step_path(self._folder, s)) for s in steps_in(self._folder) if s not in complete),
            *steps_aside(self._folder),
        ]
        for path in (
            *(step_path(self._folder, step) for step in complete if step not in kept),
            *(path for step, path in in_doubt if is_superseded(step, complete, **rules)),
        ):
            delete_step(self._folder, path)
        with contextlib.suppress(OSError):
            (self._folder / ASIDE_NAME).rmdir()  # where nothing is left in it

    def _finish(self) -> MeshLMError | None:
        """Joins the save under way; the error that nobody has been told of, or None."""
        thread, self._thread = self._thread, None
        if thread is None:
            return None
        gave_up = self._join(thread)
        error, self._unreported = self._unreported, None
        if jax.process_count() == 1:
            return error
        found = multihost_utils.process_allgather(np.asarray([error is not None, gave_up]))
        if error is None and np.any(found):
            reason = heard(self._failure_key()) or "a checkpoint failed; see its log"
            self.last_error = error = MeshLMError(f"in another process, {reason}")
        # All have an error then, and each says its own. But what Orbax still waits for keeps a
        # process from its end: should it be the last error, the first that speaks ends all at once.
        is_over = not np.any(found[..., 1])
        return agree(error) if error is not None and is_over else error

    def _join(self, thread: threading.Thread) -> bool:
        """Waits for a save; returns whether it was given up, for another process cannot write.

        Orbax would wait for that part, and training with it, for hours.
        """
        while thread.is_alive():
            thread.join(_LOOK_S)
            reason = heard(self._failure_key()) if thread.is_alive() else None
            if reason is not None:
                thread.join(_GRACE_S)
            if reason is not None and self._newest is not None and self._decide(self._newest):
                self.last_error = self._unreported = MeshLMError(f"in another process, {reason}")
                return True
        return False

    def _failure_key(self) -> str:
        return f"checkpoint-{self._attempts}"


def failpoint(name: str) -> None:
    """Where tests make a save fail: MESHLM_FAILPOINT=name:kill or name:error. Off unless set."""
    wanted, _, action = os.environ.get("MESHLM_FAILPOINT", "").partition(":")
    if wanted != name:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, "failpoint", name)


def seal(
    folder: Path, step: int, arrays: Mapping[str, ArrayInfo], files: Mapping[str, bytes]
) -> None:
    """Writes the small files and, when all is on disk, the manifest that makes it a checkpoint."""
    failpoint("arrays-written")
    for name, data in files.items():
        write_new(folder / name, data)
    manifest = Manifest(
        step=step,
        versions=library_versions(),
        arrays=arrays,
        files=hash_files(folder, files),
    )
    failpoint("before-manifest")
    write_new(folder / MANIFEST_NAME, manifest.to_json())
    sync_folder(folder)


def saving_context(is_stacked: Callable[[str], bool]) -> ocp.Context:
    """How Orbax stores arrays here: not compressed, a layer of a stack a chunk, no large chunks."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions

    def storage(key: Any, value: Any) -> Any:
        # Orbax takes no chunk shape. To shard storage along dim 0 alone makes chunks [1, ...].
        if is_stacked(key[0].key):
            return options(shard_axes=(0,))
        # A chunk is held twice by whoever reads it.
        return options(chunk_byte_size=MAX_CHUNK_BYTES) if value.ndim else None

    context = ocp.Context()
    context.asynchronous.timeout_secs = _TIMEOUT_S
    context.array.saving.use_compression = False  # weights do not shrink, and sizes stay known
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.array_metadata_store = None
    context.array.saving.scoped_storage_options_creator = storage
    return context


def _snapshot(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays that stay as they are now when the caller donates his own.

    Orbax copies from an accelerator to the host before it returns. On the CPU backend its copy is a
    view of the device buffer, so there the copy is made here.
    """
    kept = {}
    for name, array in arrays.items():
        on_cpu = all(device.platform == "cpu" for device in array.sharding.device_set)
        kept[name] = jax.device_put(array, array.sharding, may_alias=False) if on_cpu else array
    return jax.block_until_ready(kept)


def _check_arrays(step: int, arrays: Mapping[str, jax.Array]) -> None:
    if step < 0:
        raise ValueError(f"step {step} of a checkpoint is below 0")
    if not arrays:
        raise ValueError("a checkpoint without arrays cannot be saved")
    for name, array in arrays.items():
        if not _ARRAY_NAME.fullmatch(name):
            raise ValueError(f"array name {name!r}: use letters, digits, '_', '-' and '.'")
        if array.size == 0:
            raise ValueError(f"array {name!r} has shape {array.shape}, without an element")


def _failure(response: ocp.AsyncResponse[None]) -> Exception | None:
    """Returns why Orbax failed, once it has ended; None where it did not."""
    try:
        response.result()
    except Exception as error:
        return error
    return None


def _not_saved(step: int, error: Exception) -> MeshLMError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return MeshLMError(f"checkpoint of step {step} was not saved: {reason}; older ones are intact")

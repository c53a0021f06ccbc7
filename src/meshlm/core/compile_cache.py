"""The folder in which XLA keeps what it compiled, so that the next start is fast.

What lies in it is run as it is: whoever can write there can run code as the server.
"""

import os
from pathlib import Path

from meshlm.core.errors import UsageError
from meshlm.core.private_folder import make_private, private_folder, why_not_private

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use_compile_cache(given: str | None) -> None:
    """Has JAX keep all that it compiles from now on in `prepare_compile_cache(given)`."""
    import jax

    folder = prepare_compile_cache(given)
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    # All functions, the quickly compiled ones too: there are many of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def prepare_compile_cache(given: str | None) -> Path | None:
    """Returns the folder, made with access for its owner alone; None: keep nothing.

    Args:
        given: the folder; "" for none; None for what JAX_COMPILATION_CACHE_DIR says, or else
            `meshlm/compiled` in the user's own cache folder.

    Raises:
        UsageError: the folder is given and cannot be used, or others can write there.
    """
    if given is None:
        given = os.environ.get(_VARIABLE)
    if given == "":
        return None
    if given is None:
        # A user without a home that can be written: it works without, only slower.
        folder = private_folder("compiled")
        return folder if folder and os.access(folder, os.W_OK | os.X_OK) else None
    folder = Path(given)
    try:
        make_private(folder)
        reason = why_not_private(folder)
    except OSError as error:
        raise UsageError(f"--compile-cache {folder}: {error.strerror}") from None
    if reason is not None:
        raise UsageError(
            f"--compile-cache {folder}: others can write there, and what is there is run: {reason}"
        )
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--compile-cache {folder}: no folder that can be written")
    return folder

"""The few errors that a user meets, each with the exit code the command line ends with.

A message is one line that names the thing, its value and the remedy.
"""


class MeshLMError(Exception):
    """Something failed for a stated reason. Exit code 1."""

    exit_code = 1


class UsageError(MeshLMError, ValueError):
    """A wrong option or configuration, or a path that is not there. Exit code 2."""

    exit_code = 2


class BadInputError(MeshLMError, ValueError):
    """Data, weights or a checkpoint that cannot be used as they are. Exit code 3."""

    exit_code = 3


class BusyError(MeshLMError):
    """Something else holds the run folder or the port. Exit code 4."""

    exit_code = 4


class ReaderGoneError(MeshLMError):
    """Nobody reads standard output any more. Exit code 141, as of a program that SIGPIPE ends."""

    exit_code = 141

    def __init__(self) -> None:
        super().__init__("nobody reads standard output any more")


class StoppedError(MeshLMError):
    """A signal ended the work and its state is saved: 75 for SIGTERM, 130 for SIGINT."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

"""The command `meshlm`: parse, call, print. All work is done in the rooms below."""

from meshlm.cli.main import main

__all__ = ["main"]

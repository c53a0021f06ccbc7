"""meshlm data prepare"""

from rich.console import Console

from meshlm.data.prepare import PrepareConfig as Config
from meshlm.data.prepare import prepare

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Makes the token store."""
    prepare(config, Console())

"""meshlm data inspect"""

from meshlm.data.inspection import InspectConfig as Config
from meshlm.data.inspection import inspect

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Prints what the token store holds."""
    print(inspect(config))

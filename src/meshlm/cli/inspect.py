"""meshlm data inspect"""

from meshlm.data.inspection import InspectConfig as Config
from meshlm.data.inspection import inspect

__all__ = ["EXAMPLES", "Config", "run"]

EXAMPLES = (
    "meshlm data inspect store",
    "meshlm data inspect store --samples 1 --json",
)


def run(config: Config) -> None:
    """Prints what the token store holds."""
    print(inspect(config))

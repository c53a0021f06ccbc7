"""meshlm demo"""

from meshlm.demo import DemoConfig as Config
from meshlm.demo import demo

__all__ = ["EXAMPLES", "Config", "run"]

EXAMPLES = (
    "meshlm demo",
    "meshlm demo --serve",
    "meshlm demo --minutes 10 --out my-demo",
)


def run(config: Config) -> int:
    """Runs the demo."""
    return demo(config)

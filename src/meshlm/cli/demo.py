"""meshlm demo"""

from meshlm.demo import DemoConfig as Config
from meshlm.demo import demo

__all__ = ["EXAMPLES", "Config", "run"]

EXAMPLES = (
    "meshlm demo",
    "meshlm demo --minutes 10 --out my-demo",
)


def run(config: Config) -> None:
    """Runs the demo."""
    demo(config)

"""meshlm demo"""

from meshlm.demo import DemoConfig as Config
from meshlm.demo import demo

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Runs the demo."""
    demo(config)

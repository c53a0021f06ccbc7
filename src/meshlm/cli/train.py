"""meshlm train"""

from meshlm.training.config import TrainConfig as Config
from meshlm.training.loop import train

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Trains."""
    result = train(config)
    print(f"{result.run}: step {result.step:,}; curves in {result.run / 'report.html'}")

"""meshlm data prepare"""

from rich.console import Console

from meshlm.data.prepare import PrepareConfig as Config
from meshlm.data.prepare import prepare

__all__ = ["EXAMPLES", "Config", "run"]

EXAMPLES = (
    "meshlm data prepare books/ --out store --tokenizer train:8192",
    "meshlm data prepare 'pile/*.jsonl.zst' --out store --val-fraction 0.001 --workers 16",
)


def run(config: Config) -> None:
    """Makes the token store."""
    prepare(config, Console())

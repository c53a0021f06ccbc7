"""meshlm train"""

import dataclasses

from meshlm.cli.texts import text_of_word
from meshlm.core.processes import is_first
from meshlm.training.config import TrainConfig as Config
from meshlm.training.loop import train
from meshlm.training.settings import expand

__all__ = ["EXAMPLES", "Config", "expand", "run"]

EXAMPLES = (
    "meshlm train --run runs/first --data store --preset demo --steps 2000",
    "meshlm train --run runs/first --steps 4000                        # goes on",
    "meshlm train --run runs/mix --data code=0.7 prose=0.3 --preset 125m --batch-size 32",
    "meshlm train --run runs/tuned --data store --init gpt-j-6b --learning-rate 1e-5 --steps 500",
    "meshlm train --run runs/pod --data store --preset gpt-j-6b --mesh.data 8 --mesh.model 8",
)


def run(config: Config) -> None:
    """Trains."""
    prompts = tuple(text_of_word(text, "--sample-prompts") for text in config.sample_prompts)
    result = train(dataclasses.replace(config, sample_prompts=prompts))
    if is_first():
        print(f"{result.run}: step {result.step:,}; curves in {result.run / 'report.html'}")

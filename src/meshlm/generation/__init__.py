"""Generation and scoring: token ids in; token ids, text and log-probabilities out.

config.py    what is asked for and what is given back
sampling.py  logits to a token: pure, and the documented order of the options
buckets.py   the shapes that compile
decode.py    prefill, decoding with a cache
text.py      bytes of tokens to text, stop texts
generate.py  the loop on the host
score.py     log-probabilities of given tokens
"""

from meshlm.generation.config import Generation, SamplingConfig
from meshlm.generation.decode import DecodeModel
from meshlm.generation.generate import Generator
from meshlm.generation.score import Likelihood, Scorer, TokenScores

__all__ = [
    "DecodeModel",
    "Generation",
    "Generator",
    "Likelihood",
    "SamplingConfig",
    "Scorer",
    "TokenScores",
]

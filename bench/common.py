"""What the benchmarks have in common. Standard library alone: other Pythons run it too."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""From prompts of one length and a number of new tokens to the new tokens of each row."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """Reads an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return number


def cpu_model() -> str:
    """Returns the processor's name as the kernel has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def transformers_generate(model: Any, device: str = "cpu") -> Generate:
    """Returns greedy decoding as transformers' documentation shows it."""
    import torch

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return out[:, tokens.shape[1] :].tolist()

    return generate

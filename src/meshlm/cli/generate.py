"""meshlm generate"""

import dataclasses
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from meshlm.api import load
from meshlm.cli.texts import read_text, text_of_word
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.sharding import MeshConfig
from meshlm.data.tokenizer_json import SpecialTokenMode
from meshlm.generation import Generation, SamplingConfig
from meshlm.generation.profiles import Dtype, Profile, Quantization

EXAMPLES = (
    'meshlm generate runs/first --prompt "def is_even(i):"',
    "meshlm generate runs/first --prompt-file - --max-tokens 200 --top-p 0.9 < question.txt",
    'meshlm generate step_383500.tar.zst --config gpt-j-6b --profile mtj-2021 --prompt "Q:"',
    'meshlm generate runs/first/checkpoints/step_2000 --prompt "Once" -n 4 --seed 7 --json',
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Let a model continue a prompt."""

    path: Positional[Path]
    """A run, a checkpoint, or GPT-J's weights in any format that `meshlm convert` reads."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: Path | None = None
    """A UTF-8 file whose whole text is the prompt; - reads standard input."""
    max_tokens: int = 64
    """The most tokens to generate for each sample."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most probable token."""
    top_k: int | None = None
    """Sample among the K most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest most probable tokens whose probabilities reach P together."""
    min_p: float | None = None
    """Sample among tokens at least P times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens of the prompt and of the output so far less probable."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are not part of it."""
    seed: int = 0
    """The same seed gives the same text; any 64-bit integer."""
    n: Annotated[int, arg(aliases=("-n",))] = 1
    """Samples to make."""
    logprobs: int | None = None
    """Also show the log-probabilities of this many of the most probable tokens at each place."""
    dtype: Dtype | None = None
    """Weights and products; left out, as the checkpoint stores them."""
    quantize: Quantization | None = None
    """int8: matrices in int8, for less memory and more speed on a CPU, at a small loss."""
    profile: Profile = "fast"
    """How to compute: fast, as transformers does (hf), or as the original did (mtj-2021)."""
    config: str | None = None
    """The original's JSON config or a preset, where none lies beside its weights."""
    tokenizer: str | None = None
    """gpt2, a tokenizer.json or its folder, in place of what lies beside the weights."""
    special_tokens: SpecialTokenMode | None = None
    """Whether <|endoftext|> and other special tokens in prompts become tokens (parse) or stay text.
    [parse for a Hugging Face folder or a tokenizer from a file, else text]"""
    allow_pickle: bool = False
    """Read a pytorch_model.bin, as weights alone, by torch in a process of its own."""
    verify: bool = False
    """First hold every byte against certificate.json, or the download's checksums, beside it."""
    extra_tokens: bool = False
    """Also sample the extra tokens that GPT-J's vocabulary has beyond those of text."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    json: bool = False
    """Print one JSON object instead of the text."""


def run(config: Config) -> None:
    """Prints the prompt and what comes after it, as it is made."""
    prompt = _prompt(config)
    shared = {f.name for f in fields(SamplingConfig)} & {f.name for f in fields(Config)}
    sampling = SamplingConfig(**{name: getattr(config, name) for name in shared})
    stop = tuple(text_of_word(text, "--stop") for text in sampling.stop)
    sampling = dataclasses.replace(sampling, stop=stop)
    model = load(
        config.path,
        profile=config.profile,
        dtype=config.dtype,
        quantize=config.quantize,
        mesh=config.mesh,
        config=config.config,
        tokenizer=config.tokenizer,
        allow_pickle=config.allow_pickle,
        verify=config.verify,
        special_tokens=config.special_tokens,
        sample_extra_tokens=config.extra_tokens,
    )
    if model.tokenizer is None:
        raise UsageError(f"{config.path} has no tokenizer: give --tokenizer gpt2 or a file")
    streams = config.n == 1 and not config.json and config.logprobs is None
    if streams:
        _write(prompt)
    try:
        samples = model.sample([prompt], sampling, _write_piece if streams else None)
    except BadInputError:
        if streams:
            _write("\n")  # the error gets a line of its own
        raise
    if config.json:
        print(_to_json(config, prompt, samples))
    elif streams:
        _write("\n")
    else:
        _print_samples(config, model, prompt, samples)


def _prompt(config: Config) -> str:
    if (config.prompt is None) == (config.prompt_file is None):
        raise UsageError("give either --prompt TEXT or --prompt-file FILE")
    if config.prompt_file is not None:
        return read_text(config.prompt_file, "--prompt-file")
    assert config.prompt is not None
    return text_of_word(config.prompt, "--prompt")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_piece(prompt: int, sample: int, piece: str) -> None:
    _write(piece)


def _print_samples(config: Config, model, prompt: str, samples: list[Generation]) -> None:
    for number, sample in enumerate(samples):
        if config.n > 1:
            print(f"--- {number + 1} of {config.n}, {sample.finish_reason}")
        print(prompt + sample.text)
        if sample.top_logprobs is not None:
            for token, logprob, others in zip(
                sample.tokens, sample.logprobs, sample.top_logprobs, strict=True
            ):
                shown = "  ".join(
                    f"{model.tokenizer.decode([t])!r} {p:.3f}" for t, p in others.items()
                )
                print(f"{model.tokenizer.decode([token])!r:>16} {logprob:8.3f}   {shown}")


def _to_json(config: Config, prompt: str, samples: list[Generation]) -> str:
    return json.dumps(
        {
            "model": str(config.path),
            "prompt": prompt,
            "samples": [asdict(sample) for sample in samples],
        },
        allow_nan=False,
    )

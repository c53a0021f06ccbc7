"""Python's way in: `meshlm.load(path)` gives a `Model` that scores and writes text.

Dim letters: B batch, T time, V vocabulary rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int

from meshlm.conversion.loading import load_params, matrix_dtype
from meshlm.conversion.opening import open_source
from meshlm.conversion.source import Source
from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig, make_mesh
from meshlm.data.special_tokens import SpecialTokens, check_rows
from meshlm.data.tokenizer import Tokenizer
from meshlm.data.tokenizer_json import SpecialTokenMode
from meshlm.generation import DecodeModel, Generation, Generator, SamplingConfig, Scorer
from meshlm.generation.generate import start_of_text
from meshlm.generation.profiles import Dtype, Numerics, Profile, Quantization, numerics
from meshlm.model.config import ModelConfig
from meshlm.model.params import Params, check_divides
from meshlm.model.transformer import Compute
from meshlm.serving.engine import Loaded

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]


class Generations(list[Generation]):
    """Samples, prompt by prompt. Where it is a single one, its fields are at hand here too."""

    @property
    def text(self) -> str:
        """The text of the only sample."""
        return self._only().text

    @property
    def tokens(self) -> list[int]:
        """The tokens of the only sample."""
        return self._only().tokens

    @property
    def logprobs(self) -> list[float]:
        """The log-probabilities of the only sample."""
        return self._only().logprobs

    @property
    def finish_reason(self) -> str:
        """Why the only sample ended."""
        return self._only().finish_reason

    def _only(self) -> Generation:
        if len(self) != 1:
            raise UsageError(f"these are {len(self)} samples: index the one you mean")
        return self[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How probable a text is: each token given the start of a text and the tokens before it."""

    tokens: list[int]
    logprobs: list[float]
    """Natural logarithms, one a token."""

    @property
    def total(self) -> float:
        """The log-probability of the whole text."""
        return float(np.sum(self.logprobs))


class Model:
    """A model and its tokenizer, ready to compute."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        numerics: Numerics,
        mesh: Mesh,
        *,
        special_tokens: SpecialTokens | None = None,
        sample_extra_tokens: bool = False,
    ) -> None:
        """Makes a model of weights with one block a layer; see `load` for the rest.

        Args:
            special_tokens: what ends and begins texts, and whether texts spell special tokens; None
                for the tokenizer's end of text, which no text spells.
        """
        self.params = params
        self.config = config
        self.special_tokens = special_tokens or SpecialTokens.of(tokenizer)
        mode = self.special_tokens.mode
        self.tokenizer = None if tokenizer is None else tokenizer.with_special_tokens(mode)
        self.numerics = numerics
        self.mesh = mesh
        self.sample_extra_tokens = sample_extra_tokens

    def logits(self, tokens: Int[np.ndarray, "B T"] | Sequence) -> Float32[np.ndarray, "B T V"]:
        """Returns the float32 logits of every position, all rows of the vocabulary.

        Raises:
            UsageError: not two dims, an id without a row, or longer than the context.
        """
        tokens_BT = np.asarray(tokens)
        if tokens_BT.ndim != 2 or not np.issubdtype(tokens_BT.dtype, np.integer):
            raise UsageError(
                f"tokens are {tokens_BT.dtype} of shape {tokens_BT.shape}: give integers [B, T]"
            )
        return self._scorer.logits(tokens_BT)

    def generate(
        self,
        prompts: Prompts,
        *,
        max_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        n: int = 1,
        logprobs: int | None = None,
        ignore_end_of_text: bool = False,
    ) -> Generations:
        """Returns n samples for each prompt, those of the first prompt first.

        Args:
            prompts: a text, token ids, or a list of such.
            max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, n,
                logprobs, ignore_end_of_text: as `SamplingConfig` describes them.

        Raises:
            UsageError: an option is out of range, or a prompt leaves no room in the context.
        """
        sampling = SamplingConfig(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            n=n,
            logprobs=logprobs,
            ignore_end_of_text=ignore_end_of_text,
        )
        return self.sample(_as_list(prompts), sampling)

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        on_text: Callable[[int, int, str], None] | None = None,
    ) -> Generations:
        """Returns samples as `generate` does; `on_text(prompt, sample, piece)` hears each piece."""
        ids = [self.encode(prompt) for prompt in prompts]
        done = self._generator.generate(ids, sampling, on_text)
        return Generations(sample for samples in done for sample in samples)

    def score(self, texts: Prompts) -> list[Score]:
        """Returns the log-probability of each token of each text; one Score a text.

        Raises:
            UsageError: a text is longer than the context, or the model has no tokenizer.
        """
        ids = [self.encode(text) for text in _as_list(texts)]
        start = start_of_text(self._start_id)
        scores = self._scorer.token_logprobs([start + tokens for tokens in ids])
        return [
            Score(tokens=tokens, logprobs=score.log_probs.tolist())
            for tokens, score in zip(ids, scores, strict=True)
        ]

    def loglikelihood(self, context: Prompt, continuation: Prompt) -> tuple[float, bool]:
        """Returns (log-probability of the continuation, whether it is what greedy decoding gives).

        Spaces at the end of a context text belong to the continuation, as in its tokens. An empty
        context is end-of-text.

        Raises:
            UsageError: the continuation is empty, or both are longer than the context length.
        """
        if isinstance(context, str) and isinstance(continuation, str):
            kept = context.rstrip()
            context, continuation = kept, context[len(kept) :] + continuation
        before, after = self.encode(context), self.encode(continuation)
        if not after:
            raise UsageError("the continuation is empty: give at least one token")
        likelihood = self._scorer.loglikelihood([(before, after)])[0]
        return likelihood.log_prob, likelihood.is_greedy

    @property
    def compute(self) -> Compute:
        """How the passes are computed."""
        return self.numerics.compute

    @functools.cached_property
    def decode_model(self) -> DecodeModel:
        """The weights as generation, scoring and a server take them."""
        allowed = sampled = self.config.vocab_size
        if self.tokenizer is not None:
            allowed = min(allowed, self.tokenizer.vocab_size)
            sampled = allowed if self.sample_extra_tokens else self.tokenizer.text_vocab_size
            if any(sampled <= token < allowed for token in self.end_ids):
                sampled = allowed  # a sample could not end otherwise
        return DecodeModel.prepare(
            self.params,
            self.config,
            self.numerics.compute,
            allowed_vocab=allowed,
            sampled_vocab=min(sampled, allowed),
            filters_first=self.numerics.filters_first,
            mesh=self.mesh,
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token ids of which any ends a sample."""
        return self.special_tokens.end_ids(self.tokenizer)

    @property
    def _start_id(self) -> int | None:
        return self.special_tokens.start_id(self.tokenizer, self.config.vocab_size)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(
            self.decode_model,
            end_ids=self.end_ids,
            start_id=self._start_id,
            token_bytes=_no_text if self.tokenizer is None else self.tokenizer.token_bytes,
        )

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.decode_model, start_id=self._start_id)

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt: a text's, or the given ones as they are.

        Raises:
            UsageError: there is no tokenizer, or a text becomes a token that has no row.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise UsageError("this model has no tokenizer: give token ids, or load it with one")
        tokens = self.tokenizer.encode(prompt)
        check_rows(tokens, self.tokenizer, self.config.vocab_size)
        return tokens


def served(model: Model) -> Loaded:
    """Returns what a server serves of a model.

    Raises:
        UsageError: it has no tokenizer.
    """
    if model.tokenizer is None:
        raise UsageError("a model without a tokenizer cannot be served: give --tokenizer")
    return Loaded(
        model=model.decode_model, tokenizer=model.tokenizer, special_tokens=model.special_tokens
    )


def _no_text(token: int) -> bytes:
    return b""


def _as_list(prompts: Prompts) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int | np.integer) for item in items):
        return [items]
    return items


def load(
    path: str | Path,
    *,
    profile: Profile = "fast",
    dtype: Dtype | None = None,
    quantize: Quantization | None = None,
    mesh: Mesh | MeshConfig | None = None,
    config: str | Path | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    verify: bool = False,
    special_tokens: SpecialTokenMode | None = None,
    sample_extra_tokens: bool = False,
) -> Model:
    """Returns the model in a run, a checkpoint, or GPT-J's weights in another format.

    Args:
        path: a run's folder (its newest good checkpoint), a checkpoint, a Hugging Face folder, a
            checkpoint of the original (`step_N`, or the folder with its `meta.json`), or the
            archive in which that was published.
        profile: how to compute: `fast`, `hf` or `mtj-2021`; see `generation/profiles.py`.
        dtype: of weights and products. Left out, weights keep their stored type and the products
            follow it; "float32" computes all of it in float32.
        quantize: "int8" keeps the matrices of products in int8, a quarter of float32's memory, and
            multiplies in int8; `dtype` then is of all else; left out, that stays as it is stored,
            and keys and values are bfloat16. For one device and the profile `fast`; see
            docs/quantization.md.
        mesh: where to put the weights; one device unless given.
        config: the original's JSON configuration, or a preset's name, where none lies beside the
            weights.
        tokenizer: "gpt2", a tokenizer.json or its folder, in place of what lies beside the weights.
        allow_pickle: read a `pytorch_model.bin`, in a process of its own, by torch.
        verify: first hold every byte against the certificate, or the checksums of the download,
            beside the weights.
        special_tokens: "parse" makes tokens of their spelling in texts, such as `<|endoftext|>`;
            "text" leaves it text. Left out: "parse" where the tokenizer came with a Hugging Face
            folder or from a file, else "text", and what a run or a checkpoint recorded.
        sample_extra_tokens: generate ids beyond those of text too, up to the vocabulary's last row.

    Raises:
        UsageError: there is nothing to load at this path, or an option does not fit.
        BadInputError: the files are damaged, or do not fit each other.
    """
    source = open_source(
        path,
        config=config,
        tokenizer=tokenizer,
        allow_pickle=allow_pickle,
        verify=verify,
        special_tokens=special_tokens,
    )
    opened = plan_loading(source, profile=profile, dtype=dtype, quantize=quantize, mesh=mesh)
    return load_opened(opened, sample_extra_tokens=sample_extra_tokens)


class Opened(NamedTuple):
    """Weights that are found and fit what is asked of them, and are not read yet."""

    source: Source
    numerics: Numerics
    mesh: Mesh
    quantize: Quantization | None


def plan_loading(
    source: Source,
    *,
    profile: Profile = "fast",
    dtype: Dtype | None = None,
    quantize: Quantization | None = None,
    mesh: Mesh | MeshConfig | None = None,
) -> Opened:
    """Returns how weights are to be loaded, the arguments being those of `load`.

    Raises:
        UsageError: an option does not fit the model, the others or this machine.
    """
    chosen = numerics(profile, dtype, matrix_dtype(source.infos), quantize)
    if not isinstance(mesh, Mesh):
        mesh_config = mesh or MeshConfig()
        if quantize is not None and mesh_config.num_devices > 1:
            raise UsageError(f"--quantize {quantize} is for one device: leave --mesh.* out")
        check_divides(source.model, mesh_config)
        mesh = make_mesh(mesh_config)
    if quantize is not None and mesh.size > 1:
        raise UsageError(f"quantize={quantize!r} is for one device: leave the mesh out")
    return Opened(source, chosen, mesh, quantize)


def load_opened(opened: Opened, *, sample_extra_tokens: bool = False) -> Model:
    """Returns the model, its weights read."""
    model, tokenizer = opened.source.model, opened.source.tokenizer
    if tokenizer is not None and sample_extra_tokens:
        tokenizer = tokenizer.with_extra_tokens(model.vocab_size)
    numerics, quantize = opened.numerics, opened.quantize
    params = load_params(opened.source, opened.mesh, numerics.weights, quantize=quantize)
    return Model(
        params,
        model,
        tokenizer,
        numerics,
        opened.mesh,
        special_tokens=opened.source.special_tokens,
        sample_extra_tokens=sample_extra_tokens,
    )

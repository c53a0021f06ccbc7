"""Python's way in: `meshlm.load(path)` gives a `Model` that scores and writes text.

Dim letters: B batch, T time, V vocabulary rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int

from meshlm import checkpoint
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.sharding import MeshConfig, make_mesh
from meshlm.core.tree import cast_floating, from_named, to_named
from meshlm.data import tokenizer as tokenizers
from meshlm.data.tokenizer import Tokenizer
from meshlm.generation import DecodeModel, Generation, Generator, SamplingConfig, Scorer
from meshlm.model.config import ModelConfig
from meshlm.model.params import Params, abstract_params, check_divides
from meshlm.model.transformer import Compute
from meshlm.training.run_folder import CHECKPOINTS_FOLDER, parse_config

Dtype = Literal["float32", "bfloat16"]
Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]

_PARAMS = "params."


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
    """How probable a text is: each token given end-of-text and the tokens before it."""

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
        tokenizer: Tokenizer,
        compute: Compute,
        mesh: Mesh,
    ) -> None:
        self.params = params
        self.config = config
        self.tokenizer = tokenizer
        self.compute = compute
        self.mesh = mesh

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
        ids = [self._encode(prompt) for prompt in prompts]
        done = self._generator.generate(ids, sampling, on_text)
        return Generations(sample for samples in done for sample in samples)

    def score(self, texts: Prompts) -> list[Score]:
        """Returns the log-probability of each token of each text; one Score a text.

        Raises:
            UsageError: a text is longer than the context.
        """
        ids = [self._encode(text) for text in _as_list(texts)]
        start = [self.tokenizer.end_of_text_id]
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
        before, after = self._encode(context), self._encode(continuation)
        if not after:
            raise UsageError("the continuation is empty: give at least one token")
        likelihood = self._scorer.loglikelihood([(before, after)])[0]
        return likelihood.log_prob, likelihood.is_greedy

    @functools.cached_property
    def _decode_model(self) -> DecodeModel:
        return DecodeModel.prepare(
            self.params,
            self.config,
            self.compute,
            allowed_vocab=self.tokenizer.vocab_size,
            mesh=self.mesh,
        )

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(
            self._decode_model,
            end_of_text_id=self.tokenizer.end_of_text_id,
            token_bytes=self.tokenizer.token_bytes,
        )

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._decode_model, end_of_text_id=self.tokenizer.end_of_text_id)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return [int(token) for token in prompt]


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
    dtype: Dtype | None = None,
    mesh: Mesh | MeshConfig | None = None,
) -> Model:
    """Returns the model in a run (its newest good checkpoint) or in a checkpoint.

    Args:
        path: a run's folder, its folder of checkpoints, or one `step_N`.
        dtype: of weights and products. Left out, weights keep their stored type and the products
            follow it; "float32" computes all of it in float32.
        mesh: where to put the weights; one device unless given.

    Raises:
        UsageError: there is no run or checkpoint at this path.
        BadInputError: the checkpoint is damaged, or its files do not fit each other.
    """
    step_folder, is_checked = _find_checkpoint(Path(path))
    files = checkpoint.read_files(step_folder)
    for name in ("config.json", "tokenizer.json"):
        if name not in files:
            raise BadInputError(f"checkpoint {step_folder} has no {name}: it is no model's")
    record = parse_config(files["config.json"], str(step_folder / "config.json"))
    if not isinstance(mesh, Mesh):
        mesh_config = mesh or MeshConfig()
        check_divides(record.model, mesh_config)
        mesh = make_mesh(mesh_config)
    params = _load_params(step_folder, record.model, mesh, check=not is_checked)
    if dtype is not None:
        params = cast_floating(params, jnp.dtype(dtype))
    stored = jnp.dtype(params.head.dtype).name
    compute = Compute(dtype="bfloat16" if stored == "bfloat16" else "float32")
    return Model(params, record.model, tokenizers.from_json(files["tokenizer.json"]), compute, mesh)


def _find_checkpoint(path: Path) -> tuple[Path, bool]:
    """Returns the checkpoint's folder, and whether all its bytes were checked to find it."""
    if not path.exists():
        raise UsageError(f"{path}: there is nothing at this path")
    if checkpoint.step_of(path) is not None or (path / "arrays").exists():
        return path, False
    folder = path / CHECKPOINTS_FOLDER if (path / CHECKPOINTS_FOLDER).is_dir() else path
    found = checkpoint.latest_good(folder) if folder.is_dir() else None
    if found is None:
        raise UsageError(f"{path} holds no finished checkpoint: give a run or a step_N folder")
    return found, True


def _load_params(step_folder: Path, config: ModelConfig, mesh: Mesh, *, check: bool) -> Params:
    abstract = abstract_params(config, mesh)
    named = {_PARAMS + name: leaf for name, leaf in to_named(abstract).items()}
    arrays = checkpoint.restore(step_folder, named, subset=True, check=check)
    return from_named(abstract, {name.removeprefix(_PARAMS): a for name, a in arrays.items()})

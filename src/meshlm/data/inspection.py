"""`meshlm data inspect`: what a token store holds, for people and for programs."""

import json
from dataclasses import dataclass
from typing import Any

import msgspec
from tyro.conf import Positional

from meshlm.data.names import from_json_name, printable
from meshlm.data.store import SPLITS, Counts, SplitCounts, TokenStore

_SAMPLE_TOKENS = 64
_SHOWN_SOURCES = 10


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a token store holds: counts, sources, sample text."""

    path: Positional[str]
    """Folder of the token store."""
    samples: int = 3
    """Documents of each split to show the beginning of."""
    json: bool = False
    """Print one JSON object."""


def inspect(config: InspectConfig) -> str:
    """What to print for the store at `config.path`. Raises as `TokenStore.open`."""
    store = TokenStore.open(config.path)
    if config.json:
        # In ASCII: what a terminal's encoding lacks would be escaped, and be no JSON any more.
        return json.dumps(describe(store, config.samples), allow_nan=False)
    return render(store, config.samples)


def describe(store: TokenStore, num_samples: int) -> dict[str, Any]:
    """The manifest, the fingerprint and samples, as JSON has them."""
    described = msgspec.to_builtins(store.manifest)
    samples = {split: sample_texts(store, split, num_samples) for split in SPLITS}
    return described | {"fingerprint": store.fingerprint, "samples": samples}


def sample_texts(store: TokenStore, split: str, count: int) -> list[str]:
    """The beginnings of `count` documents, evenly spread over `split`."""
    starts = store.document_starts(split)
    chosen = sorted({i * len(starts) // count for i in range(count)}) if len(starts) else []
    texts = []
    for i in chosen:
        start = int(starts[i])
        end = int(starts[i + 1]) if i + 1 < len(starts) else store.num_tokens(split)
        tokens = store.read(split, start, min(start + _SAMPLE_TOKENS, end))
        texts.append(store.tokenizer.decode(tokens.tolist()))
    return texts


def render(store: TokenStore, num_samples: int) -> str:
    """The store in lines of text."""
    manifest = store.manifest
    entry = manifest.tokenizer
    lines = [
        f"{store.path}: token store, version {manifest.version}",
        f"tokenizer: {entry.name}, {entry.vocab_size:,} tokens, stored as {manifest.dtype}",
        f"fingerprint: {store.fingerprint}",
    ]
    lines += [f"{split:>5}: {_counts(manifest.splits[split])}" for split in SPLITS]
    lines += _by_name("sets", {name: _both(c) for name, c in manifest.sets.items()})
    sources = {from_json_name(source.path): _both(source.counts) for source in manifest.sources}
    lines += _by_name("sources", sources)
    if manifest.num_bad_documents or manifest.num_empty_documents:
        lines.append(
            f"left out: {manifest.num_bad_documents} bad and "
            f"{manifest.num_empty_documents} empty documents"
        )
        lines += [f"  {bad}" for bad in manifest.bad_documents]
    if manifest.left_out:
        lines.append(f"left out: {len(manifest.left_out):,} files, members or folders")
        shown = manifest.left_out[:_SHOWN_SOURCES]
        lines += [
            f"  {printable(from_json_name(one.path))}: {printable(one.reason)}" for one in shown
        ]
        if len(manifest.left_out) > _SHOWN_SOURCES:
            lines.append(f"  and {len(manifest.left_out) - _SHOWN_SOURCES:,} more (--json has all)")
    for split in SPLITS:
        for text in sample_texts(store, split, num_samples):
            lines += ["", f"--- {split}", _printable(text)]
    return "\n".join(lines)


def _both(counts: SplitCounts) -> Counts:
    total = Counts()
    for split_counts in counts.values():
        total.add(split_counts)
    return total


def _counts(counts: Counts) -> str:
    line = (
        f"{counts.num_tokens:,} tokens, {counts.num_documents:,} documents, "
        f"{counts.num_bytes:,} bytes"
    )
    if not counts.num_tokens:
        return line
    return f"{line}, {counts.num_bytes / counts.num_tokens:.2f} bytes/token"


def _by_name(title: str, counts: dict[str, Counts]) -> list[str]:
    if not counts:
        return []
    largest = sorted(counts.items(), key=lambda item: (-item[1].num_tokens, item[0]))
    lines = [f"{title}: {len(counts):,}"]
    lines += [f"  {printable(name)}: {_counts(c)}" for name, c in largest[:_SHOWN_SOURCES]]
    if len(largest) > _SHOWN_SOURCES:
        lines.append(f"  and {len(largest) - _SHOWN_SOURCES:,} more")
    return lines


def _printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)

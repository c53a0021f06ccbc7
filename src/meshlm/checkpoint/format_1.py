"""Names of arrays in checkpoints of format 1, whose parameter tree was flat.

Format 1 knows GPT-J alone. Its names end in that of a parameter: after `params.`, and after the
name of each slot of the optimizer (`optimizer.adam.mu.`, `optimizer.adafactor.v_row.`). The config
of such a checkpoint is read by `model.families.upgrade_record`.
"""

import re

_BLOCK = {
    "norm_scale": "attention_norm.scale",
    "norm_offset": "attention_norm.offset",
    "query": "attention.query.weight",
    "key": "attention.key.weight",
    "value": "attention.value.weight",
    "attention_out": "attention.out.weight",
    "ff_in": "feed_forward.up.weight",
    "ff_in_bias": "feed_forward.up.bias",
    "ff_out": "feed_forward.down.weight",
    "ff_out_bias": "feed_forward.down.bias",
}
_OTHERS = {
    "embedding": "embedding.tokens",
    "embedding_bias": "embedding.bias",
    "final_norm_scale": "final_norm.scale",
    "final_norm_offset": "final_norm.offset",
    "head": "head.weight",
    "head_bias": "head.bias",
}
PARAMETERS = {f"blocks.{old}": f"blocks.{new}" for old, new in _BLOCK.items()} | _OTHERS
"""Today's name of each parameter by its name in format 1."""


def _pattern(names: dict[str, str]) -> re.Pattern[str]:
    """Matches a name that ends in one of these; a layer's number may follow `blocks`."""
    ends = "|".join(
        re.escape(name).replace(r"blocks\.", r"blocks\.(?:\d+\.)?")
        for name in sorted(names, key=len, reverse=True)
    )
    return re.compile(rf"(?:.*\.)?(?P<end>{ends})")


_INVERSE = {new: old for old, new in PARAMETERS.items()}
_OLD, _NEW = _pattern(PARAMETERS), _pattern(_INVERSE)


def to_current(name: str) -> str:
    """Returns today's name of an array of format 1; other names stay as they are."""
    return _renamed(name, _OLD, PARAMETERS)


def to_format_1(name: str) -> str:
    """Returns the name in format 1 of an array that is named as today; others stay as they are."""
    return _renamed(name, _NEW, _INVERSE)


def _renamed(name: str, pattern: re.Pattern[str], table: dict[str, str]) -> str:
    found = pattern.fullmatch(name)
    if found is None:
        return name
    end = found["end"]
    layer = re.match(r"blocks\.(\d+\.)", end)
    renamed = table[end if layer is None else end.replace(layer[1], "", 1)]
    if layer is not None:
        renamed = renamed.replace("blocks.", layer[0], 1)
    return name[: -len(end)] + renamed

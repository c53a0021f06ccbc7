"""The shapes that generation compiles for: few, so that a new length does not compile again.

    prompt length    a power of two, at least 32
    cache places     a power of two, at least 64
    rows             the devices that share them times a power of two

Lengths end at the model's context, whatever it is. For a context of 2,048 and up to 32 rows on one
device that is at most 7 x 6 prefills and 6 x 5 decodings, and only those that are met compile.
"""

from collections.abc import Iterable

MIN_PROMPT_BUCKET = 32
MIN_CACHE_BUCKET = 64
# A group of rows is decoded together; further rows wait for it.
MAX_ROWS = 32
# Bounds the attention scores of prefill: rows x heads x length x length.
MAX_PREFILL_TOKENS = 4096


def power_of_two(least: int) -> int:
    """Returns the smallest power of two that is at least `least`."""
    return 1 << max(0, least - 1).bit_length()


def prompt_bucket(length: int, context_length: int) -> int:
    """Returns the length to which a prompt of `length` tokens is padded."""
    return min(max(MIN_PROMPT_BUCKET, power_of_two(length)), context_length)


def cache_bucket(num_places: int, context_length: int) -> int:
    """Returns the places of a cache that must hold `num_places` tokens."""
    return min(max(MIN_CACHE_BUCKET, power_of_two(num_places)), context_length)


def row_bucket(num_rows: int, shards: int) -> int:
    """Returns the rows of a batch for `num_rows`, as many on each of `shards` devices."""
    return shards * power_of_two(-(-num_rows // shards))


def prefill_parts(
    lengths: Iterable[int], context_length: int, shards: int
) -> list[tuple[int, list[int]]]:
    """Returns (padded length, indices of prompts) for each prefill.

    Prompts share a prefill only with prompts of their own length bucket.
    """
    by_bucket: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_bucket.setdefault(prompt_bucket(length, context_length), []).append(index)
    parts = []
    for bucket, indices in sorted(by_bucket.items()):
        most = shards * max(1, MAX_PREFILL_TOKENS // bucket)
        parts += [(bucket, indices[i : i + most]) for i in range(0, len(indices), most)]
    return parts

"""Is what was found in the input fit for a token store? Too much that is bad ends the work."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from meshlm.core.errors import BadInputError
from meshlm.data.inputs import InputFile, LeftOut
from meshlm.data.journal import Totals, split_counts
from meshlm.data.kinds import LABELS
from meshlm.data.readers import END_OF_TEXT

_JUDGED_FROM_DOCUMENTS = 1000
_SHORT_TOKENS = 2049
_SHOWN = 20


class Judge:
    """Judges the documents of one store by the options with which it is made.

    Args:
        max_bad_documents: the largest share of documents that may be bad.
        val_fraction: of the documents; 0 for none.
        inputs: the files, for the messages.
    """

    def __init__(
        self, max_bad_documents: float, val_fraction: float, inputs: Sequence[InputFile]
    ) -> None:
        self._max_bad, self._val_fraction = max_bad_documents, val_fraction
        self._inputs = inputs

    def add(self, totals: Totals, added: Totals, bad_at: Sequence[int]) -> None:
        """Raises BadInputError once the share of bad documents is too high at any document from the
        1,000th on.

        Args:
            totals: of the documents before these.
            added: of these.
            bad_at: ordinals of the bad ones among these.
        """
        moments = [totals.num_seen + number for number in bad_at]
        for count, seen in enumerate(moments, start=totals.num_bad + 1):
            if seen >= _JUDGED_FROM_DOCUMENTS:
                self._check_share(count, seen, totals, added)
        if totals.num_seen < _JUDGED_FROM_DOCUMENTS <= totals.num_seen + added.num_seen:
            early = sum(seen <= _JUDGED_FROM_DOCUMENTS for seen in moments)
            self._check_share(totals.num_bad + early, _JUDGED_FROM_DOCUMENTS, totals, added)

    def _check_share(self, num_bad: int, num_seen: int, *found: Totals) -> None:
        if num_bad <= self._max_bad * num_seen:
            return
        first = next(example for totals in found for example in totals.bad_examples)
        raise BadInputError(
            f"{num_bad} of {num_seen} documents are bad ({num_bad / num_seen:.2%}), the first "
            f"{first}: mend the input, or allow more with --max-bad-documents"
        )

    def check_result(
        self, totals: Totals, left_out: Sequence[LeftOut], *, split_on: str = ""
    ) -> Iterator[str]:
        """Yields notes on all that was found.

        Args:
            left_out: what was not read beside `totals.left_out`.
            split_on: the separator that was asked for, or "".

        Raises:
            BadInputError: too much is bad, or there is nothing to train on.
        """
        self._check_share(totals.num_bad, totals.num_seen, totals)
        counts = split_counts(totals.sources)
        left_out = [*left_out, *totals.left_out]
        summary = (
            f"{totals.num_bad} bad and {totals.num_empty} empty documents, "
            f"{len(left_out)} files, members or folders"
        )
        if not any(c.num_tokens for c in counts.values()):
            first = f", the first {left_out[0].path}: {left_out[0].reason}" if left_out else ""
            raise BadInputError(
                f"no text in the {len(self._inputs)} input files ({summary} left out{first}): "
                "give files with text, or JSON with a field `text` (or another --text-field)"
            )
        if not counts["train"].num_tokens:
            raise BadInputError(
                f"all {counts['val'].num_documents} documents fell to validation: "
                "give more documents or a lower --val-fraction, 0 for none"
            )
        yield from self._kinds(totals)
        if totals.num_bad or totals.num_empty or left_out:
            yield f"left out: {summary}"
        yield from _first(f"left out: {one.path}: {one.reason}" for one in left_out)
        for example in totals.bad_examples:
            yield f"bad: {example}"
        if split_on and not totals.num_split:
            yield _split_nothing(split_on)
        yield from _marks(totals)
        if self._val_fraction and not counts["val"].num_tokens:
            yield (
                f"none of the {counts['train'].num_documents} documents fell to validation: "
                "more documents or a higher --val-fraction would give a validation loss"
            )
        if counts["train"].num_tokens < _SHORT_TOKENS:
            yield (
                f"only {counts['train'].num_tokens} tokens to train on: too few for a sequence "
                "of 2048; give more text, or train with a smaller --seq-len"
            )

    def _kinds(self, totals: Totals) -> Iterator[str]:
        """What the files were read as, and where that is not what their names say."""
        ended = [(self._inputs[i].path, one) for i, one in sorted(totals.ended.items())]
        kinds = Counter(one.kind for _, one in ended if one.kind and one.kind != "left out")
        if kinds:
            listed = ", ".join(f"{n} {LABELS.get(kind, kind)}" for kind, n in kinds.most_common())
            yield f"files by kind: {listed}"
        yield from _first(f"{path}: {one.note}" for path, one in ended if one.note)
        yield from _first(
            f"{path}: truncated; what is there was used" for path, one in ended if one.truncated
        )


def _first(lines: Iterable[str]) -> Iterator[str]:
    """The first of the lines, and how many more there are."""
    lines = iter(lines)
    yield from itertools.islice(lines, _SHOWN)
    if more := sum(1 for _ in lines):
        yield f"and {more} more; the manifest has all of them"


def _split_nothing(separator: str) -> str:
    hint = ""
    if "\\n" in separator or "\\t" in separator:
        hint = "; a shell writes a line break within $'...'"
    elif "\n" in separator and "\r" not in separator:
        hint = "; files with Windows' line ends have \\r\\n"
    return f"--split-on {separator!r} stands between no two texts, so nothing was split{hint}"


def _marks(totals: Totals) -> Iterator[str]:
    if totals.num_marked:
        yield (
            f"{END_OF_TEXT} is written out in {totals.num_marked} documents, as part of their "
            f"text: to end documents there, give --split-on '{END_OF_TEXT}'; to make tokens of it, "
            "--special-tokens parse"
        )
    if totals.num_spelled:
        yield (
            f"{totals.num_spelled:,} other special tokens of the tokenizer are written out in the "
            "texts and were encoded as text: --special-tokens parse makes tokens of them"
        )
    if totals.num_boms:
        yield (
            f"{totals.num_boms} documents hold a byte-order mark (U+FEFF) after their beginning, "
            "as joined files do; it was kept as text"
        )

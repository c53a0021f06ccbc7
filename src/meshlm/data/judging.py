"""Is what was found in the input fit for a token store? Too much that is bad ends the work."""

from collections.abc import Iterator, Sequence

from meshlm.core.errors import BadInputError
from meshlm.data.journal import Totals, split_counts

_JUDGED_FROM_DOCUMENTS = 1000
_SHORT_TOKENS = 2049


class Judge:
    """Judges the documents of one store by the options with which it is made.

    Args:
        max_bad_documents: the largest share of documents that may be bad.
        val_fraction: of the documents; 0 for none.
        num_inputs: files, for the messages.
    """

    def __init__(self, max_bad_documents: float, val_fraction: float, num_inputs: int) -> None:
        self._max_bad, self._val_fraction = max_bad_documents, val_fraction
        self._num_inputs = num_inputs

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

    def check_result(self, totals: Totals) -> Iterator[str]:
        """Yields notes on all that was found.

        Raises:
            BadInputError: too much is bad, or there is nothing to train on.
        """
        self._check_share(totals.num_bad, totals.num_seen, totals)
        counts = split_counts(totals.sources)
        binary = sum(ended.binary for ended in totals.ended.values())
        left_out = (
            f"{totals.num_bad} bad and {totals.num_empty} empty documents, {binary} binary files"
        )
        if not any(c.num_tokens for c in counts.values()):
            raise BadInputError(
                f"no text in the {self._num_inputs} input files ({left_out}): "
                "give files with text, or .jsonl with a field `text`"
            )
        if not counts["train"].num_tokens:
            raise BadInputError(
                f"all {counts['val'].num_documents} documents fell to validation: "
                "give more documents or a lower --val-fraction, 0 for none"
            )
        if totals.num_bad or totals.num_empty or binary:
            yield f"left out: {left_out}"
        for example in totals.bad_examples:
            yield f"bad: {example}"
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

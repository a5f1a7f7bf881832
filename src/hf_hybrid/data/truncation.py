"""Texts longer than the limit of an option: cut, as everywhere in Transformers, but counted, said and recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_COUNTS: ContextVar[dict[str, dict[str, int]] | None] = ContextVar("truncated_rows", default=None)
_COLUMN = "is_longer_than_"


@contextmanager
def counting_truncated() -> Iterator[dict[str, dict[str, int]]]:
    """Collects meanwhile how many rows are cut, by kind of rows and option; what none exceeds is left out."""
    counts: dict[str, dict[str, int]] = {}
    token = _COUNTS.set(counts)
    try:
        yield counts
    finally:
        _COUNTS.reset(token)


class TruncatingTokenizer:
    """Calls a tokenizer with a limit, and notes for every row whether it exceeds it.

    Args:
        tokenizer: tokenizer of the model.
        limits: tokens of a text, by the option that sets them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Mapping[str, int]) -> None:
        self.tokenizer, self.limits = tokenizer, limits

    def __call__(self, option: str, *texts: Any, **named_texts: Any) -> tuple[BatchEncoding, dict[str, list[bool]]]:
        """Token ids of a batch of at most the tokens of `option`, and a column of booleans for `map_rows`."""
        encoded = self.tokenizer(
            *texts, **named_texts, truncation=True, max_length=self.limits[option], return_token_type_ids=False
        )
        if encoded.encodings is not None:
            exceeds = [bool(encoding.overflowing) for encoding in encoded.encodings]
        else:  # a tokenizer in Python
            whole = self.tokenizer(*texts, **named_texts, return_token_type_ids=False, verbose=False)
            exceeds = [len(ids) < len(all_ids) for ids, all_ids in zip(encoded["input_ids"], whole["input_ids"])]
        return encoded, {_COLUMN + option: exceeds}

    def rows_of(
        self, option: str, first: list[str], second: list[str] | None = None, *, two_inputs: bool = False
    ) -> dict[str, Any]:
        """Columns for a classifier of texts or pairs, for `map_rows`.

        Args:
            option: the option that sets the limit.
            first: a batch of texts.
            second: the other texts of pairs.
            two_inputs: return them as `pair_input_ids` and so on; otherwise a pair is one text.
        """
        encoded, exceeds = self(option, first, None if two_inputs else second)
        columns = {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}
        if two_inputs:
            paired, exceeds_too = self(option, second)
            columns |= {f"pair_{name}": values for name, values in paired.items()}
            exceeds = {name: [*map(any, zip(flags, exceeds_too[name]))] for name, flags in exceeds.items()}
        return columns | exceeds

    def map_rows(self, rows: Dataset, encode: Callable[[Any], dict[str, Any]], what: str, **options: Any) -> Dataset:
        """The rows with the columns that `encode` makes of a batch; those that are cut are counted.

        Args:
            rows: data set with any columns.
            encode: function from a batch of rows to columns, also those of booleans that a call of this tokenizer returns.
            what: name of the rows in the progress bar, the log and the records.
            options: of `Dataset.map`.
        """
        options = {"batched": True, "remove_columns": rows.column_names, "desc": f"tokenize {what}", **options}
        encoded = rows.map(encode, **options)
        noted = [name for name in encoded.column_names if name.startswith(_COLUMN)]
        for name in noted:  # in columns, because `map` may read its results from a cache
            self._report(name.removeprefix(_COLUMN), sum(encoded[name][:]), len(encoded), what)
        return encoded.remove_columns(noted)

    def _report(self, option: str, count: int, total: int, what: str) -> None:
        if not count:
            return
        logger.info(
            "%s: %s of %s rows are cut to %d tokens (`%s`).",
            what.capitalize(),
            f"{count:,}",
            f"{total:,}",
            self.limits[option],
            option,
        )
        counts = _COUNTS.get()
        if counts is not None:
            counts.setdefault(what, {})[option] = count

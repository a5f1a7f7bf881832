"""Texts that are cut to a length, counted."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import BatchEncoding

from hf_hybrid.data.truncation import TruncatingTokenizer, counting_truncated
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer

TEXTS = ["a", "abcd", "abcde", "abcdefgh"]


def rows_cut(tokenizer: Any) -> tuple[Dataset, dict[str, Any]]:
    tokenize = TruncatingTokenizer(tokenizer, {"max_length": 5})

    def encode(batch: Any) -> dict[str, Any]:
        encoded, is_long = tokenize("max_length", batch["text"])
        return {**encoded, **is_long}

    with counting_truncated() as counts:
        return tokenize.map_rows(Dataset.from_dict({"text": TEXTS}), encode, "training data"), counts


def test_rows_at_the_limit_are_not_cut() -> None:
    """With the end token; columns are those of the tokenizer, whether it is one of Rust or of Python."""
    tokenizer = byte_tokenizer()

    def in_python(*args: Any, **options: Any) -> BatchEncoding:
        return BatchEncoding(dict(tokenizer(*args, **options)))

    for kind in (tokenizer, in_python):
        encoded, counts = rows_cut(kind)
        assert counts == {"training data": {"max_length": 2}}
        assert encoded.column_names == ["input_ids", "attention_mask"]
        assert encoded["input_ids"][:] == tokenizer(TEXTS, truncation=True, max_length=5)["input_ids"]


@pytest.mark.parametrize("two_inputs", [True, False])
def test_pairs_are_counted_once(two_inputs: bool) -> None:
    """However many of their texts are cut; as one text, they share the limit."""
    tokenize = TruncatingTokenizer(byte_tokenizer(), {"max_length": 5})
    pairs = Dataset.from_dict({"one": ["a", "abcdef", "abcdef"], "two": ["a", "a", "abcdef"]})

    def encode(batch: Any) -> dict[str, Any]:
        return tokenize.rows_of("max_length", batch["one"], batch["two"], two_inputs=two_inputs)

    with counting_truncated() as counts:
        rows = tokenize.map_rows(pairs, encode, "data")
    assert counts == {"data": {"max_length": 2}} and max(rows["length"]) == 5
    assert ("pair_input_ids" in rows.column_names) == two_inputs

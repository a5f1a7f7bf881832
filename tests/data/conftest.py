"""Fixtures shared by the tests of the data area."""

from __future__ import annotations

import pytest

from hf_hybrid.data.corpus import language_reference
from hf_hybrid.tokenization.sentencepiece_tokenizer import train_sentencepiece_tokenizer


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """A few pages of English prose."""
    return language_reference()[:20]


@pytest.fixture(scope="session")
def tokenizer(documents):
    """400 pieces and 64 sentinels."""
    return train_sentencepiece_tokenizer(documents, vocab_size=400, num_sentinels=64, num_threads=1)

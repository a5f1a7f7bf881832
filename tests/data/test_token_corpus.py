"""Tokenised corpora in memory and on disk."""

from __future__ import annotations

import numpy as np
import pytest

from hf_hybrid.data.token_corpus import document_batches, load_token_file, tokenize_corpus
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer


def test_documents_end_with_eos_and_literal_specials_stay_text(tokenizer):
    texts = ["a class", "", None and "", "an </s> <extra_id_0> object", {"text": "a row"}, {"text": None}]
    tokens = tokenize_corpus([text for text in texts if text is not None], tokenizer, progress=False)
    assert tokens.dtype == np.uint16
    documents = [document for document in np.split(tokens, np.nonzero(tokens == 1)[0] + 1) if len(document)]
    decoded = [tokenizer.decode(document[:-1]) for document in documents]
    assert decoded == ["a class", "an </s> <extra_id_0> object", "a row"]
    assert tokens.max() < 400


def test_file_equals_memory(tokenizer, documents, tmp_path):
    path = tmp_path / "sub" / "tokens.bin"
    on_disk = tokenize_corpus(documents, tokenizer, path, progress=False)
    assert isinstance(on_disk, np.memmap)
    assert np.array_equal(on_disk, tokenize_corpus(documents, tokenizer, progress=False))
    assert np.array_equal(load_token_file(path), on_disk)
    assert sorted(item.name for item in path.parent.iterdir()) == ["tokens.bin", "tokens.bin.json"]
    assert len(tokenize_corpus(documents, tokenizer, max_tokens=1000, progress=False)) == 1000
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="description says"):
        load_token_file(path)


def test_batches_hold_all_documents(documents):
    batches = list(document_batches(documents, characters=5000, limit=3))
    assert [text for batch in batches for text in batch] == documents
    assert max(map(len, batches)) == 3


def test_bad_input(tokenizer, tmp_path):
    path = tmp_path / "tokens.bin"
    for texts in ([], ["", "  \n"]):
        with pytest.raises(ValueError, match="contains no text"):
            tokenize_corpus(texts, tokenizer, path, progress=False)
    with pytest.raises(ValueError, match="Documents must be strings"):
        tokenize_corpus([1, 2], tokenizer, path, progress=False)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        tokenize_corpus(["a"], byte_tokenizer(eos=False), path, progress=False)
    assert list(tmp_path.iterdir()) == []

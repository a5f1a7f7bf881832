"""The checkpoints of the repository: complete, small, and better than word counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_hybrid import verify_export
from hf_hybrid.data.corpus import embedded_text_corpus
from hf_hybrid.data.span_corruption import SpanCorruptionCollator, SpanCorruptionDataset
from hf_hybrid.data.token_corpus import tokenize_corpus
from hf_hybrid.tokenization.special_tokens import sentinel_ids

FOLDER = Path(__file__).resolve().parents[1] / "checkpoints" / "spade-small"


@pytest.fixture(scope="module")
def loaded():
    return AutoModelForSeq2SeqLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


def test_files() -> None:
    verify_export(FOLDER)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 14_000_000
    assert not list(FOLDER.glob("*.bin")) and not list(FOLDER.glob("*.pt"))


def test_hidden_text_is_easier_than_by_word_counts(loaded) -> None:
    """On documents that it has not seen, sentinels and the end of sequence left out."""
    model, tokenizer = loaded
    assert model.dtype == torch.float32
    documents = embedded_text_corpus("validation", families=("numpy", "python"))[-40:]
    tokens = tokenize_corpus(documents, tokenizer)[:12000]
    options = {"input_length": 256, "sentinel_ids": sentinel_ids(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    rows = SpanCorruptionDataset(tokens, seed=0, resample_each_epoch=False, **options)
    batch = SpanCorruptionCollator(model)([rows[index] for index in range(len(rows))])
    with torch.no_grad():
        logits = model(**batch).logits
    counted = (batch["labels"] > 1) & ~torch.isin(batch["labels"], torch.tensor(sentinel_ids(tokenizer)))
    loss = torch.nn.functional.cross_entropy(logits[counted], batch["labels"][counted])
    counts = torch.bincount(torch.as_tensor(tokens).long())
    entropy = torch.distributions.Categorical(counts.float()).entropy()  # of counts that know this very text
    assert loss < entropy - 0.3


def test_it_fills_in(loaded) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("She had never <extra_id_0> before in her life.", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0])
    assert "<extra_id_0>" in text

"""The checkpoints of the repository: complete, small, and better than word counts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from hf_hybrid import verify_export
from hf_hybrid.data.corpus import embedded_text_corpus
from hf_hybrid.data.span_corruption import SpanCorruptionCollator, SpanCorruptionDataset
from hf_hybrid.data.token_corpus import tokenize_corpus
from hf_hybrid.tokenization.special_tokens import sentinel_ids

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
FOLDER = CHECKPOINTS / "spade-small"
LM_FOLDER = CHECKPOINTS / "spade-lm-small"
LARGEST = {FOLDER: 14_000_000, LM_FOLDER: 8_000_000}  # bytes
# Written for this test. LZMA needs more than 5 bits for a byte of a text as short as these.
TEXTS = {
    "novel": "The old gentleman put down his hat upon the table, and looked at his daughter with an expression which she had "
    'never seen before. "My dear," he said, "I have something to tell you, and I do not know how to begin." She did not answer him, '
    "but went to the window and looked out at the rain.",
    "docstring": "This function returns a new array with the same shape and type as the given array. If the value is None, the "
    "default is used. Raises ValueError if the number of dimensions is not equal to the length of the list.",
}


@pytest.fixture(scope="module")
def loaded():
    return AutoModelForSeq2SeqLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def language_model():
    return AutoModelForCausalLM.from_pretrained(LM_FOLDER).eval(), AutoTokenizer.from_pretrained(LM_FOLDER)


@pytest.mark.parametrize("folder", list(LARGEST), ids=lambda folder: folder.name)
def test_files(folder: Path) -> None:
    verify_export(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST[folder]
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))


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


@pytest.mark.parametrize(("name", "bound"), [("novel", 1.2), ("docstring", 1.2)])
def test_bits_per_byte_of_a_short_text(language_model, name: str, bound: float) -> None:
    model, tokenizer = language_model
    assert model.dtype == torch.float32
    text = TEXTS[name]
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])  # a document begins behind `</s>`
    assert tokenizer.decode(ids[0, 1:]) == text  # nothing is appended, nothing is lost
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss / math.log(2) * (ids.shape[1] - 1) / len(text.encode()) < bound


def test_it_continues_a_text(language_model) -> None:
    """Also in the pipeline, which decodes the new tokens alone: without the space in front of them, unless the prompt ends with it."""
    model, tokenizer = language_model
    options = {"max_new_tokens": 12, "do_sample": False}
    text = tokenizer.decode(model.generate(**tokenizer("She had never", return_tensors="pt"), **options)[0])
    assert text.startswith("She had never ") and len(text.split()) > 6
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert write("She had never ", **options)[0]["generated_text"] == text

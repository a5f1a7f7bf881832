"""sentence-transformers: folders of every architecture open, see whole texts, train and reload equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import Case, all_heads, parametrize
from transformers import pipeline
from word_tokenizer import word_tokenizer
from works_with import working

datasets = pytest.importorskip("datasets")
sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers import (  # noqa: E402
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss  # noqa: E402

pytestmark = pytest.mark.company

ENCODER = "AutoModelForTextEncoding"  # of SPADE, whose base model is an encoder-decoder
BASES = working(
    "sentence-transformers, `SentenceTransformer`",
    [
        case
        for case in all_heads()
        if case.auto_name == ENCODER or (case.auto_name == "AutoModel" and ENCODER not in case.architecture.heads)
    ],
)
CLASSIFIERS = working(
    "sentence-transformers, `CrossEncoder`",
    [case for case in all_heads() if case.auto_name == "AutoModelForSequenceClassification"],
)
TEXTS = ["w3 w4 w5 w6", "w7", "w8 w9"]


def save(case: Case, folder: Path, **overrides: Any) -> torch.nn.Module:
    model = case.model(**overrides)
    model.save_pretrained(folder)
    word_tokenizer(ends=True, model_max_length=10**30).save_pretrained(folder)
    return model


def mean_states(model: torch.nn.Module, text: str) -> torch.Tensor:
    ids = word_tokenizer(ends=True, model_max_length=10**30)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0].mean(0)


@parametrize(BASES)
def test_embeddings_are_the_mean_states_of_whole_texts(case: Case, tmp_path: Path) -> None:
    model = save(case, tmp_path)
    encoder = SentenceTransformer(str(tmp_path), device="cpu")
    long = " ".join(TEXTS * 300)
    limit = model.config.max_source_length()
    texts = [*TEXTS, long] if limit is None else TEXTS
    for text, embedding in zip(texts, encoder.encode(texts, convert_to_tensor=True, batch_size=4)):
        torch.testing.assert_close(embedding, mean_states(model, text), rtol=1e-4, atol=1e-4)


@parametrize(BASES)
def test_it_trains_and_reloads_equal(case: Case, tmp_path: Path) -> None:
    save(case, tmp_path / "model")
    encoder = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    before = encoder.encode(TEXTS, convert_to_tensor=True)
    rows = datasets.Dataset.from_dict(
        {"sentence1": TEXTS * 4, "sentence2": TEXTS[::-1] * 4, "score": [0.1, 0.9, 0.4] * 4}
    )
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to=[], learning_rate=1e-2, save_strategy="no"
    )
    SentenceTransformerTrainer(
        model=encoder, args=args, train_dataset=rows, loss=CosineSimilarityLoss(encoder)
    ).train()
    encoder.eval()
    trained = encoder.encode(TEXTS, convert_to_tensor=True)
    assert (trained - before).abs().max() > 1e-4
    encoder.save_pretrained(str(tmp_path / "trained"))
    again = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), trained)


@parametrize(BASES)
def test_the_feature_extraction_pipeline_opens_the_same_folder(case: Case, tmp_path: Path) -> None:
    model = save(case, tmp_path)
    features = pipeline("feature-extraction", model=str(tmp_path))(TEXTS[0], return_tensors=True)
    assert type(model) is case.model_class
    torch.testing.assert_close(features[0].mean(0), mean_states(model, TEXTS[0]), rtol=1e-5, atol=1e-5)


@parametrize(CLASSIFIERS)
def test_a_cross_encoder_scores_pairs(case: Case, tmp_path: Path) -> None:
    model = save(case, tmp_path, num_labels=1)
    scorer = CrossEncoder(str(tmp_path), device="cpu", activation_fn=torch.nn.Identity())
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[0])]
    tokenizer = word_tokenizer(ends=True)
    for pair, score in zip(pairs, scorer.predict(pairs, convert_to_tensor=True)):
        inputs = tokenizer(*pair, return_tensors="pt")
        with torch.no_grad():
            expected = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0, 0]
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)

"""The stock pipelines run the models of every architecture as they run any other: single inputs, batches, long inputs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from factories import Case, all_heads, all_variants, parametrize
from PIL import Image
from transformers import PreTrainedTokenizerFast, pipeline
from word_tokenizer import word_tokenizer

TEXTS = ["w3 w4 w5 w6 w7", "w8", "w9 w10 w11"]
LONG = " ".join(f"w{3 + 7 * i % 30}" for i in range(60))


def heads(auto_name: str) -> list[Case]:
    return [case for case in all_heads() + all_heads(other_inputs=True) if case.auto_name == auto_name]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:  # a pipeline for causal models sets its padding side
    return word_tokenizer()


@parametrize(all_variants("AutoModelForCausalLM"))
def test_text_generation(tokenizer: PreTrainedTokenizerFast, case: Case) -> None:
    model = case.model()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 5, "min_new_tokens": 2, "do_sample": False}
    texts = [*TEXTS, LONG]
    single = [generator(text, **settings)[0]["generated_text"] for text in texts]
    batched = [result[0]["generated_text"] for result in generator(texts, batch_size=4, **settings)]
    assert batched == single
    for text, result in zip(texts, single):
        assert result.startswith(text)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        generated = model.generate(ids, **settings)
        words = tokenizer.decode(generated[0], skip_special_tokens=True)
        assert result.replace(" ", "") == words.replace(" ", "")
    assert any(len(result) > len(text) for text, result in zip(texts, single))  # special tokens are not shown
    beams = generator(TEXTS[0], num_beams=3, num_return_sequences=2, **settings)
    assert len(beams) == 2


@parametrize(heads("AutoModelForSequenceClassification"))
def test_text_classification(case: Case) -> None:
    model = case.model(num_labels=3)
    classifier = pipeline("text-classification", model=model, tokenizer=word_tokenizer(ends=True), top_k=None)
    pairs = [{"text": TEXTS[0], "text_pair": TEXTS[1]}, {"text": TEXTS[2], "text_pair": LONG[:60]}]
    for inputs in (TEXTS, pairs):
        for text, several in zip(inputs, classifier(inputs, batch_size=3)):
            (one,) = classifier([text])
            assert [entry["label"] for entry in one] == [entry["label"] for entry in several]
            scores = torch.tensor([entry["score"] for entry in one])
            torch.testing.assert_close(scores, torch.tensor([entry["score"] for entry in several]))
            torch.testing.assert_close(scores.sum(), torch.tensor(1.0))
    swapped = classifier([{"text": TEXTS[1], "text_pair": TEXTS[0]}])[0]
    assert swapped != classifier(pairs[:1])[0], "the second text of a pair is not read"


@parametrize(heads("AutoModelForMaskedLM"))
def test_fill_mask(case: Case) -> None:
    tokenizer = word_tokenizer(mask=True)
    fill = pipeline("fill-mask", model=case.model(), tokenizer=tokenizer, top_k=3)
    texts = [f"w3 w4 {tokenizer.mask_token} w6", f"w5 {tokenizer.mask_token}"]
    for text, several in zip(texts, fill(texts, batch_size=2)):
        one = fill(text)
        assert len(one) == 3 and all(entry["score"] > 0 for entry in one)
        assert [entry["token"] for entry in several] == [entry["token"] for entry in one]


@parametrize(heads("AutoModelForTokenClassification"))
def test_token_classification(tokenizer: PreTrainedTokenizerFast, case: Case) -> None:
    tagger = pipeline("token-classification", model=case.model(), tokenizer=tokenizer, ignore_labels=[])
    tagged = tagger([*TEXTS, LONG], batch_size=4)
    assert [len(entities) for entities in tagged] == [5, 1, 3, 60]
    for text, several in zip(TEXTS, tagged):
        assert [(entry["entity"], entry["word"]) for entry in tagger(text)] == [
            (entry["entity"], entry["word"]) for entry in several
        ]


@parametrize([case for case in all_heads() if case.auto_name in ("AutoModel", "AutoModelForTextEncoding")])
def test_feature_extraction(tokenizer: PreTrainedTokenizerFast, case: Case) -> None:
    if case.is_seq2seq:
        pytest.skip("the features of an encoder-decoder are those of its encoder: AutoModelForTextEncoding")
    extractor = pipeline("feature-extraction", model=case.model(), tokenizer=tokenizer)
    single = [torch.tensor(extractor(text)) for text in TEXTS]
    assert [features.shape[:2] for features in single] == [(1, 5), (1, 1), (1, 3)]
    for features, several in zip(single, extractor(TEXTS, batch_size=3)):
        padded = torch.tensor(several)
        torch.testing.assert_close(padded[:, : features.shape[1]], features, rtol=1e-4, atol=1e-5)


def processor(case: Case, kind: str, **options: Any) -> Any:
    module, name = getattr(case.architecture, kind).split(":")
    return getattr(import_module(module), name)(**options)


@parametrize(heads("AutoModelForImageClassification"))
def test_image_classification(case: Case) -> None:
    model = case.model(num_labels=3, image_size=4)
    classifier = pipeline(
        "image-classification", model=model, image_processor=processor(case, "image_processor", image_size=4), top_k=3
    )
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (size, size), dtype=np.uint8)) for size in (4, 9, 4)]
    for image, several in zip(images, classifier(images, batch_size=3)):
        one = classifier(image)
        assert [entry["label"] for entry in one] == [entry["label"] for entry in several]
        assert sum(entry["score"] for entry in one) == pytest.approx(1.0)
        assert one[0]["score"] == pytest.approx(several[0]["score"], rel=1e-4)


@parametrize(heads("AutoModelForAudioClassification"))
def test_audio_classification(case: Case) -> None:
    model = case.model(num_labels=3)
    extractor = processor(case, "feature_extractor", sampling_rate=8000)
    classifier = pipeline("audio-classification", model=model, feature_extractor=extractor, top_k=3)
    draw = np.random.default_rng(0)
    sounds = [draw.standard_normal(length).astype(np.float32) for length in (30, 100, 57)]
    for sound, several in zip(sounds, classifier(sounds, batch_size=3)):
        one = classifier(sound)
        assert [entry["label"] for entry in one] == [entry["label"] for entry in several]
        assert sum(entry["score"] for entry in one) == pytest.approx(1.0)
        assert one[0]["score"] == pytest.approx(several[0]["score"], rel=1e-4)

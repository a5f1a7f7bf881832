"""The stock pipelines run these models as they run any other."""

from __future__ import annotations

import copy

import pytest
import torch
from factories import VOCABULARY, Case
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, pipeline


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )


TEXTS = ["w3 w4 w5 w6 w7", "w8", "w9 w10 w11"]


@pytest.mark.parametrize(
    ("model_type", "variant"),
    [("spade_lm", name) for name in ("default", "rotary_add", "chunk_gated")]
    + [("mega", name) for name in ("default", "chunk_laplace")]
    + [("bst", name) for name in ("default", "mf")],
)
def test_text_generation(tokenizer: PreTrainedTokenizerFast, model_type: str, variant: str) -> None:
    model = Case(model_type, "AutoModelForCausalLM", variant).model()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 5, "min_new_tokens": 2, "do_sample": False}
    single = [generator(text, **settings)[0]["generated_text"] for text in TEXTS]
    batched = [result[0]["generated_text"] for result in generator(TEXTS, batch_size=3, **settings)]
    assert batched == single
    for text, result in zip(TEXTS, single):
        assert result.startswith(text) and len(result) > len(text)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        generated = model.generate(ids, **settings)
        words = tokenizer.decode(generated[0], skip_special_tokens=True)
        assert result.replace(" ", "") == words.replace(" ", "")
    beams = generator(TEXTS[0], num_beams=3, num_return_sequences=2, **settings)
    assert len(beams) == 2


@pytest.mark.parametrize("model_type", ["spade", "spade_lm", "mega", "bst"])
def test_text_classification(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    model = Case(model_type, "AutoModelForSequenceClassification", "default").model(num_labels=3)
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for text, several in zip(TEXTS, classifier(TEXTS, batch_size=3)):
        (one,) = classifier([text])
        assert [entry["label"] for entry in one] == [entry["label"] for entry in several]
        scores = torch.tensor([entry["score"] for entry in one])
        torch.testing.assert_close(scores, torch.tensor([entry["score"] for entry in several]))
        torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


def test_fill_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.mask_token = f"w{VOCABULARY - 1}"
    model = Case("mega", "AutoModelForMaskedLM", "default").model()
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3)
    found = fill(f"w3 w4 {tokenizer.mask_token} w6")
    assert len(found) == 3 and all(entry["score"] > 0 for entry in found)


@pytest.mark.parametrize("model_type", ["spade", "mega"])
def test_token_classification(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    model = Case(model_type, "AutoModelForTokenClassification", "default").model()
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    assert [len(entities) for entities in tagger(TEXTS)] == [5, 1, 3]


def test_feature_extraction(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Case("spade", "AutoModelForTextEncoding", "default").model()
    extractor = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    features = torch.tensor(extractor(TEXTS[0]))
    assert features.shape == (1, 5, model.config.d_model)

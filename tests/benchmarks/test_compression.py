"""Bits per byte: every token counted once, with enough before it; the bytes are those that the tokenizer keeps."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_hybrid

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def compression():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("compression")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 5), (8, 1), (64, 64)])
@pytest.mark.parametrize("size", [1, 7, 8, 20])
def test_every_token_is_predicted_once(compression, size: int, length: int, stride: int) -> None:
    tokens = list(range(10, 10 + size))
    predicted, first = [], True
    for inputs, targets in compression.windows(tokens, 1, length, stride):
        assert len(inputs) == len(targets) <= length
        places = [place for place, target in enumerate(targets) if target != -100]
        assert places == list(range(places[0], len(targets)))
        assert places[0] == 0 if first else places[0] >= length - stride
        predicted += [int(targets[place]) for place in places]
        first = False
    assert predicted == [*tokens, 1]


def test_code_length_is_that_of_whole_documents(compression, model) -> None:
    """Short documents fit one window: their bits are the loss of each on its own, whatever the batch pads."""
    documents = [[5, 6, 7, 8, 9], [10, 11], [12]]
    bits, count = compression.code_length(model, documents, 1, length=16, stride=12, batch_size=2)
    expected = 0.0
    with torch.no_grad():
        for ids in documents:
            row = torch.tensor([[1, *ids, 1]])
            expected += model(row, labels=row).loss.item() * (len(ids) + 1)
    assert count == 11
    assert bits == pytest.approx(expected / math.log(2), rel=1e-5)


def test_bytes_are_those_of_the_tokens(compression) -> None:
    tokenizer = hf_hybrid.byte_tokenizer()
    documents = compression.encoded(tokenizer, ["naïve", "  ", "two  words\n"])
    assert compression.text_as_read(tokenizer, documents) == "naïve\ntwo  words\n\n".encode()


def test_lzma_finds_repetitions(compression) -> None:
    text = b" ".join(str(number**3).encode() for number in range(400))
    once = compression.compressed_size(text)
    assert compression.compressed_size(2 * text) - once < once / 4


def test_sample_of_documents(compression) -> None:
    documents = [str(number) * 10 for number in range(9)]
    assert compression.sample(documents, None) == documents == sorted(compression.sample(documents, 1000))
    chosen = compression.sample(documents, 25)
    assert len(chosen) == 3 and set(chosen) < set(documents) and chosen == compression.sample(documents, 25)


def test_stride_beyond_the_window(compression, capsys) -> None:
    with pytest.raises(SystemExit):
        compression.parse(["--data", "x", "--length", "8", "--stride", "9"])
    assert "--stride must lie between 1 and --length (8); got 9." in capsys.readouterr().err

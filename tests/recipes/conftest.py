"""A toy corpus, a small tokenizer and tiny models, shared by the tests of all recipes."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from hf_hybrid.configuration.configuration_spade import SpadeConfig
from hf_hybrid.tokenization.sentencepiece_tokenizer import train_sentencepiece_tokenizer


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Pages of the language reference. They differ between versions of Python, and so does a vocabulary made from them."""
    topics = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)][:24]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index, document in enumerate(documents):
        (folder / f"{index:02d}.txt").write_text(document, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerBase:
    return train_sentencepiece_tokenizer(documents, vocab_size=480, num_sentinels=32)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """An untrained encoder-decoder with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = SpadeConfig(
        vocab_size=512, hidden_size=16, head_dim=8, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, decoder_layers=1,
        window_size=9, ssm_state_size=4, max_target_positions=64, hidden_dropout=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(tmp_path: Path) -> dict:
    """Training options of every test run: CPU, few steps, no progress bars."""
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
    }

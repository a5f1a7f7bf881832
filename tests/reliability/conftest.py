"""Small runs that the tests of reliability share."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest

from hf_hybrid.recipes import pretrain_clm, train_tokenizer

TINY = "hidden_size=16,num_attention_heads=2,head_dim=8,intermediate_size=16,num_hidden_layers=1,block_size=8,ssm_state_size=8"


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Options of a run of a second on a small corpus, without its output folder."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "corpus").mkdir()
    for index, name in enumerate(sorted(pydoc_data.topics.topics)[:12]):
        text = pydoc_data.topics.topics[name][:3000]
        (folder / "corpus" / f"{index}.txt").write_text(text, encoding="utf-8")
    tokenizer = {"data": str(folder / "corpus"), "vocab_size": 400, "output_dir": str(folder / "tokenizer")}
    train_tokenizer.main({**tokenizer, "num_sentinels": 8})
    return {
        "data": str(folder / "corpus"),
        "validation_fraction": 0.2,
        "tokenizer": str(folder / "tokenizer"),
        "arch": "bst",
        "config_overrides": f"{TINY},hidden_dropout=0.1",
        "segment_length": 16,
        "eval_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "report_to": "none",
    }


@pytest.fixture(scope="session")
def finished(toy: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of `toy`; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    pretrain_clm.main({**toy, "output_dir": str(folder)})
    return folder

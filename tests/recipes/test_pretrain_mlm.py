"""Masked language modelling, end to end on a toy corpus, with architectures of Transformers and of this library."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import evaluate
from hf_hybrid.recipes.pretrain_mlm import main

TINY_BERT = (
    "hidden_size=16,num_attention_heads=2,intermediate_size=32,num_hidden_layers=1,max_position_embeddings=64,"
    "hidden_dropout_prob=0.1"
)


@pytest.fixture
def pretraining(options, corpus, tokenizer_folder) -> dict:
    return {
        **options,
        "data": [str(corpus)],
        "tokenizer": str(tokenizer_folder),
        "arch": "bert",
        "config_overrides": TINY_BERT,
        "block_length": 32,
        "eval_strategy": "no",
        "max_validation_segments": 6,
    }


def test_a_model_is_trained_evaluated_and_filled_in(pretraining, tmp_path):
    metrics = main({**pretraining, "max_steps": 8, "learning_rate": 1e-2})
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    assert model_card_problems(card) == [] and "pipeline_tag: fill-mask" in card
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.mask_token == "<extra_id_0>"
    fill = pipeline("fill-mask", model=AutoModelForMaskedLM.from_pretrained(run), tokenizer=tokenizer)
    assert len(fill(f"a list of {tokenizer.mask_token} and values", top_k=3)) == 3
    data = {name: pretraining[name] for name in ("data", "block_length", "max_validation_segments", "use_cpu")}
    again = {"kind": "mlm", "model_name_or_path": str(run), "output_dir": str(tmp_path / "eval")}
    assert evaluate.main({**data, **again})["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_is_bitwise(pretraining, tmp_path, streaming):
    base = {**pretraining, "max_steps": 6, "save_steps": 4, "streaming": streaming, "held_out_documents": 3}
    main(base)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run" / "checkpoint-4", resumed / "checkpoint-4")
    main({**base, "output_dir": str(resumed), "resume_from_checkpoint": "last"})
    straight, continued = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", resumed))
    assert all(torch.equal(straight[name], continued[name]) for name in straight)


def test_mega_is_the_default(pretraining, tmp_path):
    overrides = (
        "hidden_size=16,num_hidden_layers=1,intermediate_size=16,nffn_hidden_size=16,use_chunking=true,chunk_size=8"
    )
    metrics = main({**pretraining, "arch": None, "config_overrides": overrides, "learning_rate": 1e-2})
    assert metrics["steps"] == 3 and metrics["eval_loss"] < 7
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "run").config.model_type == "mega"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_probability": 1.5}, "`mask_probability` must lie between"),
        ({"block_length": 65}, "accepts 64.*`block_length`"),
        ({"arch": "spade", "config_overrides": None}, "AutoModelForMaskedLM"),
        ({"streaming": True, "max_steps": -1}, "`streaming` needs `max_steps`"),
    ],
)
def test_bad_options_are_explained(pretraining, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main({**pretraining, **changes})
    assert not (tmp_path / "run").exists()

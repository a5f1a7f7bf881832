"""The option files of `configs/pretraining`: the model that they promise, and their path at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from hf_hybrid import SpadeConfig, SpadeForConditionalGeneration
from hf_hybrid.cli import main as command

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "pretraining").glob("*.yaml"))
SIZES = {"spade-7m": (6.2e6, 7.2e6), "spade-50m": (25e6, 60e6)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_size_of_the_model(path: Path) -> None:
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = SpadeForConditionalGeneration(SpadeConfig(vocab_size=8192, **options["config_overrides"]))
    smallest, largest = SIZES[path.stem]
    assert smallest < model.num_parameters() < largest


def test_from_text_to_shards_of_weights(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Prepared tokens, a run with the file that ends by its time, weights in small files."""
    tokens, run, shared = (str(tmp_path / name) for name in ("tokens", "run", "shared"))
    tokenizer = ["--tokenizer", str(tokenizer_folder)]
    texts = ["--data", str(corpus), "--validation_fraction", "0.2", "--num_proc", "1"]
    assert command(["tokenize", *texts, *tokenizer, "--output_dir", tokens]) == 0
    small = (
        "hidden_size=32,head_dim=16,num_attention_heads=2,intermediate_size=64,num_hidden_layers=2,decoder_layers=1"
    )
    changes = [
        *("--config_overrides", small, "--input_length", "32", "--per_device_train_batch_size", "4", "--use_cpu"),
        *("--max_validation_segments", "4", "--dataloader_num_workers", "0", "--max_minutes", "0.02", "--disable_tqdm", "true"),
    ]  # fmt: skip
    file = str(ROOT / "configs" / "pretraining" / "spade-50m.yaml")
    words = [file, "--data", tokens, *tokenizer, *changes, "--output_dir", run]
    assert command(["pretrain", "span-corruption", *words]) == 0
    arguments = json.loads((Path(run) / "arguments.json").read_text())
    assert arguments["bf16"] and arguments["muon_learning_rate"] == 5e-3 and arguments["arch"] == "spade"
    metrics = json.loads((Path(run) / "metrics.json").read_text())
    assert 0 < metrics["steps"] < arguments["max_steps"]
    sizes = ["--max_shard_size", "60KB", "--dtype", "bfloat16"]
    assert command(["push", "--model_name_or_path", run, *sizes, "--output_dir", shared]) == 0
    weights = list(Path(shared).glob("*.safetensors"))
    assert (
        len(weights) > 1 and max(path.stat().st_size for path in weights) < 80_000
    )  # 60 kB and the names of the tensors
    first, second = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (run, shared))
    assert first.num_parameters() == second.num_parameters() and second.dtype == torch.float32

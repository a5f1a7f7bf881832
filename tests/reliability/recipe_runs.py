"""A small run of every recipe that trains, and how two runs are compared."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

RECIPES = (
    "pretrain_clm",
    "pretrain_mlm",
    "pretrain_span_corruption",
    "finetune_glue",
    "finetune_summarization",
    "finetune_translation",
    "train_lra",
    "train_synthetic",
    "classify_image",
    "classify_audio",
)
SPADE = (
    "hidden_size=16,head_dim=8,intermediate_size=32,num_attention_heads=2,num_hidden_layers=1,decoder_layers=1,window_size=9,"
    "ssm_state_size=4,max_target_positions=256"
)
MEGA = (
    "hidden_size=16,num_hidden_layers=1,intermediate_size=16,shared_representation_size=8,nffn_hidden_size=16,"
    "hidden_dropout_prob=0.1"
)
SEQBOAT = "hidden_size=16,num_hidden_layers=2"
LONGVQ = "hidden_size=16,num_hidden_layers=2,codebook_size=8"
RECORDS = ("arguments.json", "environment.json", "fingerprints.json")


def main_of(recipe: str):
    return importlib.import_module(f"hf_hybrid.recipes.{recipe}").main


def options_of(recipe: str, toy: dict, folder: Path) -> dict:
    """A run of six steps of a recipe, with three evaluations and checkpoints, and logs between them."""
    common = {name: toy[name] for name in ("use_cpu", "disable_tqdm", "per_device_train_batch_size", "report_to")}
    common |= {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "save_strategy": "steps"}
    common |= {"save_total_limit": 1, "logging_steps": 3}
    if recipe == "train_synthetic":
        return {**common, "task": "associative_recall", "arch": "bst", "config_overrides": toy["config_overrides"]}
    if recipe.startswith("pretrain"):
        text = {name: toy[name] for name in ("data", "tokenizer", "validation_fraction")}
        if recipe == "pretrain_clm":
            return {**common, **text, "arch": "bst", "config_overrides": toy["config_overrides"], "segment_length": 16}
        if recipe == "pretrain_mlm":
            return {**common, **text, "arch": "mega", "config_overrides": MEGA, "block_length": 32}
        return {**common, **text, "config_overrides": SPADE, "input_length": 64}
    rows = {"data": _rows(recipe, toy, folder), "validation_fraction": 0.25}
    if recipe == "train_lra":
        return {**common, **rows, "task": "text", "arch": "mega", "config_overrides": MEGA}
    if recipe.startswith("classify"):
        return {**common, **rows, "arch": "mega", "config_overrides": MEGA}
    length = "max_length" if recipe == "finetune_glue" else "max_source_length"
    options = {**common, **rows, "model_name_or_path": _model(toy, folder), length: 32}
    return {**options, "source_lang": "en", "target_lang": "de"} if recipe == "finetune_translation" else options


def _rows(recipe: str, toy: dict, folder: Path) -> str:
    """The file with the rows of a recipe."""
    texts = [
        path.read_text()[100 * n : 100 * n + 80] for path in sorted(Path(toy["data"]).iterdir()) for n in range(4)
    ]
    rows: list[dict] = []
    for index, text in enumerate(texts):
        row = {"text": text, "summary": "a word", "label": index % 2}
        if recipe == "finetune_translation":
            row = {"translation": {"en": text, "de": "ein Wort"}}
        elif recipe == "classify_image":
            row = {"pixels": [200 * (index % 2)] * 8 + list(range(8)), "label": index % 2}
        elif recipe == "classify_audio":
            samples = [(index * n) % 900 for n in range(20)]
            row = {"samples": samples, "sampling_rate": 8000, "digit": index % 2, "speaker": "x"}
        rows.append(row)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _model(toy: dict, folder: Path) -> str:
    """An encoder-decoder after one step."""
    model = folder / "model"
    if not model.exists():
        options = options_of("pretrain_span_corruption", toy, folder)
        main_of("pretrain_span_corruption")({**options, "max_steps": 1, "output_dir": str(model)})
    return str(model)


def as_killed(run: Path, step: int, copy: Path) -> Path:
    """The folder of a run as a kill after the checkpoint of a step would have left it."""
    copy.mkdir()
    shutil.copytree(run / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    for name in RECORDS:
        if name != "fingerprints.json" or (run / name).exists():  # a synthetic task reads nothing
            shutil.copy(run / name, copy / name)
    return copy


def same_weights(first: Path, second: Path) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (first, second))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def without_times(record: dict) -> dict:
    """A record without what differs between two equal runs: times, memory, and what a resumed run is told besides."""
    return {
        name: value
        for name, value in record.items()
        if not any(part in name for part in ("runtime", "per_second", "peak_"))
        and name not in ("output_dir", "logging_dir", "resume_from_checkpoint", "_n_gpu", "save_total_limit")
    }


def records_of(run: Path) -> dict:
    """What two equal runs have in common of their records."""
    found = {
        name: json.loads((run / f"{name}.json").read_text()) for name in ("arguments", "metrics", "trainer_state")
    }
    return {
        "arguments": without_times(found["arguments"]),
        "metrics": without_times(found["metrics"]),
        "log": [without_times(entry) for entry in found["trainer_state"]["log_history"]],
    }

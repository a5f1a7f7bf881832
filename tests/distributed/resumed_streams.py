"""Recipes on a stream that is divided among processes, stopped on two of them and resumed on one and on four.

python -m tests.distributed.resumed_streams FOLDER RECIPE ...
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hf_hybrid.recipes import pretrain_clm, pretrain_mlm, pretrain_span_corruption
from hf_hybrid.training.trainer import HybridTrainer

from .alike import run_alike

SPADE = "hidden_size=16,num_attention_heads=2,intermediate_size=32,num_hidden_layers=1,window_size=5,ssm_state_size=4,hidden_dropout=0"
MEGA = (
    "hidden_size=16,num_hidden_layers=1,intermediate_size=16,shared_representation_size=8,nffn_hidden_size=16,dropout_prob=0,"
    "hidden_dropout_prob=0,attention_probs_dropout_prob=0,nffn_activation_dropout_prob=0"
)
RECIPES: dict[str, Any] = {
    "clm": (
        pretrain_clm,
        {"block_length": 16, "config_overrides": f"{SPADE},attention_dropout=0,activation_dropout=0"},
    ),
    "mlm": (pretrain_mlm, {"block_length": 16, "arch": "mega", "config_overrides": MEGA}),
    "span_corruption": (
        pretrain_span_corruption,
        {"input_length": 24, "config_overrides": f"{SPADE},head_dim=8,decoder_layers=1,classifier_dropout=0"},
    ),
}
ROWS = 8  # of a step
STEPS, SAVED = 6, 3


def options(recipe: str, folder: Path, workers: int = 0) -> dict[str, Any]:
    return {
        "data": str(folder / "text.jsonl"), "validation_data": str(folder / "text.jsonl"), "tokenizer": str(folder / "tokenizer"),
        "streaming": True, "stream_shards": 8, "max_validation_segments": 4, "held_out_documents": 4,
        "dataloader_num_workers": workers, "max_steps": STEPS, "save_steps": SAVED, "eval_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "seed": 7, "optim": "adamw_torch", "learning_rate": 1e-3, **RECIPES[recipe][1],
    }  # fmt: skip


def train(recipe: str, folder: Path, run: str, workers: int = 0, **further: Any) -> None:
    """Trains, and notes the rows of every step of every process."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    notes: list[list[list[int]]] = []
    inherited = HybridTrainer.training_step

    def noting(self: Any, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        notes.append(inputs["input_ids"].tolist())
        return inherited(self, model, inputs, *args, **kwargs)

    HybridTrainer.training_step = noting  # type: ignore[method-assign]
    try:
        rows = {"per_device_train_batch_size": ROWS // processes, "output_dir": str(folder / run)}
        RECIPES[recipe][0].main({**options(recipe, folder, workers), **rows, **further})
    finally:
        HybridTrainer.training_step = inherited  # type: ignore[method-assign]
    (folder / f"{run}-{rank}.json").write_text(json.dumps(notes))


def rows_of(folder: Path, run: str, processes: int) -> list[list[list[int]]]:
    """The rows of every step, in the order of the stream: sample n of the processes in turn."""
    parts = [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in range(processes)]
    return [[row for rows in zip(*step) for row in rows] for step in zip(*parts)]


def prepare(folder: Path) -> None:
    from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer

    byte_tokenizer(num_sentinels=8).save_pretrained(folder / "tokenizer")
    texts = [f"{number:03d} some words of a document {'and more ' * (number % 4)}" for number in range(96)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def begin(recipe: str, folder: Path) -> None:
    train(recipe, folder, f"{recipe}-2", workers=2)


def straight(recipe: str, folder: Path) -> None:
    train(recipe, folder, f"{recipe}-1")


def resume(recipe: str, folder: Path) -> None:
    run = f"{recipe}-2to{dist.get_world_size()}"
    if dist.get_rank() == 0:
        shutil.copytree(folder / f"{recipe}-2" / f"checkpoint-{SAVED}", folder / run / f"checkpoint-{SAVED}")
        for name in ("arguments.json", "environment.json", "data.json"):
            if (folder / f"{recipe}-2" / name).is_file():
                shutil.copy(folder / f"{recipe}-2" / name, folder / run)
    dist.barrier()
    train(recipe, folder, run, resume_from_checkpoint="last")


def compare(recipe: str, folder: Path) -> None:
    expected = rows_of(folder, f"{recipe}-1", 1)
    assert len(expected) == STEPS and all(len(step) == ROWS for step in expected)
    assert rows_of(folder, f"{recipe}-2", 2) == expected, f"{recipe}: two processes with two workers read other rows"
    weights = load_file(folder / f"{recipe}-1" / "model.safetensors")
    for processes in (1, 4):
        run = f"{recipe}-2to{processes}"
        assert rows_of(folder, run, processes) == expected[SAVED:], f"{run}: other rows than without the break"
        for name, tensor in load_file(folder / run / "model.safetensors").items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5, msg=partial(str.format, name))


if __name__ == "__main__":
    place, *recipes = sys.argv[1:]
    prepare(Path(place))
    for check, number in ((straight, 1), (begin, 2), (resume, 1), (resume, 4)):
        run_alike(check, recipes, place, number)
    for name in recipes:
        compare(name, Path(place))
    sys.stdout.write("all alike\n")

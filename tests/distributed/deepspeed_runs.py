"""Runs under DeepSpeed, by the examples in `configs/distributed`, on two processes, against runs of one process without it.

python -m tests.distributed.deepspeed_runs FOLDER STAGE [MODEL_TYPE ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import default_data_collator

from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.run_folder import check_checkpoint
from hf_hybrid.training.trainer import HybridTrainer

from ..modeling.factories import Case
from .alike import WORLD, run_alike

CONFIGS = Path(__file__).parents[2] / "configs" / "distributed"
CASES = {
    "spade": Case("spade", "AutoModelForSeq2SeqLM", "default"),
    "spade_lm": Case("spade_lm", "AutoModelForCausalLM", "default"),
    "mega": Case("mega", "AutoModelForCausalLM", "default"),
    "seqboat": Case("seqboat", "AutoModelForCausalLM", "default"),
    "bst": Case("bst", "AutoModelForCausalLM", "mf"),
    "longvq": Case("longvq", "AutoModelForCausalLM", "default"),
}
STEPS, ROWS = 3, 4


def written(model: Any) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) + 3
    return model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def train(kind: str, folder: Path, stage: int) -> None:
    """Weights after some steps, each with a checkpoint, under ZeRO of a stage, or without DeepSpeed (0), and the text that the model
    then writes."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 40, (12,), generator=generator).tolist() for _ in range(ROWS * STEPS)]
    model = CASES[kind].model()
    place = folder / f"{kind}-{stage}"
    arguments = HybridTrainingArguments(
        output_dir=str(place), use_cpu=True, max_steps=STEPS, save_steps=1, learning_rate=1e-2, ssm_learning_rate=5e-3, seed=3,
        per_device_train_batch_size=ROWS // dist.get_world_size(), train_sampling_strategy="sequential", report_to="none", disable_tqdm=True,
        weight_decay=0.1, logging_steps=1, optim="adamw_torch", lr_scheduler_type="constant",
        adam_epsilon=1e-3,  # gradients that are zeros but for rounding (keys have a common offset) would be steps of full size
        gradient_checkpointing=stage == 3,  # whose layers gather their parameters once more, in the backward pass
        deepspeed=str(CONFIGS / f"deepspeed_zero{stage}.json") if stage else None,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row[: 7 if kind == "spade" else None]} for row in rows]
    trainer = HybridTrainer(model, arguments, train_dataset=data, data_collator=default_data_collator)
    trainer.train()
    assert bool(trainer.is_deepspeed_enabled) == bool(stage)
    trainer.save_model(str(place))
    text = written(trainer.model.eval())
    torch.save(text, place / f"text{dist.get_rank()}.pt")
    dist.barrier()
    try:
        check_checkpoint(place / f"checkpoint-{STEPS}", resumable=True)
    except ValueError as error:
        assert stage and "zero_to_fp32.py come from a run under FSDP or DeepSpeed" in str(error), error
    else:
        assert not stage, f"{kind}: a checkpoint of DeepSpeed is not refused"


def compare(kind: str, folder: Path, stage: int) -> None:
    text = written(type(CASES[kind].model()).from_pretrained(folder / f"{kind}-{stage}").eval())
    for rank in range(WORLD):  # of the model in shards
        assert torch.equal(torch.load(folder / f"{kind}-{stage}" / f"text{rank}.pt"), text), f"{kind}: other text"
    expected, found = (load_file(folder / f"{kind}-{number}" / "model.safetensors") for number in (0, stage))
    # DeepSpeed saves tied tensors twice.
    assert {*expected} <= {*found} <= {*expected, "lm_head.weight"}, f"{kind}: {found.keys() ^ expected.keys()}"
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{kind}, {name}: {text}"
        )


def without(kind: str, folder: Path) -> None:
    train(kind, folder, 0)


def under_zero(kind: str, folder: Path) -> None:
    train(kind, folder, int(os.environ["ZERO_STAGE"]))


if __name__ == "__main__":
    place, number, *kinds = sys.argv[1:]
    os.environ["ZERO_STAGE"] = number
    for check, processes in ((without, 1), (under_zero, WORLD)):
        run_alike(check, kinds or CASES, place, processes)
    for name in kinds or CASES:
        compare(name, Path(place), int(number))
    sys.stdout.write("all alike\n")

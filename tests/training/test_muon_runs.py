"""Training with `optim="muon"`, the default of pretraining, over every architecture: which tensors, stopped and resumed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from factories import VARIANTS, Case

from hf_hybrid.auto import ARCHITECTURES, Architecture
from hf_hybrid.training.arguments import PretrainingArguments
from hf_hybrid.training.trainer import HybridTrainer


def pretraining_case(architecture: Architecture) -> Case:
    head = next(
        name
        for name in ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForMaskedLM")
        if name in architecture.heads
    )
    return Case(architecture.model_type, head, next(iter(VARIANTS[architecture.model_type])))


def train(case: Case, rows: list[dict[str, torch.Tensor]], folder: Path, steps: int, **options) -> HybridTrainer:
    arguments = PretrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2, eval_strategy="no",
        lr_scheduler_type="constant", warmup_steps=0, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = HybridTrainer(model=case.model(), args=arguments, train_dataset=rows)
    trainer.train(**options)
    return trainer


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda found: found.model_type)
def test_resumed_training_is_uninterrupted(architecture: Architecture, tmp_path: Path, caplog) -> None:
    case = pretraining_case(architecture)
    torch.manual_seed(0)
    inputs = case.inputs(batch=8)
    columns = inputs | case.labels(inputs)
    rows = [{name: column[index] for name, column in columns.items()} for index in range(8)]
    whole = train(case, rows, tmp_path / "whole", steps=4)
    train(case, rows, tmp_path / "stopped", steps=2)
    trainer_log = logging.getLogger("transformers.trainer")
    trainer_log.addHandler(caplog.handler)
    try:
        resumed = train(case, rows, tmp_path / "stopped", steps=4, resume_from_checkpoint=True)
    finally:
        trainer_log.removeHandler(caplog.handler)
    assert "keys in the checkpoint" not in caplog.text  # tied weights are stored once
    for (name, actual), expected in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(actual, expected), name
    optimizer = whole.optimizer.optimizer
    kinds = {
        group["name"]: {key for p in group["params"] for key in optimizer.state[p]} for group in optimizer.param_groups
    }
    assert "momentum_buffer" in kinds.pop("muon")
    assert kinds and all("exp_avg" in keys for keys in kinds.values())
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates["muon"] == 5e-3 and rates["no_decay"] == 3e-3 and rates.get("state", 1e-3) == 1e-3

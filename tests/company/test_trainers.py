"""Other trainers and searches: preference and reward trainers of TRL, a hyperparameter search with Optuna."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import Case, all_heads, parametrize
from test_trl import FIRST, FIT
from transformers import Trainer, TrainingArguments
from word_tokenizer import word_tokenizer
from works_with import working

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.company

CLASSIFIERS = [case for case in all_heads() if case.auto_name == "AutoModelForSequenceClassification"]
SMALL: dict[str, Any] = {"report_to": [], "use_cpu": True, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}


def text(row: int, length: int) -> str:
    return " ".join(f"w{3 + (5 * row + 7 * place) % 30}" for place in range(length))


def preferences() -> Any:
    rows = [
        {"prompt": text(row, 4), "chosen": " " + text(row + 1, 3), "rejected": " " + text(row + 2, 5)}
        for row in range(6)
    ]
    return datasets.Dataset.from_list(rows)


def save(case: Case, folder: Path, **overrides: Any) -> str:
    case.model(**overrides).save_pretrained(folder)
    word_tokenizer(ends=True).save_pretrained(folder)
    return str(folder)


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@parametrize(FIRST)
def test_preferences_start_at_the_loss_of_equal_models(case: Case, tmp_path: Path) -> None:
    """Before the first step model and reference agree, so the loss is log 2; then it is finite."""
    trl = pytest.importorskip("trl")
    folder = save(case, tmp_path / "model", **FIT.get(case.model_type, {}))
    args = trl.DPOConfig(str(tmp_path / "run"), per_device_train_batch_size=2, bf16=False, max_length=24, **SMALL)
    trainer = trl.DPOTrainer(model=folder, args=args, train_dataset=preferences())
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(0.6931, abs=2e-3) and torch.isfinite(found).all()


@parametrize(FIRST)
def test_group_relative_policies_sample_and_train(case: Case, tmp_path: Path) -> None:
    """The trainer generates with left-padded prompts and scores what it generated; on the policy itself the ratio is 1."""
    trl = pytest.importorskip("trl")
    folder = save(case, tmp_path / "model", **FIT.get(case.model_type, {}))
    args = trl.GRPOConfig(
        str(tmp_path / "run"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=5,
        beta=0.1,
        bf16=False,
        **SMALL,
    )
    prompts = datasets.Dataset.from_list([{"prompt": text(row, 2 + row % 3)} for row in range(6)])
    trainer = trl.GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **kwargs: [float(len(set(one.split()))) for one in completions],
        args=args,
        train_dataset=prompts,
    )
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert torch.isfinite(losses(trainer)).all() and first["kl"] == pytest.approx(0.0, abs=1e-3)


@parametrize(working("TRL, `RewardTrainer`", CLASSIFIERS))
def test_rewards_are_trained(case: Case, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    folder = save(case, tmp_path / "model", num_labels=1)
    args = trl.RewardConfig(str(tmp_path / "run"), per_device_train_batch_size=2, bf16=False, max_length=24, **SMALL)
    trainer = trl.RewardTrainer(model=folder, args=args, train_dataset=preferences())
    trainer.train()
    assert type(trainer.model) is case.model_class and torch.isfinite(losses(trainer)).all()


@parametrize(working("Optuna", CLASSIFIERS))
def test_a_search_finds_the_learning_rate_that_learns(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    tokenizer = word_tokenizer(ends=True)
    rows = [{**tokenizer(text(row, 6), padding="max_length", max_length=8), "labels": row % 2} for row in range(8)]
    args = TrainingArguments(str(tmp_path), disable_tqdm=True, **SMALL | {"max_steps": 6})
    trainer = Trainer(model_init=lambda trial: case.model(), args=args, train_dataset=rows, eval_dataset=rows)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-9, 1e-2])},
        n_trials=3,
        direction="minimize",
        backend="optuna",
    )
    assert best.hyperparameters["learning_rate"] in (1e-9, 1e-2) and best.objective > 0

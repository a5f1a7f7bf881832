"""Synthetic tasks, end to end with every architecture that has a causal language model head."""

from __future__ import annotations

import pytest
import torch
from factories import TINY_OVERRIDES
from transformers import AutoModelForCausalLM

from hf_hybrid.auto import ARCHITECTURES
from hf_hybrid.data.synthetic import associative_recall, recall_accuracy
from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import evaluate
from hf_hybrid.recipes.train_synthetic import main

ARCHES = [item.model_type for item in ARCHITECTURES if "AutoModelForCausalLM" in item.heads]
SHORT = {"num_train": 40, "num_validation": 6, "save_strategy": "no", "eval_strategy": "no"}


RECALL = {"task": "associative_recall", "length": 24, "num_pairs": 3, "vocab_size": 20, "distance": 4}
OTHERS = [{"task": "copying", "num_tokens": 5, "gap": 2}, {"task": "induction", "length": 12}]
CASES = [(arch, RECALL) for arch in ARCHES] + [("longvq", task) for task in OTHERS]


@pytest.mark.parametrize(("arch", "task"), CASES, ids=[f"{arch}-{task['task']}" for arch, task in CASES])
def test_every_architecture_trains(options, tmp_path, arch, task) -> None:
    base = options | SHORT | task | {"arch": arch, "config_overrides": TINY_OVERRIDES[arch], "max_steps": 1}
    metrics = main(base)
    assert 0 <= metrics["eval_exact_match"] <= metrics["eval_accuracy"] <= 1
    assert metrics["task"] == task["task"] and metrics["steps"] == 1
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    assert model_card_problems(card) == []
    assert "Tokenizer" not in card  # there is none to load
    config = AutoModelForCausalLM.from_pretrained(run).config
    assert config.model_type == arch and config.vocab_size == task.get("vocab_size", 32)


def test_a_task_is_learnt_and_measured_again(options, tmp_path) -> None:
    """Which of two tokens came first."""
    task = {"task": "copying", "num_tokens": 1, "vocab_size": 4, "num_validation": 30, "num_train": 4000}
    overrides = TINY_OVERRIDES["longvq"] + ",hidden_dropout=0.0"
    changes = {"arch": "longvq", "config_overrides": overrides, "max_steps": 60, "learning_rate": 1e-2}
    metrics = main(options | SHORT | task | changes | {"per_device_train_batch_size": 16})
    assert metrics["eval_accuracy"] == metrics["eval_exact_match"] == 1
    assert (tmp_path / "run" / "codebooks.png").stat().st_size > 5000
    again = {"kind": "synthetic", "model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "eval")}
    measured = evaluate.main(again | task | {"use_cpu": True})
    assert measured["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert measured["eval_accuracy"] == 1


def test_accuracy_is_that_of_the_model(options, tmp_path) -> None:
    task = {"task": "associative_recall", "length": 30, "num_pairs": 4, "vocab_size": 12, "task_seed": 3}
    model = {"arch": "spade_lm", "config_overrides": TINY_OVERRIDES["spade_lm"]}
    metrics = main(options | SHORT | task | model | {"max_steps": 2})
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    data = associative_recall(6, length=30, num_pairs=4, vocab_size=12, seed=7)
    rows = [data[index] for index in range(6)]
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        assert metrics["eval_accuracy"] == pytest.approx(recall_accuracy(trained(ids).logits, labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "reversing"}, "`task` must be one of associative_recall, copying, induction; got 'reversing'"),
        ({"task": "induction", "gap": 3}, "has no `gap`; its options are `length`, `vocab_size`"),
        ({"num_validation": 0}, "`num_validation` must be a positive number"),
        ({"task_seed": -1}, "`task_seed` must not be negative"),
        ({"length": 10}, "`length` 10 is too short"),
        ({"arch": "spade"}, "'spade' has no head for AutoModelForCausalLM"),
        ({"arch": None}, "Pass either `arch`"),
    ],
)
def test_bad_options(options, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        main({**options, **SHORT, "arch": "longvq", **changes})


def test_checkpoints_that_do_not_fit(options, tmp_path) -> None:
    task = {"task": "induction", "length": 8, "vocab_size": 6}
    model = {"arch": "spade_lm", "config_overrides": TINY_OVERRIDES["spade_lm"]}
    main(options | SHORT | task | model | {"max_steps": 1})
    again = (
        options | SHORT | task | {"model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "again")}
    )
    with pytest.raises(ValueError, match="has 9 tokens but the model only 6"):
        main(again | {"vocab_size": 9})

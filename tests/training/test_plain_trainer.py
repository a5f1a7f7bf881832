"""Features of `Trainer` itself, compared with what they mean: every head, without `HybridTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import Case, all_heads, one_of_each_kind, parametrize
from transformers import Trainer, TrainerCallback, TrainingArguments

# Settings with an auxiliary loss that is not 0.
AUXILIARY: dict[str, dict[str, Any]] = {
    "longvq": {"commitment_loss_weight": 0.5},
    "seqboat": {"dead_layer_loss_weight": 0.5, "dead_layer_min_rate": 1.0},
}
LEARNING = AUXILIARY | {"longvq": AUXILIARY["longvq"] | {"freeze_codebook": False}}
HEADS = [
    case
    for case in all_heads() + all_heads(other_inputs=True)
    if case.auto_name not in ("AutoModel", "AutoModelForTextEncoding")
]
WITH_AUXILIARY = [case for case in HEADS if case.model_type in AUXILIARY]


def rows_of(case: Case, number: int = 8) -> list[dict[str, torch.Tensor]]:
    inputs = case.inputs(batch=number)
    batch = inputs | case.labels(inputs)
    return [{name: values[row] for name, values in batch.items()} for row in range(number)]


def trainer_of(model: Any, folder: Path, rows: list, callbacks: list | None = None, **options: Any) -> Trainer:
    args = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    args |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **args | options),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=callbacks,
    )


def one_step(model: Any, folder: Path, rows: list, parts: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The logged loss and the gradients of one step over all rows, in parts that are accumulated."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    sizes = {"per_device_train_batch_size": len(rows) // parts, "gradient_accumulation_steps": parts}
    trainer = trainer_of(model, folder, rows, max_steps=1, optim="sgd", learning_rate=1.0, **sizes)
    trainer.train()
    gradients = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), gradients


@parametrize(WITH_AUXILIARY, kept=one_of_each_kind(WITH_AUXILIARY)[:3])
def test_accumulation_leaves_the_weight_of_an_auxiliary_loss(case: Case, tmp_path: Path) -> None:
    """Equal micro-batches, so that what is a mean over each of them has the mean of the whole batch."""
    rows = rows_of(case, 2) * 4
    plain, _ = one_step(case.model(), tmp_path, rows, 1)
    whole, expected = one_step(case.model(**AUXILIARY[case.model_type]), tmp_path, rows, 1)
    accumulated, found = one_step(case.model(**AUXILIARY[case.model_type]), tmp_path, rows, 4)
    assert whole > plain + 1e-3
    assert accumulated == pytest.approx(whole, abs=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@parametrize([case for case in WITH_AUXILIARY if case.auto_name == "AutoModelForCausalLM"])
def test_compiled_models_refuse_a_loss_that_lacks_their_auxiliary_term(case: Case, tmp_path: Path) -> None:
    model = case.model(**AUXILIARY[case.model_type])
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = trainer_of(model, tmp_path, rows_of(case, 2), max_steps=1, label_smoothing_factor=0.1, **compiled)
    with pytest.raises(ValueError, match=r"loss_weight` weighs. Train with `HybridTrainer`"):
        trainer.train()


class _Evaluations(TrainerCallback):
    """Loss and state at each evaluation."""

    def __init__(self) -> None:
        self.found: list[tuple[float, dict[str, torch.Tensor]]] = []

    def on_evaluate(self, *args: Any, metrics: dict[str, float], model: Any, **kwargs: Any) -> None:
        self.found.append((metrics["eval_loss"], {name: value.clone() for name, value in model.state_dict().items()}))


@parametrize(HEADS)
def test_the_best_model_is_the_one_that_was_evaluated(case: Case, tmp_path: Path) -> None:
    model, rows, evaluations = case.model(**LEARNING.get(case.model_type, {})), rows_of(case, 4), _Evaluations()
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.1}
    trainer = trainer_of(model, tmp_path, rows, [evaluations], max_steps=3, **each_step, **best)
    trainer.train()
    loss, state = min(evaluations.found, key=lambda evaluation: evaluation[0])
    assert trainer.evaluate()["eval_loss"] == loss
    loaded = case.model_class.from_pretrained(trainer.state.best_model_checkpoint)
    for found in (model.state_dict(), loaded.state_dict()):
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


READS_VALUES = [
    case
    for case in HEADS
    if case.auto_name == "AutoModelForSequenceClassification" and hasattr(case.config(), "input_type")
]


@parametrize(READS_VALUES)
def test_real_numbers_are_inputs_of_metrics_and_counted(case: Case, tmp_path: Path) -> None:
    rows = [{"input_values": torch.randn(9), "labels": torch.tensor(row % 2)} for row in range(4)]
    found: list[Any] = []
    options = {"include_for_metrics": ["inputs"], "include_num_input_tokens_seen": "all", "max_steps": 1}
    model = case.model_class(case.config(input_type="values"))
    trainer = trainer_of(model, tmp_path, rows, per_device_train_batch_size=4, **options)
    trainer.compute_metrics = lambda prediction: found.append(prediction.inputs) or {}
    trainer.train()
    trainer.evaluate()
    assert found[0].tolist() == torch.stack([row["input_values"] for row in rows]).tolist()
    assert trainer.state.num_input_tokens_seen == 36 and trainer.state.total_flos > 0

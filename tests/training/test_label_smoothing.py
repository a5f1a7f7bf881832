"""Label smoothing of (almost) no weight is the plain loss: every head that has one, in `Trainer` and in `HybridTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import Case, all_heads, all_variants, parametrize, random_ids
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_hybrid.training.trainer import HybridTrainer

HEADS = [
    case
    for case in all_heads() + all_heads(other_inputs=True)
    if case.auto_name not in ("AutoModel", "AutoModelForTextEncoding")
]
# Heads whose loss has an auxiliary term that `Trainer` cannot see.
AUXILIARY = {"longvq": {"commitment_loss_weight": 0.5}, "seqboat": {"dead_layer_loss_weight": 0.5}}


def loss_of(
    trainer_class: type[Trainer], model: Any, batch: dict[str, Any], smoothing: float, folder: Path
) -> torch.Tensor:
    """The loss of one training pass over a batch, as the trainer computes it."""
    args = TrainingArguments(str(folder), report_to=[], use_cpu=True, label_smoothing_factor=smoothing)
    trainer = trainer_class(model=model, args=args)
    counted = batch["labels"].ne(-100).sum() - 1 if "labels" in batch and trainer.model_accepts_loss_kwargs else None
    torch.manual_seed(0)
    return trainer.compute_loss(model, dict(batch), num_items_in_batch=counted)


def batch_of(case: Case) -> dict[str, Any]:
    inputs = case.inputs()
    batch = inputs | case.labels(inputs)
    if batch.get("labels") is not None and batch["labels"].dim() == 2:
        batch["labels"][1, -2:] = -100
    return batch


@pytest.mark.parametrize("trainer_class", [Trainer, HybridTrainer])
@parametrize(HEADS)
def test_smoothing_of_no_weight_is_the_plain_loss(trainer_class: type[Trainer], case: Case, tmp_path: Path) -> None:
    model = case.model().train()  # without auxiliary terms
    batch = batch_of(case)
    plain = loss_of(trainer_class, model, batch, 0.0, tmp_path)
    smoothed = loss_of(trainer_class, model, batch, 1e-9, tmp_path)
    torch.testing.assert_close(smoothed, plain, rtol=1e-5, atol=1e-6)


@parametrize([case for case in HEADS if case.model_type in AUXILIARY])
def test_an_auxiliary_loss_is_kept_or_refused(case: Case, tmp_path: Path) -> None:
    model = case.model(**AUXILIARY[case.model_type]).train()
    batch = batch_of(case)
    losses = [loss_of(HybridTrainer, model, batch, smoothing, tmp_path) for smoothing in (0.0, 1e-9)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    if "labels" not in batch:
        return  # `Trainer` leaves the loss of these heads to the model
    if getattr(model, "accepts_loss_kwargs", True):
        with pytest.raises(ValueError, match=r"loss_weight` weighs. Train with `HybridTrainer`"):
            loss_of(Trainer, model, batch, 0.1, tmp_path)


@parametrize(all_variants("AutoModelForCausalLM"))
def test_smoothing_is_that_of_the_definition(case: Case, tmp_path: Path) -> None:
    """(1 - e) times the cross-entropy with the labels plus e times that with the uniform distribution."""
    model = case.model().eval()
    ids = random_ids(2, 12)
    loss = loss_of(HybridTrainer, model, {"input_ids": ids, "labels": ids}, 0.3, tmp_path)
    scores = model(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    nll = F.nll_loss(scores, ids[:, 1:].flatten(), reduction="sum")
    expected = (0.7 * nll - 0.3 * scores.mean(-1).sum()) / (ids.numel() - 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)

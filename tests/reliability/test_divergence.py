"""A run that diverges says where, why, and what is left; no checkpoint that nothing can be done with displaces a good one."""

from __future__ import annotations

import pytest
import torch
from recipe_runs import RECIPES, as_killed, main_of, options_of
from torch import nn

from hf_hybrid.recipes import pretrain_clm
from hf_hybrid.training.checkpoints import list_checkpoints
from hf_hybrid.training.divergence import DivergedError, DivergenceMonitor, lost_weights
from hf_hybrid.training.run_folder import check_checkpoint
from hf_hybrid.training.trainer import HybridTrainer


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fourth step on the loss is lost."""
    compute = HybridTrainer.compute_loss

    def lost(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if model.training and self.state.global_step >= 3 else loss

    monkeypatch.setattr(HybridTrainer, "compute_loss", lost)


@pytest.mark.parametrize("recipe", [RECIPES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES[1:])])
@pytest.mark.parametrize("waits", [True, False])
def test_a_diverged_run_keeps_the_good_checkpoint(toy, tmp_path, monkeypatch, diverging, recipe, waits):
    """On an accelerator nothing waits for the values of a step: a log, an evaluation or a checkpoint finds it."""
    monkeypatch.setattr(HybridTrainer, "_checks_every_step", waits)
    options = {**options_of(recipe, toy, tmp_path), "logging_steps": 99, "eval_strategy": "no", "save_total_limit": 1}
    run = tmp_path / "run"
    message = (
        r"diverged at step 4: the loss is nan\..*last good checkpoint is .*checkpoint-2\. Try a lower `\w+` \(now"
    )
    with pytest.raises(DivergedError, match=message):
        main_of(recipe)({**options, "output_dir": str(run)})
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]
    check_checkpoint(run / "checkpoint-2", resumable=True)
    assert not (run / "model.safetensors").exists()


def test_lost_weights_are_not_saved(toy, finished, tmp_path, diverging, caplog):
    """Also if the user asked to hide losses that are not finite."""
    run = as_killed(finished, 2, tmp_path / "run")
    options = {**toy, "output_dir": str(run), "save_total_limit": 1, "logging_nan_inf_filter": True}
    with pytest.raises(DivergedError, match=r"diverged at step 4: weights are not finite \(.*checkpoint-2"):
        pretrain_clm.main({**options, "resume_from_checkpoint": "last"})
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def step(self, monitor: DivergenceMonitor, number: int, growth: float, *, lost: bool = False) -> None:
        loss = self.first.weight.sum() * 2 + self.second.weight.sum() * growth
        self.zero_grad()
        (loss * float("nan") if lost else loss).backward()
        monitor.observe((loss * float("nan") if lost else loss).detach(), number, is_complete=True)


def groups_of(model: Layers) -> list[dict]:
    return [
        {"name": "state", "params": list(model.second.parameters())},
        {"name": "decay", "params": list(model.first.parameters())},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_grew_before_the_end_is_named(dtype):
    model = Layers().to(dtype)
    monitor = DivergenceMonitor(model)
    for number in range(1, 9):
        model.step(monitor, number, growth=3.0 if number < 8 else 900.0)
        assert monitor.step() is None
    model.step(monitor, 9, growth=1.0, lost=True)
    assert monitor.step() == 9
    what, grown = monitor.describe(groups_of(model))
    assert grown[0] == "state" and "the loss is nan" in what
    assert "`state` x300 (second.weight)" in what
    model.step(monitor, 10, growth=1.0, lost=True)
    assert monitor.step() == 9  # the first counts


def test_the_gradient_that_is_lost_alone_is_named():
    model = Layers()
    monitor = DivergenceMonitor(model)
    for number in range(1, 4):
        model.step(monitor, number, growth=3.0)
    model.zero_grad()
    (model.first.weight.sum() + model.second.weight.sum()).backward()
    model.second.weight.grad.fill_(float("inf"))
    monitor.observe(torch.tensor(1.0), 4, is_complete=True)
    what, grown = monitor.describe(groups_of(model))
    assert monitor.step() == 4 and grown == ["state"]
    assert "a gradient is not finite" in what and "`state` beyond all numbers (second.weight)" in what


def test_float16_may_overflow_while_its_scale_adapts():
    model = Layers()
    monitor = DivergenceMonitor(model, gradients_overflow=True)
    model.step(monitor, 1, growth=float("inf"))
    loss = torch.tensor(1.0)
    monitor = DivergenceMonitor(model, gradients_overflow=True)
    monitor.observe(loss, 1, is_complete=True)
    assert monitor.step() is None
    monitor.observe(loss * float("inf"), 2, is_complete=False)
    monitor.observe(loss, 2, is_complete=True)  # of two micro-batches one was lost
    assert monitor.step() == 2


def test_lost_weights_are_listed():
    model = Layers()
    assert lost_weights(model) == [] and lost_weights(nn.Identity()) == []
    model.second.bias.data[1] = float("inf")
    assert lost_weights(model) == ["second.bias"]

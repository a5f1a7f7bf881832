"""A training that is complete is not lost: weights and metrics come first, and what follows them can only warn."""

from __future__ import annotations

import json
import logging
import os
import signal

import pytest
from recipe_runs import RECIPES, main_of, options_of, same_weights

from hf_hybrid.recipes import pretrain_clm
from hf_hybrid.recipes.support import runs
from hf_hybrid.training.callbacks import RunInterrupted
from hf_hybrid.training.segments import SegmentTrainer
from hf_hybrid.training.trainer import HybridTrainer


def fails(*args, **kwargs):
    raise RuntimeError("out of paint")


@pytest.mark.parametrize("recipe", [RECIPES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES[1:])])
def test_pictures_cards_and_reports_only_warn(toy, tmp_path, monkeypatch, caplog, recipe):
    """One warning names all that is missing; the same command writes it again and trains no further."""
    options = {**options_of(recipe, toy, tmp_path), "output_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        for name in ("plot_loss_curves", "_plot_codebooks", "make_card"):
            patch.setattr(runs, name, fails)
        metrics = main_of(recipe)(options)
    (warning,) = [entry.getMessage() for entry in caplog.records if "The training is complete" in entry.getMessage()]
    for name in ("loss_curve.png", "README.md", "RuntimeError: out of paint", "resume_from_checkpoint=last"):
        assert name in warning
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["eval_loss"] == metrics["eval_loss"]
    assert not (tmp_path / "run" / "README.md").exists()
    main_of(recipe)({**options, "resume_from_checkpoint": "last"})
    assert (tmp_path / "run" / "README.md").is_file() and (tmp_path / "run" / "loss_curve.png").is_file()


def test_names_and_values_that_do_not_suit_a_card(toy, tmp_path, monkeypatch, caplog):
    """A folder called like a placeholder, and a loss beyond all numbers."""
    monkeypatch.setattr(SegmentTrainer, "evaluate", lambda *args, **kwargs: {"eval_loss": float("inf")})
    run = tmp_path / "{{TODO}}"
    metrics = pretrain_clm.main({**toy, "max_steps": 1, "logging_steps": 1, "output_dir": str(run)})
    assert metrics["perplexity"] == float("inf")
    assert json.loads((run / "metrics.json").read_text())["eval_loss"] is None
    assert "| loss | inf |" in (run / "README.md").read_text()
    assert "to be corrected before it is published: the placeholder '{{'" in caplog.text
    assert (run / "loss_curve.png").is_file()


def test_an_evaluation_that_fails_loses_nothing(toy, finished, tmp_path, monkeypatch):
    options = {**toy, "output_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        patch.setattr(SegmentTrainer, "evaluate", fails)
        with pytest.raises(RuntimeError, match="out of paint") as caught:
            pretrain_clm.main(options)
    assert "training is complete" in caught.value.__notes__[0] and "trains no further" in caught.value.__notes__[0]
    assert same_weights(tmp_path / "run", finished)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    expected = json.loads((finished / "metrics.json").read_text())
    assert metrics["train_loss"] == expected["train_loss"] and "eval_loss" not in metrics
    assert pretrain_clm.main({**options, "resume_from_checkpoint": "last"})["eval_loss"] == expected["eval_loss"]


@pytest.mark.parametrize("place", ["evaluating", "saving"])
def test_a_signal_after_the_training_leaves_weights_and_metrics(toy, finished, tmp_path, monkeypatch, caplog, place):
    """Without checkpoints, while the final weights are saved or evaluated."""
    owner, name = {"evaluating": (SegmentTrainer, "evaluate"), "saving": (HybridTrainer, "save_model")}[place]
    original = getattr(owner, name)

    def stopped(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, stopped)
    with caplog.at_level(logging.WARNING), pytest.raises(RunInterrupted) as caught:
        pretrain_clm.main({**toy, "save_strategy": "no", "output_dir": str(tmp_path / "run")})
    assert caught.value.code == 143 and caught.value.is_trained
    assert same_weights(tmp_path / "run", finished)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 4 and "train_loss" in metrics and "eval_loss" not in metrics
    assert "only the evaluation is missing" in caplog.text and "the recipe `evaluate`" in caplog.text

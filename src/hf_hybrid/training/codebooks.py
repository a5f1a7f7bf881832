"""Monitoring the codebooks of attention over quantised keys in training (arXiv 2404.11163)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


def quantized_model(model: Any) -> Any:
    """The model with codebooks, without wrappers of PEFT or of distributed training; None if it has no codebooks."""
    while model is not None:
        if hasattr(model, "apply_codebook_updates"):
            return model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            model = getattr(model, "module", None)
    return None


def has_codebooks(model: Any) -> bool:
    """Whether a model quantises its keys."""
    return quantized_model(model) is not None


class CodebookCallback(TrainerCallback):
    """Applies pending codebook updates at the end of each step, logs the use of the codes and warns of collapse.

    Without it, the next training step applies pending updates; with it, a checkpoint includes those of its own step,
    also in distributed runs.

    Collapse means that all keys have become nearly equal: the perplexity of the codes goes to 1, while commitment loss
        and
    quantisation error become small. Therefore only the perplexity is watched. It often dips in the first steps and
    recovers.

    Attributes:
        history: one entry per log: `step`, and per layer `perplexity` (mean over heads), `active_fraction`, `relative_error`,
            `revived`.

    Args:
        collapse_perplexity: threshold of the mean perplexity of a layer.
        grace_steps: optimizer steps before the first warning.
        patience: consecutive logs below the threshold before a warning.
    """

    def __init__(self, collapse_perplexity: float = 2.0, grace_steps: int = 200, patience: int = 3) -> None:
        if collapse_perplexity < 1 or grace_steps < 0 or patience < 1:
            raise ValueError(
                "`collapse_perplexity` must be at least 1, `grace_steps` not negative and `patience` at least 1; got "
                f"{collapse_perplexity}, {grace_steps} and {patience}."
            )
        self.collapse_perplexity: float = collapse_perplexity
        self.grace_steps: int = grace_steps
        self.patience: int = patience
        self.history: list[dict[str, Any]] = []
        self._in_danger: dict[int, int] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        quantized = quantized_model(model)
        if quantized is not None:
            quantized.apply_codebook_updates()

    def state_dict(self) -> dict[str, Any]:
        """The history and the layers in danger, in JSON types."""
        return {"history": self.history, "in_danger": list(self._in_danger.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned; an empty state changes nothing."""
        if state:
            self.history, self._in_danger = list(state["history"]), dict(state["in_danger"])

    def entries(self, model: Any, step: int) -> dict[str, float]:
        """The codebook entries of a training log, also added to the history; empty without codebooks."""
        quantized = quantized_model(model)
        layers = [] if quantized is None else quantized.codebook_stats()
        if not layers or any(layer["perplexity"] is None for layer in layers):
            return {}
        for layer in layers:
            layer["perplexity"] = sum(layer["perplexity"]) / len(layer["perplexity"])
        names = ("perplexity", "active_fraction", "relative_error", "revived")
        self.history.append({"step": step} | {name: [layer[name] for layer in layers] for name in names})
        perplexities = [layer["perplexity"] for layer in layers]
        self._warn(step, perplexities)
        return {
            "codebook_perplexity": round(sum(perplexities) / len(layers), 4),
            "codebook_perplexity_min": round(min(perplexities), 4),
            "codebook_active_fraction": round(sum(layer["active_fraction"] for layer in layers) / len(layers), 4),
        }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # Only logs of training, not of evaluations; those of `HybridTrainer` already have the entries.
        if logs is None or "loss" not in logs or "codebook_perplexity" in logs:
            return
        found = self.entries(model, state.global_step)
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)  # `Trainer` has already copied the log

    def _warn(self, step: int, perplexities: list[float]) -> None:
        for index, value in enumerate(perplexities):
            if value >= self.collapse_perplexity:
                self._in_danger.pop(index, None)
                continue
            self._in_danger[index] = self._in_danger.get(index, 0) + 1
            if step >= self.grace_steps and self._in_danger[index] == self.patience:
                logger.warning(
                    "Step %d: the codes of layer %d have a perplexity of %.2f, below %.1f for %d logs: its keys are becoming "
                    "nearly equal. Lower `commitment_loss_weight` or the learning rate, or raise `chunk_size`.",
                    *(step, index, value, self.collapse_perplexity, self.patience),
                )

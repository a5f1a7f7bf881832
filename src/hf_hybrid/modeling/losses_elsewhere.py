"""Losses that other programs compute from the outputs or the weights of a model.

A trainer that smooths labels takes the logits; one that fuses the head with the loss (TRL) takes the states of the stack and the
weights of the head. Any other term of the model's own loss is then lost, so this is refused where it can be detected.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


class FusedHeadGuard:
    """Mixin of causal language models whose loss is not that of `last_hidden_state @ lm_head.weight` alone.

    TRL replaces `forward` by a function with the argument `fused_lm_head`; the guard checks what is assigned.
    """

    def reason_against_fused_head(self) -> str | None:
        """Why the head cannot be fused with the loss, and the remedy; None where it can."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and _is_fused(value) and (reason := self.reason_against_fused_head()) is not None:
            raise ValueError(f"{type(self).__name__} cannot take a head that is fused with its loss: {reason}")
        super().__setattr__(name, value)


def _is_fused(forward: Callable) -> bool:
    try:
        return "fused_lm_head" in inspect.signature(forward, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return False


def check_loss_elsewhere(model: nn.Module, weight: str, num_items_in_batch: torch.Tensor | int | None) -> None:
    """Checks a training pass without labels if the loss of the model has an auxiliary term: a loss computed elsewhere
    lacks it.

    Args:
        model: the head; nothing is checked outside of training, or where the weight is 0.
        weight: field of the configuration with the weight of the term.
        num_items_in_batch: divisor of the loss, which only `Trainer` passes.

    Raises:
        ValueError: `Trainer` computes the loss (label smoothing, `compute_loss_func`). Others are warned once.
    """
    if not model.training or not torch.is_grad_enabled() or not getattr(model.config, weight):
        return
    message = (
        f"{type(model).__name__} is trained without labels, so its loss is computed elsewhere and lacks the auxiliary term that "
        f"`{weight}` weighs. Train with `HybridTrainer`, whose label smoothing keeps the term, or set `{weight}=0`."
    )
    if num_items_in_batch is not None:
        raise ValueError(message)
    if not torch.compiler.is_compiling():  # a warning cannot be traced
        logger.warning_once(message)


__all__ = ["FusedHeadGuard", "check_loss_elsewhere"]

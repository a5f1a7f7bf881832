"""Optimizer groups chosen by parameter name.

Names are the only reliable key: attributes set on parameters do not survive `from_pretrained`, which rebuilds every
tensor. State space parameters want their own learning rate and no weight decay (decaying `log_dt` or the spectrum
changes the time scales the layer was given), arXiv 2111.00396 appendix D.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Tensors of a state space layer or an exponential moving average: every leaf below a module called `ssm`, `ema` or `ema_gate`.
SSM_PATTERN = re.compile(r"(^|\.)(ssm|ema|ema_gate)\.")

# Tables and norms. One-dimensional tensors (biases, norm weights, gates) are recognised by shape as well.
NO_DECAY_PATTERN = re.compile(
    r"(^|\.)(shared|embed_tokens|embed_positions|embeddings|\w+_embeddings|relative_attention_bias|rel_pos_bias|rel_bias|codebook)(\.|$)"
    r"|(^|\.)(qk_(weight|gamma|beta)|context\.ids|context\.initial)$|norm|(^|\.|_)bias$"
)


def group_of(name: str, parameter: nn.Parameter) -> str:
    """Name of the group a parameter belongs to: `"ssm"`, `"no_decay"` or `"decay"`."""
    if SSM_PATTERN.search(name):
        return "ssm"
    if parameter.ndim <= 1 or NO_DECAY_PATTERN.search(name):
        return "no_decay"
    return "decay"


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    ssm_learning_rate: float | None = 1e-3,
) -> list[dict]:
    """Split the trainable parameters of a model into optimizer groups.

    Args:
        model: any model; tied parameters are counted once.
        learning_rate: of everything but the state space parameters.
        weight_decay: of the matrices; biases, norms, embeddings, bias tables and state space parameters have none.
        ssm_learning_rate: of the state space parameters; None = `learning_rate`.

    Returns:
        Up to three non-empty groups with the keys `name`, `params`, `lr`, `weight_decay`, the decayed one first.
        Each trainable parameter is in exactly one. Schedulers scale the groups together, so their ratio is kept.

    Raises:
        ValueError: no parameter is trainable, or a rate is negative.
    """
    ssm_learning_rate = learning_rate if ssm_learning_rate is None else ssm_learning_rate
    for argument, value in (
        ("learning_rate", learning_rate),
        ("ssm_learning_rate", ssm_learning_rate),
        ("weight_decay", weight_decay),
    ):
        if value < 0:
            raise ValueError(f"`{argument}` must not be negative; got {value}.")
    groups: dict[str, dict[str, Any]] = {
        "decay": {"name": "decay", "params": [], "lr": learning_rate, "weight_decay": weight_decay},
        "no_decay": {"name": "no_decay", "params": [], "lr": learning_rate, "weight_decay": 0.0},
        "ssm": {"name": "ssm", "params": [], "lr": ssm_learning_rate, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name, parameter)]["params"].append(parameter)
    used = [group for group in groups.values() if group["params"]]
    if not used:
        raise ValueError("The model has no trainable parameter: every one has `requires_grad=False`.")
    return used

"""Optimizer groups chosen by parameter name.

Names are the only reliable key: attributes set on parameters do not survive `from_pretrained`, which rebuilds every
tensor. The record of an architecture (`auto.Architecture`) says which tensors are state, which have no weight decay and which have.
The recurrence needs its own learning rate and no weight decay, because decaying `log_dt` or the spectrum changes the
time scales of the layer (arXiv 2111.00396, appendix D).
"""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from ..auto import Architecture, find_architecture, is_head

logger = logging.getLogger(__name__)

# For models without a record, and for modules that others add to a model: the usual names, else the shape.
_USUAL_NAMES = re.compile(r"(^|\.)(shared|wte|wpe|(\w+_)?embed(_tokens|_positions|dings?)?|\w*bias|\w*norm\w*)(\.|$)")

_USUAL_STATE = re.compile(r"(^|\.)(ssm|ema)\.")


def group_of(name: str, parameter: nn.Parameter, architecture: Architecture | None = None) -> str | None:
    """Name of the group a parameter belongs to: `"state"`, `"no_decay"` or `"decay"`; None if the record has no rule.

    Args:
        name: name of the parameter in its model; adapters may have inserted parts into it.
        parameter: the tensor; its shape decides in models without a record.
        architecture: record of the model, or None.
    """
    if architecture is None:
        if _USUAL_STATE.search(name):
            return "state"
        return "no_decay" if parameter.ndim <= 1 or _USUAL_NAMES.search(name) else "decay"
    kinds = architecture.kinds_of(name)
    return kinds[0] if len(kinds) == 1 else None


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    ssm_learning_rate: float | None = 1e-3,
    muon_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Splits the trainable parameters of a model into optimizer groups.

    Args:
        model: a model of this library or any other; tied parameters are counted once.
        learning_rate: learning rate of everything except the state.
        weight_decay: weight decay of the matrices; biases, norms, embeddings and state have none.
        ssm_learning_rate: learning rate of the state (state spaces, moving averages); None = `learning_rate`.
        muon_learning_rate: learning rate of the matrices of the blocks, which then form a group `"muon"` for
            `training.muon.MuonAdamW`; those of heads stay with AdamW. None: no such group.
        head_learning_rate: learning rate of the modules that a head adds to the stack, which then form the groups `"head_decay"` and
            `"head_no_decay"`. None: they have that of everything else.

    Returns:
        Up to six non-empty groups with the keys `name`, `params`, `lr`, `weight_decay` (and `muon` if its learning
        rate is set), those with weight decay first. Each trainable parameter is in exactly one group. Schedulers scale
        all groups by the same factor, so the ratios of their learning rates are kept.

    Raises:
        ValueError: no parameter is trainable, or a rate is negative.
    """
    ssm_learning_rate = learning_rate if ssm_learning_rate is None else ssm_learning_rate
    for argument, value in (
        ("learning_rate", learning_rate),
        ("ssm_learning_rate", ssm_learning_rate),
        ("muon_learning_rate", muon_learning_rate),
        ("head_learning_rate", head_learning_rate),
        ("weight_decay", weight_decay),
    ):
        if value is not None and value < 0:
            raise ValueError(f"`{argument}` must not be negative; got {value}.")
    groups: dict[str, dict[str, Any]] = {
        "muon": {"name": "muon", "params": [], "lr": muon_learning_rate, "weight_decay": weight_decay},
        "decay": {"name": "decay", "params": [], "lr": learning_rate, "weight_decay": weight_decay},
        "head_decay": {"name": "head_decay", "params": [], "lr": head_learning_rate, "weight_decay": weight_decay},
        "no_decay": {"name": "no_decay", "params": [], "lr": learning_rate, "weight_decay": 0.0},
        "state": {"name": "state", "params": [], "lr": ssm_learning_rate, "weight_decay": 0.0},
        "head_no_decay": {"name": "head_no_decay", "params": [], "lr": head_learning_rate, "weight_decay": 0.0},
    }
    architecture = find_architecture(getattr(getattr(model, "config", None), "model_type", None))
    unknown = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name, parameter, architecture)
            if group is None:
                unknown.append(name)
                group = group_of(name, parameter) or "decay"
            if muon_learning_rate is not None and group == "decay" and parameter.ndim == 2 and not is_head(name):
                group = "muon"
            if head_learning_rate is not None and is_head(name) and group != "state":
                group = f"head_{group}"
            groups[group]["params"].append(parameter)
    if muon_learning_rate is not None:
        for name, members in groups.items():
            members["muon"] = name == "muon"
    if unknown:
        logger.warning(
            "The record of %r does not name %d tensors of this %s (%s, ...): their shapes decide whether they decay.",
            architecture.model_type if architecture else None,
            len(unknown),
            type(model).__name__,
            ", ".join(unknown[:3]),
        )
    used = [group for group in groups.values() if group["params"]]
    if not used:
        raise ValueError("The model has no trainable parameters: all have `requires_grad=False`.")
    return used

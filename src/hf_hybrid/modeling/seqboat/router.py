"""Router of sparse modular activation: which tokens run a sub-module, and how strongly (arXiv 2306.11197, section 3)."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.autocast import without_autocast
from ...ops.sequence_group import SequenceGroup


def truncated_normal(weight: torch.Tensor, init: ModuleType, std: float) -> None:
    """Normal initial values within two deviations; zeros where `std`, by which torch divides, is 0."""
    if std == 0:
        init.zeros_(weight)
    else:
        init.trunc_normal_(weight, mean=0.0, std=std, a=-2 * std, b=2 * std)


class Routing(NamedTuple):
    """Decision of a router.

    Attributes:
        active: (B, L) bool; padding never is.
        gate: (B, L), factor of the sub-module's output, in (0.5, 1] where active and 0 elsewhere.
        logits: (B, L, 2): skip, activate; None without a router.
    """

    active: torch.Tensor
    gate: torch.Tensor
    logits: torch.Tensor | None


class ActivationRouter(nn.Module):
    """Two logits per token, u = W h + b; a token is active where u_1 > u_0 + act_bias.

    The gate of an active token is its probability sigmoid((u_1 - u_0 - act_bias) / tau), with a learned temperature tau. There is no
    noise and no straight-through estimator: training and inference decide the same, and the gradient reaches the
    logits of active tokens only. A layer in which nothing is active therefore cannot be revived by its router; see
    `dead_layer_penalty`.

    The decision compares the logits, in float32 or better whatever the precision of the model: rounded probabilities are
    equal near 1/2, where every new router is.

    Args:
        hidden_size: D.
        init_temp_scale: c; the temperature starts at c * sqrt(D).
        act_bias: bias added to the skip logit; positive values reduce activation.
    """

    def __init__(self, hidden_size: int, *, init_temp_scale: float = 1.0, act_bias: float = 0.0) -> None:
        super().__init__()
        self.hidden_size, self.init_temp_scale, self.act_bias = hidden_size, init_temp_scale, act_bias
        self.weight = nn.Parameter(torch.empty(2, hidden_size))
        self.bias = nn.Parameter(torch.empty(2))
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.initialize(nn.init)

    @torch.no_grad()
    def initialize(self, init: ModuleType, std: float = 0.02) -> None:
        """Writes initial values; with `transformers.initialization`, loaded tensors stay as they are."""
        truncated_normal(self.weight, init, std)
        init.zeros_(self.bias)
        init.constant_(self.log_temperature, math.log(self.init_temp_scale * math.sqrt(self.hidden_size)))

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, act_bias={self.act_bias}"

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> Routing:
        """Decides for (B, L, D); `mask` (B, L) bool is True at real tokens."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with without_autocast(hidden_states.device):
            logits = F.linear(hidden_states.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
            skip, activate = logits.unbind(-1)
            margin = activate - (skip + self.act_bias if self.act_bias else skip)
            active = margin > 0
            if mask is not None:
                active = active & mask
            gate = torch.sigmoid(margin / self.log_temperature.to(dtype).exp())
            return Routing(active, gate * active, logits)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., 2) logits to the probabilities of skipping and activating."""
        biased = torch.stack([logits[..., 0] + self.act_bias, logits[..., 1]], dim=-1)
        return torch.softmax(biased / self.log_temperature.to(logits.dtype).exp(), dim=-1)

    def dead_layer_penalty(
        self,
        routing: Routing,
        mask: torch.Tensor | None = None,
        minimum_rate: float = 0.02,
        group: SequenceGroup | None = None,
    ) -> torch.Tensor:
        """Pulls tokens over the threshold while fewer than `minimum_rate` of them are active, and vanishes otherwise.

            max(0, 1 - rate / minimum_rate) * mean softplus(u_0 + act_bias - u_1)

        The first factor has no gradient; the second reaches every real token, active or not. Of texts in pieces each process of
        the `group` gets its share of the penalty.
        """
        losses = F.softplus(routing.logits[..., 0] + self.act_bias - routing.logits[..., 1])
        real = torch.ones_like(routing.active) if mask is None else mask
        number, active = real.sum(), routing.active.sum()
        if group is not None:
            number, active = group.reduce(torch.stack([number, active])).unbind()
        number = number.clamp(min=1)
        deficit = (1 - active / (number * minimum_rate)).clamp(min=0)
        return deficit * torch.where(real, losses, 0).sum() / number

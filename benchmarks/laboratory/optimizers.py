"""Optimizers that are compared here, and that neither this library nor Transformers has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Steps of one size in the direction of the sign of an average (arXiv 2302.06675, algorithm 2)."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                direction = state["average"].lerp(parameter.grad, 1 - first).sign_()
                state["average"].lerp_(parameter.grad, 1 - second)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        return loss


class RmsAdamW(torch.optim.AdamW):
    """AdamW whose steps are multiplied by the root mean square of the tensor, at least 1e-3, as Adafactor does.

    Reference: P. Nawrot, "nanoT5" (arXiv 2309.02373), section 2.4. Weight decay is not scaled.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        before = [
            (group["lr"], parameter, parameter.detach().clone())
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        try:
            loss = super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays):
                group["weight_decay"] = decay
        decay_of = {id(p): group["weight_decay"] for group in self.param_groups for p in group["params"]}
        for rate, parameter, old in before:
            scale = old.square().mean().sqrt().clamp(min=1e-3)
            parameter.sub_(old).mul_(scale).add_(old, alpha=1 - rate * decay_of[id(parameter)])
        return loss


@torch.no_grad()
def round_moments(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Rounds what the optimizer keeps of each parameter to bfloat16, to the nearest: a hook after its step."""
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value) and value.ndim:  # the number of steps stays
                value.copy_(value.bfloat16())

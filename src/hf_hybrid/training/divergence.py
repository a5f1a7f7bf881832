"""Notices that a run diverges before a checkpoint of it displaces a good one, and says which gradients grew."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import last_good_checkpoint

_RUNNING = 0.98  # decay of the running norm of a gradient
_FADING = 0.8  # of the growth that was seen, so that what grew steps before the end still counts
_RATES = {"state": "ssm_learning_rate", "muon": "muon_learning_rate"}  # of the groups of `parameter_groups`


class DivergedError(FloatingPointError):
    """The loss, a gradient or a weight is no longer finite."""


class DivergenceMonitor:
    """Compares the norm of each gradient with its running mean, on the device of the model; only `step` waits for it.

    Args:
        model: a model in training; its trainable parameters are watched.
        gradients_overflow: whether gradients may be infinite without harm, as those of float16 with a scale that adapts.
    """

    def __init__(self, model: nn.Module, *, gradients_overflow: bool = False) -> None:
        named = [(name, item) for name, item in model.named_parameters() if item.requires_grad]
        self.names = [name.removeprefix("module.") for name, _ in named]
        self.parameters = [item for _, item in named]
        self.gradients_overflow = gradients_overflow
        self._running: torch.Tensor | None = None  # (P,)
        self._growth: torch.Tensor | None = None  # (P,): largest recent ratio to the running norm
        self._step: torch.Tensor | None = None  # the first step that was not finite, or -1
        self._loss: torch.Tensor | None = None  # at that step
        self._pending: torch.Tensor | None = None  # losses of the micro-batches of the step so far

    @torch.no_grad()
    def observe(self, loss: torch.Tensor, step: int, *, is_complete: bool) -> None:
        """Notes a micro-batch.

        Args:
            loss: its loss, a scalar.
            step: number of the optimizer step it belongs to.
            is_complete: whether the gradients of the step are complete.
        """
        self._pending = loss if self._pending is None else self._pending + loss
        if not is_complete:
            return
        loss, self._pending = self._pending, None
        norms = self._norms(loss.device)
        if self._running is None or self._growth is None or self._step is None or self._loss is None:
            self._running, self._growth = torch.zeros_like(norms), torch.ones_like(norms)
            self._step, self._loss = torch.full_like(loss, -1, dtype=torch.int64), torch.zeros_like(loss)
        finite = norms.isfinite()
        # A lost loss leaves no gradient: which of them grew, the steps before say.
        lost = torch.where(loss.isfinite(), math.inf, self._growth)
        known = self._running > 0
        ratios = torch.where(known, norms / torch.where(known, self._running, 1.0), 1.0)
        growth = torch.maximum(_FADING * self._growth, torch.where(finite, ratios, lost))
        average = torch.where(known, torch.lerp(norms, self._running, _RUNNING), norms)
        is_first_loss = (self._step < 0) & ~(loss.isfinite() & (finite.all() | self.gradients_overflow))
        self._growth = torch.where(self._step < 0, growth, self._growth)
        self._running = torch.where(finite, average, self._running)
        self._loss = torch.where(is_first_loss, loss, self._loss)
        self._step = torch.where(is_first_loss, step, self._step)

    def _norms(self, device: torch.device) -> torch.Tensor:
        """(P,), float32: the norms of the gradients; of sharded ones those of the part in this process."""
        grads: list[torch.Tensor] = [item.grad for item in self.parameters if item.grad is not None]
        local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
        local = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in local]
        is_double = any(grad.dtype == torch.float64 for grad in local)  # which a norm does not narrow
        found = iter(torch._foreach_norm(local, dtype=torch.float64 if is_double else torch.float32) if local else ())
        zero = torch.zeros((), device=device)
        return torch.stack(
            [zero if item.grad is None else next(found).to(device, torch.float32) for item in self.parameters]
            or [zero]
        )

    def step(self) -> int | None:
        """The first step at which the loss or a gradient was not finite; None so far."""
        number = -1 if self._step is None else int(self._step)
        return None if number < 0 else number

    def describe(self, groups: Iterable[Mapping[str, Any]]) -> tuple[str, list[str]]:
        """What happened, in a sentence or two, and the parameter groups whose gradients grew, the most grown first.

        Args:
            groups: parameter groups of the optimizer, with their names.
        """
        if self._loss is None or self._growth is None:
            return "", []
        loss = float(self._loss)
        what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        group_of = {id(item): str(group.get("name", "all")) for group in groups for item in group["params"]}
        largest: dict[str, tuple[float, str]] = {}
        for ratio, name, item in zip(self._growth.tolist(), self.names, self.parameters):
            group = group_of.get(id(item), "all")
            if group not in largest or ratio > largest[group][0]:
                largest[group] = ratio, name
        order = sorted(largest, key=lambda group: -largest[group][0])
        order = [group for group in order if largest[group][0] > 1.0]
        if not order:
            return f"{what}.", []
        grown = [
            f"`{group}` "
            + (f"x{largest[group][0]:.3g}" if math.isfinite(largest[group][0]) else "beyond all numbers")
            + f" ({largest[group][1]})"
            for group in order
        ]
        return f"{what}. Gradients that grew most, against their running norm: {', '.join(grown)}.", order


def diverged(step: int, what: str, run: Path, options: Any, grown: Iterable[str] = ()) -> DivergedError:
    """The error that ends a diverged run.

    Args:
        step: at which it diverged.
        what: what is not finite, as sentences.
        run: folder of the run.
        options: its training arguments.
        grown: names of the parameter groups whose gradients grew, the most grown first.
    """
    good = last_good_checkpoint(run)
    rest = "There is no checkpoint of this run." if good is None else f"The last good checkpoint is {good}."
    rate = next((_RATES.get(group, "learning_rate") for group in grown), "learning_rate")
    if getattr(options, rate, None) is None:
        rate = "learning_rate"
    remedies = [
        f"a lower `{rate}` (now {getattr(options, rate)})",
        f"a lower `max_grad_norm` (now {options.max_grad_norm})",
    ]
    remedies.append("a longer warm-up (`warmup_steps`)")
    if options.fp16:
        remedies.append("`bf16` or float32 instead of `fp16`")
    again = "" if good is None else ", and continue with `--resume_from_checkpoint last`"
    return DivergedError(f"The run diverged at step {step}: {what} {rest} Try {', '.join(remedies)}{again}.")


@torch.no_grad()
def lost_weights(model: nn.Module) -> list[str]:
    """The names of the parameters with values that are not finite; of sharded ones the part in this process counts."""
    names, flags = [], []
    for name, item in model.named_parameters():
        local: torch.Tensor = item.to_local() if hasattr(item, "to_local") else item
        names.append(name)
        flags.append(local.isfinite().all())
    if not flags:
        return []
    together = torch.stack([flag.to(flags[0].device) for flag in flags])
    return [name for name, is_finite in zip(names, together.tolist()) if not is_finite]

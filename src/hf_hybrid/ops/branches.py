"""Which of two forms of an operation runs: that for CPUs, or that for accelerators.

Many operations have two: on a CPU loops over pieces that stay in cache, and reads of values, which cost nothing there;
on an accelerator a few large kernels of fixed shapes, and no value that the host waits for. Both compute the same. All
code asks here which one to take, so that tests can run the forms for accelerators on a CPU (`forced_branch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CPU, ACCELERATOR = "cpu", "accelerator"

# A plain global: compiled graphs guard on it, and the threads of a backward pass see it.
_forced: str | None = None


def uses_cpu_form(place: torch.Tensor | torch.device) -> bool:
    """Whether the form for CPUs runs for a tensor, or on a device."""
    if _forced is not None:
        return _forced == CPU
    device = place.device if isinstance(place, torch.Tensor) else place
    return device.type == "cpu"


def can_read_values(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor may be read: eagerly on a CPU, where no one waits for them."""
    return uses_cpu_form(tensor) and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def is_eager_inference(states: torch.Tensor) -> bool:
    """Whether forms may run that exist for eager float32 and float64 on a CPU alone, without gradients or autocast."""
    return (
        states.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and can_read_values(states)
    )


def widest_float(place: torch.Tensor | torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    device = place.device if isinstance(place, torch.Tensor) else place
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def forced_branch(name: str) -> Iterator[None]:
    """Context in which one form runs wherever the tensors are.

    Args:
        name: "cpu" or "accelerator".

    Raises:
        ValueError: another name.
    """
    global _forced
    if name not in (CPU, ACCELERATOR):
        raise ValueError(f"`name` must be {CPU!r} or {ACCELERATOR!r}; got {name!r}.")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before

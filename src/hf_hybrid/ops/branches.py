"""Which of two forms of an operation runs: that for CPUs, or that for accelerators.

Many operations have two: on a CPU loops over pieces that stay in cache, and reads of values, which cost nothing there;
on an accelerator a few large kernels of fixed shapes, and no value that the host waits for. Both compute the same. All
code asks here which one to take, so that tests can run the forms for accelerators on a CPU (`forced_branch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad

CPU, ACCELERATOR = "cpu", "accelerator"

_BATCHED = torch._C._dispatch_key_parse("Batched")

# A plain global: compiled graphs guard on it, and the threads of a backward pass see it.
_forced: str | None = None


def uses_cpu_form(place: torch.Tensor | torch.device) -> bool:
    """Whether the form for CPUs runs for a tensor, or on a device."""
    if _forced is not None:
        return _forced == CPU
    device = place.device if isinstance(place, torch.Tensor) else place
    return device.type == "cpu"


def can_read_values(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor may be read: eagerly on a CPU, where no one waits for them, and not for all entries of a
    `torch.func.vmap` at once."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return uses_cpu_form(tensor) and "Vmap" not in transforms()


def transforms() -> list[str]:
    """The transforms of `torch.func` around this call, from the outermost on: "Grad", "Jvp", "Vmap"."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    names = [interpreter.key().name for interpreter in stack]
    return [name for name in names if name != "Functionalize"]


def takes_plain_form() -> bool:
    """Whether an operation must consist of operators of torch, which have a rule for everything.

    So it is in the transforms of `torch.func`, which operators of `torch.library` refuse, and in forward-mode differentiation, in
    which they drop tangents without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or bool(transforms())


def is_batched(gradient: torch.Tensor) -> bool:
    """Whether a gradient stands for many (`is_grads_batched=True`, vectorized Jacobians): nothing may be written in place."""
    return not torch.compiler.is_compiling() and torch._C._dispatch_keys(gradient).has(_BATCHED)


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is differentiated, or stands for many, by a transform of `torch.func` or in forward mode."""
    if not takes_plain_form():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def without_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """What a transform of `torch.func` has wrapped: for `vmap` all entries together."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, for one whose forward pass torch can differentiate itself where `takes_plain_form`."""
    if takes_plain_form():
        return function.forward(*arguments)
    return function.apply(*arguments)


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

"""Computation outside autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Context in which operations keep the types of their operands; the meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def outside_autocast(function: _Function) -> _Function:
    """Decorator: runs a function of tensors on one device in `without_autocast`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        with without_autocast(tensor.device):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]

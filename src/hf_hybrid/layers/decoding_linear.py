"""Linear layers during a generation on a CPU, whose steps have few rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import nn

from ..ops.few_rows import few_rows_linear


def _forward(layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """`nn.Linear.forward`."""
    return few_rows_linear(inputs, layer.weight, layer.bias)


@contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Context in which the linear layers of a model multiply few rows in the form that is fast there.

    The layers stay `torch.nn.Linear`: tools that quantise a model replace modules of exactly this class. What has a forward of its own
    (a subclass, or a layer that a hook of Accelerate wraps) is left alone.

    Args:
        model: any model.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # another generation of this model may have ended before

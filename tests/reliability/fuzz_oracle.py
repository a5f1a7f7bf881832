"""What a random call or configuration must end with: an error that explains itself, or a finite result that is right."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import Cache

from hf_hybrid.auto import ARCHITECTURES

# Largest difference between float32 and float64, relative to the largest number of a tensor. Gradients sum over tokens and pass the
# layers twice.
SINGLE_PRECISION, OF_GRADIENTS = 2e-4, 2e-3
DOCUMENTED = (ValueError, TypeError, NotImplementedError)
# In backticks as in this library, in quotes as in the checks of types by huggingface_hub and Transformers.
NAMED_ARGUMENT = re.compile(r"[`'\"]\w[\w.]*[`'\"=]")
OF_PYTHON = re.compile(r"unexpected keyword argument|required positional argument")


def check_documented(error: BaseException, *, of_transformers: bool = False) -> None:
    """An error is one that a user can act on: a ValueError, TypeError or NotImplementedError that names an argument and that a
    statement of this library (or of the package of another architecture) raised, not something inside torch.

    Args:
        error: the exception.
        of_transformers: whether errors that Transformers raises count, as those of `generate` and of `PreTrainedConfig` do.
    """
    place = traceback.extract_tb(error.__traceback__)[-1]
    packages = {architecture.package.split(".", 1)[0] for architecture in ARCHITECTURES}
    if of_transformers:
        packages |= {"transformers", "huggingface_hub"}
    is_raised = place.line.startswith("raise ") and any(f"/{package}/" in place.filename for package in packages)
    is_named = bool(NAMED_ARGUMENT.search(str(error))) and (is_raised or bool(OF_PYTHON.search(str(error))))
    assert isinstance(error, DOCUMENTED) and is_named, describe(error)


def describe(error: BaseException) -> str:
    """Kind and place of an error, in one line."""
    places = traceback.extract_tb(error.__traceback__)
    own = [place for place in places if "/hf_hybrid/" in place.filename] or places
    place = own[-1]
    name = place.filename.rsplit("/", 1)[-1]
    return f"{type(error).__name__} at {name}:{place.lineno} ({place.line}): {str(error)[:200]}"


def named_tensors(outputs: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating tensor of an output, by the path to it; caches are left out."""
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point():
            yield prefix, outputs
    elif isinstance(outputs, Mapping):
        for name, value in outputs.items():
            yield from named_tensors(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(outputs, (tuple, list)):
        for index, value in enumerate(outputs):
            yield from named_tensors(value, f"{prefix}.{index}" if prefix else str(index))
    elif not isinstance(outputs, (Cache, type(None))):
        raise AssertionError(f"{prefix} is a {type(outputs).__name__}")


def check_finite(outputs: Any) -> None:
    """Every number of an output is finite."""
    for name, tensor in named_tensors(outputs):
        assert tensor.isfinite().all(), f"`{name}` is not finite"


def check_same(
    actual: Any,
    expected: Any,
    moved: Callable[[], Any] | None,
    tolerance: float = SINGLE_PRECISION,
    what: str = "",
) -> None:
    """Two outputs agree, relative to the largest number of each tensor.

    Args:
        actual, expected: outputs, or tensors.
        moved: gives `expected` with weights moved by as much as float32 rounds them. Where that changes the result as much, it was
            at a jump (of a router, or between two codewords), and no precision is to be expected.
        tolerance: largest difference.
        what: name of a single tensor.
    """
    first, second = dict(named_tensors(actual, what)), dict(named_tensors(expected, what))
    assert first.keys() == second.keys(), f"{sorted(first)} and {sorted(second)}"
    far = {name: difference(first[name], second[name]) for name in first}
    far = {
        name: distance
        for name, distance in far.items()
        if not distance <= (max(tolerance, OF_GRADIENTS) if name.startswith("gradient") else tolerance)
    }
    if far and moved is not None:
        others = dict(named_tensors(moved()))
        far = {
            name: distance for name, distance in far.items() if difference(others[name], second[name]) < 0.1 * distance
        }
    assert not far, f"other results: {far}"


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number where that is above 1; infinite for other shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max()) / max(1.0, float(expected.abs().max()))


@torch.no_grad()
def move_weights(model: torch.nn.Module) -> None:
    """Moves every weight by about as much as float32 rounds the results of a layer."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.mul_(1 + 1e-6 * noise)

"""Operations on long inputs, whose forms the small models do not reach, in transforms of `torch.func`."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp, vmap

from hf_hybrid.ops.cross_entropy import FEWEST_ELEMENTS, summed_cross_entropy
from hf_hybrid.ops.diagonal_scan import diagonal_scan
from hf_hybrid.ops.diagonal_ssm import DiagonalSystem
from hf_hybrid.ops.recompute import recomputed
from hf_hybrid.ops.rms_norm import rms_norm

CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def scanned(inputs: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    rate, turn, *rest = parts
    system = DiagonalSystem(-rate.square() - 0.1, turn, *rest)
    outputs, state = diagonal_scan(inputs, system, backward=system)
    return torch.cat([outputs.flatten(), state.flatten()])


def pieces(inputs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return recomputed(lambda first, second: torch.tanh(first) * second, inputs, other)


def losses(logits: torch.Tensor) -> torch.Tensor:
    return summed_cross_entropy(logits, torch.arange(len(logits)))


CASES = {
    "scan": (scanned, [(2, 3, 100), *[(3, 4)] * 6]),
    "norm": (lambda states, weight: rms_norm(states, weight, 1e-6), [(2, 300, 1024), (1024,)]),
    "pieces": (pieces, [(2, 300, 1024)] * 2),
    "loss": (losses, [(16, FEWEST_ELEMENTS // 16)]),
}


@pytest.mark.parametrize("name", CASES)
def test_tangents_and_rows(name: str) -> None:
    function, shapes = CASES[name]
    inputs = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    directions = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    outputs = function(*inputs)
    weights = torch.randn_like(outputs)
    gradients = torch.autograd.grad(outputs, inputs, weights)
    plain = tuple(tensor.detach() for tensor in inputs)

    expected = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions))
    _, tangent = jvp(function, plain, directions)
    torch.testing.assert_close((tangent * weights).sum(), expected, **CLOSE)

    several = vmap(function)(*(torch.stack([tensor, tensor + 0.1]) for tensor in plain))
    torch.testing.assert_close(several[0], outputs.detach(), **CLOSE)
    torch.testing.assert_close(several[1], function(*(tensor + 0.1 for tensor in plain)), **CLOSE)

    if (
        name == "scan"
    ):  # torch's older `vmap`, which `is_grads_batched` takes, lacks rules that its backward pass needs
        return
    many = torch.stack([weights, 2 * weights])
    batched = torch.autograd.grad(function(*inputs), inputs, many, is_grads_batched=True)
    for gradient, both in zip(gradients, batched):
        torch.testing.assert_close(both, torch.stack([gradient, 2 * gradient]), **CLOSE)

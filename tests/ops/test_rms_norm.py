"""Root mean square normalisation: equal to the library's form, forward and backward, whole or in pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_hybrid.ops import rms_norm as module
from hf_hybrid.ops.rms_norm import rms_norm

pytestmark = pytest.mark.both_branches


@pytest.fixture
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ELEMENTS_AT_A_TIME", 24)  # two rows of 12, so the last piece of 7 rows is ragged


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    weight = torch.rand(shape[-1], generator=generator, dtype=dtype) + 0.5
    return inputs.requires_grad_(), weight.requires_grad_(), gradient


@pytest.mark.usefixtures("few_rows_at_a_time")
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (12,), (0, 12), (1, 30)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_the_form_of_torch(shape, dtype, tolerance):
    inputs, weight, gradient = tensors(shape, dtype)
    results = []
    for outputs in (rms_norm(inputs, weight, 1e-6), F.rms_norm(inputs, weight.shape, weight, 1e-6)):
        results.append([outputs, *torch.autograd.grad(outputs, (inputs, weight), gradient)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.usefixtures("few_rows_at_a_time")
def test_gradcheck_with_strided_inputs():
    inputs = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x.permute(2, 1, 0), w, 1e-3), (inputs, weight))


def test_one_of_the_gradients_is_enough():
    inputs, weight, gradient = tensors((3, 12), torch.float32)
    frozen = rms_norm(inputs, weight.detach(), 1e-6)
    assert torch.equal(
        torch.autograd.grad(frozen, inputs, gradient)[0],
        torch.autograd.grad(rms_norm(inputs, weight, 1e-6), inputs, gradient)[0],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_torch(dtype):
    inputs, weight, _ = tensors((3, 12), dtype)
    assert torch.equal(rms_norm(inputs, weight, 1e-6), F.rms_norm(inputs, weight.shape, weight, 1e-6))


@pytest.mark.both_branches(only="cpu")
def test_second_derivatives(few_rows_at_a_time):
    inputs, weight, _ = tensors((3, 4), torch.float64)
    assert torch.autograd.gradgradcheck(lambda *given: rms_norm(*given, 1e-6), (inputs, weight))


@pytest.mark.both_branches(only="cpu")
@pytest.mark.filterwarnings("error")
def test_half_precision_inputs_of_a_wider_weight(few_rows_at_a_time):
    """Under autocast: what torch computes, without its warning about two dtypes."""
    inputs, weight, gradient = tensors((7, 12), torch.float32)
    halves = [inputs.detach().bfloat16().requires_grad_() for _ in range(2)]
    weights = [weight.detach().clone().requires_grad_() for _ in range(2)]
    found = rms_norm(halves[0], weights[0], 1e-6)
    expected = F.rms_norm(halves[1].float(), (12,), weights[1], 1e-6).to(torch.bfloat16)
    for result in (found, expected):
        result.backward(gradient.bfloat16())
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert torch.equal(halves[0].grad, halves[1].grad)
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


def test_compiles_in_one_graph():
    inputs, weight, gradient = tensors((3, 12), torch.float32)
    expected = torch.autograd.grad(rms_norm(inputs, weight, 1e-6), (inputs, weight), gradient)
    outputs = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")(inputs, weight, 1e-6)
    for actual, wanted in zip(torch.autograd.grad(outputs, (inputs, weight), gradient), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_a_program_takes_any_number_of_rows():
    """Even where fewer elements than `FEWEST_ELEMENTS` are computed otherwise in eager."""

    class Norm(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return rms_norm(inputs, weight, 1e-6)

    weight, (few, many) = torch.rand(12), (torch.randn(rows, 12) for rows in (5, module.FEWEST_ELEMENTS))
    with torch.no_grad():
        for example, other in ((few, many), (many, few)):
            shapes = ({0: torch.export.Dim.AUTO}, None)
            program = torch.export.export(Norm(), (example, weight), dynamic_shapes=shapes).module()
            torch.testing.assert_close(program(other, weight), F.rms_norm(other, weight.shape, weight, 1e-6))

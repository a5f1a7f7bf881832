"""Products of a decoding step on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_hybrid.layers.decoding_linear import few_rows
from hf_hybrid.ops.few_queries import few_query_attention, for_few_queries, is_few_queries
from hf_hybrid.ops.few_rows import few_rows_linear

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(rows: int, has_bias: bool) -> None:
    inputs, weight = torch.randn(rows, 1, 40, dtype=torch.float64), torch.randn(24, 40, dtype=torch.float64)
    bias = torch.randn(24, dtype=torch.float64) if has_bias else None
    with torch.no_grad():
        found = few_rows_linear(inputs, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, F.linear(inputs, weight, bias), **EXACT)


def test_linear_of_other_shapes_and_types() -> None:
    with torch.no_grad():
        weight = torch.randn(6, 4)
        for shape in ((4,), (0, 4), (2, 3, 4)):
            inputs = torch.randn(shape)
            torch.testing.assert_close(few_rows_linear(inputs, weight), F.linear(inputs, weight))
        low = torch.randn(2, 4, dtype=torch.bfloat16)
        assert torch.equal(few_rows_linear(low, weight.bfloat16()), F.linear(low, weight.bfloat16()))
        with torch.autocast("cpu", torch.bfloat16):
            assert few_rows_linear(torch.randn(2, 4), weight).dtype == torch.bfloat16


def test_linear_has_gradients() -> None:
    inputs, weight = torch.randn(2, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    few_rows_linear(inputs, weight).sum().backward()
    assert inputs.grad is not None and weight.grad is not None


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("mask_kind", ["none", "boolean", "infinite", "additive", "each query"])
@pytest.mark.parametrize("is_laid_out", [False, True])
def test_attention(queries: int, mask_kind: str, is_laid_out: bool) -> None:
    batch, heads, keys, width = 2, 3, 260, 8
    query = torch.randn(batch, queries, heads, width, dtype=torch.float64).transpose(1, 2)
    key, value = torch.randn(2, batch, keys, heads, width, dtype=torch.float64).transpose(2, 3)
    mask = None
    if mask_kind != "none":
        mask = torch.rand(batch, 1, queries if mask_kind == "each query" else 1, keys) > 0.5
        mask[1] = False  # no key is visible
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    if mask_kind in ("additive", "infinite"):
        least = -torch.inf if mask_kind == "infinite" else torch.finfo(torch.float64).min
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, least)
    if is_laid_out:
        laid_out = for_few_queries(key, value)
        assert torch.equal(laid_out[0], key) and torch.equal(laid_out[1], value)
        key, value = laid_out
    with torch.no_grad():
        assert is_few_queries(query, key)
        found = few_query_attention(query, key, value, mask, 0.3)
    torch.testing.assert_close(found, expected, **EXACT)


def test_layers_stay_as_they_are() -> None:
    """Inside and behind the context; two generations of a model may overlap."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6)))
    inputs = torch.randn(2, 4)
    expected = model(inputs)
    first, second = few_rows(model), few_rows(model)
    with torch.no_grad():
        with first:
            assert all(type(layer) is nn.Linear for layer in (model[0], model[1][0]))
            with second:
                torch.testing.assert_close(model(inputs), expected)
            assert "forward" in vars(model[0])
        assert "forward" not in vars(model[0])
    assert torch.equal(model(inputs), expected)


def test_wrapped_layers_are_left_alone() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = wrapped = lambda inputs: inputs
    with few_rows(nn.Sequential(layer)):
        assert layer.forward is wrapped
    assert layer.forward is wrapped

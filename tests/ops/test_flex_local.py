"""FlexAttention as local attention: its pattern and its table by the definition, with gradients, and PyTorch's own eager form."""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.ops import flex_local
from hf_hybrid.ops.flex_local import Pattern, flex_local_attention, flex_reference, table_bias, visibility
from hf_hybrid.ops.local_attention import chunk_attention_reference, local_attention_reference

LENGTH, HEADS, WIDTH = 37, 2, 16


def states(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(2, HEADS, LENGTH, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]


def padding() -> torch.Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :9] = mask[1, -5:] = False
    return mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_pattern_and_table_are_those_of_local_attention(chunk_size: int | None, causal: bool) -> None:
    left = 7
    pattern = Pattern(left, 0 if causal else left, chunk_size)
    query, key, value = states()
    table = torch.randn(HEADS, left + pattern.right + 1, dtype=torch.float64, requires_grad=True)
    mask = padding()
    actual = flex_reference(query, key, value, visibility(pattern, mask, None), table_bias(table, left))
    options = {"causal": causal, "key_mask": mask}
    if chunk_size is None:
        expected = local_attention_reference(query, key, value, radius=left, bias=table, **options)
    else:
        wide = torch.nn.functional.pad(table, (0, left)) if causal else table
        expected = chunk_attention_reference(query, key, value, chunk_size=chunk_size, bias=wide, **options)
    torch.testing.assert_close(actual, expected)
    inputs = (query, key, value, table)
    for first, second in zip(torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(first, second)


def test_the_form_of_pytorch_and_the_shared_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (part.detach() for part in states(torch.float32))
    pattern, table, mask = Pattern(7, 7), torch.randn(HEADS, 15), padding()
    made = []
    original = flex_local.create_block_mask
    monkeypatch.setattr(
        flex_local, "create_block_mask", lambda *args, **kwargs: made.append(1) or original(*args, **kwargs)
    )
    for _ in range(3):  # layers of one forward pass
        actual = flex_local_attention(query, key, value, pattern, bias=table, key_mask=mask)
    expected = local_attention_reference(query, key, value, radius=7, bias=table, key_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert len(made) == 1
    flex_local_attention(query, key, value, pattern, bias=table, key_mask=padding())
    mask[0, 9] = False
    flex_local_attention(query, key, value, pattern, bias=table, key_mask=mask)
    assert len(made) == 3  # another mask, and a changed one

"""Attention of texts that arrive in pieces, rings and row orders, against the token by token definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.ops.block_state import (
    compact_rows,
    context_attention,
    context_attention_reference,
    restore_rows,
    ring_after,
    ring_view,
    row_order,
    segment_attention,
    segment_attention_reference,
    step_attention,
    writable,
    write_slots,
)

pytestmark = pytest.mark.both_branches

HEADS, WIDTH = 2, 3
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
sizes = st.integers(1, 6)


def heads(batch: int, length: int, *more: int) -> torch.Tensor:
    return torch.randn(batch, HEADS, length, *more, WIDTH, dtype=torch.float64)


@given(length=st.integers(1, 23), size=sizes, is_sliding=st.booleans(), has_bias=st.booleans())
def test_a_whole_text(length: int, size: int, is_sliding: bool, has_bias: bool) -> None:
    states = [heads(2, length) for _ in range(3)]
    bias = torch.randn(HEADS, size, dtype=torch.float64) if has_bias else None
    options = {"block_size": size, "is_sliding": is_sliding, "bias": bias, "scale": 0.7}
    torch.testing.assert_close(
        segment_attention(*states, **options), segment_attention_reference(*states, **options), **CLOSE
    )


@given(cuts=st.sets(st.integers(1, 22), max_size=5), size=sizes, is_sliding=st.booleans(), per_row=st.booleans())
def test_pieces_with_rings(cuts: set[int], size: int, is_sliding: bool, per_row: bool) -> None:
    """The same rows, told by one number or row by row; single tokens also by the step."""
    query, key, value = (heads(2, 23) for _ in range(3))
    bias = torch.randn(HEADS, size, dtype=torch.float64)
    options = {"block_size": size, "is_sliding": is_sliding, "bias": bias}
    expected = segment_attention_reference(query, key, value, **options)
    rings: list[torch.Tensor | None] = [None, None]
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 23]):
        piece = slice(first, last)
        start = torch.full((2,), first) if per_row and first else first
        outputs = segment_attention(
            query[:, :, piece], key[:, :, piece], value[:, :, piece], start=start, rings=rings, **options
        )
        torch.testing.assert_close(outputs, expected[:, :, piece], **CLOSE)
        rings = [ring_after(ring, s[:, :, piece], size=size, start=start) for ring, s in zip(rings, (key, value))]
        if last - first == 1:
            view = ring_view(torch.tensor([first]), size, is_sliding=is_sliding)
            outputs = step_attention(query[:, :, piece], *rings, view, bias=bias)
            torch.testing.assert_close(outputs, expected[:, :, piece], **CLOSE)


@given(lengths=st.lists(st.integers(0, 9), min_size=2, max_size=4), size=sizes, is_sliding=st.booleans())
def test_rows_of_different_lengths(lengths: list[int], size: int, is_sliding: bool) -> None:
    """Two calls with another number of real tokens in every row."""
    batch = len(lengths)
    counts = [torch.tensor(lengths), torch.tensor(lengths[::-1])]
    texts = [heads(batch, max(1, int(sum(counts).max()))) for _ in range(3)]
    options = {"block_size": size, "is_sliding": is_sliding}
    expected = segment_attention_reference(*texts, **options)
    start: int | torch.Tensor = 0
    rings: list[torch.Tensor | None] = [None, None]
    for count in counts:
        width = max(1, int(count.max()))
        pieces = []
        for text in texts:
            begins = torch.zeros(batch, dtype=torch.long) if isinstance(start, int) else start
            index = (begins.unsqueeze(1) + torch.arange(width)).clamp(max=text.shape[2] - 1)
            pieces.append(text.gather(2, index[:, None, :, None].expand(-1, HEADS, -1, WIDTH)))
        outputs = segment_attention(*pieces, start=start, rings=rings, **options)
        for row, real in enumerate(count.tolist()):
            begin = 0 if isinstance(start, int) else int(start[row])
            torch.testing.assert_close(outputs[row, :, :real], expected[row, :, begin : begin + real], **CLOSE)
        rings = [
            ring_after(ring, piece, size=size, start=start, counts=count) for ring, piece in zip(rings, pieces[1:])
        ]
        start = start + count
    for row, total in enumerate(start.tolist()):
        for ring, text in zip(rings, texts[1:]):
            for slot in range(size):
                positions = [p for p in range(total) if p % size == slot]
                found = text[row, :, positions[-1]] if positions else torch.zeros(HEADS, WIDTH)
                assert torch.equal(ring[row, :, slot], found.double())


@given(length=st.integers(1, 17), first=st.integers(0, 9), size=sizes, states=st.integers(1, 4), per_row=st.booleans())
def test_contexts_of_blocks(length: int, first: int, size: int, states: int, per_row: bool) -> None:
    query = heads(2, first + length)
    blocks = (first + length + size - 1) // size + 2
    key, value = heads(2, blocks, states), heads(2, blocks, states)
    expected = context_attention_reference(query, key, value, block_size=size)[:, :, first:]
    skipped = first // size
    start = torch.full((2,), first) if per_row else first
    outputs = context_attention(
        query[:, :, first:], key[:, :, skipped:], value[:, :, skipped:], block_size=size, start=start
    )
    torch.testing.assert_close(outputs, expected, **CLOSE)


@given(mask=st.lists(st.booleans(), min_size=12, max_size=12))
def test_row_order(mask: list[bool]) -> None:
    real = torch.tensor(mask).view(3, 4)
    states = torch.randn(3, 4, 2)
    order = row_order(real)
    compact = compact_rows(states, order)
    for row in range(3):
        count = int(order.counts[row])
        assert torch.equal(compact[row, :count], states[row, real[row]])
        assert not compact[row, count:].any()
    assert torch.equal(restore_rows(compact, order), states * real.unsqueeze(-1))


def test_row_order_is_differentiable() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]]).bool()
    states = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    order = row_order(mask)
    assert torch.autograd.gradcheck(lambda x: restore_rows(compact_rows(x, order).square(), order), states)


@pytest.mark.parametrize("is_sliding", [True, False])
def test_gradients(is_sliding: bool) -> None:
    states = [heads(1, 7).requires_grad_() for _ in range(3)]
    bias = torch.randn(HEADS, 3, dtype=torch.float64, requires_grad=True)
    rings = [heads(1, 3) for _ in range(2)]

    def attend(query, key, value, bias):
        options = {"block_size": 3, "is_sliding": is_sliding, "bias": bias, "rings": rings}
        return segment_attention(query, key, value, start=4, **options)

    assert torch.autograd.gradcheck(attend, (*states, bias))
    contexts = [heads(1, 4, 2).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: context_attention(q, k, v, block_size=3, start=2), (states[0], *contexts)
    )


def test_a_step_writes_in_place_only_where_it_may() -> None:
    ring, token = torch.zeros(2, 1, 3, 1), torch.ones(2, 1, 1, 1)
    assert write_slots(ring, token, 1) is ring and ring[:, 0, 1, 0].tolist() == [1, 1]
    slots = torch.tensor([0, 2])
    write_slots(ring, 2 * token, slots, valid=torch.tensor([True, False]))
    assert ring[..., 0].flatten().tolist() == [2, 1, 0, 0, 1, 0]
    write_slots(ring, 3 * token, slots)
    assert ring[..., 0].flatten().tolist() == [3, 1, 0, 0, 1, 3]
    needing = token.clone().requires_grad_()
    assert write_slots(ring, needing, 0) is not ring
    with torch.inference_mode():
        locked = torch.zeros(2, 1, 3, 1)
        assert writable(locked, token) is locked
    assert writable(locked, token) is not locked
    one_graph = torch.compile(write_slots, fullgraph=True, backend="eager")
    with torch.no_grad():
        copied = one_graph(ring, 4 * token, 1)
    assert copied is not ring and copied[:, 0, 1, 0].tolist() == [4, 4]

"""Attention inside the blocks of a text that arrives in pieces: rings of keys and values, and context states.

A text is cut into blocks of W tokens. A token sees the tokens of its own block up to itself ("block"), or the last W
tokens ("sliding window"); it may also see S context states that all tokens of its block share. Between two calls the
keys and values of the last W tokens are kept in a ring: that of position p lies in slot p mod W.

Positions count the real tokens of a row. In a call the real tokens of a row are its first ones (`compact_rows`), and
`start` says how many came in earlier calls: one number for all rows, or a tensor (B,).

Shape letters: B batch, n heads, T tokens of a call, W tokens per block and per window, e head width, S context states.
Reference: arXiv 2306.09539.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .blocked_attention import blocked_attention
from .in_place import is_changeable
from .local_attention import cached_local_attention, chunk_attention, local_attention
from .sdpa import dot_product_attention
from .sdpa_blocks import Blocks

Start = int | torch.Tensor


# ---------------------------------------------------------------------------------------------------------------------
# rows with padding
# ---------------------------------------------------------------------------------------------------------------------


class RowOrder(NamedTuple):
    """Where the tokens of padded rows go when the real ones move to the front."""

    places: torch.Tensor  # (B * T,), places in a flattened (B, T + 1) tensor; padding goes to the last column
    counts: torch.Tensor  # (B,) real tokens


def row_order(mask: torch.Tensor) -> RowOrder:
    """Order of the rows of a padding mask (B, T) bool, True at real tokens."""
    batch, length = mask.shape
    columns = torch.where(mask, mask.long().cumsum(1) - 1, length)
    rows = torch.arange(batch, device=mask.device).unsqueeze(1) * (length + 1)
    return RowOrder((columns + rows).flatten(), mask.long().sum(1))


def compact_rows(states: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """(B, T, D) with the real tokens of every row first, in order, then zeros."""
    batch, length, width = states.shape
    moved = states.new_zeros(batch * (length + 1), width).index_copy(0, order.places, states.flatten(0, 1))
    return moved.view(batch, length + 1, width)[:, :length]


def restore_rows(states: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Inverse of `compact_rows`, with zeros at padding."""
    return F.pad(states, (0, 0, 0, 1)).flatten(0, 1).index_select(0, order.places).view(states.shape)


# ---------------------------------------------------------------------------------------------------------------------
# rings
# ---------------------------------------------------------------------------------------------------------------------


def ring_after(
    ring: torch.Tensor | None,
    states: torch.Tensor,
    *,
    size: int,
    start: Start = 0,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The ring after the tokens of a call; slots that no token reached stay as they are, or zero.

    Args:
        ring: (B, n, W, e), or None before the first call.
        states: (B, n, T, e).
        size: W.
        start: tokens of earlier calls.
        counts: (B,) real tokens of each row, the first ones; None: all T.

    Returns:
        (B, n, W, e), a new tensor.
    """
    batch, _, length, _ = states.shape
    if isinstance(start, int) and counts is None and length >= size:
        return states[:, :, length - size :].roll((start + length) % size, dims=2)
    if ring is None:
        ring = states.new_zeros(*states.shape[:2], size, states.shape[3])
    slots = torch.arange(size, device=states.device)
    if isinstance(start, int) and counts is None:
        return ring.index_copy(2, (slots[:length] + start) % size, states)
    first = torch.as_tensor(start, device=states.device).view(-1, 1)  # (B, 1), or (1, 1) for all rows
    last = first + (length if counts is None else counts.unsqueeze(1)) - 1
    newest = last - (last - slots) % size  # position whose slot this is, (B, W)
    index = torch.where(newest >= first, newest - first + size, slots)
    return _gather_tokens(torch.cat([ring, states], dim=2), index)


def _gather_tokens(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, n, X, e) and (B, Y) -> (B, n, Y, e), the tokens of each row at its own places."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def write_slots(
    ring: torch.Tensor, states: torch.Tensor, slots: Start, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """The ring after one token: written in place when nothing needs the old values, else into a copy.

    Args:
        ring: (B, n, W, e).
        states: (B, n, 1, e).
        slots: slot of the token, one or (B,).
        valid: (B,) bool, rows whose token is real; None for all.
    """
    ring = writable(ring, states)
    if isinstance(slots, int):
        written = ring[:, :, slots]
        new = states[:, :, 0]
        ring[:, :, slots] = new if valid is None else torch.where(valid[:, None, None], new, written)
        return ring
    rows = torch.arange(ring.shape[0], device=ring.device)
    new = states[:, :, 0].to(ring.dtype)
    if valid is not None:
        new = torch.where(valid[:, None, None], new, ring[rows, :, slots])
    ring[rows, :, slots] = new
    return ring


def writable(kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The kept tensor itself if it may be changed in place, else a copy: under autograd, in graphs, outside inference
    mode."""
    needs_graph = torch.is_grad_enabled() and (kept.requires_grad or new.requires_grad)
    return kept if is_changeable(kept) and not needs_graph else kept.clone()


# ---------------------------------------------------------------------------------------------------------------------
# attention of a piece of text
# ---------------------------------------------------------------------------------------------------------------------


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_size: int,
    is_sliding: bool,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    start: Start = 0,
    rings: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of the tokens of a call to those of their block, or of their window, in this call and before it.

    Query t sees key j when 0 <= t - j < W (sliding), or j <= t and both lie in the same block.

    Args:
        query, key, value: (B, n, T, e), T >= 1.
        block_size: W.
        is_sliding: windows instead of blocks.
        bias: (n, W); entry k is added to the scores at distance `t - j = W - 1 - k`.
        scale: factor on the products of queries and keys; None = e ** -0.5.
        dropout_p: probability of dropping an attention probability.
        start: tokens of earlier calls.
        rings: keys and values of earlier calls, (B, n, W, e) each; needed unless `start` is 0.

    Returns:
        (B, n, T, e).
    """
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    if isinstance(start, int) and start == 0:
        if is_sliding:
            return local_attention(query, key, value, radius=block_size - 1, causal=True, bias=bias, **options)
        return _blocks(query, key, value, block_size, bias, options)
    assert rings is not None
    if isinstance(start, int):
        return _uniform_attention(query, key, value, block_size, is_sliding, bias, options, start, rings)
    # Rows of different phases: every row is moved to the right until its blocks begin where those of the others do.
    length = query.shape[2]
    phase = (start % block_size).unsqueeze(1)  # (B, 1)
    columns = torch.arange(length + block_size - 1, device=query.device)
    token = (columns - phase).clamp(max=length - 1)
    queries = _gather_tokens(query, token.clamp(min=0))
    source = torch.where(token < 0, columns, token + block_size)
    keys, values = (_gather_tokens(torch.cat(pair, dim=2), source) for pair in zip(rings, (key, value)))
    if is_sliding:
        has_block = (start >= block_size).unsqueeze(1).expand(-1, block_size)
        key_mask = F.pad(has_block, (0, columns.shape[0]), value=True)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(rings, (keys, values)))
        outputs = cached_local_attention(
            queries, keys, values, radius=block_size - 1, bias=bias, key_mask=key_mask, **options
        )
    else:
        outputs = _blocks(queries, keys, values, block_size, bias, options)
    return _gather_tokens(outputs, phase + columns[:length])


def _blocks(query, key, value, block_size: int, bias: torch.Tensor | None, options: dict) -> torch.Tensor:
    bias = None if bias is None else F.pad(bias, (0, block_size - 1))
    return chunk_attention(query, key, value, chunk_size=block_size, causal=True, bias=bias, **options)


def _uniform_attention(query, key, value, block_size, is_sliding, bias, options, start, rings) -> torch.Tensor:
    """`segment_attention` for one `start` > 0 of all rows."""
    phase, length = start % block_size, query.shape[2]
    if is_sliding:
        older = [ring[:, :, :phase] for ring in rings]
        if start >= block_size:
            older = [torch.cat([ring[:, :, phase + 1 :], part], dim=2) for ring, part in zip(rings, older)]
        key, value = (torch.cat(pair, dim=2) for pair in zip(older, (key, value)))
        return cached_local_attention(query, key, value, radius=block_size - 1, bias=bias, **options)
    key, value = (torch.cat([ring[:, :, :phase], new], dim=2) for ring, new in zip(rings, (key, value)))
    if phase + length <= block_size:  # one block
        bias = None if bias is None else bias[:, block_size - phase - length :]
        return cached_local_attention(query, key, value, radius=phase + length - 1, bias=bias, **options)
    query = F.pad(query, (0, 0, phase, 0))
    return _blocks(query, key, value, block_size, bias, options)[:, :, phase:]


def segment_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_size: int,
    is_sliding: bool,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """`segment_attention` of a whole text by its definition, token by token through the rings."""
    batch, heads, length, width = query.shape
    rings = [query.new_zeros(batch, heads, block_size, width) for _ in range(2)]
    outputs = []
    for position in range(length):
        slot = position % block_size
        for ring, states in zip(rings, (key, value)):
            ring[:, :, slot] = states[:, :, position]
        seen = [s for s in range(block_size) if s <= slot or (is_sliding and position >= block_size)]
        scores = torch.einsum("bne,bnse->bns", query[:, :, position], rings[0][:, :, seen])
        scores = scores * (width**-0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias[:, [block_size - 1 - (slot - s) % block_size for s in seen]]
        outputs.append(torch.einsum("bns,bnse->bne", torch.softmax(scores, dim=-1), rings[1][:, :, seen]))
    return torch.stack(outputs, dim=2)


class RingView(NamedTuple):
    """What one new token sees of a ring."""

    distance: torch.Tensor  # (1 or B, W): t - j of every slot
    visible: torch.Tensor  # (1 or B, W) bool


def ring_view(position: torch.Tensor, block_size: int, *, is_sliding: bool) -> RingView:
    """View of tokens at `position`, (1,) or (B,); their own key is in the ring already."""
    slots = torch.arange(block_size, device=position.device)
    distance = (position.unsqueeze(1) - slots) % block_size
    farthest = position if is_sliding else position % block_size
    return RingView(distance, distance <= farthest.unsqueeze(1))


def step_attention(
    query: torch.Tensor,
    key_ring: torch.Tensor,
    value_ring: torch.Tensor,
    view: RingView,
    *,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of one token per row to a ring that holds its own key: (B, n, 1, e) -> (B, n, 1, e)."""
    visible = view.visible[:, None, None]  # (B, 1, 1, W)
    if bias is None:
        scores = torch.zeros((), dtype=query.dtype, device=query.device)
    else:
        index = bias.shape[1] - 1 - view.distance
        scores = bias.to(query.dtype)[:, index].transpose(0, 1).unsqueeze(2)  # (B, n, 1, W)
    mask = torch.where(visible, scores, torch.finfo(query.dtype).min / 2)
    return dot_product_attention(query, key_ring, value_ring, attn_mask=mask, scale=scale)


def context_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    start: Start = 0,
) -> torch.Tensor:
    """Attention of every token to the S context states of its block.

    Args:
        query: (B, n, T, e).
        key, value: (B, n, K, S, e), contexts of consecutive blocks, beginning with the block in which the call starts;
            at least as many as the call touches.
        block_size: W.
        scale, dropout_p, start: as in `segment_attention`.

    Returns:
        (B, n, T, e).
    """
    length, states = query.shape[2], key.shape[3]
    if isinstance(start, int):
        phase = start % block_size
        queries = F.pad(query, (0, 0, phase, 0)) if phase else query
    else:
        shift = (start % block_size).unsqueeze(1)
        columns = torch.arange(length + block_size - 1, device=query.device)
        queries = _gather_tokens(query, (columns - shift).clamp(0, length - 1))
    total = queries.shape[2]
    num_blocks = -(-total // block_size)
    rows = block_size if num_blocks > 1 else total
    queries = F.pad(queries, (0, 0, 0, num_blocks * rows - total)).unflatten(2, (num_blocks, rows))
    key, value = (part[:, :, :num_blocks].flatten(2, 3) for part in (key, value))
    blocks = Blocks(period=states, span=states, front=0, shift=rows - 1)
    entries = rows + states - 1
    outputs = blocked_attention(
        queries, key, value, blocks, bias=None, entries=entries, scale=scale, dropout_p=dropout_p
    )
    outputs = outputs.flatten(2, 3)
    if isinstance(start, int):
        return outputs[:, :, phase : phase + length]
    return _gather_tokens(outputs, shift + columns[:length])


def context_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    block_size: int,
    scale: float | None = None,
) -> torch.Tensor:
    """`context_attention` of a whole text, token by token."""
    outputs = []
    for position in range(query.shape[2]):
        block = position // block_size
        scores = torch.einsum("bne,bnse->bns", query[:, :, position], key[:, :, block])
        weights = torch.softmax(scores * (query.shape[3] ** -0.5 if scale is None else scale), dim=-1)
        outputs.append(torch.einsum("bns,bnse->bne", weights, value[:, :, block]))
    return torch.stack(outputs, dim=2)

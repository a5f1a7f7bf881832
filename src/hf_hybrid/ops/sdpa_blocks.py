"""Blocked attention by `scaled_dot_product_attention`: for accelerators, exported graphs and single blocks.

Shape letters as in `blocked_attention`: B batch, n heads, T blocks, b queries in a block, w keys in the slice of a block, d
head width, Lk keys, m entries of the bias vector.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .autocast import without_autocast
from .recompute import recomputed
from .relative_position import toeplitz_bias
from .sdpa import dot_product_attention

_FEATURES = 8  # by which heads are widened to hide keys; fused kernels want multiples of 8


class Blocks(NamedTuple):
    """Where the keys of a block lie: slot c of block t holds key `t * period - front + c`, 0 <= c < span = w.

    The bias of row a and slot c is entry `c - a + shift` of the bias vector; without such an entry the key is hidden.
    """

    period: int
    span: int
    front: int
    shift: int


def slots(states: torch.Tensor, dim: int, blocks: Blocks, num_blocks: int, fill: float = 0) -> torch.Tensor:
    """Slices of all blocks, an overlapping view of the padded `states`: dimension Lk becomes T, and w is appended."""
    if torch.compiler.is_exporting():
        return _copied_slots(states, dim, blocks, num_blocks, fill)
    back = (num_blocks - 1) * blocks.period + blocks.span - blocks.front - states.shape[dim]
    amounts = (0, 0) * (states.dim() - 1 - dim) + (blocks.front, back)  # negative amounts crop
    return F.pad(states, amounts, value=fill).unfold(dim, blocks.span, blocks.period)


def _copied_slots(states: torch.Tensor, dim: int, blocks: Blocks, num_blocks: int, fill: float) -> torch.Tensor:
    """`slots` for exported graphs, which may have no overlapping views: side by side, whole periods of the states."""
    pieces = -(-blocks.span // blocks.period)
    periods = num_blocks + pieces - 1
    back = periods * blocks.period - blocks.front - states.shape[dim]
    padded = F.pad(states, (0, 0) * (states.dim() - 1 - dim) + (blocks.front, back), value=fill)
    parts = padded.unflatten(dim, (periods, blocks.period))
    slots = torch.cat([parts.narrow(dim, piece, num_blocks) for piece in range(pieces)], dim=dim + 1)
    return slots.narrow(dim + 1, 0, blocks.span).movedim(dim + 1, -1)


def hidden_slots(key: torch.Tensor, key_mask: torch.Tensor | None, blocks: Blocks, num_blocks: int) -> torch.Tensor:
    """(B, T, w) bool: slots that hold padding, or lie outside the sequence."""
    if key_mask is None:
        key_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return slots(~key_mask, 1, blocks, num_blocks, fill=True)


def masked_attention(query, key, value, blocks, bias, key_mask, segments, scale, dropout_p) -> torch.Tensor:
    """One row of a batch of `scaled_dot_product_attention` per block, with an additive tensor of bias and mask for each."""
    batch, _, num_blocks, num_rows, _ = query.shape
    keys = slots(key, 2, blocks, num_blocks).transpose(-1, -2)  # (B, n, T, w, d)
    values = slots(value, 2, blocks, num_blocks).transpose(-1, -2)
    # Hidden scores are finite, so that rows which see nothing stay free of NaN both ways; they are zeroed at the end.
    hiding = torch.finfo(query.dtype).min / 2
    band = toeplitz_bias(bias.to(query.dtype), num_rows, blocks.span, shift=blocks.shift)  # (n or 1, b, w)
    inside = toeplitz_bias(torch.ones_like(bias[:1]), num_rows, blocks.span, shift=blocks.shift) > 0
    visible = inside & ~hidden_slots(key, key_mask, blocks, num_blocks).unsqueeze(2)  # (B, T, b, w)
    if segments is not None:
        visible = visible & (segments[0].unsqueeze(-1) == slots(segments[1], 1, blocks, num_blocks).unsqueeze(-2))
    outputs = dot_product_attention(
        query.transpose(1, 2).flatten(0, 1),
        keys.transpose(1, 2).flatten(0, 1),
        values.transpose(1, 2).flatten(0, 1),
        attn_mask=torch.where(visible.unsqueeze(2), band, hiding).flatten(0, 1),
        dropout_p=dropout_p,
        scale=scale,
    )
    outputs = outputs.unflatten(0, (batch, num_blocks)).transpose(1, 2)
    return outputs.masked_fill(~visible.any(-1)[:, None, :, :, None], 0)


# ---------------------------------------------------------------------------------------------------------------------
# accelerators
# ---------------------------------------------------------------------------------------------------------------------


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Blocks,
    *,
    bias: torch.Tensor | None,
    entries: int,
    key_mask: torch.Tensor | None,
    segments: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """`blocked_attention` by fused kernels; for the backward pass only its inputs are kept.

    All blocks share one mask (n, b, w) of the offsets, or none where everything or exactly the past is seen. Padding, and
    slots outside the text, are hidden by features that widen queries and keys: they add a large negative number to the
    scores, so that no mask per block is made. Slices that overlap are copies; the backward pass makes them again.
    """

    dtype = query.dtype
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, kept keys and values are wider

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *biases: torch.Tensor) -> torch.Tensor:
        with without_autocast(query.device), _fused_kernels(query):
            if segments is None:
                form = partial(_shared_mask_attention, entries=entries)
                return form(query, key, value, blocks, biases[0] if biases else None, key_mask, scale, dropout_p)
            table = biases[0] if biases else query.new_zeros(1, entries)
            return masked_attention(query, key, value, blocks, table, key_mask, segments, scale, dropout_p)

    tensors = (query, key, value) if bias is None else (query, key, value, bias)
    if dropout_p > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return checkpoint(attend, *tensors, use_reentrant=False).to(dtype)  # draws the same dropout again
    return recomputed(attend, *tensors).to(dtype)


def _fused_kernels(query: torch.Tensor) -> AbstractContextManager[None]:
    """Without the kernels of cuDNN, whose gradients are NaN for some shapes (pytorch issue 196678)."""
    if not query.is_cuda:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _shared_mask_attention(query, key, value, blocks, bias, key_mask, scale, dropout_p, *, entries) -> torch.Tensor:
    batch, _, num_blocks, num_rows, width = query.shape
    last = num_rows - 1
    sees_all = blocks.shift >= last and blocks.span + blocks.shift <= entries
    is_causal = num_rows == blocks.span and blocks.shift >= last and entries == blocks.shift + 1
    front, back = blocks.front, (num_blocks - 1) * blocks.period + blocks.span - blocks.front - key.shape[2]
    # Slots behind the text are after every query that counts.
    hides = key_mask is not None or front > 0 or (back > 0 and not is_causal)
    keys, values = (_padded(states, 2, front, back) for states in (key, value))
    visible = None
    if hides:
        if key_mask is None:
            key_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        visible = _padded(key_mask, 1, front, back)  # (B, padded Lk)
        features = key.new_zeros(*visible.shape, _FEATURES)
        features[..., 0] = (~visible).to(key.dtype) * max(torch.finfo(key.dtype).min / 4, -1e30)
        keys = torch.cat([keys, features.unsqueeze(1).expand(-1, keys.shape[1], -1, -1)], dim=-1)
        query = F.pad(query, (0, _FEATURES), value=1.0)
    mask = None
    if bias is not None or not (sees_all or is_causal):
        table = query.new_zeros(1, entries) if bias is None else bias.to(query.dtype)
        fill = torch.finfo(query.dtype).min / 2  # finite: -inf would give NaN with other hidden scores
        mask = toeplitz_bias(table, num_rows, blocks.span, shift=blocks.shift, fill=fill).unsqueeze(0)  # (1, n, b, w)
    keys, values = (
        part.unfold(2, blocks.span, blocks.period).mT.transpose(1, 2).flatten(0, 1) for part in (keys, values)
    )
    outputs = F.scaled_dot_product_attention(
        query.transpose(1, 2).flatten(0, 1),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and is_causal and not sees_all,
        dropout_p=dropout_p,
        scale=scale,
    )
    outputs = outputs.unflatten(0, (batch, num_blocks)).transpose(1, 2)
    if visible is None:
        return outputs
    return outputs.masked_fill(~_sees_any(visible, blocks, num_blocks, num_rows, entries)[:, None, ..., None], 0)


def _padded(states: torch.Tensor, dim: int, front: int, back: int) -> torch.Tensor:
    """Zeros (False) before and behind a dimension; negative numbers crop. Padding by nothing would copy."""
    if front == 0 and back == 0:
        return states
    return F.pad(states, (0, 0) * (states.dim() - 1 - dim) + (front, back))


def _sees_any(visible: torch.Tensor, blocks: Blocks, num_blocks: int, num_rows: int, entries: int) -> torch.Tensor:
    """Whether some key within reach of each query is visible: (B, padded Lk) bool to (B, T, b)."""
    before = F.pad(visible.long().cumsum(1), (1, 0))  # visible keys before each place
    rows = torch.arange(num_rows, device=visible.device)
    starts = torch.arange(num_blocks, device=visible.device).unsqueeze(1) * blocks.period
    first = (rows - blocks.shift).clamp(0, blocks.span) + starts
    stop = (rows - blocks.shift + entries).clamp(0, blocks.span) + starts
    return before[:, stop] > before[:, first]

"""Softmax attention of blocks of queries to slices of the keys: the engine of window and chunk attention.

Every block of b queries sees w consecutive keys, with a bias (and a reach) that depends on the offset alone. Slices of
neighbouring blocks may overlap; they are strided views of one padded copy.

Shape letters: B batch, n heads, T blocks, b queries in a block, w keys in the slice of a block, d head width, Lk keys, m
entries of the bias vector.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .autocast import without_autocast
from .branches import uses_cpu_form
from .dropout_masks import dropout_factors
from .pieces import PAIRS_AT_A_TIME, even_slices
from .relative_position import toeplitz_bias, toeplitz_bias_gradient
from .sdpa_blocks import Blocks, hidden_slots, masked_attention, sdpa_attention, slots


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Blocks,
    *,
    bias: torch.Tensor | None,
    entries: int,
    key_mask: torch.Tensor | None = None,
    segments: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention of blocks of queries to their slices of the keys.

    On CPU the operator of this file, which never stores the scores; elsewhere, in exported graphs, and for a single
    block without gradient, `scaled_dot_product_attention` (`sdpa_blocks`).

    Args:
        query: (B, n, T, b, d).
        key, value: (B, n, Lk, d).
        blocks: the slices.
        bias: (n, m), or (1, m) for all heads; None for zeros.
        entries: m.
        key_mask: (B, Lk) bool, True = token.
        segments: integers (B, T, b) of the queries and (B, Lk) of the keys; keys of other segments are hidden.
        scale: factor on the products of queries and keys; None = d ** -0.5.
        dropout_p: probability of dropping an attention probability.

    Returns:
        (B, n, T, b, d) in the dtype of `query`; zeros for queries that see no key. Softmax in float32 or better.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    inputs = (query, key, value) if bias is None else (query, key, value, bias)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    exporting = torch.compiler.is_exporting()
    # A decoding step: one call takes half the time.
    single = not exporting and query.shape[2] == 1 and not trains and dropout_p == 0
    if not (uses_cpu_form(query) or exporting or single):
        options: dict[str, Any] = {"key_mask": key_mask, "segments": segments, "scale": scale, "dropout_p": dropout_p}
        return sdpa_attention(query, key, value, blocks, bias=bias, entries=entries, **options)
    bias = query.new_zeros(1, entries) if bias is None else bias
    if exporting or single:
        with without_autocast(query.device):
            return masked_attention(query, key, value, blocks, bias, key_mask, segments, scale, dropout_p)
    seed = torch.randint(2**62, (1,)) if dropout_p > 0 else None
    query_segments, key_segments = (None, None) if segments is None else segments
    tensors = (query, key, value, bias, key_mask, query_segments, key_segments, seed)
    return _blocked_attention(*tensors, *blocks, scale, dropout_p)


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matrix products over two leading dimensions."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


# The CPU operator. The fused CPU kernel of `scaled_dot_product_attention` takes neither a mask that needs a gradient
# nor dropout; with a learned bias PyTorch falls back to a form that stores all scores in main memory. Here the scores
# of some blocks of some heads at a time stay in cache through both products and the softmax; the backward pass computes
# them again from the inputs, and sums their gradient over all blocks before the diagonals become the bias gradient.
# Measured with 8 heads of 64, radius 127, L 2,048, float32, forward and backward on one thread, ratios to this operator:
# `scaled_dot_product_attention` on the same blocks 1.9, scores stored for three blocks as LongT5 does 1.5, dense 16.
# It is one opaque operator for torch.compile, which would otherwise unroll the loop over parts. Its namespace is that
# of the module, so that a second copy of this file (remote code beside the installed package) does not clash.
_NAMESPACE = re.sub(r"\W", "_", __name__)


class _Parts:
    """The parts of one call: blocks of one head whose scores are made together.

    Tensors are arranged as (n, rows, blocks, ...). Rows of the batch whose blocks share no key (chunks, short
    sequences) are joined to a single row with more blocks, so that parts are as large as allowed.
    """

    def __init__(
        self, query, key, value, bias, key_mask, query_segments, key_segments, seed, blocks, scale, dropout_p
    ):
        batch, heads, self.num_blocks, num_rows, _ = query.shape
        self.blocks, self.scale, self.dropout_p = blocks, scale, dropout_p
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.joined = blocks.span <= blocks.period
        self.grid = (1, batch * self.num_blocks) if self.joined else (batch, self.num_blocks)
        self.heads = heads
        self.queries = self.arrange(query)  # (n, rows, blocks, b, d)
        self.keys, self.values = self._key_slots(key), self._key_slots(value)  # (n, rows, blocks, d, w)
        # Scores out of reach are -inf, and every row has some key in reach; those of padding are finite, so that the
        # softmax of a row with nothing but padding in reach is free of NaN.
        self.band = toeplitz_bias(bias.to(self.dtype), num_rows, blocks.span, shift=blocks.shift, fill=-torch.inf)
        self.hidden = hidden_slots(key, key_mask, blocks, self.num_blocks).reshape(*self.grid, blocks.span)
        self.segments = None
        if query_segments is not None:
            key_segments = slots(key_segments, 1, blocks, self.num_blocks)
            self.segments = tuple(part.reshape(*self.grid, -1) for part in (query_segments, key_segments))
        self.generator = None if seed is None else torch.Generator().manual_seed(int(seed))

    def arrange(self, states: torch.Tensor) -> torch.Tensor:
        """(B, n, T, b, d) -> (n, rows, blocks, b, d)."""
        return states.to(self.dtype).transpose(0, 1).reshape(self.heads, *self.grid, *states.shape[3:])

    def restore(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Inverse of `arrange`."""
        return states.view(self.heads, -1, self.num_blocks, *states.shape[3:]).transpose(0, 1).to(dtype)

    def _key_slots(self, states: torch.Tensor) -> torch.Tensor:
        found = slots(states.to(self.dtype).transpose(0, 1), 2, self.blocks, self.num_blocks)
        return found.reshape(self.heads, *self.grid, *found.shape[3:]) if self.joined else found

    def __iter__(self) -> Iterator[tuple[tuple[slice, int, slice], torch.Tensor, torch.Tensor | None]]:
        """((heads, row, blocks), their probabilities, factors of dropout); blocks that see no key are left out."""
        pairs = self.band[0].numel()
        for row in range(self.grid[0]):
            seeing = (~self.hidden[row]).any(-1).nonzero()
            start, stop = (int(seeing[0]), int(seeing[-1]) + 1) if len(seeing) else (0, 0)
            for blocks in even_slices(start, stop, max(1, PAIRS_AT_A_TIME // pairs)):
                masks = self._masks(row, blocks)
                together = max(1, PAIRS_AT_A_TIME // (pairs * (blocks.stop - blocks.start)))
                for heads in even_slices(0, self.heads, together):
                    part = (heads, row, blocks)
                    probabilities = self._probabilities(part, masks)
                    factors = None
                    if self.generator is not None:
                        factors = dropout_factors(probabilities.shape, self.dropout_p, self.generator, self.dtype)
                    yield part, probabilities, factors

    def _masks(self, row: int, blocks: slice) -> list[tuple[slice, torch.Tensor]]:
        """Runs of blocks, counted from the first of a part, that have hidden slots: 1 where hidden, (run, b or 1, w)."""
        hidden = self.hidden[row, blocks].unsqueeze(1)
        if self.segments is not None:
            query_segments, key_segments = (segments[row, blocks] for segments in self.segments)
            hidden = hidden | (query_segments.unsqueeze(-1) != key_segments.unsqueeze(-2))
        affected = [False, *hidden.flatten(1).any(-1).tolist(), False]
        borders = [i for i in range(len(affected) - 1) if affected[i] != affected[i + 1]]
        runs = [slice(*pair) for pair in zip(borders[::2], borders[1::2])]
        return [(run, hidden[run].to(self.dtype)) for run in runs]

    def _probabilities(self, part: tuple[slice, int, slice], masks: list[tuple[slice, torch.Tensor]]) -> torch.Tensor:
        """Softmax of the scores of a part, (heads, blocks, b, w); zero for rows that see no key."""
        queries, band = self.queries[part], self.band if len(self.band) == 1 else self.band[part[0]]
        scores = band.unsqueeze(1).expand(*queries.shape[:2], -1, -1).clone(memory_format=torch.contiguous_format)
        scores.flatten(0, 1).baddbmm_(queries.flatten(0, 1), self.keys[part].flatten(0, 1), alpha=self.scale)
        for run, hidden in masks:  # sums and products, as masked_fill_ takes twenty times longer
            scores[:, run].add_(hidden, alpha=torch.finfo(self.dtype).min)
        probabilities = torch.softmax(scores, dim=-1)
        for run, hidden in masks:
            probabilities[:, run].mul_(1 - hidden)
        return probabilities


@torch.library.custom_op(f"{_NAMESPACE}::blocked_attention", mutates_args=())
def _blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    key_mask: torch.Tensor | None,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    seed: torch.Tensor | None,
    period: int,
    span: int,
    front: int,
    shift: int,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        tensors = (query, key, value, bias, key_mask, query_segments, key_segments, seed)
        parts = _Parts(*tensors, Blocks(period, span, front, shift), scale, dropout_p)
        outputs = torch.zeros_like(parts.queries, memory_format=torch.contiguous_format)
        for part, probabilities, factors in parts:
            if factors is not None:
                probabilities.mul_(factors)
            outputs[part] = _bmm(probabilities, parts.values[part].mT)
        return parts.restore(outputs, query.dtype).contiguous()


@_blocked_attention.register_fake
def _(query, *arguments) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{_NAMESPACE}::blocked_attention_backward", mutates_args=())
def _blocked_attention_backward(
    gradient: torch.Tensor,
    bias_trains: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    key_mask: torch.Tensor | None,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    seed: torch.Tensor | None,
    period: int,
    span: int,
    front: int,
    shift: int,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", enabled=False):
        tensors = (query, key, value, bias, key_mask, query_segments, key_segments, seed)
        parts = _Parts(*tensors, Blocks(period, span, front, shift), scale, dropout_p)
        gradients = parts.arrange(gradient)
        query_gradient = torch.zeros_like(parts.queries, memory_format=torch.contiguous_format)
        key_gradient, value_gradient = _SlotGradient(parts, key), _SlotGradient(parts, value)
        band_gradient = torch.zeros_like(parts.band)
        for part, probabilities, factors in parts:
            output_gradient = gradients[part]
            dropped = probabilities if factors is None else probabilities * factors
            value_gradient.add(part, _bmm(dropped.mT, output_gradient))
            score_gradient = _bmm(output_gradient, parts.values[part])
            if factors is not None:
                score_gradient.mul_(factors)
            # derivative of the softmax: p * (g - sum(p * g)), one pass
            score_gradient = torch._softmax_backward_data(score_gradient, probabilities, -1, probabilities.dtype)
            if bias_trains:
                heads = slice(None) if len(band_gradient) == 1 else part[0]
                band_gradient[heads].add_(score_gradient.sum(1).sum_to_size(band_gradient[heads].shape))
            query_gradient[part] = _bmm(score_gradient, parts.keys[part].mT)
            key_gradient.add(part, _bmm(score_gradient.mT, parts.queries[part]))
        return (
            parts.restore(query_gradient.mul_(scale), query.dtype).contiguous(),
            key_gradient.total().mul_(scale).to(key.dtype),
            value_gradient.total().to(value.dtype),
            toeplitz_bias_gradient(band_gradient, bias.shape[-1], shift=shift).to(bias.dtype).contiguous(),
        )


@_blocked_attention_backward.register_fake
def _(gradient, bias_trains, query, key, value, bias, *arguments) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value, bias))


class _SlotGradient:
    """Gradient of keys or values, collected from the slices of the blocks, which may overlap."""

    def __init__(self, parts: _Parts, states: torch.Tensor):
        self.parts, self.length = parts, states.shape[2]
        self.period = parts.blocks.period
        self.pieces = -(-parts.blocks.span // self.period)  # periods touched by one slice
        rows, num_blocks = parts.grid
        width = states.shape[3]
        self.sums = torch.zeros(parts.heads, rows, num_blocks + self.pieces - 1, self.period, width, dtype=parts.dtype)

    def add(self, part: tuple[slice, int, slice], gradient: torch.Tensor) -> None:
        """Adds the gradient (heads, blocks, w, d) of the slices of a part."""
        heads, row, blocks = part
        for piece, section in enumerate(gradient.split(self.period, dim=2)):
            touched = slice(blocks.start + piece, blocks.stop + piece)
            self.sums[heads, row, touched, : section.shape[2]].add_(section)

    def total(self) -> torch.Tensor:
        """(B, n, Lk, d)."""
        width = self.sums.shape[-1]
        if self.parts.joined:
            sums = self.sums.view(self.parts.heads, -1, self.parts.num_blocks * self.period, width)
        else:
            sums = self.sums.flatten(2, 3)
        front = self.parts.blocks.front
        sums = F.pad(sums, (0, 0, -front, front + self.length - sums.shape[2]))
        return sums.transpose(0, 1).contiguous()


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.numbers = inputs[8:]


def _backward(ctx, gradient):
    gradients = _blocked_attention_backward(gradient, ctx.needs_input_grad[3], *ctx.saved_tensors, *ctx.numbers)
    return *gradients, *(None,) * 10


_blocked_attention.register_autograd(_backward, setup_context=_save_for_backward)

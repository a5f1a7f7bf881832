"""Window attention over one stream that holds the tokens of many rows, one row after the other: the engine of
compaction.

Query i of the stream sees the keys j of its own row with |i - j| <= window (causal: 0 <= i - j). Scores, weights and their
derivatives exist for some blocks of queries at a time, each with the keys it can reach; they are computed again for the
backward pass.

Shape letters: C tokens of the stream, Z width of queries and keys, E width of values, T blocks of b queries with S keys each.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .autocast import without_autocast
from .branches import takes_plain_form, uses_cpu_form
from .dropout_masks import dropout_factors
from .export_shapes import count_blocks
from .gated_scores import ACCELERATOR_PAIRS_AT_A_TIME, LAPLACE_MEAN, LAPLACE_STD, activate
from .pieces import PAIRS_AT_A_TIME
from .products import split_bmm, wide_bmm
from .relative_position import toeplitz_bias, toeplitz_bias_gradient
from .second_derivatives import refuse_second_derivatives

_BLOCK = 64  # queries of a block: fewer waste less on keys out of reach, more make better matrix products
_REACH_OF_SINGLE_BLOCKS = 8 * _BLOCK  # reach from which every block is worth a call of its own, with exactly its keys


class Stream(NamedTuple):
    """What the scores of a stream are made from: query . key + rank_bias + position_bias.

    Attributes:
        query: (C, Z), scaled, float32 or better.
        key: (C, Z).
        value: (C, E).
        rank_bias: (2 window + 1,): entry window + j - i; or None.
        position_bias: (2R + 1,): entry R + p_j - p_i, the ends beyond; or None.
        rows: (C,) row of each token, rising; -1 for entries at the end without a token.
        positions: (C,) p; needed for `position_bias`.
        activation: "softmax", "laplace" or "relu2".
        window: reach in tokens of the row, to each side; None for the whole row.
        causal: keys after the query are hidden.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rank_bias: torch.Tensor | None
    position_bias: torch.Tensor | None
    rows: torch.Tensor
    positions: torch.Tensor
    activation: str
    window: int | None
    causal: bool


def packed_attention(stream: Stream, dropout_p: float = 0.0, longest: int | None = None) -> torch.Tensor:
    """Outputs (C, E) in the dtype of the values; zeros where `rows` is -1. Weights in float32 or better.

    Args:
        stream: what the scores are made from.
        dropout_p: probability of dropping a weight.
        longest: a number that no row's tokens exceed, by which accelerators, which do not read the rows, limit the reach.
    """
    if torch.compiler.is_exporting() or takes_plain_form():
        return packed_attention_static(stream, dropout_p)
    seed = torch.randint(2**62, (1,)) if dropout_p > 0 else None
    window = -1 if stream.window is None else stream.window
    longest = stream.rows.shape[0] if longest is None else longest
    return _packed_attention(*stream[:7], seed, stream.activation, window, longest, stream.causal, dropout_p)


def packed_attention_static(stream: Stream, dropout_p: float = 0.0) -> torch.Tensor:
    """`packed_attention` from ordinary operations of fixed shapes, for exported graphs; all weights exist at once.

    With a window they are linear in C; without one they are C x C.
    """
    query, key, value, rank_bias, position_bias, rows, positions, activation, window, causal = stream
    dtype, length = query.dtype, query.shape[0]
    if window is None:  # one block, which holds everything
        left, rest, size, span = 0, 0, length, length
    else:
        left, size, span = window, _BLOCK, window + _BLOCK + (0 if causal else window)
        rest = count_blocks(length, size) * size - length

    def blocks(states: torch.Tensor, fill: int = 0) -> torch.Tensor:
        if window is None:
            return states.unsqueeze(0)
        return F.pad(states, (0, 0) * (states.dim() - 1) + (0, rest), value=fill).unflatten(0, (-1, size))

    def slots(states: torch.Tensor, fill: int = 0) -> torch.Tensor:
        if window is None:
            return states.movedim(0, -1).unsqueeze(0)
        amounts = (0, 0) * (states.dim() - 1) + (left, rest + span - left - size)
        return F.pad(states, amounts, value=fill).unfold(0, span, size)  # (T, ..., S)

    scores = blocks(query) @ slots(key.to(dtype))
    offsets = torch.arange(span, device=query.device) - left - torch.arange(size, device=query.device).unsqueeze(1)
    visible = blocks(rows, -2).unsqueeze(-1) == slots(rows, -3).unsqueeze(-2)
    if window is not None:
        visible = visible & (offsets.abs() <= window)
    if causal:
        visible = visible & (offsets <= 0)
    for bias, distances in ((rank_bias, offsets), (position_bias, None)):
        if bias is not None:
            if distances is None:
                distances = slots(positions).unsqueeze(-2) - blocks(positions).unsqueeze(-1)
            reach = bias.shape[0] // 2
            scores = scores + bias.to(dtype)[distances.clamp(-reach, reach) + reach]
    weights = activate(scores.masked_fill(~visible, torch.finfo(dtype).min), activation).masked_fill(~visible, 0)
    outputs = F.dropout(weights, dropout_p) @ slots(value.to(dtype)).mT
    outputs = outputs.flatten(0, 1)[:length]
    return outputs.masked_fill((rows < 0).unsqueeze(-1), 0).to(value.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# operator
# ---------------------------------------------------------------------------------------------------------------------

# One opaque operator for torch.compile: on a CPU it reads the rows, so that only tokens that are present cost time. Its
# namespace is that of the module, so that a second copy of this file (remote code beside the installed package) does not clash.
_NAMESPACE = re.sub(r"\W", "_", __name__)


class _Part(NamedTuple):
    """Some blocks and the scores of their queries."""

    queries: slice  # of the stream (single block) or of the blocks
    keys: slice  # of the stream (single block); of the blocks otherwise
    shift: int  # entry of the band for row 0 and key 0
    weights: torch.Tensor  # (G, b, S)
    slope: torch.Tensor | None  # derivative of the weights, None for the softmax
    factors: torch.Tensor | None  # of dropout
    distances: torch.Tensor | None  # (G, b, S) entries of the position bias


class _Blocks:
    """Blocks of one call, part by part, in the same order (and with the same dropout) whenever they are iterated.

    Far reaches are cut block by block, to exactly the keys of its rows; for near ones the keys of many blocks are overlapping
    slices of the padded stream, and one product serves them all. On CPUs everything is computed in float32 or better;
    accelerators multiply matrices in the dtype of the keys, take many blocks at a time whatever the reach, and do not
    read the rows: entries without a token are computed too.
    """

    def __init__(
        self,
        query,
        key,
        value,
        rank_bias,
        position_bias,
        rows,
        positions,
        seed,
        activation,
        window,
        longest,
        causal,
        dropout_p,
    ):
        self.activation, self.dropout_p, self.dtype = activation, dropout_p, query.dtype
        self.reads_rows = uses_cpu_form(query)
        self.product_dtype = self.dtype if self.reads_rows else key.dtype
        self.generator = None if seed is None else torch.Generator(query.device).manual_seed(int(seed))
        self.starts: list[int] = []  # of the rows
        self.length = rows.shape[0]
        if self.reads_rows:
            counts = torch.bincount(rows[rows >= 0]).tolist() if rows.numel() else []
            self.length, longest = sum(counts), max([1, *counts])
            self.starts = [0, *accumulate(counts)]
        longest = max(1, min(longest, self.length))
        self.left = longest - 1 if window < 0 else min(window, longest - 1)
        self.right = 0 if causal else self.left
        self.single = self.reads_rows and self.left + self.right >= _REACH_OF_SINGLE_BLOCKS
        size = _BLOCK if self.left < 16 * _BLOCK else 2 * _BLOCK
        if not self.reads_rows:  # longer blocks copy less of the keys that neighbours share
            size = min(max(_BLOCK, 1 << self.left.bit_length()), 8 * _BLOCK)
        self.size = min(size, max(self.length, 1))
        self.num_blocks = -(-self.length // self.size)
        self.band = query.new_zeros(self.left + self.right + 1)
        if rank_bias is not None:
            centre = rank_bias.shape[0] // 2
            self.band = rank_bias[centre - self.left : centre + self.right + 1].to(self.dtype)
        self.table = None if position_bias is None else position_bias.to(self.dtype)
        self.query, self.key, self.value, self.rows, self.positions = (
            states[: self.length] for states in (query, key, value, rows, positions)
        )
        self.key, self.value = self.key.to(self.product_dtype), self.value.to(self.product_dtype)
        if not self.single and self.length:
            self._cut()

    def _cut(self) -> None:
        """Arranges the stream as blocks."""
        self.span = self.left + self.size + self.right
        self.rest = self.num_blocks * self.size - self.length
        self.queries = self.blocks(self.query)
        self.keys, self.values = self._slots(self.key), self._slots(self.value)  # (T, Z, S), (T, E, S)
        query_rows = F.pad(self.rows, (0, self.rest), value=-2).view(self.num_blocks, self.size)
        key_rows = F.pad(self.rows, (self.left, self.rest + self.right), value=-3)
        key_rows = key_rows.unfold(0, self.span, self.size)
        self.foreign = query_rows.unsqueeze(-1), key_rows.unsqueeze(-2)
        self.borders = self._borders()
        if self.table is not None:
            query_positions = F.pad(self.positions, (0, self.rest)).view(self.num_blocks, self.size)
            self.places = query_positions.unsqueeze(-1), self._slots(self.positions).unsqueeze(-2)

    def _borders(self) -> list[bool]:
        """Blocks with keys of several rows, or outside the stream: those inside which a row starts or ends; all where
        the rows are not read."""
        if not self.reads_rows:
            return [True] * self.num_blocks
        flags = [False] * self.num_blocks
        for start in self.starts:
            first = max(0, (start - self.size - self.right) // self.size + 1)
            last = min(self.num_blocks - 1, (start + self.left - 1) // self.size)
            flags[first : last + 1] = [True] * max(0, last + 1 - first)
        return flags

    def blocks(self, states: torch.Tensor) -> torch.Tensor:
        """(C, X) -> (T, b, X)."""
        return F.pad(states, (0, 0, 0, self.rest)).view(self.num_blocks, self.size, states.shape[-1])

    def _slots(self, states: torch.Tensor) -> torch.Tensor:
        amounts = (0, 0) * (states.dim() - 1) + (self.left, self.rest + self.right)
        return F.pad(states, amounts).unfold(0, self.span, self.size)

    def without_empty(self, states: torch.Tensor) -> torch.Tensor:
        """(C, X) with zeros at entries without a token, where such entries are computed."""
        return states if self.reads_rows else states.masked_fill((self.rows < 0).unsqueeze(-1), 0)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Batched matrix product in the working precision."""
        return wide_bmm(left, right, self.product_dtype)

    def forward_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`product` for scores and outputs."""
        multiply = split_bmm if self.activation == "relu2" else wide_bmm
        return multiply(left, right, self.product_dtype)

    def each(self, with_slope: bool) -> Iterator[_Part]:
        """The parts with their weights."""
        return self._each_single(with_slope) if self.single else self._each_group(with_slope)

    def _each_single(self, with_slope: bool) -> Iterator[_Part]:
        for start in range(0, self.length, self.size):
            stop = min(start + self.size, self.length)
            first_row = bisect.bisect_right(self.starts, start) - 1
            last_row_end = self.starts[bisect.bisect_left(self.starts, stop)]
            queries = slice(start, stop)
            keys = slice(
                max(start - self.left, self.starts[first_row]),
                min(stop + self.right, last_row_end),
            )
            shift = self.left - start + keys.start
            scores = self._scores(self.query[None, queries], self.key[None, keys].mT, shift)
            distances = None
            if self.table is not None:
                distances = self._distances(
                    self.positions[queries, None].unsqueeze(0), self.positions[None, None, keys]
                )
                scores.add_(self.table[distances])
            if self.starts[first_row + 1] < keys.stop:  # several rows
                hidden = self.rows[queries, None] != self.rows[None, keys]
                scores.add_(hidden.to(self.dtype), alpha=torch.finfo(self.dtype).min)
            yield self._part(queries, keys, shift, scores, distances, with_slope)

    def _each_group(self, with_slope: bool) -> Iterator[_Part]:
        pairs = PAIRS_AT_A_TIME if self.reads_rows else ACCELERATOR_PAIRS_AT_A_TIME
        together = max(1, pairs // (self.size * self.span)) if self.length else 1
        for start in range(0, self.num_blocks, together):
            blocks = slice(start, min(start + together, self.num_blocks))
            scores = self._scores(self.queries[blocks], self.keys[blocks], shift=0)
            distances = None
            if self.table is not None:
                distances = self._distances(self.places[0][blocks], self.places[1][blocks])
                scores.add_(self.table[distances])
            for first, last in _runs(self.borders[blocks]):
                run = slice(blocks.start + first, blocks.start + last)
                hidden = (self.foreign[0][run] != self.foreign[1][run]).to(self.dtype)
                scores[first:last].add_(hidden, alpha=torch.finfo(self.dtype).min)
            yield self._part(blocks, blocks, 0, scores, distances, with_slope)

    def _scores(self, queries: torch.Tensor, keys: torch.Tensor, shift: int) -> torch.Tensor:
        """Products of (G, b, Z) and (G, Z, S) with the bias of the ranks; -inf out of reach."""
        band = toeplitz_bias(self.band, queries.shape[1], keys.shape[2], shift=shift, fill=-torch.inf)
        if self.product_dtype == self.dtype:
            return torch.baddbmm(band, queries, keys)
        return self.forward_product(queries, keys).add_(band)

    def _distances(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        reach = self.table.shape[0] // 2
        return (key_positions - query_positions).clamp_(-reach, reach).add_(reach)

    def _part(self, queries, keys, shift, scores, distances, with_slope) -> _Part:
        weights, slope = _activate_(scores, self.activation, with_slope)
        factors = None
        if self.generator is not None:
            factors = dropout_factors(weights.shape, self.dropout_p, self.generator, self.dtype)
        return _Part(queries, keys, shift, weights, slope, factors, distances)


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """First and last + 1 of each run of True."""
    start = None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            yield start, index
            start = None


def _activate_(scores: torch.Tensor, activation: str, with_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights of scores, and their derivative if asked for and pointwise; the scores are overwritten."""
    if activation == "softmax":
        return torch.softmax(scores, dim=-1), None
    if activation == "relu2":
        scores.relu_()
        return scores.square(), scores.mul_(2) if with_slope else None
    scores.sub_(LAPLACE_MEAN).div_(LAPLACE_STD * math.sqrt(2))
    slope = None
    if with_slope:
        slope = scores.square().neg_().exp_().mul_(1 / (LAPLACE_STD * math.sqrt(2 * math.pi)))
    return scores.erf_().add_(1).mul_(0.5), slope


@torch.library.custom_op(f"{_NAMESPACE}::packed_attention", mutates_args=())
def _packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rank_bias: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    rows: torch.Tensor,
    positions: torch.Tensor,
    seed: torch.Tensor | None,
    activation: str,
    window: int,
    longest: int,
    causal: bool,
    dropout_p: float,
) -> torch.Tensor:
    with without_autocast(query.device):
        tensors = (query, key, value, rank_bias, position_bias, rows, positions, seed)
        blocks = _Blocks(*tensors, activation, window, longest, causal, dropout_p)
        outputs = value.new_empty(value.shape)
        outputs[blocks.length :] = 0
        for part in blocks.each(with_slope=False):
            weights = part.weights if part.factors is None else part.weights.mul_(part.factors)
            if blocks.single:
                outputs[part.queries] = blocks.forward_product(weights, blocks.value[None, part.keys])[0]
                continue
            tokens = slice(part.queries.start * blocks.size, min(part.queries.stop * blocks.size, blocks.length))
            produced = blocks.forward_product(weights, blocks.values[part.keys].mT).flatten(0, 1)
            outputs[tokens] = produced[: tokens.stop - tokens.start]
        return blocks.without_empty(outputs)


@_packed_attention.register_fake
def _(query, key, value, *arguments) -> torch.Tensor:
    return value.new_empty(value.shape)


class _KeyGradient:
    """Gradient of keys or values, collected from the slices of the blocks, which overlap."""

    def __init__(self, blocks: _Blocks, states: torch.Tensor):
        self.blocks, self.total_length = blocks, states.shape[0]
        options = {"dtype": blocks.dtype, "device": states.device}
        if blocks.single or not blocks.length:
            self.sums = torch.zeros(states.shape, **options)
        else:
            pieces = -(-blocks.span // blocks.size)  # periods of b tokens touched by one slice
            self.sums = torch.zeros(blocks.num_blocks + pieces - 1, blocks.size, states.shape[1], **options)

    def add(self, part: _Part, gradient: torch.Tensor) -> None:
        """Adds the gradient (G, S, X) of the keys of a part."""
        if self.blocks.single:
            self.sums[part.keys].add_(gradient[0])
            return
        for piece, section in enumerate(gradient.split(self.blocks.size, dim=1)):
            self.sums[part.keys.start + piece : part.keys.stop + piece, : section.shape[1]].add_(section)

    def total(self) -> torch.Tensor:
        """(C, X)."""
        if self.blocks.single or not self.blocks.length:
            return self.sums
        found = self.sums.flatten(0, 1)[self.blocks.left : self.blocks.left + self.blocks.length]
        return F.pad(found, (0, 0, 0, self.total_length - self.blocks.length)).contiguous()


def _score_gradient(part: _Part, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of the scores of a part from that of its weights, which is changed in place."""
    if part.factors is not None:
        gradient.mul_(part.factors)
    if part.slope is not None:
        return gradient.mul_(part.slope)
    # Derivative of the softmax: p * (g - sum(p * g)), in one pass.
    return torch._softmax_backward_data(gradient, part.weights, -1, gradient.dtype)


@torch.library.custom_op(f"{_NAMESPACE}::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rank_bias: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    rows: torch.Tensor,
    positions: torch.Tensor,
    seed: torch.Tensor | None,
    activation: str,
    window: int,
    longest: int,
    causal: bool,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and both biases (empty for one that is absent)."""
    with without_autocast(query.device):
        tensors = (query, key, value, rank_bias, position_bias, rows, positions, seed)
        blocks = _Blocks(*tensors, activation, window, longest, causal, dropout_p)
        dtype = blocks.dtype
        gradient = blocks.without_empty(gradient[: blocks.length].to(dtype))
        gradients = gradient if blocks.single or not blocks.length else blocks.blocks(gradient)
        query_gradient = torch.zeros(query.shape, dtype=dtype, device=query.device)
        key_gradient, value_gradient = _KeyGradient(blocks, key), _KeyGradient(blocks, value)
        band_gradient, table_gradient = (
            None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=query.device)
            for bias in (None if rank_bias is None else blocks.band, position_bias)
        )
        for part in blocks.each(with_slope=True):
            if blocks.single:
                arrived, tokens = gradients[None, part.queries], part.queries
                queries, keys = blocks.query[None, part.queries], blocks.key[None, part.keys]
                values = blocks.value[None, part.keys].mT
            else:
                arrived, queries = gradients[part.queries], blocks.queries[part.queries]
                keys, values = blocks.keys[part.keys].mT, blocks.values[part.keys]
                tokens = slice(part.queries.start * blocks.size, min(part.queries.stop * blocks.size, blocks.length))
            weights, factors = part.weights, part.factors
            value_gradient.add(part, blocks.product((weights if factors is None else weights * factors).mT, arrived))
            score_gradient = _score_gradient(part, blocks.product(arrived, values))
            if band_gradient is not None:
                entries = band_gradient.shape[0]
                band_gradient += toeplitz_bias_gradient(score_gradient.sum(0), entries, shift=part.shift)
            if table_gradient is not None and part.distances is not None:
                table_gradient.index_add_(0, part.distances.flatten(), score_gradient.flatten())
            query_gradient[tokens] = blocks.product(score_gradient, keys).flatten(0, 1)[: tokens.stop - tokens.start]
            key_gradient.add(part, blocks.product(score_gradient.mT, queries))
        if band_gradient is not None and rank_bias is not None:
            centre = rank_bias.shape[0] // 2
            after = rank_bias.shape[0] - centre - 1 - blocks.right
            band_gradient = F.pad(band_gradient, (centre - blocks.left, after)).to(rank_bias.dtype)
        if table_gradient is not None and position_bias is not None:
            table_gradient = table_gradient.to(position_bias.dtype)
        states = (query_gradient, key_gradient.total().to(key.dtype), value_gradient.total().to(value.dtype))
        biases = (query.new_zeros(0) if found is None else found for found in (band_gradient, table_gradient))
        return *states, *biases  # type: ignore[return-value]


@_packed_attention_backward.register_fake
def _(gradient, query, key, value, rank_bias, position_bias, *arguments) -> tuple[torch.Tensor, ...]:
    tensors = [query, key, value, *(query.new_zeros(0) if b is None else b for b in (rank_bias, position_bias))]
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _backward(ctx, gradient):
    saved = ctx.saved_tensors
    *gradients, band, table = _packed_attention_backward(gradient, *saved, *ctx.options)
    return *gradients, None if saved[3] is None else band, None if saved[4] is None else table, *(None,) * 8


_packed_attention.register_autograd(_backward, setup_context=_save_for_backward)
refuse_second_derivatives(_packed_attention_backward, "attention of the activated tokens")

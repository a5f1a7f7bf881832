"""Attention over quantised keys: the engine of `vq_attention`.

The scores of a few chunks at a time are computed, used and dropped while they are in cache: scores of the codewords,
which stand for the far keys, beside those of the near keys. The backward pass computes them, and the mean values of the
codes, again. Accelerators take many chunks at a time, multiply in the dtype of the values with sums in float32, and read no
value.

Shapes: R rows (batch and heads), T chunks of C queries, K chunks of keys: an empty one (or the window of a memory) in front, and
an empty one behind when attention is bidirectional; S codewords, d width of keys, e width of values, span: near keys of a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .autocast import without_autocast
from .branches import uses_cpu_form
from .code_memory import CodeMemory
from .pieces import even_slices
from .products import wide_bmm
from .relative_position import toeplitz_bias, toeplitz_bias_gradient
from .second_derivatives import refuse_second_derivatives

# Pairs of query and key or codeword whose scores exist at one time: 4 MB in float32 on a CPU.
PAIRS_AT_A_TIME, ACCELERATOR_PAIRS_AT_A_TIME = 1 << 20, 1 << 26

_NAMESPACE = re.sub(r"\W", "_", __name__)


def near_bias(window_bias: torch.Tensor, chunk_size: int, causal: bool) -> torch.Tensor:
    """Bias by offset for the keys of a slice that begins one chunk before its queries.

    The bias of row a and slot c is entry `c - a + C - 1`; causal ones end with the key of the query itself.

    Returns:
        (H, 2 C) or (H, 4 C - 1).
    """
    window = window_bias.shape[-1] if causal else (window_bias.shape[-1] + 1) // 2
    before = 2 * chunk_size - window
    return F.pad(window_bias.flip(-1), (before, 0 if causal else before))


def far_sums(parts: torch.Tensor, causal: bool) -> torch.Tensor:
    """Sums over the chunks of keys that are far from each chunk of queries: (., K, ...) to (., T, ...).

    Chunk k of keys is chunk k - 1 of queries. Prefix and suffix sums: a total less the near ones would cancel.
    """
    number = parts.shape[1] - (1 if causal else 2)
    layout = (0, 0) * (parts.dim() - 2) + (1, 0)
    before = F.pad(parts, layout).cumsum(1)[:, :number]
    if causal:
        return before
    return before + F.pad(parts.flip(1), layout).cumsum(1)[:, :number].flip(1)


def far_sums_gradient(gradient: torch.Tensor, causal: bool) -> torch.Tensor:
    """Transpose of `far_sums`: (., T, ...) to (., K, ...)."""
    sides = (0, 0) * (gradient.dim() - 2)
    after = F.pad(gradient[:, 1:].flip(1).cumsum(1).flip(1), (*sides, 0, 2 if causal else 3))
    if causal:
        return after
    return after + F.pad(gradient[:, :-1].cumsum(1), (*sides, 3, 0))


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts of the chunks, one behind the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Part(NamedTuple):
    """Some chunks of some rows; G = rows times chunks."""

    rows: slice
    chunks: slice
    keys: torch.Tensor  # (G, S + span, d), codewords and near keys; without codewords when nothing is far
    values: torch.Tensor  # (G, S + span, e), mean values of the codes and near values
    queries: torch.Tensor  # (G, C, d)
    weights: torch.Tensor  # (G, C, S + span)


class _Far(NamedTuple):
    """Summary of the far tokens of every chunk, for some rows: counts (R, T, S), and means of values (R, T, S, e)."""

    counts: torch.Tensor
    means: torch.Tensor


class _Call:
    """The tensors of one call, cut into chunks."""

    def __init__(self, query, value, codes, codebook, window_bias, key_mask, memory, chunk_size, causal) -> None:
        self.shape = query.shape[:3]
        batch, self.heads, length = self.shape
        self.causal, self.chunk, self.size = causal, chunk_size, codebook.shape[1]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.reads_mask = uses_cpu_form(query)
        self.product_dtype = self.dtype if self.reads_mask or value.dtype.itemsize >= 4 else value.dtype
        self.pairs = PAIRS_AT_A_TIME if self.reads_mask else ACCELERATOR_PAIRS_AT_A_TIME
        self.device = query.device
        self.number = -(-length // chunk_size)
        self.span = (2 if causal else 3) * chunk_size
        self.tail = self.number * chunk_size - length
        self.layout = (chunk_size, self.tail if causal else self.tail + chunk_size)
        self.has_far = memory is not None or self.number > 2
        self.queries = F.pad(query.to(self.dtype).flatten(0, 1), (0, 0, 0, self.tail)).unflatten(1, (-1, chunk_size))
        mask = torch.ones(batch, length, dtype=torch.bool, device=self.device) if key_mask is None else key_mask
        self.is_seen = None if key_mask is None else self._seen(mask, memory)  # (B, L)
        mask = F.pad(mask, self.layout)
        rows = torch.arange(batch * self.heads, device=self.device) if self.heads > 1 else None
        self.places = None if rows is None else (rows // self.heads, rows % self.heads)  # batch and head of each row
        self.codes = F.pad(codes.flatten(0, 1), self.layout)  # (R, K C)
        self.values = F.pad(value.to(self.dtype).flatten(0, 1), (0, 0, *self.layout))
        self.before = None
        if memory is not None:
            kept = slice(chunk_size - memory.window_codes.shape[-1], chunk_size)
            mask[:, kept] = memory.window_mask
            self.codes[:, kept] = memory.window_codes.flatten(0, 1)
            self.values[:, kept] = memory.window_values.flatten(0, 1).to(self.dtype)
            self.before = tuple(part.flatten(0, 1).to(self.dtype) for part in memory[3:])
        self.real = mask.to(self.dtype)  # (B, K C), 1 at real keys, 0 elsewhere
        # (B, K C), added to scores
        is_whole = self.reads_mask and bool(mask.all())
        self.hidden = None if is_whole else (self.real - 1) * (-torch.finfo(self.dtype).min / 2)
        self.words = codebook.to(self.dtype)
        band = near_bias(window_bias.to(self.dtype), chunk_size, causal)
        self.band_entries = band.shape[-1]
        self.band = toeplitz_bias(band, chunk_size, self.span, shift=chunk_size - 1, fill=-torch.inf)  # (H, C, span)

    def _seen(self, mask: torch.Tensor, memory: CodeMemory | None) -> torch.Tensor:
        seen = mask.cumsum(1) > 0 if self.causal else mask.any(1, keepdim=True).expand_as(mask)
        if memory is not None:
            seen = seen | (memory.window_mask.any(1) | (memory.code_count[:, 0] > 0).any(1)).unsqueeze(1)
        return seen

    def row_slices(self) -> Iterator[tuple[slice, list[slice]]]:
        """Rows to be taken together, and slices of their chunks."""
        pairs = self.chunk * (self.span + (self.size if self.has_far else 0))
        chunks = max(1, self.pairs // pairs)
        together = max(1, chunks // self.number)
        cuts = even_slices(0, self.number, chunks)
        for rows in even_slices(0, self.shape[0] * self.heads, together):
            yield rows, cuts

    def by_batch(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """(B, ...) to (R, ...)."""
        return tensor[rows] if self.places is None else tensor[self.places[0][rows]]

    def by_head(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """(H, ...) to (R, ...)."""
        if self.places is None:
            return tensor.expand(rows.stop - rows.start, *tensor.shape[1:])
        return tensor[self.places[1][rows]]

    def add_by_head(self, total: torch.Tensor, found: torch.Tensor, rows: slice) -> None:
        """Adds (R, ...) to (H, ...)."""
        if self.places is None:
            total.add_(found.sum(0))
        else:
            total.index_add_(0, self.places[1][rows], found)

    def near_keys(self, rows: slice) -> torch.Tensor:
        """(R, K C, d) codewords of all keys."""
        codes = self.codes[rows]
        return self.words[0][codes] if self.places is None else self.words[self.places[1][rows, None], codes]

    def far(self, rows: slice) -> _Far | None:
        """Counts and mean values of the far tokens."""
        if not self.has_far:
            return None
        cut = (-1, self.chunk)
        codes, values = self.codes[rows].unflatten(1, cut), self.values[rows].unflatten(1, cut)
        real = self.by_batch(self.real, rows).unflatten(1, cut)
        number_of, sum_of = [], []
        for chunks in even_slices(0, codes.shape[1], max(1, self.pairs // (self.chunk * self.size))):
            hot = values.new_zeros(*codes[:, chunks].shape, self.size)
            hot.scatter_(-1, codes[:, chunks].unsqueeze(-1), real[:, chunks].unsqueeze(-1))
            number_of.append(hot.sum(2))
            found = self.product(hot.mT.flatten(0, 1), values[:, chunks].flatten(0, 1))
            sum_of.append(found.unflatten(0, hot.shape[:2]))
        counts, sums = (far_sums(joined(found), self.causal) for found in (number_of, sum_of))
        if self.before is not None:
            count, mean = (part[rows].unsqueeze(1) for part in self.before)
            counts = counts + count
            sums = sums.addcmul_(count.unsqueeze(-1), mean)
        return _Far(counts, sums.div_(counts.clamp(min=1).unsqueeze(-1)))

    def parts(self, rows: slice, cuts: list[slice], far: _Far | None) -> Iterator[_Part]:
        """Weights of all chunks of some rows, a few chunks at a time."""
        keys = self.near_keys(rows).unfold(1, self.span, self.chunk)  # (R, T, d, span)
        values = self.values[rows].unfold(1, self.span, self.chunk)
        hidden = None if self.hidden is None else self.by_batch(self.hidden, rows).unfold(1, self.span, self.chunk)
        hiding = torch.finfo(self.dtype).min / 2
        band, words = self.by_head(self.band, rows).unsqueeze(1), self.by_head(self.words, rows).unsqueeze(1)
        for chunks in cuts:
            part_keys, part_values = keys[:, chunks].mT, values[:, chunks].mT
            number = part_keys.shape[1]
            scores = band.expand(-1, number, -1, -1)  # (R, t, C, span)
            if hidden is not None:
                scores = scores + hidden[:, chunks].unsqueeze(2)
            if far is not None:
                logs = far.counts[:, chunks].log().clamp(min=hiding).unsqueeze(2)
                scores = torch.cat([logs.expand(-1, -1, self.chunk, -1), scores], dim=-1)
                part_keys = torch.cat([words.expand(-1, number, -1, -1), part_keys], dim=2)
                part_values = torch.cat([far.means[:, chunks], part_values], dim=2)
            queries = self.queries[rows, chunks].flatten(0, 1)
            part_keys, part_values = part_keys.flatten(0, 1), part_values.flatten(0, 1)
            if self.product_dtype == self.dtype:
                scores = torch.baddbmm(scores.flatten(0, 1), queries, part_keys.mT)
            else:
                scores = self.product(queries, part_keys.mT).add_(scores.flatten(0, 1))
            yield _Part(rows, chunks, part_keys, part_values, queries, torch.softmax(scores, dim=-1))

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(G, M, K) @ (G, K, N) in the working precision."""
        return wide_bmm(left, right, self.product_dtype)

    def restore(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(R, T, C, .) to (B, H, L, .), in another precision."""
        batch, heads, length = self.shape
        return states.view(batch, heads, -1, states.shape[-1])[:, :, :length].to(dtype).contiguous()

    def hide_blind(self, states: torch.Tensor) -> torch.Tensor:
        """(B, H, L, e) with zeros for queries that see nothing."""
        return states if self.is_seen is None else states * self.is_seen[:, None, :, None].to(states.dtype)


def _memory(tensors: tuple[torch.Tensor | None, ...]) -> CodeMemory | None:
    return None if tensors[0] is None else CodeMemory(*tensors)  # type: ignore[arg-type]


@torch.library.custom_op(f"{_NAMESPACE}::vq_attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_bias: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    key_mask: torch.Tensor | None,
    window_codes: torch.Tensor | None,
    window_values: torch.Tensor | None,
    window_mask: torch.Tensor | None,
    code_count: torch.Tensor | None,
    code_value_mean: torch.Tensor | None,
    chunk_size: int,
    causal: bool,
    far_key_gradient: bool,
) -> torch.Tensor:
    with without_autocast(query.device):
        memory = _memory((window_codes, window_values, window_mask, code_count, code_value_mean))
        call = _Call(query, value, codes, codebook, window_bias, key_mask, memory, chunk_size, causal)
        outputs = call.queries.new_empty(*call.queries.shape[:3], value.shape[-1])
        for rows, cuts in call.row_slices():
            for part in call.parts(rows, cuts, call.far(rows)):
                block = outputs[rows, part.chunks]
                block.copy_(call.product(part.weights, part.values).view(block.shape))
        return call.hide_blind(call.restore(outputs, value.dtype))


@_attention.register_fake
def _(query, key, value, *arguments) -> torch.Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op(f"{_NAMESPACE}::vq_attention_backward", mutates_args=())
def _attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window_bias: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    key_mask: torch.Tensor | None,
    window_codes: torch.Tensor | None,
    window_values: torch.Tensor | None,
    window_mask: torch.Tensor | None,
    code_count: torch.Tensor | None,
    code_value_mean: torch.Tensor | None,
    chunk_size: int,
    causal: bool,
    far_key_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with without_autocast(query.device):
        memory = _memory((window_codes, window_values, window_mask, code_count, code_value_mean))
        call = _Call(query, value, codes, codebook, window_bias, key_mask, memory, chunk_size, causal)
        gradient = call.hide_blind(gradient.to(call.dtype)).flatten(0, 1)
        gradients = F.pad(gradient, (0, 0, 0, call.tail)).unflatten(1, (-1, chunk_size))
        query_gradient = torch.empty_like(call.queries)
        key_gradient = gradients.new_zeros(*call.codes.shape, key.shape[-1]).unflatten(1, (-1, chunk_size))
        value_gradient = torch.zeros_like(call.values).unflatten(1, (-1, chunk_size))
        band_gradient = torch.zeros_like(call.band)
        for rows, cuts in call.row_slices():
            found = (query_gradient, key_gradient, value_gradient, band_gradient)
            _row_gradients(call, rows, cuts, gradients, *found, far_key_gradient)
        tokens = slice(chunk_size, chunk_size + call.shape[2])
        shape = call.shape[:2]
        bias_gradient = toeplitz_bias_gradient(band_gradient, call.band_entries, shift=chunk_size - 1)
        before = 2 * chunk_size - (window_bias.shape[-1] if causal else (window_bias.shape[-1] + 1) // 2)
        bias_gradient = bias_gradient[:, before : before + window_bias.shape[-1]].flip(-1)
        return (
            call.restore(query_gradient, query.dtype),
            key_gradient.flatten(1, 2)[:, tokens].unflatten(0, shape).to(key.dtype).contiguous(),
            value_gradient.flatten(1, 2)[:, tokens].unflatten(0, shape).to(value.dtype).contiguous(),
            bias_gradient.to(window_bias.dtype).contiguous(),
        )


def _row_gradients(
    call, rows, cuts, gradients, query_gradient, key_gradient, value_gradient, band_gradient, far_key_gradient
) -> None:
    """Adds the gradients of some rows."""
    far = call.far(rows)
    size = 0 if far is None else call.size
    width, code_gradients = key_gradient.shape[-1], []
    for part in call.parts(rows, cuts, far):
        chunks = part.chunks
        shape = (rows.stop - rows.start, chunks.stop - chunks.start)
        outer = gradients[rows, chunks].flatten(0, 1)
        found_values = call.product(part.weights.mT, outer).unflatten(0, shape)
        scores = call.product(outer, part.values.mT)
        scores = torch._softmax_backward_data(scores, part.weights, -1, scores.dtype)
        query_gradient[rows, chunks] = call.product(scores, part.keys).unflatten(0, shape)
        found_keys = call.product(scores.mT, part.queries).unflatten(0, shape)
        call.add_by_head(band_gradient, scores[..., size:].unflatten(0, shape).sum(1), rows)
        for piece in range(call.span // call.chunk):
            touched = slice(chunks.start + piece, chunks.stop + piece)
            slots = slice(size + piece * call.chunk, size + (piece + 1) * call.chunk)
            key_gradient[rows, touched].add_(found_keys[:, :, slots])
            value_gradient[rows, touched].add_(found_values[:, :, slots])
        if far is not None:  # of the mean residuals and mean values of every code, together
            code_gradients.append(torch.cat([found_keys[:, :, :size], found_values[:, :, :size]], dim=-1))
    if far is None:
        return
    code_gradient = joined(code_gradients).div_(far.counts.clamp(min=1).unsqueeze(-1))
    shares = far_sums_gradient(code_gradient, call.causal)  # (R, K, S, d + e)
    index = call.codes[rows].unflatten(1, (-1, call.chunk)).unsqueeze(-1)
    real = call.by_batch(call.real, rows).unflatten(1, (-1, call.chunk)).unsqueeze(-1)
    gathered = shares.gather(2, index.expand(*index.shape[:-1], shares.shape[-1])).mul_(real)
    if far_key_gradient:
        key_gradient[rows].add_(gathered[..., :width])
    value_gradient[rows].add_(gathered[..., width:])


@_attention_backward.register_fake
def _(gradient, query, key, value, window_bias, *arguments) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value, window_bias))


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-3])
    ctx.settings = inputs[-3:]


def _backward(ctx, gradient):
    return *_attention_backward(gradient, *ctx.saved_tensors, *ctx.settings), *(None,) * 11


_attention.register_autograd(_backward, setup_context=_save_for_backward)
refuse_second_derivatives(_attention_backward, "attention over quantised keys")


def vq_scores_attention(query, key, value, codes, codebook, window_bias, key_mask, memory, *settings):
    """As `vq_attention`; `settings` are `chunk_size`, `causal` and `far_key_gradient`."""
    parts = (None,) * 5 if memory is None else tuple(memory)
    return _attention(query, key, value, window_bias, codes, codebook, key_mask, *parts, *settings)

"""Local attention: sliding windows and chunks, bidirectional or causal, with a relative bias, in linear time and memory.

Window: key j is visible to query i when |j - i| <= r (causal: 0 <= i - j <= r). Chunk: when both lie in the same chunk
of c tokens (causal: and j <= i). Keys marked as padding are never visible; a query that sees no key returns zeros.

Queries are processed in blocks: a block of b consecutive queries sees at most b + 2r consecutive keys (b + r when
causal), which are read as one strided slice. No tensor of size L x L, or of L x L bits, is ever made.

Shape letters: B batch, n heads, L tokens (Lq queries, Lk keys), d head width, r radius, c chunk size, b queries in a
block, w keys seen by a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .autocast import without_autocast
from .blocked_attention import blocked_attention
from .branches import uses_cpu_form
from .export_shapes import count_blocks, is_open
from .pieces import PAIRS_AT_A_TIME
from .sdpa import dot_product_attention
from .sdpa_blocks import Blocks

ACCELERATOR_PAIRS_PER_BLOCK = 1 << 24  # of one head, in the mask that all blocks of a chunk share


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    radius: int,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Sliding window attention: query i sees the keys j with |j - i| <= radius, causal: 0 <= i - j <= radius.

    Args:
        query: (B, n, L, d), any strides.
        key, value: (B, n, L, d), any strides.
        radius: r, in tokens, 0 or more.
        causal: keys after the query are hidden.
        bias: (n, 2r + 1), causal: (n, r + 1); entry k is added to the scores of offset `j - i = k - r`.
        key_mask: (B, L) bool, True = token, False = padding.
        scale: factor on the products of queries and keys; None = d ** -0.5.
        dropout_p: probability of dropping an attention probability (callers pass 0 outside training).

    Returns:
        (B, n, L, d) in the dtype of `query`. The softmax is computed in float32 or better.

    Raises:
        ValueError: shapes do not fit together, or `radius` is negative.
    """
    _check_shapes(query, key, value, key_mask)
    _check_positive("radius", radius, minimum=0)
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"`key` has {key.shape[2]} tokens but `query` has {query.shape[2]}; use `cached_local_attention` to attend "
            "to keys of earlier calls."
        )
    right = 0 if causal else radius
    _check_bias(bias, query.shape[1], radius + right + 1)
    return _band_attention(
        query, key, value, radius, right, bias=bias, key_mask=key_mask, scale=scale, dropout_p=dropout_p
    )


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    chunk_size: int,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention inside non-overlapping chunks: query i sees the keys of chunk i // c (causal: those with j <= i).

    Args:
        query: (B, n, L, d), any strides.
        key, value: (B, n, L, d), any strides.
        chunk_size: c, in tokens.
        causal: keys after the query are hidden.
        bias: (n, 2c - 1); entry k is added to the scores of offset `j - i = k - (c - 1)`.
        key_mask: (B, L) bool, True = token, False = padding.
        positions: (B, L) integer position of every token in its own row, None = 0..L-1 in every row. Given for rows
            padded at the left, where chunk p // c must be that of the unpadded row. The tokens of one chunk must be
            neighbours in the row; positions of padding are free, and what padded queries return is then unspecified.
        scale: factor on the products of queries and keys; None = d ** -0.5.
        dropout_p: probability of dropping an attention probability.

    Returns:
        (B, n, L, d) in the dtype of `query`. The softmax is computed in float32 or better.

    Raises:
        ValueError: shapes do not fit together, or `chunk_size` is not positive.
    """
    _check_shapes(query, key, value, key_mask, positions)
    _check_positive("chunk_size", chunk_size, minimum=1)
    _check_bias(bias, query.shape[1], 2 * chunk_size - 1)
    if positions is not None:
        if causal and bias is not None:
            bias = bias[:, :chunk_size]
        return _band_attention(
            query,
            key,
            value,
            chunk_size - 1,
            0 if causal else chunk_size - 1,
            bias=bias,
            key_mask=key_mask,
            segments=torch.div(positions, chunk_size, rounding_mode="floor"),
            scale=scale,
            dropout_p=dropout_p,
        )
    length = query.shape[2]
    size = chunk_size if is_open(length) else min(chunk_size, length)
    entries = size if causal else 2 * size - 1
    if bias is not None:
        bias = bias[:, chunk_size - size : chunk_size - size + entries]
    chunks = _into_blocks(query, 2, size)
    # A block is a chunk, or a piece of it when the chunk is long.
    pairs = PAIRS_AT_A_TIME if uses_cpu_form(query) else ACCELERATOR_PAIRS_PER_BLOCK
    rows = size if size * size <= pairs else max(64, pairs // size)
    pieces = []
    for start in range(0, size, rows):
        piece = chunks[:, :, :, start : start + rows]
        span = start + piece.shape[3] if causal else size
        blocks = Blocks(period=size, span=span, front=0, shift=size - 1 - start)
        pieces.append(
            blocked_attention(
                piece,
                key,
                value,
                blocks,
                bias=bias,
                entries=entries,
                key_mask=key_mask,
                scale=scale,
                dropout_p=dropout_p,
            )
        )
    outputs = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3)
    return outputs.flatten(2, 3)[:, :, :length]


def cached_local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    radius: int | None = None,
    chunk_size: int | None = None,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Causal local attention of new queries to cached and new keys: one decoding step, or one piece of a prompt.

    Queries and keys are aligned at their ends: the last query stands at the position of the last key. Only the last
    `radius` (chunk: `chunk_size - 1`) keys before the first query are read, so older ones need not be kept.

    Args:
        query: (B, n, Lq, d) of the new tokens.
        key, value: (B, n, Lk, d), Lk >= Lq: cached keys, then those of the new tokens.
        radius: window attention of this radius; exactly one of `radius` and `chunk_size` is given.
        chunk_size: chunk attention of this chunk size.
        bias: (n, radius + 1), or (n, 2 * chunk_size - 1), as in `local_attention` and `chunk_attention`.
        key_mask: (B, Lk) bool, True = token, False = padding.
        positions: (B, Lk) integer position of every key in its own row; needed for chunks (see `chunk_attention`).
        scale: factor on the products of queries and keys; None = d ** -0.5.
        dropout_p: probability of dropping an attention probability.

    Returns:
        (B, n, Lq, d) in the dtype of `query`, equal to the last Lq rows of one pass over the whole sequence.

    Raises:
        ValueError: shapes do not fit together, or not exactly one of `radius` and `chunk_size` is given.
    """
    _check_shapes(query, key, value, key_mask, positions)
    if (radius is None) == (chunk_size is None):
        raise ValueError(
            f"give exactly one of `radius` and `chunk_size`; got radius={radius}, chunk_size={chunk_size}."
        )
    segments = None
    if radius is not None:
        _check_positive("radius", radius, minimum=0)
        _check_bias(bias, query.shape[1], radius + 1)
    else:
        _check_positive("chunk_size", chunk_size, minimum=1)
        _check_bias(bias, query.shape[1], 2 * chunk_size - 1)
        if positions is None:
            raise ValueError("`positions` (B, Lk) must be given with `chunk_size`: chunks are cut by position.")
        segments = torch.div(positions, chunk_size, rounding_mode="floor")
        radius = chunk_size - 1
        bias = None if bias is None else bias[:, :chunk_size]
    return _band_attention(
        query, key, value, radius, 0, bias=bias, key_mask=key_mask, segments=segments, scale=scale, dropout_p=dropout_p
    )


def halo_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    radius: int,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Bidirectional sliding window attention of a piece of a text to its own keys and the `radius` keys on either side.

    Args:
        query: (B, n, L, d).
        key, value: (B, n, radius + L + radius, d).
        key_mask: (B, radius + L + radius) bool, True = token, False = padding, or beyond the ends of the text.
        radius, bias, scale, dropout_p: as in `local_attention`.

    Returns:
        (B, n, L, d) in the dtype of `query`, equal to the rows of the piece in one pass over the whole text.

    Raises:
        ValueError: shapes do not fit together, or `radius` is negative.
    """
    _check_shapes(query, key, value, key_mask)
    _check_positive("radius", radius, minimum=0)
    _check_bias(bias, query.shape[1], 2 * radius + 1)
    if key.shape[2] != query.shape[2] + 2 * radius:
        raise ValueError(
            f"`key` must have {query.shape[2]} + 2 * {radius} tokens, those of the piece and of both sides; got {key.shape[2]}."
        )
    padded = F.pad(query, (0, 0, 0, radius))  # queries and keys end together
    outputs = _band_attention(
        padded, key, value, radius, radius, bias=bias, key_mask=key_mask, scale=scale, dropout_p=dropout_p
    )
    return outputs[:, :, : query.shape[2]]


def _band_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left: int,
    right: int,
    *,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    segments: torch.Tensor | None = None,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    """Attention of query i to the keys `i + s - left .. i + s + right`, s = Lk - Lq.

    `bias` is (n, left + right + 1); `segments` (B, Lk) hides the keys of other segments than the query's own.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    ahead = num_keys - num_queries  # s
    open_length = is_open(num_queries, num_keys)
    trains = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    # Asked first: a comparison of an open size would tie an exported graph to its outcome.
    is_plain = not (open_length or torch.compiler.is_exporting() or trains)
    if is_plain and num_queries == 1 and right == 0 and dropout_p == 0:
        return _one_query(query, key, value, left, bias, key_mask, segments, scale)
    reach_left, reach_right = left, right
    if not open_length:  # offsets that no pair of tokens has are cut off the band
        reach_left, reach_right = min(left, num_keys - 1), min(right, num_queries - 1)
    if bias is not None:
        bias = bias[:, left - reach_left : left + 1 + reach_right]
    block = _block_length(reach_left, query.device)
    span = block + reach_left + reach_right
    if (
        not open_length and num_keys <= span and num_queries * num_keys <= PAIRS_AT_A_TIME
    ):  # short: one block, which sees all keys
        block = num_queries
        blocks = Blocks(period=num_keys, span=num_keys, front=0, shift=reach_left - ahead)
    else:
        blocks = Blocks(period=block, span=span, front=reach_left - ahead, shift=0)
    query = _into_blocks(query, 2, block)
    pair = None if segments is None else (_into_blocks(segments[:, ahead:], 1, block), segments)
    outputs = blocked_attention(
        query,
        key,
        value,
        blocks,
        bias=bias,
        entries=reach_left + reach_right + 1,
        key_mask=key_mask,
        segments=pair,
        scale=scale,
        dropout_p=dropout_p,
    )
    return outputs.flatten(2, 3)[:, :, :num_queries]


def _one_query(query, key, value, left, bias, key_mask, segments, scale) -> torch.Tensor:
    """`_band_attention` of the last token alone, a decoding step: a few kernels."""
    reach = min(left + 1, key.shape[2])
    key, value, mask, visible = key[:, :, -reach:], value[:, :, -reach:], None, None
    if bias is not None:
        mask = bias[:, left + 1 - reach : left + 1].to(query.dtype)[None, :, None]  # (1, n, 1, reach)
    if key_mask is not None:
        visible = key_mask[:, -reach:]
    if segments is not None:
        own = segments[:, -reach:] == segments[:, -1:]
        visible = own if visible is None else visible & own
    with without_autocast(query.device):
        if visible is None:
            return dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        seen = visible[:, None, None]
        shown, hidden = query.new_zeros(()), query.new_full((), torch.finfo(query.dtype).min / 2)
        mask = torch.where(seen, shown if mask is None else mask, hidden)
        outputs = dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return outputs.masked_fill(~seen.any(-1, keepdim=True), 0)


def _block_length(reach: int, device: torch.device) -> int:
    """Queries in a block of window attention.

    A block computes b + 2r keys for every query, of which 2r + 1 count: short blocks waste less, longer ones make
    better products. Time on CPU at radius 127, forward and backward: b = 32 1.25, 64 1, 96 1.1, 128 1.15.
    """
    if uses_cpu_form(device):
        return 64 if reach >= 32 else 32
    return max(64, reach + 1)


def _into_blocks(states: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Pads dimension `dim` at the end to a multiple of `size` and splits it into (blocks, size)."""
    count = count_blocks(states.shape[dim], size)
    missing = count * size - states.shape[dim]
    if torch.compiler.is_compiling() or missing:  # eager: padding by nothing would copy
        states = F.pad(states, (0, 0) * (states.dim() - 1 - dim) + (0, missing))
    return states.unflatten(dim, (count, size))


def local_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    radius: int,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Dense form of `local_attention`, quadratic in L; same arguments and result."""
    offsets = _offsets(query)
    visible = (offsets >= -radius) & (offsets <= (0 if causal else radius))
    scores_bias = None if bias is None else bias[:, (offsets + radius).clamp(0, bias.shape[-1] - 1)]
    return _dense_attention(query, key, value, visible, scores_bias, key_mask, scale)


def chunk_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    chunk_size: int,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Dense form of `chunk_attention`, quadratic in L; same arguments and result."""
    offsets = _offsets(query)
    if positions is None:
        positions = torch.arange(query.shape[2], device=query.device)[None]
    chunks = torch.div(positions, chunk_size, rounding_mode="floor")
    visible = (chunks.unsqueeze(-1) == chunks.unsqueeze(-2)).unsqueeze(1)
    if causal:
        visible = visible & (offsets <= 0)
    scores_bias = None if bias is None else bias[:, (offsets + chunk_size - 1).clamp(0, bias.shape[-1] - 1)]
    return _dense_attention(query, key, value, visible, scores_bias, key_mask, scale)


def _offsets(query: torch.Tensor) -> torch.Tensor:
    """(L, L): key position minus query position."""
    index = torch.arange(query.shape[2], device=query.device)
    return index[None, :] - index[:, None]


def _dense_attention(query, key, value, visible, scores_bias, key_mask, scale) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    if scores_bias is not None:
        scores = scores + scores_bias.to(dtype)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    visible = visible.expand_as(scores)
    probabilities = torch.softmax(scores.masked_fill(~visible, torch.finfo(dtype).min), dim=-1)
    return (probabilities.masked_fill(~visible, 0) @ value.to(dtype)).to(query.dtype)


def _check_shapes(query, key, value, key_mask, positions=None) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(
            "`query`, `key` and `value` must be (batch, heads, tokens, width), key and value of one shape; "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3] or query.shape[2] > key.shape[2]:
        raise ValueError(
            "`key` must have the batch, heads and width of `query` and at least as many tokens; "
            f"got {tuple(key.shape)} for query {tuple(query.shape)}."
        )
    if query.shape[2] == 0:
        raise ValueError(f"`query` has no tokens: {tuple(query.shape)}; at least one is needed.")
    expected = (key.shape[0], key.shape[2])
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected):
        raise ValueError(
            f"`key_mask` must be bool of shape {expected} (True = token); got {key_mask.dtype} of shape "
            f"{tuple(key_mask.shape)}."
        )
    if positions is not None and tuple(positions.shape) != expected:
        raise ValueError(f"`positions` must have shape {expected}; got {tuple(positions.shape)}.")


def _check_bias(bias: torch.Tensor | None, heads: int, entries: int) -> None:
    if bias is not None and tuple(bias.shape) != (heads, entries):
        raise ValueError(
            f"`bias` must have shape {(heads, entries)}, one entry per head and offset; got {tuple(bias.shape)}."
        )


def _check_positive(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}; got {value}.")

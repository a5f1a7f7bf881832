"""Compaction: the active tokens of a whole batch as one stream, attention among them, and the way back.

In a batch of B rows of L tokens, those with `active` set are packed one after another, row by row, without padding to
the fullest row. Within a row the difference of two places in the stream is the difference of their ranks (the number of
active tokens before them), so that attention with a window counted in active tokens is window attention over the stream
(arXiv 2306.11197, section 3):

    outputs_i = sum_j A_ij value_j   over keys j of the same row, |rank_i - rank_j| <= w, causal: rank_j <= rank_i
    A = softmax(s), relu(s)^2 or laplace(s),   s_ij = query_i . key_j * scale_i + bias_ij

The softmax has scale Z ** -0.5. The others are pointwise and have the scale 1 / n instead, with n = w (causal) or 2 w for a
window, and without one the rank + 1 (causal) or the number of active tokens of the row. A hidden key has no weight. The bias depends on the
difference of ranks, or on that of the original positions.

What a row returns does not depend on the other rows of the batch.

Shape letters: B rows, L tokens, C active tokens of all rows, Z width of queries and keys, E width of values, w window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .autocast import outside_autocast
from .branches import widest_float
from .gated_scores import ACTIVATIONS, activate
from .packed_attention import Stream, packed_attention, packed_attention_static


class ActiveTokens(NamedTuple):
    """Where the entries of a stream come from.

    Attributes:
        index: (C,) place in the flattened batch, b * L + l.
        rows: (C,) row b, rising; -1 for entries at the end without an active token (static shapes only).
        ranks: (C,) active tokens before it in its row.
        positions: (C,) place l in its row.
        counts: (B,) active tokens of each row.
        longest: a number that no row's active tokens exceed.
        is_static: the shapes do not depend on what is active.
    """

    index: torch.Tensor
    rows: torch.Tensor
    ranks: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor
    longest: int
    is_static: bool


def active_tokens(active: torch.Tensor, capacity: int | None = None) -> ActiveTokens:
    """Finds the active tokens of a batch.

    Args:
        active: (B, L) bool.
        capacity: entries of the stream. None: as many as there are active tokens, which takes one synchronisation on an
            accelerator. A number gives fixed shapes, for compiled graphs; it must not be smaller than the number of active
            tokens (B * L always suffices), since the rest would be lost.
    """
    batch, length = active.shape
    flat = active.flatten()
    counts = active.sum(-1)
    ranks = active.long().cumsum(-1).flatten() - 1
    if capacity is None:
        index = flat.nonzero().squeeze(-1)
        rows = torch.div(index, length, rounding_mode="floor")
        return ActiveTokens(index, rows, ranks[index], index - rows * length, counts, length, is_static=False)
    places = torch.arange(batch * length, device=active.device)
    before = flat.long().cumsum(0)
    slots = torch.where(flat, before - 1, before[-1:] + places - before)  # active ones first, both in their order
    index = torch.zeros_like(places).scatter(0, slots, places)[:capacity]
    rows = torch.div(index, length, rounding_mode="floor")
    positions, taken = index - rows * length, torch.where(flat[index], rows, -1)
    return ActiveTokens(index, taken, ranks[index], positions, counts, length, is_static=True)


def gather_active(states: torch.Tensor, tokens: ActiveTokens) -> torch.Tensor:
    """(B, L, X) -> (C, X)."""
    return states.flatten(0, 1).index_select(0, tokens.index)


def add_active(base: torch.Tensor, states: torch.Tensor, tokens: ActiveTokens) -> torch.Tensor:
    """`base` (B, L, X) plus states (C, X) at the active tokens; those of entries without a token must be zeros."""
    return base.flatten(0, 1).index_add(0, tokens.index, states).unflatten(0, base.shape[:2])


@outside_autocast
def compacted_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: ActiveTokens,
    *,
    activation: str,
    window: int | None,
    causal: bool,
    rank_bias: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    static: bool = False,
) -> torch.Tensor:
    """Attention among the active tokens of each row, in time and memory linear in C with a window.

    Args:
        query: (C, Z), unscaled.
        key: (C, Z).
        value: (C, E).
        tokens: tokens of the entries.
        activation: "softmax", "laplace" or "relu2".
        window: w, in active tokens to each side; None for all active tokens of the row, in time C times their number.
        causal: keys after the query are hidden.
        rank_bias: (2 w + 1,) added to the scores, entry w + rank_j - rank_i; needs a window.
        position_bias: (2 R + 1,) added to the scores, entry R + l_j - l_i; distances beyond R take the ends.
        dropout_p: probability of dropping a weight.
        static: use the form made of ordinary operations, which holds all weights in memory at once.

    Returns:
        (C, E) in the dtype of `value`; zeros for entries without a token. Weights in float32 or better.

    Raises:
        ValueError: unknown activation, a window below 1, or shapes that do not fit together.
    """
    _check(query, key, value, tokens.index.shape, activation, window, rank_bias, position_bias)
    states = query.to(torch.promote_types(query.dtype, torch.float32))
    if activation == "softmax":
        states = states * query.shape[-1] ** -0.5
    elif window is not None:
        states = states / (window if causal else 2 * window)
    else:
        numbers = tokens.ranks + 1 if causal else tokens.counts[tokens.rows.clamp(min=0)]
        states = states / numbers.clamp(min=1).unsqueeze(-1)
    rows, positions = tokens.rows, tokens.positions
    stream = Stream(states, key, value, rank_bias, position_bias, rows, positions, activation, window, causal)
    if static:
        return packed_attention_static(stream, dropout_p)
    return packed_attention(stream, dropout_p, longest=tokens.longest)


def compacted_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    active: torch.Tensor,
    *,
    activation: str,
    window: int | None,
    causal: bool,
    rank_bias: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, without compaction and quadratic in L: (B, L, .) and `active` (B, L) -> (B, L, E), 0 where inactive."""
    _check(query, key, value, active.shape, activation, window, rank_bias, position_bias)
    dtype = torch.promote_types(query.dtype, torch.float32)
    places = torch.arange(active.shape[1], device=active.device)
    ranks = active.long().cumsum(-1) - 1
    steps = ranks.unsqueeze(1) - ranks.unsqueeze(2)  # rank_j - rank_i
    seen = active.unsqueeze(1) & active.unsqueeze(2)
    if window is not None:
        seen = seen & (steps.abs() <= window)
    if causal:
        seen = seen & (steps <= 0)
    if activation == "softmax":
        scale = torch.full_like(ranks, query.shape[-1], dtype=dtype) ** -0.5
    elif window is not None:
        scale = torch.full_like(ranks, window if causal else 2 * window, dtype=dtype).reciprocal()
    else:
        scale = (ranks + 1 if causal else active.sum(-1, keepdim=True).expand_as(ranks)).clamp(min=1).to(dtype) ** -1
    scores = query.to(dtype) @ key.to(dtype).mT * scale.unsqueeze(-1)
    for bias, offsets in ((rank_bias, steps), (position_bias, (places - places.unsqueeze(1)).unsqueeze(0))):
        if bias is not None:
            reach = bias.shape[0] // 2
            scores = scores + bias.to(dtype)[offsets.clamp(-reach, reach) + reach]
    scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
    return (activate(scores, activation).masked_fill(~seen, 0) @ value.to(dtype)).to(value.dtype)


def _check(query, key, value, tokens, activation, window, rank_bias, position_bias) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {ACTIVATIONS}; got {activation!r}.")
    if window is not None and window < 1:
        raise ValueError(f"`window` must be a positive number of active tokens, or None for all; got {window}.")
    shapes = [tuple(states.shape[:-1]) for states in (query, key, value)]
    if query.shape != key.shape or any(shape != tuple(tokens) for shape in shapes):
        raise ValueError(
            f"`query`, `key` and `value` must be {tuple(tokens)} + (width,), the first two of one width; got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if rank_bias is not None and (window is None or rank_bias.shape != (2 * window + 1,)):
        raise ValueError(
            f"`rank_bias` needs a window w and one entry for each of 2 w + 1 differences of ranks; got window {window} and "
            f"shape {tuple(rank_bias.shape)}."
        )
    if position_bias is not None and (position_bias.dim() != 1 or position_bias.shape[0] % 2 == 0):
        raise ValueError(
            f"`position_bias` must be a vector of an odd number of entries, the distance 0 in the middle; got "
            f"{tuple(position_bias.shape)}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# rotary positions
# ---------------------------------------------------------------------------------------------------------------------


def rotary_table(positions: torch.Tensor, width: int, dtype: torch.dtype, base: float = 10000.0) -> torch.Tensor:
    """Angles of rotary positions as cosines and sines: integers (...) -> (..., Z / 2, 2) in `dtype`.

    Pair m of a vector is turned by `position * base ** (-2 m / Z)`. The angles are computed in float64 where there is one:
    far from the origin those of float32 are wrong in the third digit.

    Raises:
        ValueError: the width is odd.
    """
    if width < 2 or width % 2:
        raise ValueError(f"Rotary positions need an even width; got {width}.")
    wide = widest_float(positions)
    pairs = torch.arange(width // 2, device=positions.device, dtype=wide)
    angles = positions.unsqueeze(-1) * torch.pow(base ** (-2 / width), pairs)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


def rotate_pairs(states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns the neighbours (2 m, 2 m + 1) of vectors (..., Z) by the angles of `rotary_table` (..., Z / 2, 2)."""
    first, second = states.unflatten(-1, (-1, 2)).to(table.dtype).unbind(-1)
    cos, sin = table.unbind(-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.stack(turned, dim=-1).flatten(-2).to(states.dtype)

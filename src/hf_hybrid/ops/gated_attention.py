"""Gated attention of Mega: one head, three activations of the scores, on whole sequences, chunks, caches and sources.

    outputs_i = sum_j A_ij value_j,    A = softmax(s) or phi(s),    s_ij = query_i . key_j * scale_i + bias[j - i]

`softmax` has scale Z ** -0.5. `laplace` and `relu2` are pointwise, phi(s) = (1 + erf((s - mu) / (sigma sqrt 2))) / 2 and
phi(s) = max(s, 0)^2 (arXiv 2209.10655, Eq. 17 and section 3.4): their rows are not normalised, so the scores are divided
by the number of keys instead. That number is

    causal                   i + 1, for position i in the chunk (padding at the right is not counted by construction)
    with a mask of the keys  the keys of the chunk that are tokens, at least 1
    otherwise                the length of the chunk

Chunks are cut every c tokens; the last may be shorter. The softmax treats a chunk of nothing but padding as if it had none;
any other query that sees no key returns zeros.

Shape letters: B batch, L tokens (T queries, S keys), Z width of queries and keys, E width of values, c chunk size, m
entries of the bias to one side; G groups that do not see each other (chunks), with R queries and S keys each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .autocast import outside_autocast
from .export_shapes import count_blocks, is_open
from .gated_scores import ACTIVATIONS, Scores, activate, activate_visible, attend, score_weights
from .shared_source import targets_per_source

# ---------------------------------------------------------------------------------------------------------------------
# self attention
# ---------------------------------------------------------------------------------------------------------------------


@outside_autocast
def gated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    activation: str,
    bias: torch.Tensor | None = None,
    chunk_size: int | None = None,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention of every token to its chunk, in memory linear in L: the scores of a few blocks exist at a time.

    Args:
        query, key: (B, L, Z), unscaled.
        value: (B, L, E).
        activation: "softmax", "laplace" or "relu2".
        bias: (2m - 1,), m at least the length of a chunk; entry m - 1 + o is added to the scores of offset `j - i = o`.
        chunk_size: c, in tokens; None = one chunk.
        causal: keys after the query are hidden.
        key_mask: (B, L) bool, True = token, False = padding.
        positions: (B, L) integers, position of every token in its own row; None = 0..L-1. Given for rows padded at the
            left (negative there), so that chunks and divisors are those of the unpadded row. The tokens of a row stand
            at different positions below L; what queries at padding return is then unspecified, but finite.
        dropout_p: probability of dropping a weight (callers pass 0 outside training).

    Returns:
        (B, L, E) in the dtype of `value`. Scores and weights are float32 or better.

    Raises:
        ValueError: unknown activation, or shapes that do not fit together.
    """
    _check_self(query, key, value, activation, bias, chunk_size, key_mask, positions)
    key_mask = _visible(key_mask, positions)
    if positions is not None and _is_cut(query.shape[1], chunk_size):
        slots = _Slots(positions, key_mask, width=query.shape[1])
        aligned = [slots.gather(states) for states in (query, key, value)]
        outputs = gated_attention(
            *aligned,
            activation=activation,
            bias=bias,
            chunk_size=chunk_size,
            causal=causal,
            key_mask=slots.filled,
            dropout_p=dropout_p,
        )
        return slots.restore(outputs)
    length = query.shape[1]
    if chunk_size is not None and is_open(length):
        query, key, value, key_mask = _whole_chunks(query, key, value, key_mask, chunk_size)
    pieces = []
    for part, scores in _chunk_scores(query, key, activation, bias, chunk_size, causal, key_mask, positions):
        values = value[:, part].reshape(*scores.key.shape[:2], value.shape[-1])
        pieces.append(attend(scores, values, dropout_p).reshape(value.shape[0], -1, value.shape[-1]))
    outputs = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return outputs[:, :length] if is_open(length) else outputs


def _whole_chunks(query, key, value, key_mask, chunk_size) -> tuple[torch.Tensor, ...]:
    """Pads an open length to a multiple of the chunk, where a last chunk of another size cannot be told apart."""
    length = query.shape[1]
    missing = count_blocks(length, chunk_size) * chunk_size - length
    mask = torch.ones_like(key[..., 0], dtype=torch.bool) if key_mask is None else key_mask
    query, key, value = (F.pad(states, (0, 0, 0, missing)) for states in (query, key, value))
    return query, key, value, F.pad(mask, (0, missing))


@outside_autocast
def gated_attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    activation: str,
    bias: torch.Tensor | None = None,
    chunk_size: int | None = None,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights A of `gated_attention`, all at once: (B, chunks, c, c) in float32 or better, or (B, 1, L, L).

    Rows and columns that a shorter last chunk lacks are zero. With `positions`, chunks hold the tokens by position.
    """
    _check_self(query, key, None, activation, bias, chunk_size, key_mask, positions)
    key_mask = _visible(key_mask, positions)
    if positions is not None and _is_cut(query.shape[1], chunk_size):
        slots = _Slots(positions, key_mask, width=query.shape[1])
        query, key, key_mask, positions = slots.gather(query), slots.gather(key), slots.filled, None
    pieces: list[torch.Tensor] = []
    for _, scores in _chunk_scores(query, key, activation, bias, chunk_size, causal, key_mask, positions):
        weights = score_weights(scores).unflatten(0, (query.shape[0], -1))
        missing = pieces[0].shape[-1] - weights.shape[-1] if pieces else 0
        pieces.append(F.pad(weights, (0, missing, 0, missing)))
    return torch.cat(pieces, dim=1)


@outside_autocast
def cached_gated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    activation: str,
    bias: torch.Tensor | None = None,
    chunk_size: int | None = None,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Causal attention of new tokens to cached and new keys: one decoding step, or one piece of a prompt.

    Queries and keys are aligned at their ends: the last query stands at the position of the last key.

    Args:
        query: (B, T, Z) of the new tokens.
        key: (B, S, Z), S >= T: cached keys, then those of the new tokens.
        value: (B, S, E).
        activation, bias, chunk_size, dropout_p: as in `gated_attention`.
        key_mask: (B, S) bool, True = token, False = padding.
        positions: (B, S) integer position of every key in its own row. None: the first key stands at the beginning of a
            chunk (or of the sequence). Keys of earlier chunks are not seen, so the last c - 1 of the cache are enough.

    Returns:
        (B, T, E) in the dtype of `value`, equal to the last T rows of one pass over the whole sequence.

    Raises:
        ValueError: as `gated_attention`.
    """
    if positions is not None and chunk_size is not None and key.shape[1] >= chunk_size + query.shape[1]:
        reach = chunk_size - 1 + query.shape[1]
        key, value, positions = key[:, -reach:], value[:, -reach:], positions[:, -reach:]
        key_mask = None if key_mask is None else key_mask[:, -reach:]
    _check_self(query, key, value, activation, bias, chunk_size, key_mask, positions, cached=True)
    key_mask = _visible(key_mask, positions)
    new, total = query.shape[1], key.shape[1]
    if chunk_size is not None and positions is None and total > chunk_size:  # the new tokens cross the end of a chunk
        outputs = gated_attention(
            F.pad(query, (0, 0, total - new, 0)),
            key,
            value,
            activation=activation,
            bias=bias,
            chunk_size=chunk_size,
            causal=True,
            key_mask=key_mask,
            dropout_p=dropout_p,
        )
        return outputs[:, total - new :]
    if chunk_size is not None and positions is not None:
        if new > 1:
            return _cached_rows(query, key, value, activation, bias, chunk_size, key_mask, positions, dropout_p)
        chunks = torch.div(positions, chunk_size, rounding_mode="floor")
        key_mask = key_mask & (chunks == chunks[:, -1:])
        positions = torch.remainder(positions, chunk_size)
    divisor = None
    if activation != "softmax":
        places = torch.arange(total, device=query.device).unsqueeze(0) if positions is None else positions
        divisor = places[:, total - new :].clamp(min=0) + 1
    band = _centre(bias, total, query)
    hidden = _hidden(key_mask, activation)
    scores = Scores(_scaled(query, activation, divisor), key, band, hidden, activation, causal=True, shift=new - 1)
    return attend(scores, value, dropout_p)


def _cached_rows(query, key, value, activation, bias, chunk_size, visible, positions, dropout_p) -> torch.Tensor:
    """Several new tokens in rows at different places of their chunks, moved so that the chunks coincide."""
    new, total = query.shape[1], key.shape[1]
    first = positions.masked_fill(~visible, torch.iinfo(positions.dtype).max).amin(-1, keepdim=True)
    start = torch.div(first, chunk_size, rounding_mode="floor") * chunk_size
    slots = _Slots(positions - start, visible, width=total + chunk_size - 1)
    outputs = gated_attention(
        slots.gather(F.pad(query, (0, 0, total - new, 0))),
        slots.gather(key),
        slots.gather(value),
        activation=activation,
        bias=bias,
        chunk_size=chunk_size,
        causal=True,
        key_mask=slots.filled,
        dropout_p=dropout_p,
    )
    return slots.restore(outputs)[:, total - new :]


class _Slots:
    """Tokens moved to the places of their positions: token l of row b goes to slot `positions[b, l]`.

    Padding, and tokens whose position is outside 0..width-1, go nowhere.
    """

    def __init__(self, positions: torch.Tensor, key_mask: torch.Tensor, width: int):
        self.positions = positions.long().clamp(0, width - 1)
        taken = key_mask & (positions >= 0) & (positions < width)
        slots = torch.where(taken, self.positions, width)  # the last slot collects the rest
        tokens = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        source = tokens.new_zeros(positions.shape[0], width + 1).scatter(1, slots, tokens)
        self.source = source[:, :width]
        self.filled = torch.zeros_like(source, dtype=torch.bool).scatter(1, slots, True)[:, :width]

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, X) -> (B, width, X); slots without a token hold one of the row."""
        return states.gather(1, self.source.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    def restore(self, states: torch.Tensor) -> torch.Tensor:
        """Inverse of `gather`; padding receives the states of some slot."""
        return states.gather(1, self.positions.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _is_cut(length: int, chunk_size: int | None) -> bool:
    """Whether a text is, or may be, cut into several chunks."""
    return chunk_size is not None and (is_open(length) or chunk_size < length)


def _visible(key_mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of the keys, without those at negative positions."""
    if positions is None:
        return key_mask
    return positions >= 0 if key_mask is None else key_mask & (positions >= 0)


# ---------------------------------------------------------------------------------------------------------------------
# cross attention
# ---------------------------------------------------------------------------------------------------------------------


@outside_autocast
def gated_cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    activation: str,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention of target tokens to all source tokens; memory linear in T + S.

    Args:
        query: (B, T, Z), unscaled.
        key: (B, S, Z), or with fewer rows, each of which several consecutive rows of queries share.
        value: (B, S, E), with as many rows as `key`.
        activation: "softmax", "laplace" or "relu2".
        bias: (T + S - 1,), or (B, T + S - 1) when rows are shifted by padding; entry T - 1 + j - i is added to the score of
            query i and key j.
        key_mask: (B, S) bool, True = token, or with as many rows as `key`. `laplace` and `relu2` divide by the number of
            tokens, at least 1.
        dropout_p: probability of dropping a weight.

    Returns:
        (B, T, E) in the dtype of `value`; zeros for a row without source tokens.

    Raises:
        ValueError: unknown activation, or shapes that do not fit together.
    """
    if query.shape[0] == key.shape[0]:
        return attend(_source_scores(query, key, value, activation, bias, key_mask), value, dropout_p)
    trains = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    each = _scores_of_each_target(query, key, value, activation, bias, key_mask)
    if query.shape[1] == 1 and not trains and dropout_p == 0:  # a decoding step
        weights = _step_weights(list(each))
        return (weights @ value.to(weights.dtype)).to(value.dtype).flatten(0, 1).unsqueeze(1)
    return torch.stack([attend(scores, value, dropout_p) for scores in each], dim=1).flatten(0, 1)


@outside_autocast
def gated_cross_attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    activation: str,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights A of `gated_cross_attention`, all at once: (B, T, S) in float32 or better."""
    if query.shape[0] == key.shape[0]:
        return score_weights(_source_scores(query, key, None, activation, bias, key_mask))
    each = _scores_of_each_target(query, key, None, activation, bias, key_mask)
    return torch.stack([score_weights(scores) for scores in each], dim=1).flatten(0, 1)


def _scores_of_each_target(query, key, value, activation, bias, key_mask) -> Iterator[Scores]:
    """Scores of the first target of every source, of the second ..., where several rows of queries share a row of keys."""
    sources = key.shape[0]
    shared = targets_per_source(query.shape[0], sources)

    def of_target(states: torch.Tensor | None, target: int) -> torch.Tensor | None:
        return states if states is None or states.shape[0] == sources else states[target::shared]

    for target in range(shared):
        own_bias = bias if bias is None or bias.dim() == 1 else bias[target::shared]
        own_mask = of_target(key_mask, target)
        yield _source_scores(query[target::shared], key, value, activation, own_bias, own_mask)


def _step_weights(targets: list[Scores]) -> torch.Tensor:
    """Weights (S, R, keys) of R targets with one token each for their source, from one product."""
    first = targets[0]
    query = torch.cat([scores.query for scores in targets], dim=1)
    bias = torch.stack([scores.bias for scores in targets], dim=1)  # a single token has an entry for each key
    raw = query @ first.key.to(query.dtype).mT + bias.to(query.dtype)
    masks = [scores.hidden for scores in targets if scores.hidden is not None]  # of all targets, or of none
    hidden = torch.stack(masks, dim=1) if masks else None
    return activate_visible(raw, hidden, first.activation)


def _source_scores(query, key, value, activation, bias, key_mask) -> Scores:
    _check(query, key, value, activation, key_mask)
    entries = query.shape[1] + key.shape[1] - 1
    if bias is None:
        bias = query.new_zeros(entries)
    if bias.shape not in ((entries,), (query.shape[0], entries)):
        raise ValueError(
            f"`bias` must have shape {(entries,)} or {(query.shape[0], entries)}, one entry for each offset of a source "
            f"from a target token; got {tuple(bias.shape)}."
        )
    divisor = key.shape[1] if key_mask is None else key_mask.sum(-1, keepdim=True).clamp(min=1)
    return Scores(
        query=_scaled(query, activation, divisor),
        key=key,
        bias=bias.reshape(-1, entries),
        hidden=None if key_mask is None else ~key_mask,
        activation=activation,
        causal=False,
        shift=query.shape[1] - 1,
    )


# ---------------------------------------------------------------------------------------------------------------------
# scores
# ---------------------------------------------------------------------------------------------------------------------


def _chunk_scores(
    query, key, activation, bias, chunk_size, causal, key_mask, positions
) -> Iterator[tuple[slice, Scores]]:
    """The chunks of full length as one set of groups, then the rest as a chunk of its own, with their tokens."""
    length = query.shape[1]
    full = length if not _is_cut(length, chunk_size) else chunk_size
    rest = length % full
    for size, tokens in ((full, slice(0, length - rest)), (rest, slice(length - rest, length))):
        if size == 0:
            return
        groups = [states[:, tokens].reshape(-1, size, states.shape[-1]) for states in (query, key)]
        mask = None if key_mask is None else key_mask[:, tokens].reshape(-1, size)
        divisor: torch.Tensor | int
        if causal:
            index = torch.arange(size, device=query.device).unsqueeze(0) if positions is None else positions[:, tokens]
            divisor = index.clamp(min=0) + 1
        else:
            divisor = size if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
        yield (
            tokens,
            Scores(
                query=_scaled(groups[0], activation, divisor),
                key=groups[1],
                bias=_centre(bias, size, query),
                hidden=_hidden(mask, activation),
                activation=activation,
                causal=causal,
                shift=size - 1,
            ),
        )


def _scaled(query: torch.Tensor, activation: str, divisor: torch.Tensor | int | None) -> torch.Tensor:
    """Queries times the scale of their scores, in float32 or better; `divisor` is a number or (G or 1, R or 1);
    softmax ignores it."""
    states = query.to(torch.promote_types(query.dtype, torch.float32))
    if activation == "softmax":
        return states * query.shape[-1] ** -0.5
    return states / (divisor.unsqueeze(-1) if isinstance(divisor, torch.Tensor) else divisor)


def _centre(bias: torch.Tensor | None, size: int, query: torch.Tensor) -> torch.Tensor:
    """(1, 2 size - 1): the entries of a bias (2m - 1,) that a chunk of `size` tokens uses."""
    if bias is None:
        return query.new_zeros(1, 2 * size - 1)
    middle = bias.shape[0] // 2
    return bias[middle - size + 1 : middle + size].unsqueeze(0)


def _hidden(key_mask: torch.Tensor | None, activation: str) -> torch.Tensor | None:
    """(G, S): padding; for the softmax except in groups of nothing but padding."""
    if key_mask is None or activation != "softmax":
        return None if key_mask is None else ~key_mask
    return ~key_mask & key_mask.any(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# references and checks
# ---------------------------------------------------------------------------------------------------------------------


def gated_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    activation: str,
    bias: torch.Tensor | None = None,
    chunk_size: int | None = None,
    causal: bool = False,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense form of `gated_attention`, quadratic in L; same arguments and result."""
    length = query.shape[1]
    index = torch.arange(length, device=query.device)
    places = index.unsqueeze(0) if positions is None else positions
    key_mask = _visible(key_mask, positions)
    size = max(length, 1) if chunk_size is None else chunk_size
    chunks = torch.zeros_like(places) if chunk_size is None else torch.div(places, size, rounding_mode="floor")
    together = chunks.unsqueeze(-1) == chunks.unsqueeze(-2)  # (B, L, L)
    tokens = torch.ones_like(together) if key_mask is None else key_mask.unsqueeze(1) & together
    seen = together & tokens
    if activation == "softmax":  # a chunk without tokens sees its padding
        seen = seen | (together & ~tokens.any(-1, keepdim=True))
    if causal:
        divisor = (places if chunk_size is None else places % size).clamp(min=0) + 1
        seen = seen & (index[None, :] <= index[:, None])
    else:
        divisor = (together & tokens).sum(-1).clamp(min=1)
    offsets = index[None, :] - index[:, None]
    entries = query.new_zeros(()) if bias is None else bias[(bias.shape[0] // 2 + offsets).clamp(0, bias.shape[0] - 1)]
    return _dense(query, key, value, activation, entries, seen, divisor)


def gated_cross_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    activation: str,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gated_cross_attention` from its definition; same arguments and result."""
    targets, sources = (torch.arange(states.shape[1], device=states.device) for states in (query, key))
    offsets = sources[None, :] - targets[:, None]
    entries = query.new_zeros(()) if bias is None else bias[..., query.shape[1] - 1 + offsets]
    seen = torch.ones(query.shape[0], 1, key.shape[1], dtype=torch.bool, device=key.device)
    if key_mask is not None:
        seen = key_mask.unsqueeze(1)
    return _dense(query, key, value, activation, entries, seen, seen.sum(-1).clamp(min=1))


def _dense(query, key, value, activation, entries, seen, divisor) -> torch.Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    products = query.to(dtype) @ key.to(dtype).mT
    products = products * query.shape[-1] ** -0.5 if activation == "softmax" else products / divisor.unsqueeze(-1)
    scores = products + entries.to(dtype)
    if activation == "softmax":
        scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
    return (activate(scores, activation).masked_fill(~seen, 0) @ value.to(dtype)).to(value.dtype)


def _check_self(query, key, value, activation, bias, chunk_size, key_mask, positions, cached=False) -> None:
    _check(query, key, value, activation, key_mask)
    if query.shape[1] > key.shape[1] or (not cached and query.shape[1] != key.shape[1]):
        raise ValueError(
            f"`key` has {key.shape[1]} tokens but `query` has {query.shape[1]}; `key` must have as many tokens"
            + (
                ", or more (the cached ones)."
                if cached
                else "; use `cached_gated_attention` for keys of earlier calls."
            )
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be a positive number of tokens, or None; got {chunk_size}.")
    if positions is not None and positions.shape != key.shape[:2]:
        raise ValueError(f"`positions` must have shape {tuple(key.shape[:2])}; got {tuple(positions.shape)}.")
    needed = chunk_size if _is_cut(key.shape[1], chunk_size) else key.shape[1]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] % 2 == 0 or bias.shape[0] < 2 * needed - 1):
        raise ValueError(
            f"`bias` must be a vector of an odd number of entries, at least {2 * needed - 1} for {needed} tokens in a "
            f"chunk; got {tuple(bias.shape)}."
        )


def _check(query, key, value, activation, key_mask) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {ACTIVATIONS}; got {activation!r}.")
    if query.dim() != 3 or key.dim() != 3 or query.shape[::2] != key.shape[::2] or 0 in (query.shape[1], key.shape[1]):
        raise ValueError(
            "`query` and `key` must be (batch, tokens, width), with at least one token and the same batch and width; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if value is not None and (value.dim() != 3 or value.shape[:2] != key.shape[:2]):
        raise ValueError(f"`value` must be {tuple(key.shape[:2])} + (width,), as `key`; got {tuple(value.shape)}.")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != key.shape[:2]):
        raise ValueError(
            f"`key_mask` must be bool of shape {tuple(key.shape[:2])} (True = token); got {key_mask.dtype} of shape "
            f"{tuple(key_mask.shape)}."
        )

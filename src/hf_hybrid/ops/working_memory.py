"""Working memory: the last active tokens of every row in a ring of constant size, and attention that continues from it.

A text read in pieces gives the same outputs as in one pass (`compaction.compacted_attention`, causal). Shape letters:
B rows, T new tokens, C active ones among them, W slots, Z width of queries and keys, E width of values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .autocast import outside_autocast
from .compaction import ActiveTokens, compacted_attention
from .gated_scores import activate
from .in_place import is_changeable


class WorkingMemory(NamedTuple):
    """The last active tokens of every row, in a ring: the active token of rank r lies in slot r mod W.

    Attributes:
        keys: (B, W, Z), ready to be multiplied with queries.
        values: (B, W, E).
        positions: (B, W) places in the row.
        counts: (B,) active tokens so far; the last min(counts, W) of them are there.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor

    def ranks(self) -> torch.Tensor:
        """(B, W) rank of what each slot holds; negative for an empty one."""
        slots = torch.arange(self.keys.shape[1], device=self.keys.device)
        last = self.counts.unsqueeze(-1) - 1
        return last - torch.remainder(last - slots, self.keys.shape[1])


def empty_memory(batch: int, slots: int, key: torch.Tensor, value: torch.Tensor) -> WorkingMemory:
    """A memory of W slots without content, in the dtypes of `key` (..., Z) and `value` (..., E)."""
    return WorkingMemory(
        key.new_zeros(batch, slots, key.shape[-1]),
        value.new_zeros(batch, slots, value.shape[-1]),
        torch.zeros(batch, slots, dtype=torch.long, device=key.device),
        torch.zeros(batch, dtype=torch.long, device=key.device),
    )


def enlarge_memory(memory: WorkingMemory, slots: int) -> WorkingMemory:
    """A memory that has never been full, with more slots."""
    more = slots - memory.keys.shape[1]
    keys, values = (F.pad(states, (0, 0, 0, more)) for states in (memory.keys, memory.values))
    return WorkingMemory(keys, values, F.pad(memory.positions, (0, more)), memory.counts)


def write_memory(
    memory: WorkingMemory, keys: torch.Tensor, values: torch.Tensor, tokens: ActiveTokens, first_position: int
) -> WorkingMemory:
    """The memory after some new tokens, of which only the active ones are written.

    Args:
        memory: memory of the rows before.
        keys, values: (C, Z) and (C, E) of the active tokens.
        tokens: the active tokens; their ranks and positions count from the first new token.
        first_position: position of the first new token.
    """
    batch, slots = memory.positions.shape
    rows = tokens.rows.clamp(min=0)
    ranks = tokens.ranks + memory.counts[rows]
    counts = memory.counts + tokens.counts
    kept = (tokens.rows >= 0) & (ranks >= counts[rows] - slots)
    places = torch.where(
        kept, rows * slots + torch.remainder(ranks, slots), batch * slots
    )  # the last collects the rest

    def write(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        target = torch.cat([old.flatten(0, 1), old.new_zeros(1, *old.shape[2:])])
        return target.index_copy(0, places, new.to(old.dtype))[:-1].unflatten(0, (batch, slots)).clone()

    positions = write(memory.positions, tokens.positions + first_position)
    return WorkingMemory(write(memory.keys, keys), write(memory.values, values), positions, counts)


@outside_autocast
def token_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    active: torch.Tensor,
    memory: WorkingMemory,
    position: int | torch.Tensor,
    *,
    activation: str,
    window: int | None,
    rank_bias: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, WorkingMemory]:
    """`memory_attention` of one new token of every row, and the memory after it.

    The token is written first, active or not, into the slot of the next active one, and then sees the slots alone. If it is not
    active, it does not count: the next token takes its slot.

    Args:
        query, key, value: (B, 1, Z), (B, 1, Z) and (B, 1, E).
        active: (B, 1) bool.
        memory: memory of the rows, with a slot more than the `window`, or than the active tokens without one. Changed in place if
            possible.
        position: position of the token, a number or (1,).
        activation, window, rank_bias, position_bias: as in `compacted_attention`.

    Returns:
        (B, 1, E) in the dtype of `value`, unspecified for inactive tokens, but finite; and the memory.
    """
    dtype, slots = torch.promote_types(query.dtype, torch.float32), memory.keys.shape[1]
    counts = memory.counts.unsqueeze(-1)
    memory = _with_token(memory, key, value, active, position)
    # (B, 1, W) active tokens from that in a slot to the new one
    steps = torch.remainder(counts - torch.arange(slots, device=key.device), slots).unsqueeze(1)
    hidden = steps > (counts if window is None else counts.clamp(max=window)).unsqueeze(-1)
    states = query.to(dtype)
    if activation == "softmax":
        states = states * query.shape[-1] ** -0.5
    elif window is not None:
        states = states / window
    else:
        states = states / (counts + 1).unsqueeze(-1)
    scores = states @ memory.keys.to(dtype).mT
    if rank_bias is not None:
        reach = rank_bias.shape[0] // 2
        scores = scores + rank_bias.to(dtype)[(reach - steps).clamp(min=0)]
    if position_bias is not None:
        reach = position_bias.shape[0] // 2
        places = (memory.positions - (position - reach)).clamp(0, 2 * reach)
        scores = scores + position_bias.to(dtype)[places].unsqueeze(1)
    # The token sees itself, so no row of weights is empty.
    weights = activate(scores.masked_fill(hidden, torch.finfo(dtype).min), activation)
    return (weights @ memory.values.to(dtype)).to(value.dtype), memory


def _with_token(
    memory: WorkingMemory,
    key: torch.Tensor,
    value: torch.Tensor,
    active: torch.Tensor,
    position: int | torch.Tensor,
) -> WorkingMemory:
    """The memory with one more token of every row, which counts if it is active."""
    place = torch.remainder(memory.counts, memory.keys.shape[1]).unsqueeze(-1)
    in_place = not torch.is_grad_enabled() and is_changeable(memory.keys)

    def write(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        index = place.view(*new.shape[:2], *(1,) * (new.dim() - 2)).expand_as(new)
        new = new.to(old.dtype)
        return old.scatter_(1, index, new) if in_place else old.scatter(1, index, new)

    if isinstance(position, torch.Tensor):
        new_positions = position.expand_as(place)
    else:  # in exported programs a symbol, which is no int
        new_positions = torch.full_like(place, position)
    positions = write(memory.positions, new_positions)
    return WorkingMemory(
        write(memory.keys, key), write(memory.values, value), positions, memory.counts + active.squeeze(-1)
    )


@outside_autocast
def memory_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    active: torch.Tensor,
    memory: WorkingMemory,
    first_position: int | torch.Tensor,
    *,
    activation: str,
    window: int | None,
    rank_bias: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a few new tokens to the working memory and to one another: fixed shapes, W + T keys per query.

    Args:
        query, key, value: (B, T, Z), (B, T, Z) and (B, T, E) of the new tokens, active or not.
        active: (B, T) bool.
        memory: memory of the rows, with W >= `window` slots, or all active tokens without one.
        first_position: position of the first new token, a number or (1,).
        activation, window, rank_bias, position_bias: as in `compacted_attention`.

    Returns:
        (B, T, E) in the dtype of `value`; unspecified for inactive tokens, but finite.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    new_ranks = memory.counts.unsqueeze(-1) + active.long().cumsum(-1) - 1
    ranks = torch.cat([memory.ranks(), torch.where(active, new_ranks, -1)], dim=1)
    steps = ranks.unsqueeze(1) - new_ranks.unsqueeze(2)  # (B, T, W + T)
    seen = (ranks >= 0).unsqueeze(1) & (steps <= 0)
    if window is not None:
        seen = seen & (steps >= -window)
    states = query.to(dtype)
    if activation == "softmax":
        states = states * query.shape[-1] ** -0.5
    elif window is not None:
        states = states / window
    else:
        states = states / (new_ranks + 1).clamp(min=1).unsqueeze(-1)
    scores = torch.cat([states @ keys.to(dtype).mT for keys in (memory.keys, key)], dim=-1)
    if rank_bias is not None:
        reach = rank_bias.shape[0] // 2
        scores = scores + rank_bias.to(dtype)[steps.clamp(-reach, reach) + reach]
    if position_bias is not None:
        reach = position_bias.shape[0] // 2
        new_positions = first_position + torch.arange(query.shape[1], device=query.device).expand_as(active)
        distances = torch.cat([memory.positions, new_positions], dim=1).unsqueeze(1) - new_positions.unsqueeze(2)
        scores = scores + position_bias.to(dtype)[distances.clamp(-reach, reach) + reach]
    weights = activate(scores.masked_fill(~seen, torch.finfo(dtype).min), activation).masked_fill(~seen, 0)
    slots = memory.keys.shape[1]
    outputs = weights[..., :slots] @ memory.values.to(dtype) + weights[..., slots:] @ value.to(dtype)
    return outputs.to(value.dtype)


def continued_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: ActiveTokens,
    memory: WorkingMemory,
    first_position: int,
    *,
    activation: str,
    window: int | None,
    rank_bias: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    behind: WorkingMemory | None = None,
) -> torch.Tensor:
    """`memory_attention` of many new tokens: one stream of what the memory holds and the new active tokens, row by row.

    Args:
        query, key, value: (C, Z), (C, Z) and (C, E) of the new active tokens.
        tokens: the active tokens; their ranks and positions count from the first new token.
        memory, first_position, activation, window, rank_bias, position_bias: as in `memory_attention`.
        dropout_p: probability of dropping a weight.
        behind: the first active tokens behind the new ones, counted from the end of the text; attention then sees them too, and
            needs a window.

    Returns:
        (C, E) in the dtype of `value`.
    """
    memories = [memory] if behind is None else [memory, behind]
    batch, slots = memory.positions.shape
    kept = [item.counts.clamp(max=slots) for item in memories]
    totals = sum(kept, tokens.counts)
    size = len(memories) * batch * slots + tokens.index.shape[0] if tokens.is_static else int(totals.sum())
    starts = totals.cumsum(0) - totals
    ranks = [item.ranks() for item in memories]
    places = [starts.unsqueeze(-1) + ranks[0] - (memory.counts - kept[0]).unsqueeze(-1)]
    if behind is not None:
        places.append((starts + kept[0] + tokens.counts + behind.counts - 1).unsqueeze(-1) - ranks[1])
    old = torch.cat([torch.where(rank >= 0, place, size) for rank, place in zip(ranks, places)]).flatten()
    rows = tokens.rows.clamp(min=0)
    new = torch.where(tokens.rows >= 0, starts[rows] + kept[0][rows] + tokens.ranks, size)

    def join(remembered: list[torch.Tensor], added: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """(B, W, ...) each, and (C, ...), as one stream; what has no place is dropped."""
        empty = added.new_full((size + 1, *added.shape[1:]), fill)
        states = torch.cat(remembered).flatten(0, 1).to(added.dtype)
        return empty.index_copy(0, old, states).index_copy(0, new, added)[:size]

    row_of_slots = torch.arange(batch, device=key.device).unsqueeze(-1).expand(-1, slots)
    stream = ActiveTokens(
        index=torch.arange(size, device=key.device),
        rows=join([row_of_slots] * len(memories), rows, fill=-1),
        ranks=join(ranks, tokens.ranks + memory.counts[rows]),
        positions=join([item.positions for item in memories], tokens.positions + first_position),
        counts=totals,
        longest=len(memories) * slots + tokens.longest,
        is_static=tokens.is_static,
    )
    outputs = compacted_attention(
        # The memories have no queries: only their keys and values matter.
        join([torch.zeros_like(item.keys) for item in memories], query),
        join([item.keys for item in memories], key),
        join([item.values for item in memories], value),
        stream,
        activation=activation,
        window=window,
        causal=behind is None,
        rank_bias=rank_bias,
        position_bias=position_bias,
        dropout_p=dropout_p,
    )
    return F.pad(outputs, (0, 0, 0, 1))[new]

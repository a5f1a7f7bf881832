"""Local attention by FlexAttention, for accelerators: blocks out of reach are skipped, and no mask or bias is made per pair.

The pattern (window, chunk, padding) is a block mask that all layers of a forward pass share; a learned bias is a captured table
with one entry per head and offset. Shape letters: B batch, n heads, L tokens, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .autocast import without_autocast


class Pattern(NamedTuple):
    """Which keys a query sees.

    Attributes:
        left, right: largest distance of a key before and after the query.
        chunk_size: keys of other chunks are hidden; None for windows.
    """

    left: int
    right: int
    chunk_size: int | None = None


def visibility(pattern: Pattern, key_mask: torch.Tensor | None, positions: torch.Tensor | None) -> Callable[..., Any]:
    """The pattern as a `mask_mod`; `key_mask` (B, L) bool and `positions` (B, L) as in `flex_local_attention`."""
    left, right, size = pattern

    def is_visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = (key - query <= right) & (query - key <= left)
        if size is not None and positions is not None:
            seen = seen & (positions[batch, query] // size == positions[batch, key] // size)
        elif size is not None:
            seen = seen & (query // size == key // size)
        return seen if key_mask is None else seen & key_mask[batch, key]

    return is_visible


def table_bias(table: torch.Tensor, left: int) -> Callable[..., Any]:
    """Entry `key - query + left` of a table (n, left + right + 1), or (1, ...) for all heads, as a `score_mod`."""
    last, is_shared = table.shape[1] - 1, table.shape[0] == 1

    def add_bias(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[head * 0 if is_shared else head, (key - query + left).clamp(0, last)]

    return add_bias


def flex_local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    *,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Local attention of a whole text.

    Args:
        query, key, value: (B, n, L, d).
        pattern: see `Pattern`.
        bias: (n, left + right + 1); entry k is added to the scores of offset `j - i = k - left`.
        key_mask: (B, L) bool, True = token.
        positions: (B, L) integer position of each token in its own row, from which chunks are counted; None: from the first token.
        scale: factor on the products of queries and keys; None = d ** -0.5.

    Returns:
        (B, n, L, d); zeros for queries that see no key.
    """
    score = None if bias is None else table_bias(bias, pattern.left)
    mask = _shared_block_mask(pattern, key_mask, positions, query)
    form = _compiled() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    with without_autocast(query.device):
        found: torch.Tensor = form(query, key, value, score_mod=score, block_mask=mask, scale=scale)  # type: ignore[assignment]
        return found


def flex_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_visible: Callable[..., Any],
    add_bias: Callable[..., Any] | None,
    scale: float | None = None,
) -> torch.Tensor:
    """What FlexAttention computes of a `mask_mod` and a `score_mod`, with all L x L scores; differentiable everywhere."""
    sizes = (*query.shape[:3], key.shape[2])
    places = torch.meshgrid(*(torch.arange(size, device=query.device) for size in sizes), indexing="ij")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if add_bias is None else add_bias(scores, *places)
    seen = is_visible(*places)
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1)
    return weights.masked_fill(~seen, 0) @ value


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


# The last block mask of each pattern, with weak references to what it was made from: the layers of a forward pass, and its
# recomputation under gradient checkpointing, pass the same tensors, and may have two patterns in turn.
_last: dict[Pattern, tuple[Any, list[weakref.ref[torch.Tensor]], BlockMask]] = {}
_MOST_PATTERNS = 4


def _shared_block_mask(
    pattern: Pattern, key_mask: torch.Tensor | None, positions: torch.Tensor | None, query: torch.Tensor
) -> BlockMask:
    batch = None if key_mask is None and positions is None else query.shape[0]
    arguments = (visibility(pattern, key_mask, positions), batch, None, query.shape[2], query.shape[2])
    if torch.compiler.is_compiling():
        return create_block_mask(*arguments, device=query.device)
    sources = [tensor for tensor in (key_mask, positions) if tensor is not None]
    versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in sources)
    place = (query.shape[2], query.device, key_mask is None, positions is None, versions)
    known, references, mask = _last.pop(pattern, (None, [], None))
    same = len(references) == len(sources) and all(ref() is tensor for ref, tensor in zip(references, sources))
    if mask is None or known != place or not same:
        mask = create_block_mask(*arguments, device=query.device)
    while len(_last) >= _MOST_PATTERNS:  # the one that was not used for longest
        del _last[next(iter(_last))]
    _last[pattern] = place, [weakref.ref(tensor) for tensor in sources], mask
    return mask

"""Attention of a few queries to many keys on a CPU: a decoding step after a long source.

It takes as long as keys and values take to read, if every product reads them once and in their order.

Shapes: B batch, n heads, T queries, L keys, d head width.
"""

from __future__ import annotations

import torch

from .branches import is_eager_inference
from .masked_softmax import masked_softmax

MOST_QUERIES = 8
FEWEST_KEYS = 256  # with fewer, the time goes into calls of operators, and there are more of them here


def has_few_queries(queries: int, key: torch.Tensor) -> bool:
    """Whether so many queries to each of the keys (B, n, L, d) take `few_query_attention`, if they are of their type."""
    return queries <= MOST_QUERIES and key.shape[2] >= FEWEST_KEYS and is_eager_inference(key)


def is_few_queries(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `few_query_attention` is the faster form for (B, n, T, d) queries and (B, n, L, d) keys."""
    return query.dtype == key.dtype and has_few_queries(query.shape[2], key)


def few_query_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """softmax(scaling q k^T) v of a few queries, by two products that read keys and values once.

    One query of 8 heads to 4,096 keys in two rows, d 64, one thread: 1.5 ms; 2.4 ms by `scaled_dot_product_attention`, and 3.3 ms
    with heads that alternate in memory.

    Args:
        query: (B, n, T, d).
        key, value: (B, n, L, d); fastest as `for_few_queries` lays them out.
        mask: (B or 1, 1, T or 1, L), boolean or additive, or None: see `masked_softmax`.
        scaling: factor of the scores.

    Returns:
        (B, n, T, d); zeros for a query to which the mask shows no key.
    """
    batch, heads, queries, width = query.shape
    turned = (query * scaling).reshape(batch * heads, queries, width).transpose(1, 2)
    scores = torch.bmm(key.flatten(0, 1), turned).transpose(1, 2).reshape(batch, heads, queries, -1)
    weights, value = masked_softmax(scores, mask).flatten(0, 1), value.flatten(0, 1)
    if queries == 1 and value.stride(-1) != 1:
        return torch.bmm(value.transpose(1, 2), weights.transpose(1, 2)).view(batch, heads, 1, width)
    return torch.bmm(weights, value).view(batch, heads, queries, width)


def for_few_queries(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, n, L, d) in the order of memory in which `few_query_attention` reads them fastest: head after head, and
    values component after component. Without gradients."""
    batch, heads, length, width = value.shape
    turned = value.new_empty(batch, heads * width, length)
    for target, row in zip(turned, value.transpose(1, 2).flatten(2)):  # torch has a fast form for matrices alone
        target.copy_(row.t())
    return key.contiguous(), turned.view(batch, heads, width, length).transpose(2, 3)

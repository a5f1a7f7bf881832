"""Products of a decoding step on a CPU: few rows of inputs, and matrices that are read once from memory.

Such a product takes as long as its matrix takes to read. The library behind torch reaches this for a single row; for two to eight it
does with the operands exchanged, in the sizes below.

Shapes: B batch, n heads, T queries, L keys, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .branches import can_read_values

MOST_QUERIES = 8
FEWEST_KEYS = 256  # with fewer, the time goes into calls of operators, and there are more of them here

_FLOATS = (torch.float32, torch.float64)
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # not sharded, not quantised


def exchanges_operands(rows: int, inner: int) -> bool:
    """Whether `weight @ inputs.T` is the faster of the two products of (rows, inner) inputs with a matrix.

    Times of the other over its own, float32, one thread (Zen 3, MKL), matrices that are not in cache:

        rows         2          3          4          6          8
        inner 512    1.9-3.2    1.7-3.1    1.9-2.2    1.3-1.5    1.2-1.3
        inner 1024   1.7-2.6    1.6-2.9    1.6-2.8    0.9-1.5    0.6-0.9
        inner 4096   1.4        1.5        0.7        0.5        0.6
    """
    return rows > 1 and (rows <= 3 or inner * rows <= 4096)


def few_rows_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, faster for two to eight rows on a CPU; equal up to the order of sums.

    Args:
        inputs: (..., I).
        weight: (O, I).
        bias: (O,), or None.

    Returns:
        (..., O), contiguous. Whatever this form does not cover is left to torch: other devices, types and kinds of tensors, autocast, gradients.
    """
    *leading, inner = inputs.shape
    rows = inputs.numel() // max(inner, 1)
    is_plain = type(weight) in _PLAIN and type(inputs) is torch.Tensor and inputs.dtype == weight.dtype
    if not (exchanges_operands(rows, inner) and is_plain and _is_covered(inputs)):
        return F.linear(inputs, weight, bias)
    columns = inputs.reshape(rows, inner).contiguous().t()  # the product is slow if these are contiguous themselves
    product = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.t().contiguous().view(*leading, -1)


def _is_covered(states: torch.Tensor) -> bool:
    return (
        states.dtype in _FLOATS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and can_read_values(states)
    )


def is_few_queries(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `few_query_attention` is the faster form for (B, n, T, d) queries and (B, n, L, d) keys."""
    is_few = query.shape[2] <= MOST_QUERIES and key.shape[2] >= FEWEST_KEYS
    return is_few and query.dtype == key.dtype and _is_covered(query)


def few_query_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """softmax(scaling q k^T) v of a few queries, by two products that read keys and values once.

    One query of 8 heads to 4,096 keys in two rows, d 64, one thread: 1.5 ms; 2.4 ms by `scaled_dot_product_attention`, and 3.3 ms
    with heads that alternate in memory.

    Args:
        query: (B, n, T, d).
        key, value: (B, n, L, d); fastest as `for_few_queries` lays them out.
        mask: (B or 1, 1, T or 1, L), boolean (True where visible) or additive, or None.
        scaling: factor of the scores.

    Returns:
        (B, n, T, d); zeros for a query that sees no key.
    """
    batch, heads, queries, width = query.shape
    turned = (query * scaling).reshape(batch * heads, queries, width).transpose(1, 2)
    scores = torch.bmm(key.flatten(0, 1), turned).transpose(1, 2).reshape(batch, heads, queries, -1)
    if mask is None:
        weights = scores.softmax(-1)
    elif mask.dtype == torch.bool:
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0)
    else:
        weights = (scores + mask).softmax(-1)
    weights, value = weights.flatten(0, 1), value.flatten(0, 1)
    if queries == 1 and value.stride(-1) != 1:
        return torch.bmm(value.transpose(1, 2), weights.transpose(1, 2)).view(batch, heads, 1, width)
    return torch.bmm(weights, value).view(batch, heads, queries, width)


def for_few_queries(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, n, L, d) in the order of memory in which `few_query_attention` reads them fastest: head after head, and
    values component after component."""
    if value.requires_grad:
        return key.contiguous(), value.transpose(2, 3).contiguous().transpose(2, 3)
    batch, heads, length, width = value.shape
    turned = value.new_empty(batch, heads * width, length)
    for target, row in zip(turned, value.transpose(1, 2).flatten(2)):  # torch has a fast form for matrices alone
        target.copy_(row.t())
    return key.contiguous(), turned.view(batch, heads, width, length).transpose(2, 3)

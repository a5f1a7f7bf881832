"""Products of a decoding step on a CPU: few rows of inputs, and matrices that are read once from memory.

Such a product takes as long as its matrix takes to read. The library behind torch reaches this for a single row; for two to eight it
does with the operands exchanged, in the sizes below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .branches import is_eager_inference

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # not sharded, not quantised


def exchanges_operands(rows: int, inner: int) -> bool:
    """Whether `weight @ inputs.T` is the faster of the two products of (rows, inner) inputs with a matrix.

    Times of the other over its own, float32, one thread (Zen 3, MKL), matrices that are not in cache:

        rows         2          3          4          6          8
        inner 512    1.9-3.2    1.7-3.1    1.9-2.2    1.3-1.5    1.2-1.3
        inner 1024   1.7-2.6    1.6-2.9    1.6-2.8    0.9-1.5    0.6-0.9
        inner 4096   1.4        1.5        0.7        0.5        0.6
    """
    return 1 < rows <= 8 and (rows <= 3 or inner * rows <= 4096)


def few_rows_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, faster for two to eight rows on a CPU; equal up to the order of sums.

    Args:
        inputs: (..., I).
        weight: (O, I).
        bias: (O,), or None.

    Returns:
        (..., O), contiguous. Torch computes what this form does not cover: other devices, types and kinds of tensors, autocast,
        gradients.
    """
    *leading, inner = inputs.shape
    rows = inputs.numel() // max(inner, 1)
    is_plain = type(weight) in _PLAIN and type(inputs) is torch.Tensor and inputs.dtype == weight.dtype
    if not (exchanges_operands(rows, inner) and is_plain and is_eager_inference(inputs)):
        return F.linear(inputs, weight, bias)
    columns = inputs.reshape(rows, inner).contiguous().t()  # the product is slow if these are contiguous themselves
    product = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.t().contiguous().view(*leading, -1)

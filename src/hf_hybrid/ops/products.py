"""Products in one operation: of matrices with float32 sums of less precise operands, and of several with the same factor."""

from __future__ import annotations

import torch


def wide_bmm(left: torch.Tensor, right: torch.Tensor, product_dtype: torch.dtype) -> torch.Tensor:
    """(G, M, K) @ (G, K, N) in float32 or better, of operands rounded to `product_dtype`.

    CUDA multiplies operands in half precision on its fast units and can hand out the float32 sums. Elsewhere the operands
    are rounded in the same way and multiplied in float32, so that the result is the same up to the order of sums.
    """
    left, right = left.to(product_dtype), right.to(product_dtype)
    if product_dtype.itemsize >= 4:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def split_bmm(left: torch.Tensor, right: torch.Tensor, product_dtype: torch.dtype) -> torch.Tensor:
    """`wide_bmm` that keeps the float32 digits of `left`, as a sum of two numbers of `product_dtype`; twice the work.

    For weights that are not normalised, as squares: their rounding would show in sums that cancel.
    """
    high = left.to(product_dtype)
    product = wide_bmm(high, right, product_dtype)
    if product_dtype.itemsize >= 4:
        return product
    return product.add_(wide_bmm(left - high.to(left.dtype), right, product_dtype))


def scaled_pair(shared: torch.Tensor, factors: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The pair `shared * factors[i] + offsets[i]`: (..., Z), (2, Z) and (2, Z) to (2, ..., Z)."""
    shape = (2, *(1,) * (shared.dim() - 1), shared.shape[-1])
    return torch.addcmul(offsets.view(shape), shared.unsqueeze(0), factors.view(shape))

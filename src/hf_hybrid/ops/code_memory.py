"""What causal attention over vector-quantised keys remembers of a text: constant in size (section 2 of arXiv 2309.16354).

The last w - 1 tokens are kept with their codes, because a bias depends on their distances. Of all earlier ones, only
the number of keys of each code and the mean of their values are kept.

Shapes: B batch, H heads, L new tokens, S codewords, d width of keys, e width of values, w window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .in_place import is_changeable


class CodeMemory(NamedTuple):
    """State of one layer after the tokens seen so far.

    Attributes:
        window_codes: (B, H, w - 1) int64, codes of the last tokens, oldest first.
        window_values: (B, H, w - 1, e).
        window_mask: (B, w - 1) bool, True at real tokens; False at padding and in places not filled yet.
        code_count: (B, H, S), earlier real tokens of each code; float32 or better, like `code_value_mean`.
        code_value_mean: (B, H, S, e), mean of their values.
    """

    window_codes: torch.Tensor
    window_values: torch.Tensor
    window_mask: torch.Tensor
    code_count: torch.Tensor
    code_value_mean: torch.Tensor


def empty_memory(codes: torch.Tensor, values: torch.Tensor, codebook_size: int, window: int) -> CodeMemory:
    """Memory before the first token; sizes, types and device follow `codes` (B, H, L) and `values` (B, H, L, e)."""
    batch, heads, _, width = values.shape
    wide = torch.promote_types(values.dtype, torch.float32)
    return CodeMemory(
        codes.new_zeros(batch, heads, window - 1),
        values.new_zeros(batch, heads, window - 1, width),
        torch.zeros(batch, window - 1, dtype=torch.bool, device=codes.device),
        values.new_zeros(batch, heads, codebook_size, dtype=wide),
        values.new_zeros(batch, heads, codebook_size, width, dtype=wide),
    )


def remember(memory: CodeMemory, codes: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> CodeMemory:
    """The memory after new tokens: those that leave the window enter the counts and means.

    Args:
        memory: memory of the earlier tokens.
        codes: (B, H, L).
        values: (B, H, L, e).
        mask: (B, L) bool, True at real tokens, or None.
    """
    if mask is None:
        mask = torch.ones(codes.shape[0], codes.shape[2], dtype=torch.bool, device=codes.device)
    parts = (codes, values.to(memory.window_values.dtype), mask)
    halves = [_slide(old, new, dim) for old, new, dim in zip(memory[:3], parts, (2, 2, 1))]
    leaving = [half[0] for half in halves]
    add = _add_token if leaving[0].shape[-1] == 1 else _add_tokens
    count, mean = add(memory.code_count, memory.code_value_mean, *leaving)
    return CodeMemory(*(half[1] for half in halves), count, mean)


def _slide(old: torch.Tensor, new: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves a window when new tokens enter it, and the new window."""
    kept, length = old.shape[dim], new.shape[dim]
    if length < kept:
        leaving, staying = old.split([length, kept - length], dim)
        return leaving, torch.cat([staying, new], dim)
    passing, staying = new.split([length - kept, kept], dim)
    return torch.cat([old, passing], dim), staying.clone()  # a copy frees the longer tensor


def _add_tokens(
    count: torch.Tensor, mean: torch.Tensor, codes: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and means with (B, H, n) more codes and their values."""
    real = mask.unsqueeze(1).to(count.dtype).expand(codes.shape)
    total = count.scatter_add(-1, codes, real)
    index = codes.unsqueeze(-1).expand(*codes.shape, values.shape[-1])
    sums = (count.unsqueeze(-1) * mean).scatter_add(-2, index, values.to(mean.dtype) * real.unsqueeze(-1))
    return total, sums / total.clamp(min=1).unsqueeze(-1)


def _add_token(
    count: torch.Tensor, mean: torch.Tensor, codes: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_add_tokens`, for one token; in place where nothing else can depend on the old tensors."""
    real = mask.unsqueeze(1).to(count.dtype)
    number = count.gather(-1, codes) + real
    index = codes.unsqueeze(-1).expand(*codes.shape, values.shape[-1])
    old = mean.gather(-2, index)
    new = old + (values.to(mean.dtype) - old) * (real / number.clamp(min=1)).unsqueeze(-1)
    if torch.is_grad_enabled() or not is_changeable(mean):
        return count.scatter(-1, codes, number), mean.scatter(-2, index, new)
    return count.scatter_(-1, codes, number), mean.scatter_(-2, index, new)

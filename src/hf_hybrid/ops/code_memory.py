"""What causal attention over vector-quantised keys remembers of a text: constant in size (section 2 of arXiv 2309.16354).

The last w - 1 tokens are kept with their codes, because a bias depends on their distances. Of all earlier ones, only
the number of keys of each code and the mean of their values are kept.

Shapes: B batch, H heads, L new tokens, S codewords, d width of keys, e width of values, w window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

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


class TokenWindow(NamedTuple):
    """The window that ends with a new token.

    Attributes:
        codes: (B, H, w).
        values: (B, H, w, e).
        mask: (B, w) bool.
        real: (B, w), the mask in the dtype of the counts.
    """

    codes: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    real: torch.Tensor


def join_token(
    memory: CodeMemory, codes: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> TokenWindow:
    """The last tokens and a new one: codes (B, H, 1), values (B, H, 1, e) and mask (B, 1) bool, or None."""
    if mask is None:
        mask = F.pad(memory.window_mask, (0, 1), value=True)
    else:
        mask = torch.cat([memory.window_mask, mask], dim=1)
    joined = torch.cat([memory.window_values, values.to(memory.window_values.dtype)], dim=2)
    return TokenWindow(torch.cat([memory.window_codes, codes], dim=2), joined, mask, mask.to(memory.code_count.dtype))


def remember_token(memory: CodeMemory, window: TokenWindow) -> CodeMemory:
    """The memory after the new token of a window, whose first one enters the counts and means; in place where nothing else can
    depend on the old tensors."""
    codes, values, real = window.codes[..., :1], window.values[:, :, :1], window.real[:, None, :1]
    count, mean = memory.code_count, memory.code_value_mean
    in_place = not torch.is_grad_enabled() and is_changeable(mean)
    real = real.expand_as(codes)
    count = count.scatter_add_(-1, codes, real) if in_place else count.scatter_add(-1, codes, real)
    share = real / count.gather(-1, codes).clamp(min=1)
    index = codes.unsqueeze(-1).expand_as(values)
    moved = torch.lerp(mean.gather(-2, index), values.to(mean.dtype), share.unsqueeze(-1))
    mean = mean.scatter_(-2, index, moved) if in_place else mean.scatter(-2, index, moved)
    return CodeMemory(window.codes[..., 1:], window.values[:, :, 1:], window.mask[:, 1:], count, mean)


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
    count, mean = _add_tokens(memory.code_count, memory.code_value_mean, *leaving)
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

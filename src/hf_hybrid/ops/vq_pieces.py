"""What attention over vector-quantised keys needs of the pieces of a text that other processes hold.

The chunks next to a piece are seen key by key; of all others the number of keys of each code, and sums of their values
and of their residuals, are enough.

Shapes as in `vq_attention`: B batch, H heads, L tokens of a piece, S codewords, d and e widths of keys and values, C chunk
size, K chunks of keys (those of the piece, one in front, and one behind unless attention is causal).
"""

from __future__ import annotations

import torch

from .sequence_group import SequenceGroup


def put_neighbours_around(
    group: SequenceGroup,
    mask: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor,
    chunk_size: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Puts the chunks of the neighbouring pieces into the empty ones around a piece; beyond the text they stay empty.

    Args:
        mask: (B, K C) bool.
        codes: (B, H, K C).
        values: (B, H, K C, e).
        residual: (B, H, K C, d), zeros with the gradient of the keys.
    """
    size, stop = chunk_size, mask.shape[1] if causal else mask.shape[1] - chunk_size
    both = torch.cat([values, residual], dim=-1)
    numbers = torch.cat([codes, mask.long().unsqueeze(1)], dim=1)  # (B, H + 1, K C)
    own, places = both[:, :, size:stop], numbers[:, :, size:stop]
    states = [group.shift(own[:, :, -size:], 1), own]
    around = [group.exchange(places[:, :, -size:], 1), places]
    if not causal:
        states.append(group.shift(own[:, :, :size], -1))
        around.append(group.exchange(places[:, :, :size], -1))
    values, residual = torch.cat(states, dim=2).split([values.shape[-1], residual.shape[-1]], dim=-1)
    codes, mask_numbers = torch.cat(around, dim=2).split([codes.shape[1], 1], dim=1)
    return mask_numbers.squeeze(1).bool(), codes, values, residual


def far_sums_of_others(group: SequenceGroup, parts: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    """Sums over the chunks of all other pieces that are far from every chunk of this one.

    Args:
        parts: sums of every chunk of keys, (B, H, K, S[, width]).

    Returns:
        (B, H, 1, S[, width]) each. (A total less the near chunk would cancel, so that chunk is left out beforehand.)
    """
    widths = [1 if part.dim() == 4 else part.shape[-1] for part in parts]
    joined = torch.cat([part.unsqueeze(-1) if part.dim() == 4 else part for part in parts], dim=-1)
    own = joined[:, :, 1:] if causal else joined[:, :, 1:-1]  # (B, H, T, S, widths)
    total = own.sum(2)
    found = group.shift(group.exclusive_scan(total) + own[:, :, :-1].sum(2), 1)
    if not causal:
        found = found + group.shift(group.exclusive_scan(total, reverse=True) + own[:, :, 1:].sum(2), -1)
    sums = found.unsqueeze(2).split(widths, dim=-1)
    return [part.squeeze(-1) if like.dim() == 4 else part for part, like in zip(sums, parts)]

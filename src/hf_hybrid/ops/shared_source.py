"""Attention of several rows of targets to one row of a source: beams, or several samples of the same source.

The targets of a source are consecutive: of B = S R rows, row i reads source i // R. Keys and values exist once per source, and
the tokens of its R targets are queries of the same product.
"""

from __future__ import annotations

import torch


def targets_per_source(targets: int, sources: int) -> int:
    """Rows of targets for each source.

    Raises:
        ValueError: there are not as many for every source.
    """
    if targets == sources:
        return 1
    if targets % sources:
        raise ValueError(
            f"There are {targets} rows of targets for the keys and values of {sources} sources; the number of targets must be a "
            "multiple of that of sources."
        )
    return targets // sources


def mask_of_sources(mask: torch.Tensor | None, sources: int, queries: int) -> torch.Tensor | None:
    """Mask of padding in the sources for the queries of all targets.

    Args:
        mask: (S, 1, T, L), or (S R, 1, T, L) with a row for each target, boolean or additive; equal for all T tokens of a row.
        sources: S.
        queries: R T.

    Returns:
        (S, 1, 1 or R T, L), or None.
    """
    if mask is None:
        return None
    mask = mask[:, :, :1]
    if mask.shape[0] == sources:
        return mask
    mask = mask.reshape(sources, 1, -1, mask.shape[-1])
    return mask.repeat_interleave(queries // mask.shape[2], dim=2)

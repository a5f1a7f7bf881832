"""Sizes that an exported graph leaves open."""

from __future__ import annotations

import torch


def is_open(*sizes: int) -> bool:
    """Whether a size is a variable of the graph being exported: one graph then has to serve every value of it.

    Forms that are chosen by comparing such a size would tie the graph to one outcome of the comparison. In eager mode and in
    graphs compiled for the sizes at hand all sizes are numbers.
    """
    return any(isinstance(size, torch.SymInt) for size in sizes)


def count_blocks(length: int, size: int) -> int:
    """Blocks of `size` that hold `length` tokens.

    One more when the length is open: broadcasting treats sizes of 1 differently, so a graph must know that none of its sizes
    is 1.
    """
    return -(-length // size) + is_open(length)

"""How much work a blocked operation does at a time."""

from __future__ import annotations

# Pairs of query and key whose scores exist at one time on CPU: 1 MB in float32, so that they stay in cache.
PAIRS_AT_A_TIME = 1 << 18


def even_slices(start: int, stop: int, at_most: int) -> list[slice]:
    """Cuts a range into the fewest slices of nearly equal length, none longer than `at_most`."""
    count = -(-(stop - start) // at_most)
    borders = [start + (stop - start) * index // count for index in range(count + 1)] if count else []
    return [slice(*pair) for pair in zip(borders[:-1], borders[1:])]

"""Parallel work on a numbered sequence of samples; the result does not depend on the number of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from tqdm.auto import tqdm

Result = TypeVar("Result")


def available_processes() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_blocks(
    make: Callable[[range], Result],
    indices: range,
    *,
    block: int = 64,
    num_processes: int = 1,
    progress: bool = False,
    description: str = "Generating",
    unit: str = " samples",
) -> Iterator[Result]:
    """Applies a function to consecutive blocks of indices and yields the results in order.

    Args:
        make: function of a range of indices. With several processes it must be picklable (a function of a module, or a
            `partial` of one), and a script that calls this needs the `if __name__ == "__main__":` guard, since
            processes are spawned.
        indices: indices of all samples, in steps of 1.
        block: indices per call.
        num_processes: number of processes; 1 works in this process.
        progress: show a progress bar.
        description: label of the progress bar.
        unit: what it counts.

    Raises:
        ValueError: a count is not positive.
    """
    if block < 1 or num_processes < 1:
        raise ValueError(f"`block` and `num_processes` must be positive; got {block} and {num_processes}.")
    blocks = [indices[first : first + block] for first in range(0, len(indices), block)]
    with tqdm(
        total=len(indices), desc=description, unit=unit, disable=None if progress else True, mininterval=1.0
    ) as bar:
        if min(num_processes, len(blocks)) <= 1:
            for part in blocks:
                yield make(part)
                bar.update(len(part))
            return
        with ProcessPoolExecutor(min(num_processes, len(blocks)), mp_context=get_context("spawn")) as pool:
            for part, result in zip(blocks, pool.map(make, blocks)):
                yield result
                bar.update(len(part))

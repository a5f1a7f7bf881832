"""Programs of several processes that compute the same checks together."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


def _work(rank: int, check: Callable[[Any, Path], None], cases: Iterable[Any], folder: str, processes: int) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    names = {**ranks, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    meeting = f"{folder}/{check.__name__}-of-{processes}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    case: Any = None
    try:
        for case in cases:
            check(case, Path(folder))
    except Exception:
        sys.stdout.write(f"rank {rank}, {case}:\n{traceback.format_exc()}\n")
        sys.stdout.flush()
        os._exit(1)  # the processes no longer run alike
    dist.destroy_process_group()


def run_alike(check: Callable[[Any, Path], None], cases: Iterable[Any], folder: str, processes: int = WORLD) -> None:
    """Calls `check(case, folder)` for each case in every process of a gloo group, and says "all alike"."""
    # By fork: the processes need not import everything again.
    torch.multiprocessing.start_processes(
        _work, args=(check, cases, folder, processes), nprocs=processes, start_method="fork"
    )
    sys.stdout.write("all alike\n")

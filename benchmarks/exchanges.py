"""Bytes that the processes of each kind of parallelism exchange in a training step, counted at the collective operations.

    python benchmarks/exchanges.py --models spade_lm mega

Two processes on this machine. Counted is what a process puts into each operation (an all-gather: its part; a sum or a reduce-scatter: the whole), so
the figures do not depend on the algorithm by which a library carries it out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from pieces import models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROCESSES = 2
# Of an operation with a buffer for its result, only the other argument is sent.
WITH_RESULT = ("_allgather_base_", "allgather_", "_reduce_scatter_base_", "reduce_scatter_")


class Exchanged(TorchDispatchMode):
    """Bytes of the tensors that collective operations are given."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")
        if name[0] in ("c10d", "_c10d_functional") and not name[1].lstrip("_").startswith(
            ("wait_", "wrap_", "barrier")
        ):
            given = args[1] if name[1] in WITH_RESULT else args[0]
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            self.sent[name[1].strip("_")] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def distribute(kind: str, model: Any, place: str) -> Any:
    from transformers.distributed import DistributedConfig

    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if dist.get_rank() == 0:
        model.save_pretrained(place)
    dist.barrier()
    sizes: dict[str, Any] = {"fsdp": {"fsdp_size": PROCESSES}, "tp": {"tp_size": PROCESSES, "tp_plan": "auto"}}[kind]
    return type(model).from_pretrained(place, distributed_config=DistributedConfig(**sizes))


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    for name in options.models:
        for kind in options.kinds:
            torch.manual_seed(0)
            model = models(options.hidden, options.layers)[name]()
            size = 4 * sum(parameter.numel() for parameter in model.parameters())
            ids = torch.randint(3, 256, (options.batch, options.length))
            net = distribute(kind, model, f"{folder}/{name}").train()
            exchanged = Exchanged()
            for counting in (False, True):  # the first step also prepares
                with exchanged if counting else torch.enable_grad():
                    net(input_ids=ids, labels=ids).loss.backward()
            if rank == 0:
                states = 4 * options.batch * options.length * options.hidden
                found = {
                    "model": name, "kind": kind, "rows": options.batch, "length": options.length, "parameter_bytes": size,
                    "bytes_of_states_of_a_layer": states, **exchanged.sent, "sum": sum(exchanged.sent.values()),
                }  # fmt: skip
                print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["spade_lm", "mega", "seqboat", "bst", "longvq"])
    parser.add_argument("--kinds", nargs="+", default=["ddp", "fsdp", "tp"], choices=["ddp", "fsdp", "tp"])
    parser.add_argument("--batch", type=int, default=1, help="rows of each process")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(measure, args=(options, folder), nprocs=PROCESSES, start_method="fork")


if __name__ == "__main__":
    main()

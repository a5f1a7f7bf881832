"""What a text cut over processes costs: time, memory and bytes exchanged per process.

    python benchmarks/pieces.py --processes 2 --length 65536
    python benchmarks/pieces.py --processes 8 --length 65536 131072 --forward_only

Of several lengths every process must send as many bytes as of the first, or the program ends with an error. Every process runs
on this machine, so the time says nothing about speed on several. Memory is the largest growth of a process after the model was built.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import hf_hybrid
from hf_hybrid import SequenceGroup, context_parallel, split_batch


def models(hidden: int, layers: int) -> dict[str, Any]:
    """SPADE's encoder, and a causal model of every architecture that can be cut, in the sizes of the page."""
    common = {"vocab_size": 256, "hidden_size": hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 32, "intermediate_size": 2 * hidden}
    single = {"shared_representation_size": hidden // 2, "ema_projection_size": 16}
    return {
        "spade": lambda: hf_hybrid.SpadeEncoderModel(
            hf_hybrid.SpadeConfig(**common, **heads, head_dim=32, window_size=128, ssm_state_size=32)
        ),
        "spade_lm": lambda: hf_hybrid.SpadeLMForCausalLM(
            hf_hybrid.SpadeLMConfig(**common, **heads, window_size=128, ssm_state_size=32)
        ),
        "mega": lambda: hf_hybrid.MegaForCausalLM(
            hf_hybrid.MegaConfig(
                **common, **single, intermediate_size=2 * hidden, nffn_hidden_size=2 * hidden, use_chunking=True,
                chunk_size=128, is_decoder=True, bidirectional=False,
            )
        ),
        "seqboat": lambda: hf_hybrid.SeqBoatForCausalLM(
            hf_hybrid.SeqBoatConfig(
                **common, qk_dim=hidden // 2, value_dim=2 * hidden, ema_dim=16, window_size=129, is_decoder=True
            )
        ),
        "bst": lambda: hf_hybrid.BstForCausalLM(
            hf_hybrid.BstConfig(**common, **heads, head_dim=32, block_size=128, context_variant="mf", ssm_state_size=32)
        ),
        "longvq": lambda: hf_hybrid.LongVQForCausalLM(
            hf_hybrid.LongVQConfig(
                **common, intermediate_size=2 * hidden, value_size=2 * hidden, shared_representation_size=hidden // 2,
                codebook_size=64, window_size=128, chunk_size=128, codebook_init="random", is_decoder=True,
            )
        ),
    }  # fmt: skip


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(model: Any, piece: dict[str, torch.Tensor], forward_only: bool) -> None:
    """A pass over the piece of this process; the encoder has no loss, the mean of its squares stands for one."""
    if forward_only or "labels" not in piece:
        options = {} if "labels" not in piece else {"use_cache": False}
        states = model.base_model(piece["input_ids"], **options).last_hidden_state
        if not forward_only:
            states.pow(2).mean().backward()
    else:
        model.train()(**piece).loss.backward()


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=options.processes)
    group = SequenceGroup()
    for name in options.models:
        sent_before: set[int] = set()
        for length in options.length:
            torch.manual_seed(0)
            model = models(options.hidden, options.layers)[name]()
            ids = torch.randint(3, 256, (1, length))
            batch = {"input_ids": ids} if name == "spade" else {"input_ids": ids, "labels": ids}
            piece = split_batch(batch, group, model)
            before, sent, start = peak_bytes(), group.bytes_sent, time.perf_counter()
            with context_parallel(model, group), torch.set_grad_enabled(not options.forward_only):
                run(model, piece, options.forward_only)
            dist.barrier()
            seconds, sent = time.perf_counter() - start, group.bytes_sent - sent
            sent_before.add(sent)
            if len(sent_before) > 1:
                raise RuntimeError(f"{name}: process {rank} sends {sent_before} bytes of texts of other lengths")
            growth = torch.tensor([float(peak_bytes() - before)])
            dist.all_reduce(growth, dist.ReduceOp.MAX)
            most = torch.tensor([sent])
            dist.all_reduce(most, dist.ReduceOp.MAX)
            if rank == 0:
                found = {
                    "model": name, "processes": options.processes, "length": length, "hidden": options.hidden,
                    "layers": options.layers, "pass": "forward" if options.forward_only else "forward and backward",
                    "seconds": round(seconds, 2), "bytes_sent_per_process": int(most),
                    "bytes_sent_per_layer": int(most) // options.layers, "memory_growth_mib": round(float(growth) / 2**20, 1),
                }  # fmt: skip
                print(json.dumps(found), flush=True)
            del model, piece
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--length", type=int, nargs="+", default=[65536], help="tokens of the whole text, one or several"
    )
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["spade", "spade_lm", "mega", "seqboat", "bst", "longvq"])
    parser.add_argument("--forward_only", action="store_true", help="no loss and no backward pass")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            measure, args=(options, folder), nprocs=options.processes, start_method="fork"
        )


if __name__ == "__main__":
    main()

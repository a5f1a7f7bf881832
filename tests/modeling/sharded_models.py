"""Models sharded by FSDP2 against the same models in one piece; a program of two processes, run by `test_sharding`.

python -m tests.modeling.sharded_models {plain|accelerate|transformers} FOLDER
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from .factories import Case, all_variants

WORLD = 2
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
KERNEL = 30  # tokens


def build(case: Case) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model, and inputs with labels that differ from process to process."""
    model = case.model().train()
    torch.manual_seed(dist.get_rank())
    inputs = case.inputs()
    return model, inputs | case.labels(inputs)


def state_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "kernel")}


def watch_kernels(sharded: nn.Module, plain: nn.Module) -> list[bool]:
    """Whether the kernels are those of the model in one piece, bit for bit, for each call of a state space from now on."""
    wanted = {name: layer.kernel(KERNEL).detach() for name, layer in state_layers(plain).items()}
    found: list[bool] = []
    for name, layer in state_layers(sharded).items():
        layer.register_forward_pre_hook(
            lambda module, _inputs, kernel=wanted[name]: found.append(torch.equal(module.kernel(KERNEL), kernel))
        )
    return found


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


def check_half(case: Case, sharded: nn.Module, plain: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Two training steps in bfloat16: kernels as in float32, loss near it, gradients for all states."""
    for _ in range(2):
        exact = watch_kernels(sharded, plain)
        actual, expected = step(sharded, inputs), step(plain, inputs)
        assert all(exact), f"{case}: kernels differ"
        assert exact or not state_layers(plain)
        torch.testing.assert_close(actual.float(), expected, rtol=3e-2, atol=3e-2)
        for name, parameter in sharded.named_parameters():
            assert parameter.grad is not None and parameter.dtype == torch.float32, f"{case}: {name}"
            update = 0.05 * parameter.grad.full_tensor()
            with torch.no_grad():  # the same step in both
                parameter.sub_(0.05 * parameter.grad)
                plain.get_parameter(name).sub_(update)
        sharded.zero_grad()
        plain.zero_grad()


def check_single(case: Case, sharded: nn.Module, plain: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """In float32: loss and gradients are those of the model in one piece."""
    actual, expected = step(sharded, inputs), step(plain, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in plain.named_parameters():
        gradient = parameter.grad / WORLD
        dist.all_reduce(gradient)
        found = sharded.get_parameter(name).grad.full_tensor()
        torch.testing.assert_close(
            found, gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def shard_layers(model: nn.Module, **settings: Any) -> None:
    """One group per layer, and one for the rest."""
    for module in [*model.modules()]:
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, **settings)
    fully_shard(model, **settings)


def plain(case: Case, folder: Path) -> None:
    model, inputs = build(case)
    sharded = copy.deepcopy(model)
    shard_layers(sharded)
    check_single(case, sharded, model, inputs)
    sharded = case.model().train()
    shard_layers(sharded, mp_policy=HALF)
    check_half(case, sharded, case.model().train(), inputs)


def accelerate(case: Case, folder: Path) -> None:
    """What `accelerate launch` does with FSDP2 and bfloat16; its own launcher shards on accelerators only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model, inputs = build(case)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
    )
    check_half(case, fsdp2_prepare_model(accelerator, copy.deepcopy(model)), model, inputs)


def transformers(case: Case, folder: Path) -> None:
    """`from_pretrained` with a `DistributedConfig`."""
    from transformers.distributed import DistributedConfig

    model, inputs = build(case)
    place = folder / f"{case.model_type}"
    if dist.get_rank() == 0:
        model.save_pretrained(place)
    dist.barrier()
    config = DistributedConfig(fsdp_size=WORLD, fsdp_mixed_precision=True)
    sharded = type(model).from_pretrained(place, distributed_config=config).train()
    check_half(case, sharded, model, inputs)


def work(rank: int, mode: str, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD), OMP_NUM_THREADS="1"
    )
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    check = {"plain": plain, "accelerate": accelerate, "transformers": transformers}[mode]
    cases = all_variants() if mode == "plain" else [case for case in all_variants() if case.variant == "default"]
    failed = 0
    for case in cases:
        try:
            check(case, Path(folder))
        except Exception:
            failed += 1
            sys.stdout.write(f"rank {rank}, {case}:\n{traceback.format_exc()}\n")
            break  # the processes no longer run alike
    dist.destroy_process_group()
    if failed:
        os._exit(1)


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=tuple(sys.argv[1:]), nprocs=WORLD)
    sys.stdout.write("all alike\n")

"""A run that is sharded over two processes, saved, loaded whole and resumed; run by `test_sharded_checkpoints`.

python -m tests.distributed.sharded_checkpoints FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ..modeling.factories import Case
from .alike import WORLD, run_alike

CASES = [
    Case("spade", "AutoModelForSeq2SeqLM", "default"),
    Case("mega", "AutoModelForSeq2SeqLM", "default"),
    Case("spade_lm", "AutoModelForCausalLM", "default"),
    Case("mega", "AutoModelForCausalLM", "default"),
    Case("seqboat", "AutoModelForCausalLM", "default"),
    Case("bst", "AutoModelForCausalLM", "mf"),
    Case("longvq", "AutoModelForCausalLM", "default"),
]


def load(kind: type, place: Path) -> nn.Module:
    from transformers.distributed import DistributedConfig

    return kind.from_pretrained(place, distributed_config=DistributedConfig(fsdp_size=WORLD)).train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def check(case: Case, folder: Path) -> None:
    plain = case.model()
    place = folder / f"{case.model_type}-{case.auto_name}"
    if dist.get_rank() == 0:
        plain.save_pretrained(place / "start")
    dist.barrier()
    batches = []
    for step in range(4):
        torch.manual_seed(10 * step + dist.get_rank())
        inputs = case.inputs()
        batches.append(inputs | case.labels(inputs))
    model = load(type(plain), place / "start")
    optimizer = optimizer_of(model)
    train(model, optimizer, batches[:2])

    model.save_pretrained(place / "whole")
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=place / "optimizer")
    expected = whole(model)
    again = type(plain).from_pretrained(place / "whole")  # in one piece
    stored, alone = (load_file(place / name / "model.safetensors").keys() for name in ("whole", "start"))
    assert stored == alone, f"{case}: tied tensors are saved twice"
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), f"{case}: {name} of the whole checkpoint differs"
    torch.manual_seed(0)
    prompt: dict[str, Any] = {"input_ids": case.inputs()["input_ids"], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.eval().generate(**prompt), again.generate(**prompt)), f"{case}: other text"

    train(model.train(), optimizer, batches[2:])  # without a break
    resumed = load(type(plain), place / "whole")
    optimizer = optimizer_of(resumed)
    state = {"optimizer": get_optimizer_state_dict(resumed, optimizer)}
    dcp.load(state, checkpoint_id=place / "optimizer")
    set_optimizer_state_dict(resumed, optimizer, state["optimizer"])
    train(resumed, optimizer, batches[2:])
    found = whole(resumed)
    for name, tensor in whole(model).items():
        assert torch.equal(found[name], tensor), f"{case}: {name} differs after the break"


if __name__ == "__main__":
    run_alike(check, CASES, sys.argv[1])

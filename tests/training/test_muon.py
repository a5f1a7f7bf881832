"""Muon beside AdamW: its iteration, its steps against those of torch, saving and resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_hybrid.training.muon import MuonAdamW, orthogonalize, product_dtype


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (3, 6, 4), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_end_near_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, dtype=torch.float64).to(dtype)).double())
    assert values.min() > 0.6 and values.max() < 1.3


def test_zero_gradients_stay_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def make_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))


def make_optimizer(model: torch.nn.Module, **options: Any) -> MuonAdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return MuonAdamW(
        [
            {"params": matrices, "lr": 1e-2, "weight_decay": 0.1, "muon": True},
            {"params": vectors, "lr": 3e-3, "weight_decay": 0.0},
        ],
        **options,
    )


def train(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> float:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 6, generator=generator)
        loss = (model(inputs) - inputs[:, :3]).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are in bfloat16 whatever the device; here both make them in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float, raising=True)
    ours, theirs = make_model(), make_model()
    train(ours, [make_optimizer(ours, orthogonalization_dtype=torch.float32)], range(5))
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    train(theirs, [muon, torch.optim.AdamW(vectors, lr=3e-3, weight_decay=0.0)], range(5))
    for actual, expected in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", None])
def test_products_are_in_bfloat16_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, capability: str | None) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, capability: True}, raising=False)
    product_dtype.cache_clear()
    assert product_dtype("cpu") == (torch.float32 if capability is None else torch.bfloat16)
    assert product_dtype("cuda") == torch.bfloat16
    product_dtype.cache_clear()


def test_loss_falls_and_gradients_stay() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    first = train(model, [optimizer], range(1))
    assert train(model, [optimizer], range(200)) < 0.2 * first
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_resumed_is_uninterrupted() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, [optimizer], range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, [optimizer], range(3, 6))
    resumed = make_model()
    resumed.load_state_dict(saved[0])
    again = make_optimizer(resumed)
    again.load_state_dict(saved[1])
    train(resumed, [again], range(3, 6))
    for actual, expected in zip(resumed.parameters(), model.parameters()):
        assert torch.equal(actual, expected)


def test_tensors_that_are_not_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Muon trains matrices; got a tensor of shape \(4,\)"):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(4))], "muon": True}])


def _train_sharded(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        plain, sharded = make_model(), make_model()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        train(plain, [make_optimizer(plain)], range(4))
        train(sharded, [make_optimizer(sharded)], range(4))
        for actual, expected in zip(sharded.parameters(), plain.parameters()):
            torch.testing.assert_close(actual.full_tensor(), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # two more processes
def test_sharded_matrices_take_the_same_steps(tmp_path) -> None:
    torch.multiprocessing.spawn(_train_sharded, (str(tmp_path),), nprocs=2)

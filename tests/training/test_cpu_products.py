"""Products of float32 matrices by oneDNN: only in training steps, only where they stay products of float32."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments

from hf_hybrid.training import cpu_products
from hf_hybrid.training.cpu_products import fast_products, limit_kept_products, onednn_is_exact
from hf_hybrid.training.trainer import HybridTrainer

CPU = torch.device("cpu")
settings = torch.backends.mkldnn.matmul


@pytest.fixture
def exact(monkeypatch):
    """A processor on which oneDNN stays exact, whatever this one does."""
    monkeypatch.setattr(cpu_products, "onednn_is_exact", lambda: True)


def test_the_setting_is_given_back_after_errors_too(exact) -> None:
    before = settings.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), fast_products(CPU):
        assert settings.fp32_precision == "bf16"
        raise RuntimeError("inside")
    assert settings.fp32_precision == before


def test_a_choice_of_the_process_stands(exact) -> None:
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        with fast_products(CPU):
            assert settings.fp32_precision == "ieee"
    finally:
        settings.fp32_precision = before


def test_other_devices_are_left_alone(exact) -> None:
    with fast_products(torch.device("meta")):
        assert settings.fp32_precision == "none"


def test_products_that_round_are_noticed(monkeypatch) -> None:
    """As on processors with units for matrices of bfloat16."""

    def rounding(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if left.dtype == torch.float32 else left.dtype
        return torch.mm(left.to(dtype), right.to(dtype)).to(left.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not onednn_is_exact.__wrapped__()
    with fast_products(CPU):  # what was found for the process counts
        assert settings.fp32_precision == ("bf16" if onednn_is_exact() else "none")


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("terms", [48, 1000])
def test_products_and_gradients_are_those_of_float32(rows, terms) -> None:
    """To the rounding of sums of float32, on whatever processor runs this."""
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, terms, generator=generator, requires_grad=True)
    weights = torch.randn(96, terms, generator=generator, requires_grad=True)
    outputs = torch.randn(rows, 96, generator=generator)
    with fast_products(CPU):
        product = inputs @ weights.T
        product.backward(outputs)
    tolerance = 4e-6 * max(terms, rows, 96) ** 0.5
    for actual, left, right in (
        (product, inputs, weights.T),
        (inputs.grad, outputs, weights),
        (weights.grad, outputs.T, inputs),
    ):
        exact = left.detach().double() @ right.detach().double()
        torch.testing.assert_close(actual.detach().double(), exact, rtol=0, atol=tolerance)


def test_training_steps_run_inside_and_evaluations_outside(exact, tmp_path) -> None:
    """Evaluations have the numbers of any other forward pass of the same weights."""
    seen = {True: set(), False: set()}

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = torch.nn.Linear(3, 1)

        def forward(self, x, labels=None):
            seen[self.training].add(settings.fp32_precision)
            return {"loss": (self.map(x) - labels).square().mean(), "logits": self.map(x)}

    rows = [{"x": torch.ones(3), "labels": torch.ones(1)}] * 4
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        save_strategy="no",
    )
    HybridTrainer(Model(), arguments, train_dataset=rows, eval_dataset=rows).train()
    assert seen == {True: {"bf16"}, False: {"none"}}


def test_what_onednn_keeps_is_bounded_unless_the_environment_says_otherwise(monkeypatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    limit_kept_products()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"


GROWTH = """
import ctypes
import torch
from hf_hybrid.training.cpu_products import _allowed, limit_kept_products
limit_kept_products()
torch.set_num_threads(1)

def memory():
    ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back to the system depends on processor and moment
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

weights = torch.randn(384, 256)
def products(start, stop):
    for rows in range(start, stop):
        torch.randn(rows, 256) @ weights.T
with _allowed():
    products(1000, 1200)
    before = memory()
    products(1200, 2000)
print(memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in cpu_products._CACHES}
    done = subprocess.run([sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 50  # 2 with the bound, 439 to 461 without

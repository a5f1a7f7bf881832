"""Codebooks: assignment, statistics, updates, start, revival, precision, checkpoints, and two processes as one."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_hybrid.modeling.longvq.quantizer import VectorQuantizer, update_quantizers
from hf_hybrid.ops import codebook as codebook_module
from hf_hybrid.ops.codebook import nearest_codes, perplexity

HEADS, SIZE, WIDTH = 2, 8, 4


def quantizer(**settings) -> VectorQuantizer:
    return VectorQuantizer(HEADS, SIZE, WIDTH, **settings).train()


def keys(batch: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randn(batch, HEADS, length, WIDTH)


def step(layer: VectorQuantizer, states: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    layer(states, mask)
    update_quantizers([layer])


def clusters(size: int, number: int, noise: float) -> torch.Tensor:
    """(1, HEADS, number, WIDTH) keys around `size` centres per head, as many around each."""
    centres = torch.nn.functional.normalize(torch.randn(HEADS, size, WIDTH), dim=-1) * 3
    chosen = (torch.arange(number) % size).expand(HEADS, -1)
    states = centres[torch.arange(HEADS)[:, None], chosen]
    return (states + noise * torch.randn_like(states)).unsqueeze(0)


class TestForward:
    def test_nearest_codeword_the_lowest_among_equals(self, monkeypatch) -> None:
        monkeypatch.setattr(codebook_module, "PAIRS_AT_A_TIME", 100)
        states, words = keys().double(), torch.randn(HEADS, SIZE, WIDTH, dtype=torch.float64)
        distances = (states.unsqueeze(3) - words[:, None]).square().sum(-1)
        assert torch.equal(nearest_codes(states, words), distances.argmin(-1))
        words[:, 5] = words[:, 2]
        assert not (nearest_codes(states, words) == 5).any()

    def test_commitment_and_perplexity_of_real_tokens(self) -> None:
        layer, states = quantizer(), keys().requires_grad_()
        mask = torch.rand(3, 20) > 0.4
        found = layer(states, mask)
        nearest = layer.codebook[torch.arange(HEADS)[:, None], found.codes]
        squares = (states - nearest).square()[mask.unsqueeze(1).expand(3, HEADS, 20)]
        torch.testing.assert_close(found.commitment, squares.mean())
        for head in range(HEADS):
            shares = torch.bincount(found.codes[:, head][mask], minlength=SIZE) / mask.sum()
            entropy = -sum(float(share) * float(share.log()) for share in shares if share > 0)
            assert float(found.perplexity[head]) == pytest.approx(torch.tensor(entropy).exp().item(), rel=1e-5)
        found.commitment.backward()
        assert not states.grad[~mask.unsqueeze(1).expand(3, HEADS, 20)].any() and states.grad.any()
        assert perplexity(torch.ones(1, 7)) == pytest.approx(7)
        assert perplexity(torch.tensor([[0.0, 4.0]])) == pytest.approx(1)

    def test_the_forward_pass_changes_no_codebook(self) -> None:
        layer = quantizer()
        before = copy.deepcopy(layer.state_dict())
        for _ in range(3):
            layer(keys())
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def test_only_padding(self) -> None:
        """Finite, without gradient, and no update."""
        layer, states = quantizer(), keys().requires_grad_()
        before = copy.deepcopy(layer.state_dict())
        found = layer(states, torch.zeros(3, 20, dtype=torch.bool))
        assert found.commitment == 0 and found.perplexity.isfinite().all()
        found.commitment.backward()
        assert not states.grad.any()
        update_quantizers([layer])
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_stores_the_same_once(self, use_reentrant: bool) -> None:
        layer, states = quantizer(), keys().requires_grad_()
        torch.manual_seed(5)
        (layer(states).commitment * 1.0).backward()
        expected, gradient = layer.take_pending(), states.grad.clone()
        states.grad = None
        torch.manual_seed(5)
        checkpoint(lambda inputs: layer(inputs).commitment, states, use_reentrant=use_reentrant).backward()
        for found, wanted in zip(layer.take_pending(), expected):
            assert torch.equal(found, wanted)
        assert torch.equal(states.grad, gradient)

    def test_graphs_survive_an_update(self) -> None:
        layer, states = quantizer(), keys().requires_grad_()
        first = layer(states).commitment
        expected = torch.autograd.grad(first, states, retain_graph=True)[0]
        update_quantizers([layer])
        second = layer(states).commitment
        update_quantizers([layer])
        assert torch.equal(torch.autograd.grad(first, states)[0], expected)
        torch.autograd.grad(second, states)

    def test_nothing_is_stored_in_evaluation_or_when_frozen(self) -> None:
        layer = quantizer()
        layer.eval()(keys())
        assert layer.take_pending() is None
        with torch.no_grad():
            layer.train()(keys())
        assert layer.take_pending() is None
        frozen = quantizer(frozen=True)
        before = frozen.codebook.clone()
        for _ in range(3):
            step(frozen, keys())
        assert torch.equal(frozen.codebook, before) and frozen.num_updates == 0


class TestUpdates:
    def test_start_at_keys_of_the_first_batch(self) -> None:
        layer, states = quantizer(), keys()
        mask = torch.rand(3, 20) > 0.3
        step(layer, states, mask)
        for head in range(HEADS):
            rows = states[:, head][mask]
            assert (layer.codebook[head, :, None] == rows).all(-1).any(-1).all()
            assert len(layer.codebook[head].unique(dim=0)) == SIZE
        torch.testing.assert_close(layer.ema_count, torch.full((HEADS, SIZE), float(mask.sum()) / SIZE))
        torch.testing.assert_close(layer.ema_sum, layer.codebook * layer.ema_count.unsqueeze(-1))
        assert layer.num_updates == 1

    def test_more_codewords_than_keys(self) -> None:
        """Keys are used again with a little noise, and a warning names the remedy."""
        layer, states = quantizer(), keys(1, 3)
        step(layer, states)
        for head in range(HEADS):
            distances = (layer.codebook[head, :, None] - states[0, head]).norm(dim=-1).amin(-1)
            assert (distances[:3] == 0).all() and (distances < 0.1).all()
            assert len(layer.codebook[head].unique(dim=0)) == SIZE
        for _ in range(5):
            step(layer, states)
        assert all(buffer.isfinite().all() for buffer in layer.buffers())

    @pytest.mark.parametrize("init", ["data", "kmeans"])
    def test_clusters_are_found(self, init: str) -> None:
        """Relative error below 0.05, and 0.9 of the codewords in use."""
        layer = quantizer(init=init, dead_code_threshold=0.1)
        states = clusters(SIZE, 400, 0.1)
        for _ in range(60):
            step(layer, states)
        found = layer(states)
        error = (states - layer.codebook[torch.arange(HEADS)[:, None], found.codes]).square().sum()
        assert error / states.square().sum() < 0.05
        assert (found.perplexity > 0.9 * SIZE).all()
        report = layer.report()
        assert report["relative_error"] < 0.05 and report["active_fraction"] == 1 and report["num_updates"] == 60

    def test_kmeans_starts_nearer_than_keys(self) -> None:
        torch.manual_seed(1)
        states = clusters(SIZE, 400, 0.3)
        errors = {}
        for init in ("data", "kmeans"):
            layer = quantizer(init=init)
            torch.manual_seed(2)
            step(layer, states)
            errors[init] = float(layer(states).commitment)
        assert errors["kmeans"] < errors["data"]

    def test_a_lost_codeword_is_revived_within_the_patience(self) -> None:
        layer = quantizer(init="random", decay_warmup=False)
        states = keys(4, 100)
        step(layer, states)
        with torch.no_grad():
            layer.codebook[:, 3] = 100.0
            layer.ema_sum[:, 3] = 100.0 * layer.ema_count[:, 3, None]
        steps = 0
        while steps < 700 and (layer.codebook[:, 3].abs() > 50).any():
            step(layer, states)
            steps += 1
        assert 100 < steps < 600
        assert layer.report()["revived"] >= HEADS
        torch.testing.assert_close(layer.ema_sum, layer.codebook * layer.ema_count.unsqueeze(-1), rtol=1e-4, atol=1e-4)
        step(layer, states)
        assert (layer.codebook[:, 3].abs() < 50).all(), "the old sum may not come back"
        assert layer.report()["revived"] == 0 or (layer.codebook.abs() < 50).all()

    def test_no_revival_without_threshold(self) -> None:
        layer = quantizer(init="random", dead_code_threshold=0.0)
        with torch.no_grad():
            layer.codebook[:, 3] = layer.ema_sum[:, 3] = 100.0
        for _ in range(30):
            step(layer, keys())
        assert (layer.codebook[:, 3] > 50).all()

    def test_two_calls_of_a_step_count_together(self) -> None:
        """The texts of a pair: their statistics are those of one batch."""
        states = keys(4)
        together = quantizer(init="random", dead_code_threshold=0.0)
        apart = copy.deepcopy(together)
        step(together, states)
        apart(states[:1], slot=0)
        apart(states[1:], slot=1)
        update_quantizers([apart])
        torch.testing.assert_close(apart.codebook, together.codebook)
        assert apart.num_updates == 1


class TestPrecision:
    def test_casts_leave_float32(self) -> None:
        layer = quantizer()
        expected = copy.deepcopy(layer.state_dict())
        for cast in (layer.half(), layer.bfloat16(), layer.to(torch.bfloat16)):
            for name, buffer in cast.state_dict().items():
                assert torch.equal(buffer, expected[name]) and buffer.dtype == expected[name].dtype
        found = layer(keys().bfloat16())
        assert found.commitment.dtype == found.words.dtype == torch.float32
        assert layer.double().codebook.dtype == torch.float64

    def test_made_under_a_half_precision_default(self) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert quantizer().codebook.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)

    def test_loaded_codebooks_do_not_start_again(self) -> None:
        layer = quantizer()
        step(layer, keys())
        other = quantizer()
        assert not other.has_started()
        other.load_state_dict(layer.state_dict())
        before = other.codebook.clone()
        step(other, keys(1, 4))
        assert other.num_updates == 2
        assert (other.codebook - before).abs().mean() < 0.5 * before.abs().mean()


def test_unknown_start() -> None:
    with pytest.raises(ValueError, match="`init` must be one of data, kmeans, random; got 'zeros'"):
        quantizer(init="zeros")


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from hf_hybrid.modeling.longvq.quantizer import VectorQuantizer, update_quantizers
folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
for kind in ("plain", "data"):
    torch.manual_seed(0)
    settings = dict(init="random", dead_code_threshold=0.0) if kind == "plain" else dict(init=kind, dead_code_threshold=0.5)
    layers = [VectorQuantizer(2, 8, 4, **settings).train() for _ in range(2)]
    torch.manual_seed(rank)
    for batch in torch.load(f"{folder}/keys.pt"):
        for layer in layers:
            layer(batch[rank::2])
        update_quantizers(layers)
    torch.save([layer.state_dict() for layer in layers], f"{folder}/{kind}{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_end_alike(tmp_path: Path) -> None:
    """Both have the same codebooks; without revival, those of one process with the whole batch."""
    batches = [keys(4, 30) for _ in range(5)]
    torch.save(batches, tmp_path / "keys.pt")
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for kind in ("plain", "data"):
        first, second = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in range(2))
        for ours, theirs in zip(first, second):
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), kind
    first = torch.load(tmp_path / "plain0.pt")
    torch.manual_seed(0)
    layers = [quantizer(init="random", dead_code_threshold=0.0) for _ in range(2)]
    for batch in batches:
        for layer in layers:
            layer(batch)
        update_quantizers(layers)
    for layer, found in zip(layers, first):
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)

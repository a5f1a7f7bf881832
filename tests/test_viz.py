"""Pictures: what is drawn is right, and a file appears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import initialization as init

from hf_hybrid.layers.ema import MultiDimensionalDampedEma
from hf_hybrid.layers.ssm import StateSpaceLayer
from hf_hybrid.modeling.bst.context_filters import DiagonalFilters, DplrFilters, ExplicitFilters
from hf_hybrid.modeling.longvq.s4d import ActivatedS4D
from hf_hybrid.viz import effective_memory, plot_loss_curves, plot_state_space_channels, time_constants

PNG = b"\x89PNG\r\n"


def test_effective_memory_of_known_kernels() -> None:
    kernel = torch.zeros(4, 10)
    kernel[0, 0] = 1.0  # all at lag 0
    kernel[1, 7] = -2.0  # all at lag 7
    kernel[2] = 1.0  # evenly over ten lags
    assert effective_memory(kernel, 0.95).tolist() == [1, 8, 10, 0]
    assert effective_memory(kernel, 0.5).tolist() == [1, 8, 5, 0]


def test_effective_memory_of_an_exponential_decay() -> None:
    decay = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    kernel = decay.unsqueeze(-1) ** torch.arange(5000)
    expected = (torch.tensor(0.05).log() / (2 * decay.log())).ceil().long()  # 1 - d^(2m) >= 0.95
    assert torch.equal(effective_memory(kernel), expected)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_effective_memory_refuses_other_shares(share: float) -> None:
    with pytest.raises(ValueError, match="`share` must lie"):
        effective_memory(torch.ones(3), share)


@pytest.mark.parametrize("ssm_type", ["s4d", "s4"])
def test_time_constants_follow_the_step_size(ssm_type: str) -> None:
    layer = StateSpaceLayer(3, 8, ssm_type=ssm_type)
    with torch.no_grad():
        layer.log_dt.fill_(-7.0)
    slow = time_constants(layer)
    with torch.no_grad():
        layer.log_dt.fill_(-6.0)
    fast = time_constants(layer)
    assert slow.shape == (3, 4 if ssm_type == "s4d" else 8)
    assert (slow > 0).all()
    # Small steps: the decay per token is proportional to the step (eigenvalues may come in another order).
    torch.testing.assert_close(
        slow.sort().values / fast.sort().values, torch.full_like(slow, torch.e), rtol=2e-2, atol=0
    )


def test_time_constant_of_a_known_decay() -> None:
    layer = StateSpaceLayer(2, 4)
    with torch.no_grad():
        layer.log_dt.fill_(0.0)
        layer.inv_w_real.fill_(-3.0)  # rate exp(-3) per token
    torch.testing.assert_close(time_constants(layer).float(), torch.full((2, 2), torch.e**3))


@pytest.mark.parametrize("ssm_type", ["s4d", "s4"])
def test_picture_of_state_space_channels(tmp_path: Path, ssm_type: str) -> None:
    layers = {
        name: StateSpaceLayer(8, 4, ssm_type=ssm_type, bidirectional=True, max_length=64)
        for name in ("new", "trained")
    }
    path = plot_state_space_channels(layers, tmp_path / "pictures" / "ssm.png", length=64)
    assert path.read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="1 to 4 layers"):
        plot_state_space_channels({}, tmp_path / "none.png")


def test_layers_of_every_architecture(tmp_path: Path) -> None:
    """Filters of context states, moving averages, state spaces with an activation; explicit filters have no states."""
    layers = {
        "s4d": DiagonalFilters(4, 3, 6),
        "s4": DplrFilters(4, 3, 6),
        "average": MultiDimensionalDampedEma(4, 5),
        "activated": ActivatedS4D(4, 6),
    }
    layers["s4d"].initialize(init)
    assert [tuple(time_constants(layer).shape) for layer in layers.values()] == [(4, 3), (4, 6), (4, 5), (4, 3)]
    explicit = ExplicitFilters(4, 2, 20, feature_size=4)
    explicit.initialize(init)
    assert explicit.kernel(30).shape == (2, 4, 30) and not explicit.kernel(30)[..., 20:].any()
    assert plot_state_space_channels(layers, tmp_path / "all.png", length=64).read_bytes().startswith(PNG)
    assert plot_state_space_channels({"explicit": explicit}, tmp_path / "one.png", length=64).is_file()
    with pytest.raises(ValueError, match=r"ExplicitFilters has no states.*effective_memory"):
        time_constants(explicit)


def test_time_constants_of_context_filters() -> None:
    filters = DiagonalFilters(2, 3, 4)
    filters.initialize(init)
    with torch.no_grad():
        filters.log_dt.fill_(0.0)
        filters.log_A_real.fill_(-4.0)  # rate exp(-4) per token
    torch.testing.assert_close(time_constants(filters).float(), torch.full((2, 2), torch.e**4))


def test_loss_curves_with_a_reference_line(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}]
    path = plot_loss_curves(history, tmp_path / "loss.png", reference_lines={"entropy": 2.7}, title="run")
    assert path is not None and path.read_bytes().startswith(PNG)
    assert plot_loss_curves([{"step": 1, "accuracy": 0.5}], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()

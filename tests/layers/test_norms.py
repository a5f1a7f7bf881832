"""Mega's sequence norms against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel

from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.layers.norms import sequence_norm

B, L, D, EPS = 3, 7, 5, 1e-5


def by_hand(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if kind == "scalenorm":
        return weight[:1] * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    if kind == "rmsnorm":
        return weight * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    over = -1 if kind == "layernorm" else (0, 1)
    centred = x - x.mean(over, keepdim=True)
    return weight * centred / (centred.square().mean(over, keepdim=True) + EPS).sqrt() + bias


NAMES = {
    "layernorm": {"norm.weight", "norm.bias"},
    "scalenorm": {"norm.scalar"},
    "rmsnorm": {"norm.weight"},
    "batchnorm": {"norm.weight", "norm.bias"},
    "syncbatchnorm": {"norm.weight", "norm.bias"},
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("affine", [True, False])
def test_follows_its_formula(kind, affine):
    norm = sequence_norm(kind, D, affine).double()
    assert {name for name, _ in norm.named_parameters()} == (NAMES[kind] if affine else set())
    weight, bias = torch.ones(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    if affine:
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        weight = norm.norm.scalar if kind == "scalenorm" else norm.norm.weight
        bias = getattr(norm.norm, "bias", None)
    x = 1e-2 * torch.randn(B, L, D, dtype=torch.float64)  # small, so that eps counts
    torch.testing.assert_close(norm(x), by_hand(kind, x, weight, bias))


@pytest.mark.parametrize("kind", ["batchnorm", "syncbatchnorm"])
def test_batch_norms_keep_running_statistics(kind):
    norm = sequence_norm(kind, D)
    x = 3 + 2 * torch.randn(B, L, D)
    norm(x)
    torch.testing.assert_close(norm.norm.running_mean, 0.1 * x.mean((0, 1)))
    torch.testing.assert_close(norm.norm.running_var, 0.9 + 0.1 * x.flatten(0, 1).var(0))
    assert norm.norm.num_batches_tracked == 1
    mean, variance = norm.norm.running_mean.clone(), norm.norm.running_var.clone()
    torch.testing.assert_close(norm.eval()(x), (x - mean) / (variance + EPS).sqrt())
    assert torch.equal(norm.norm.running_mean, mean)


def test_legacy_rms_norm_only_scales():
    norm = sequence_norm("rmsnorm", D, rms_norm_legacy=True)
    nn.init.normal_(norm.norm.weight)
    x = torch.randn(B, L, D)
    assert torch.equal(norm(x), x * norm.norm.weight)
    assert torch.equal(sequence_norm("rmsnorm", D, affine=False, rms_norm_legacy=True)(x), x)
    assert sequence_norm("layernorm", D, rms_norm_legacy=True).state_dict().keys() == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("kind", NAMES)
def test_half_precision_follows_float32(kind):
    norm = sequence_norm(kind, 64)
    x = 5 * torch.randn(B, L, 64)
    expected = norm(x)
    actual = norm.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2)


def test_unknown_kind():
    with pytest.raises(ValueError, match="scalenorm"):
        sequence_norm("groupnorm", D)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("config_class", [MegaConfig, SeqBoatConfig])
def test_models_are_built_with_any_norm(config_class, kind, affine, tmp_path):
    """Also loaded, where every tensor that a file lacks is initialised."""
    options = {"normalization_type": kind} if config_class is MegaConfig else {"norm_type": kind}
    config = config_class(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, intermediate_size=8, final_norm_affine=affine, **options
    )
    model = AutoModel.from_config(config)
    model.train()(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name

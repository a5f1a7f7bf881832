"""The feed-forward layer against its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_hybrid.layers.norms import build_norm
from hf_hybrid.modeling.spade.feed_forward import FeedForward

PLAIN = {"relu": F.relu, "gelu": F.gelu}
GATED = {"gated-gelu": lambda x: F.gelu(x, approximate="tanh"), "gated-silu": F.silu}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [*PLAIN, *GATED])
def test_formula(kind: str, bias: bool) -> None:
    layer, inputs = FeedForward(6, 10, kind=kind, bias=bias), torch.randn(2, 3, 6)
    assert all((module.bias is not None) == bias for module in layer.modules() if isinstance(module, nn.Linear))
    if kind in PLAIN:
        inner = PLAIN[kind](layer.wi(inputs))
    else:
        inner = GATED[kind](layer.wi_0(inputs)) * layer.wi_1(inputs)
    torch.testing.assert_close(layer(inputs), layer.wo(inner))


def test_inner_norm_stands_behind_the_activation() -> None:
    layer = FeedForward(6, 10, kind="relu", inner_norm=build_norm("layernorm", 10, 1e-5))
    inputs = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(inputs), layer.wo(F.layer_norm(F.relu(layer.wi(inputs)), (10,), eps=1e-5)))


def test_dropout_acts_in_training_only() -> None:
    layer, inputs = FeedForward(6, 64, dropout=0.5), torch.randn(2, 3, 6)
    assert not torch.equal(layer(inputs), layer(inputs))
    layer.eval()
    assert torch.equal(layer(inputs), layer(inputs))


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="`kind` must be one of .*'relu'.*got 'swish'"):
        FeedForward(4, 4, kind="swish")


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
def test_norms_by_name(name: str) -> None:
    inputs = 3 * torch.randn(2, 5, 8) + 1
    centred = inputs - inputs.mean(-1, keepdim=True) if name == "layernorm" else inputs
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(build_norm(name, 8, 1e-3)(inputs), expected)


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match="`norm_type`.*got 'batch'"):
        build_norm("batch", 8, 1e-3)

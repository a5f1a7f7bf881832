"""The local attention layer against dense attention written out, and its calls in pieces against one call."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_hybrid.layers.norms import build_norm
from hf_hybrid.modeling.spade.local_self_attention import LocalSelfAttention
from hf_hybrid.modeling.spade.spade_cache import SlidingRecurrentLayer
from hf_hybrid.ops.relative_position import apply_rotary, relative_position_bucket, rotary_cos_sin

WIDTH, HEADS, LENGTH = 12, 3, 17


def build(**kwargs) -> LocalSelfAttention:
    layer = LocalSelfAttention(
        WIDTH, HEADS, kwargs.pop("window", 4), num_buckets=8, max_distance=10, **kwargs
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * WIDTH**-0.5)
    return layer.eval()


def dense(layer: LocalSelfAttention, hidden: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The layer written with an L x L matrix."""
    batch, length, _ = hidden.shape

    def heads(projection: nn.Linear) -> torch.Tensor:
        return projection(hidden).view(batch, length, HEADS, -1).transpose(1, 2)

    query, key, value = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    places = torch.arange(length)
    if layer.position_encoding == "rotary":
        cos, sin = rotary_cos_sin(places.unsqueeze(0), layer.head_dim, layer.rotary_base)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    offset = places - places.unsqueeze(1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(layer.head_dim)
    if layer.position_encoding == "bias":
        bucket = relative_position_bucket(
            offset, bidirectional=not layer.is_causal, num_buckets=layer.num_buckets, max_distance=layer.max_distance
        )
        scores = scores + layer.relative_attention_bias.weight[bucket].permute(2, 0, 1)
    if layer.attention_type == "window":
        visible = offset.abs() < layer.window
    else:
        visible = places // layer.window == (places // layer.window).unsqueeze(1)
    if layer.is_causal:
        visible = visible & (offset <= 0)
    visible = visible.expand(batch, 1, length, length)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    return layer.o_proj((weights @ value).transpose(1, 2).reshape(batch, length, WIDTH))


ALL_KINDS = [
    (kind, causal, encoding)
    for kind in ("window", "chunk")
    for causal in (False, True)
    for encoding in ("bias", "rotary", "none")
]


@pytest.mark.parametrize(("kind", "causal", "encoding"), ALL_KINDS)
def test_against_dense_attention(kind: str, causal: bool, encoding: str) -> None:
    layer = build(attention_type=kind, is_causal=causal, position_encoding=encoding)
    hidden = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    positions = torch.arange(LENGTH).unsqueeze(0)
    torch.testing.assert_close(layer(hidden, positions=positions), dense(layer, hidden))
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, 11:] = False
    actual = layer(hidden, key_mask=mask, positions=positions)
    torch.testing.assert_close(actual[mask], dense(layer, hidden, mask)[mask])


@pytest.mark.parametrize(("kind", "causal", "encoding"), [case for case in ALL_KINDS if case[1]])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("cuts", [[1, 2, 3], [5, 6, 13], [16]])
def test_pieces_with_a_cache_equal_one_call(
    kind: str, causal: bool, encoding: str, window: int, cuts: list[int]
) -> None:
    layer = build(attention_type=kind, is_causal=True, position_encoding=encoding, window=window)
    hidden = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    expected = layer(hidden, positions=torch.arange(LENGTH).unsqueeze(0))
    state = SlidingRecurrentLayer({"window_size": layer.reach + 1})
    parts = []
    for start, end in zip([0, *cuts], [*cuts, LENGTH]):
        seen = 0 if state.keys is None else state.keys.shape[2]
        positions = torch.arange(start - seen, end).unsqueeze(0)
        parts.append(layer(hidden[:, start:end], positions=positions, cache_layer=state))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_bias_of_another_layer() -> None:
    owner, borrower = build(), build(has_bias_table=False)
    assert not hasattr(borrower, "relative_attention_bias") and borrower.bias_vector() is None
    hidden = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    without = borrower(hidden)
    borrowed = borrower(hidden, bias=owner.bias_vector())
    assert (without - borrowed).abs().max() > 1e-3
    borrower.load_state_dict({k: v for k, v in owner.state_dict().items() if "bias" not in k})
    torch.testing.assert_close(borrower(hidden, bias=owner.bias_vector()), owner(hidden))


def test_a_given_bias_takes_the_place_of_the_own_table() -> None:
    layer, hidden = build(), torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    given = torch.randn(HEADS, 2 * layer.reach + 1, dtype=torch.float64)
    assert (layer(hidden, bias=given) - layer(hidden)).abs().max() > 1e-3
    torch.testing.assert_close(layer(hidden, bias=layer.bias_vector()), layer(hidden))


def test_normformer_options() -> None:
    plain = build(is_causal=True)
    hidden = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    norm = build_norm("layernorm", WIDTH, 1e-5).double()
    layer = build(is_causal=True, scale_heads=True, output_norm=norm)
    layer.load_state_dict(plain.state_dict() | {"head_scale": torch.tensor([1.0, 2.0, -3.0])}, strict=False)
    scaled = plain(hidden) * torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64).repeat_interleave(WIDTH // HEADS)
    torch.testing.assert_close(layer(hidden), norm(scaled))


def test_dropout_in_training_only() -> None:
    layer, hidden = build(dropout=0.5), torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(hidden), dense(layer, hidden))
    layer.train()
    assert not torch.equal(layer(hidden), layer(hidden))


@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_a_long_text_makes_no_square_matrix(kind: str) -> None:
    """65,536 tokens: a single matrix of all pairs would need 4 GiB of booleans."""
    layer = build(attention_type=kind, window=8).float()
    with torch.no_grad():
        outputs = layer(torch.randn(1, 65536, WIDTH), positions=torch.arange(65536).unsqueeze(0))
    assert outputs.isfinite().all()

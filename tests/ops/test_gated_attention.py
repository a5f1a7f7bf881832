"""Gated attention against its definition: activations, chunks, padding on both sides, caches, sources, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.ops import gated_scores as engine
from hf_hybrid.ops.branches import uses_cpu_form
from hf_hybrid.ops.gated_attention import (
    ACTIVATIONS,
    cached_gated_attention,
    gated_attention,
    gated_attention_reference,
    gated_attention_weights,
    gated_cross_attention,
    gated_cross_attention_reference,
    gated_cross_attention_weights,
)

pytestmark = pytest.mark.both_branches

Z, E = 4, 5
PADDINGS = ["none", "left", "right", "inside", "full"]


def states(batch: int, length: int, dtype: torch.dtype = torch.float64, sources: int | None = None):
    """Query, key and value."""
    sizes = ((length, Z), (sources or length, Z), (sources or length, E))
    return [torch.randn(batch, *size, dtype=dtype).requires_grad_() for size in sizes]


def vector(entries: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(entries, dtype=dtype, requires_grad=True)


def padding_mask(kind: str, batch: int, length: int) -> torch.Tensor | None:
    """(B, L), True = token; the last row of "full" holds nothing but padding."""
    index = torch.arange(length)
    if kind == "none":
        return None
    if kind in ("left", "right"):
        amounts = torch.randint(0, length, (batch, 1))
        return index >= amounts if kind == "left" else index < length - amounts
    mask = torch.rand(batch, length) > 0.4
    if kind == "full":
        mask[-1] = False
    return mask


def assert_same_with_gradients(actual, expected, inputs, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(actual)
    pairs = zip(*(torch.autograd.grad(outputs, inputs, weight, retain_graph=True) for outputs in (actual, expected)))
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["one part", "many parts"])
def parts(request, monkeypatch) -> None:
    """With small parts, tiny inputs take the ways of long ones."""
    if request.param == "many parts":
        monkeypatch.setattr(engine, "PAIRS_AT_A_TIME", 200)
        monkeypatch.setattr(engine, "CAUSAL_ROWS", 5)


def weights_by_hand(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, mask: list[bool], activation: str, causal: bool
) -> torch.Tensor:
    """Weights of one chunk, in Python numbers."""
    length, middle = len(query), len(bias) // 2
    weights = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        scores = {}
        for j in range(i + 1 if causal else length):
            if not mask[j] and (activation != "softmax" or any(mask)):
                continue
            product = float(query[i] @ key[j])
            product /= math.sqrt(Z) if activation == "softmax" else i + 1 if causal else max(1, sum(mask))
            scores[j] = product + float(bias[middle + j - i])
        total = sum(math.exp(score) for score in scores.values())
        for j, score in scores.items():
            if activation == "softmax":
                weights[i, j] = math.exp(score) / total
            elif activation == "relu2":
                weights[i, j] = max(score, 0) ** 2
            elif mask[j]:
                weights[i, j] = 0.5 * (1 + math.erf((score - 0.707107) / (0.282095 * math.sqrt(2))))
    return weights


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6])
def test_follows_the_definition(activation, causal, mask):
    mask = [bool(entry) for entry in mask]
    query, key, value = (tensor.detach() for tensor in states(1, 6))
    bias = vector(11).detach()
    weights = weights_by_hand(query[0], key[0], bias, mask, activation, causal)
    options = {"activation": activation, "bias": bias, "causal": causal, "key_mask": torch.tensor(mask)[None]}
    for attend in (gated_attention, gated_attention_reference):
        torch.testing.assert_close(attend(query, key, value, **options)[0], weights @ value[0])
    torch.testing.assert_close(gated_attention_weights(query, key, **options)[0, 0], weights)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_equals_the_dense_form(parts, activation, causal, padding):
    for length, chunk_size in ((1, None), (41, None), (1, 6), (5, 6), (6, 6), (7, 6), (37, 6), (41, 30)):
        query, key, value = states(2, length)
        bias = vector(2 * (chunk_size or length) - 1)
        options = {"activation": activation, "bias": bias, "chunk_size": chunk_size, "causal": causal}
        options["key_mask"] = padding_mask(padding, 2, length)
        assert_same_with_gradients(
            gated_attention(query, key, value, **options),
            gated_attention_reference(query, key, value, **options),
            (query, key, value, bias),
        )


@given(
    length=st.integers(1, 150),
    chunk_size=st.one_of(st.none(), st.integers(1, 60)),
    batch=st.integers(1, 3),
    activation=st.sampled_from(ACTIVATIONS),
    causal=st.booleans(),
    with_bias=st.booleans(),
    padding=st.sampled_from(PADDINGS),
)
def test_equals_the_dense_form_anywhere(length, chunk_size, batch, activation, causal, with_bias, padding):
    query, key, value = states(batch, length, torch.float32)
    bias = vector(2 * max(length, chunk_size or 1) + 5, torch.float32) if with_bias else None
    options = {"activation": activation, "bias": bias, "chunk_size": chunk_size, "causal": causal}
    options["key_mask"] = padding_mask(padding, batch, length)
    assert_same_with_gradients(
        gated_attention(query, key, value, **options),
        gated_attention_reference(query, key, value, **options),
        (query, key, value, bias) if with_bias else (query, key, value),
        tolerance=2e-4 if activation == "relu2" else 2e-5,  # squares of sums of up to 150 terms in float32
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 8, 100])
@pytest.mark.parametrize("padding", [1, 5, 8, 21])
def test_padding_on_either_side_changes_nothing(activation, causal, chunk_size, padding):
    length = 37
    query, key, value = states(1, length)
    options = {"activation": activation, "chunk_size": chunk_size, "causal": causal, "bias": vector(199)}
    expected = gated_attention(query, key, value, **options)
    filler = [torch.full((1, padding, tensor.shape[-1]), 1e3, dtype=tensor.dtype) for tensor in (query, key, value)]
    token = torch.ones(1, length, dtype=torch.bool)
    index = torch.arange(length + padding)[None]

    left = [torch.cat([pad, real], dim=1) for pad, real in zip(filler, (query, key, value))]
    mask, positions = torch.cat([~token[:, :1].expand(1, padding), token], dim=1), index - padding
    for attend in (gated_attention, gated_attention_reference):
        actual = attend(*left, **options, key_mask=mask, positions=positions)
        assert actual.isfinite().all()
        assert_same_with_gradients(actual[:, padding:], expected, (query, key, value, options["bias"]))

    right = [torch.cat([real, pad], dim=1) for pad, real in zip(filler, (query, key, value))]
    mask = torch.cat([token, ~token[:, :1].expand(1, padding)], dim=1)
    for positions in (None, index):
        actual = gated_attention(*right, **options, key_mask=mask, positions=positions)
        assert actual.isfinite().all()
        assert_same_with_gradients(actual[:, :length], expected, (query, key, value, options["bias"]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("chunk_size", [None, 12])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("piece", [1, 2, 9, 24, 64])
def test_pieces_with_cached_keys_equal_one_pass(parts, activation, chunk_size, padding, piece):
    length = 64
    query, key, value = states(2, length)
    mask = positions = None
    if padding == "left":
        amounts = torch.tensor([[0], [17]])
        positions = torch.arange(length) - amounts
        mask = positions >= 0
    options = {"activation": activation, "chunk_size": chunk_size, "bias": vector(2 * (chunk_size or length) - 1)}
    expected = gated_attention(query, key, value, **options, causal=True, key_mask=mask, positions=positions)
    for start in range(0, length, piece):
        stop = min(start + piece, length)
        first = 0
        if chunk_size is not None:  # what a cache of bounded size holds
            first = start // chunk_size * chunk_size if positions is None else max(0, start - chunk_size + 1)
        actual = cached_gated_attention(
            query[:, start:stop],
            key[:, first:stop],
            value[:, first:stop],
            **options,
            key_mask=None if mask is None else mask[:, first:stop],
            positions=None if positions is None else positions[:, first:stop],
        )
        assert actual.isfinite().all()
        for row in range(2):
            tokens = slice(0, None) if mask is None else mask[row, start:stop]
            torch.testing.assert_close(actual[row, tokens], expected[row, start:stop][tokens], rtol=1e-10, atol=1e-10)


def test_keys_of_earlier_chunks_in_the_cache_are_not_seen():
    query, key, value = states(1, 30, torch.float32)
    positions = torch.arange(30)[None]
    options = {"activation": "softmax", "chunk_size": 8}
    expected = gated_attention(query, key, value, **options, causal=True)
    actual = cached_gated_attention(query[:, -1:], key, value, **options, positions=positions)
    torch.testing.assert_close(actual, expected[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_row", [False, True])
@given(
    targets=st.integers(1, 70),
    sources=st.integers(1, 70),
    padding=st.sampled_from(["none", "left", "right", "inside"]),
)
def test_cross_attention_equals_its_definition(activation, per_row, targets, sources, padding):
    query, key, value = states(2, targets, sources=sources)
    bias = torch.randn(2, targets + sources - 1, dtype=torch.float64)
    bias = (bias if per_row else bias[0]).requires_grad_()
    options = {"activation": activation, "bias": bias, "key_mask": padding_mask(padding, 2, sources)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PAIRS_AT_A_TIME", 300)
        assert_same_with_gradients(
            gated_cross_attention(query, key, value, **options),
            gated_cross_attention_reference(query, key, value, **options),
            (query, key, value, bias),
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_source_rows_give_zeros(activation):
    query, key, value = states(2, 7, torch.float32, sources=9)
    bias = vector(15, torch.float32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    outputs = gated_cross_attention(query, key, value, activation=activation, bias=bias, key_mask=mask)
    assert torch.equal(outputs[1], torch.zeros_like(outputs[1]))
    for gradient in torch.autograd.grad(outputs.square().sum(), (query, key, value, bias)):
        assert gradient.isfinite().all()


def test_source_padding_changes_nothing():
    query, key, value = states(1, 6, sources=11)
    bias = vector(16)
    expected = gated_cross_attention(query, key, value, activation="laplace", bias=bias)
    for left in (0, 4):  # at the left, the caller shifts the bias along
        pads = (left, 4 - left)
        padded = [torch.nn.functional.pad(tensor, (0, 0, *pads), value=1e3) for tensor in (key, value)]
        mask = torch.nn.functional.pad(torch.ones(1, 11, dtype=torch.bool), pads)
        shifted = torch.nn.functional.pad(bias, pads)[None]
        actual = gated_cross_attention(query, *padded, activation="laplace", bias=shifted, key_mask=mask)
        assert_same_with_gradients(actual, expected, (query, key, value, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_those_of_the_outputs(activation, causal):
    length, chunk_size = 21, 8
    query, key, value = states(2, length)
    mask = padding_mask("inside", 2, length)
    options = {"activation": activation, "bias": vector(15), "chunk_size": chunk_size, "causal": causal}
    weights = gated_attention_weights(query, key, **options, key_mask=mask)
    assert weights.shape == (2, 3, chunk_size, chunk_size)
    values = torch.nn.functional.pad(value, (0, 0, 0, 3)).unflatten(1, (3, chunk_size))
    outputs = (weights @ values).flatten(1, 2)[:, :length]
    torch.testing.assert_close(outputs, gated_attention(query, key, value, **options, key_mask=mask))
    hidden = torch.nn.functional.pad(~mask, (0, 3), value=True).view(2, 3, 1, chunk_size)
    whole = gated_attention_weights(query, key, **options)
    assert not whole[:, -1, 5:].any() and not whole[:, -1, :, 5:].any()
    assert not weights.masked_select(hidden & ~hidden.all(-1, keepdim=True)).any()
    if causal:
        assert not weights.triu(1).any()
    if activation == "softmax":
        torch.testing.assert_close(whole[:, :2].sum(-1), torch.ones_like(whole[:, :2, 0]))
    else:
        assert (weights >= 0).all()
    cross = gated_cross_attention_weights(query, key[:, :9], activation=activation, key_mask=mask[:, :9])
    expected = gated_cross_attention(query, key[:, :9], value[:, :9], activation=activation, key_mask=mask[:, :9])
    torch.testing.assert_close(cross @ value[:, :9], expected)


def test_laplace_is_a_half_at_its_mean():
    scores = torch.tensor([[[0.707107, -3.0, 4.0]]], dtype=torch.float64)
    weights = gated_cross_attention_weights(
        scores.new_ones(1, 1, 1), 3 * scores.mT, activation="laplace", key_mask=torch.ones(1, 3, dtype=torch.bool)
    )
    assert weights[0, 0, 0] == pytest.approx(0.5, abs=1e-12)
    assert 0 <= weights[0, 0, 1] < 1e-6 and 1 - 1e-6 < weights[0, 0, 2] <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_of_padding_are_finite_and_rows_without_keys_are_zero(activation, causal):
    query, key, value = states(1, 24, torch.float32)
    mask = torch.ones(1, 24, dtype=torch.bool)
    mask[:, :10] = False  # the first chunk, and the beginning of the second
    options = {"activation": activation, "chunk_size": 8, "causal": causal, "key_mask": mask}
    outputs = gated_attention(query, key, value, **options)
    if activation == "softmax":  # as if there were no mask
        expected = gated_attention(query, key, value, activation=activation, chunk_size=8, causal=causal)[:, :8]
        torch.testing.assert_close(outputs[:, :8], expected)
    else:
        assert not outputs[:, :8].any()
    assert outputs[:, 8:10].any() != causal
    for gradient in torch.autograd.grad(outputs.square().sum(), (query, key, value)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_receptive_field_is_exact(activation, causal):
    """A changed key and value moves the queries of its chunk (causal: not those before), the others not by a bit."""
    query, key, value = states(1, 100, torch.float32)
    options = {"activation": activation, "chunk_size": 16, "causal": causal, "bias": torch.ones(31)}
    before = gated_attention(query, key, value, **options)
    key, value = key.detach().clone(), value.detach().clone()
    key[:, 37] += 1
    value[:, 37] += 1
    after = gated_attention(query, key, value, **options)
    moved = (after != before).any(-1)[0].nonzero().flatten().tolist()
    assert moved == list(range(37 if causal else 32, 48))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("form", ["causal chunks", "whole", "source", "source per row"])
def test_gradcheck(monkeypatch, activation, dropout_p, form):
    monkeypatch.setattr(engine, "PAIRS_AT_A_TIME", 200)
    query, key, value = states(2, 30, sources=40 if "source" in form else None)
    entries = {"causal chunks": (17,), "whole": (59,), "source": (69,), "source per row": (2, 69)}[form]
    bias = torch.randn(entries, dtype=torch.float64, requires_grad=True)
    options = {"activation": activation, "key_mask": padding_mask("full", 2, key.shape[1]), "dropout_p": dropout_p}
    if form == "causal chunks":
        options |= {"chunk_size": 9, "causal": True}

    def attend(query, key, value, bias):
        torch.manual_seed(1)  # the same dropout in every evaluation
        function = gated_cross_attention if "source" in form else gated_attention
        return function(query, key, value, bias=bias, **options)

    assert torch.autograd.gradcheck(attend, (query, key, value, bias), fast_mode=True)


def test_dropout_keeps_the_mean_and_drops_the_stated_part():
    query, key, _ = states(1, 100, torch.float32)
    value = torch.eye(100)[None]
    options = {"activation": "laplace", "bias": torch.ones(199)}
    weights = gated_attention(query, key, value, **options)
    dropped = torch.stack([gated_attention(query, key, value, **options, dropout_p=0.3) for _ in range(20)])
    ratio = dropped / weights
    assert ((ratio == 0) | ((ratio - 1 / 0.7).abs() < 1e-4)).all()
    assert (ratio == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(activation, dtype):
    query, key, value = (t.detach().to(dtype).requires_grad_() for t in states(2, 140, torch.float32))
    bias = vector(127, torch.float32)
    options = {"activation": activation, "bias": bias, "chunk_size": 64, "key_mask": padding_mask("full", 2, 140)}
    actual = gated_attention(query, key, value, **options)
    assert actual.dtype == dtype
    expected = gated_attention_reference(query.float(), key.float(), value.float(), **options)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad(actual.float().sum(), (query, key, value, bias))
    assert [g.dtype for g in gradients] == [dtype, dtype, dtype, torch.float32]
    assert all(g.isfinite().all() for g in gradients)


def test_autocast_does_not_lower_the_precision_inside():
    query, key, value = states(1, 100, torch.float32)
    expected = gated_attention(query, key, value, activation="laplace", chunk_size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gated_attention(query, key, value, activation="laplace", chunk_size=32)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [3000, 9000])
def test_few_scores_exist_at_one_time(monkeypatch, length, causal):
    made = []
    original = engine._Parts._weights

    def spy(self, part, *arguments):
        made.append((part.rows.stop - part.rows.start) * (part.keys.stop - part.keys.start))
        return original(self, part, *arguments)

    monkeypatch.setattr(engine._Parts, "_weights", spy)
    query, key = torch.randn(2, 1, length, 1)
    gated_attention(query, key, key, activation="relu2", causal=causal)
    on_cpu = uses_cpu_form(query)
    assert max(made) <= (engine.PAIRS_AT_A_TIME if on_cpu else engine.ACCELERATOR_PAIRS_AT_A_TIME)
    share = (
        0.6 if on_cpu else 0.625
    )  # n pieces of causal scores are (n + 1) / 2n of all; accelerators have four at least
    assert sum(made) <= length**2 * (share if causal else 1)


def test_compiles_in_one_graph_forward_and_backward():
    query, key, value = states(2, 70, torch.float32)
    bias = vector(139, torch.float32)
    mask = padding_mask("left", 2, 70)
    positions = torch.arange(70) - (~mask).sum(1, keepdim=True)

    def attend(query, key, value, bias, mask, positions):
        options = {"bias": bias, "causal": True, "key_mask": mask}
        whole = gated_attention(query, key, value, activation="laplace", **options)
        chunks = gated_attention(
            query, key, value, activation="softmax", chunk_size=16, positions=positions, **options
        )
        return whole + chunks + gated_cross_attention(query, key, value, activation="relu2", bias=bias)

    inputs = (query, key, value, bias)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    actual, expected = (function(*inputs, mask, positions) for function in (compiled, attend))
    assert_same_with_gradients(actual, expected, inputs, tolerance=1e-5)


def test_exports_without_an_own_operator():
    class Chunks(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return gated_attention(query, key, value, activation="softmax", chunk_size=16, key_mask=mask)

    query, key, value = (tensor.detach() for tensor in states(2, 40, torch.float32))
    mask = padding_mask("inside", 2, 40)
    program = torch.export.export(Chunks(), (query, key, value, mask))
    assert not any("hf_hybrid" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(query, key, value, mask), Chunks()(query, key, value, mask))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "elu"}, "activation"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"bias": torch.zeros(10)}, "bias"),
        ({"bias": torch.zeros(9)}, "bias"),
        ({"key_mask": torch.ones(2, 8)}, "key_mask"),
        ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, "key_mask"),
        ({"positions": torch.zeros(2, 7)}, "positions"),
        ({"query": torch.zeros(2, 7, Z)}, "cached_gated_attention"),
        ({"query": torch.zeros(2, 9, Z)}, "as many"),
        ({"key": torch.zeros(2, 8, Z + 1)}, "width"),
        ({"value": torch.zeros(2, 7, E)}, "value"),
    ],
)
def test_bad_arguments(changes, message):
    query, key, value = states(2, 8)
    arguments = {"query": query, "key": key, "value": value, "activation": "softmax", **changes}
    with pytest.raises(ValueError, match=message):
        gated_attention(**arguments)


def test_bad_bias_of_cross_attention():
    query, key, value = states(2, 8, sources=5)
    with pytest.raises(ValueError, match="bias"):
        gated_cross_attention(query, key, value, activation="softmax", bias=torch.zeros(13))

"""Window and chunk attention against their dense forms: outputs, gradients, padding, causality, caches, precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.ops import blocked_attention as engine
from hf_hybrid.ops import local_attention as module
from hf_hybrid.ops.local_attention import (
    cached_local_attention,
    chunk_attention,
    chunk_attention_reference,
    halo_attention,
    local_attention,
    local_attention_reference,
)
from hf_hybrid.ops.sdpa_blocks import masked_attention

pytestmark = pytest.mark.both_branches

HEADS, WIDTH = 2, 4


def states(batch: int, length: int, dtype: torch.dtype = torch.float64, heads: int = HEADS) -> list[torch.Tensor]:
    """Query, key and value as a layer makes them: strided views of (B, L, n, d)."""
    return [torch.randn(batch, length, heads, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


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
    pairs = zip(torch.autograd.grad(actual, inputs, weight), torch.autograd.grad(expected, inputs, weight))
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["one part", "many parts"])
def parts(request, monkeypatch) -> None:
    """With a small number of pairs, tiny inputs take the ways of long ones."""
    if request.param == "many parts":
        for owner in (engine, module):
            monkeypatch.setattr(owner, "PAIRS_AT_A_TIME", 300)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "right", "inside", "full"])
@pytest.mark.parametrize("radius", [0, 3, 40])
def test_window_equals_dense_band(parts, radius, causal, padding):
    block = radius + 1
    for length in sorted({1, max(1, block - 1), block, block + 1, 3 * block + 2, 131}):
        query, key, value = states(2, length)
        bias = torch.randn(HEADS, radius + 1 if causal else 2 * radius + 1, dtype=torch.float64, requires_grad=True)
        options = {"radius": radius, "causal": causal, "bias": bias, "key_mask": padding_mask(padding, 2, length)}
        assert_same_with_gradients(
            local_attention(query, key, value, **options),
            local_attention_reference(query, key, value, **options),
            (query, key, value, bias),
        )


@given(
    length=st.integers(1, 150),
    radius=st.integers(0, 60),
    batch=st.integers(1, 3),
    causal=st.booleans(),
    with_bias=st.booleans(),
    padding=st.sampled_from(["none", "left", "right", "inside", "full"]),
    scale=st.sampled_from([None, 1.0]),
)
def test_window_equals_dense_band_anywhere(length, radius, batch, causal, with_bias, padding, scale):
    query, key, value = states(batch, length, torch.float32)
    bias = torch.randn(HEADS, radius + 1 if causal else 2 * radius + 1, requires_grad=True) if with_bias else None
    mask = padding_mask(padding, batch, length)
    options = {"radius": radius, "causal": causal, "bias": bias, "key_mask": mask, "scale": scale}
    inputs = (query, key, value, bias) if with_bias else (query, key, value)
    assert_same_with_gradients(
        local_attention(query, key, value, **options),
        local_attention_reference(query, key, value, **options),
        inputs,
        tolerance=2e-5,  # sums of up to 121 terms in float32
    )


@given(
    length=st.integers(1, 90),
    chunk_size=st.integers(1, 40),
    causal=st.booleans(),
    padding=st.sampled_from(["none", "left", "right", "inside", "full"]),
)
def test_chunks_equal_dense_chunks(length, chunk_size, causal, padding):
    query, key, value = states(2, length)
    bias = torch.randn(HEADS, 2 * chunk_size - 1, dtype=torch.float64, requires_grad=True)
    options = {"chunk_size": chunk_size, "causal": causal, "bias": bias, "key_mask": padding_mask(padding, 2, length)}
    assert_same_with_gradients(
        chunk_attention(query, key, value, **options),
        chunk_attention_reference(query, key, value, **options),
        (query, key, value, bias),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_long_chunks_are_cut_into_pieces(parts, causal):
    query, key, value = states(2, 300)
    bias = torch.randn(HEADS, 2 * 140 - 1, dtype=torch.float64, requires_grad=True)
    options = {"chunk_size": 140, "causal": causal, "bias": bias}
    assert_same_with_gradients(
        chunk_attention(query, key, value, **options),
        chunk_attention_reference(query, key, value, **options),
        (query, key, value, bias),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [1, 5, 8, 21])
def test_left_padded_chunks_are_cut_by_position(causal, padding):
    length, chunk_size = 37, 8
    query, key, value = states(1, length)
    bias = torch.randn(HEADS, 2 * chunk_size - 1, dtype=torch.float64)
    options = {"chunk_size": chunk_size, "causal": causal, "bias": bias}
    expected = chunk_attention(query, key, value, **options)
    left = [torch.cat([torch.randn(1, HEADS, padding, WIDTH, dtype=t.dtype), t], dim=2) for t in (query, key, value)]
    positions = (torch.arange(length + padding) - padding).clamp(min=0)[None]
    mask = torch.arange(length + padding)[None] >= padding
    actual = chunk_attention(*left, **options, key_mask=mask, positions=positions)
    torch.testing.assert_close(actual[:, :, padding:], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["window", "chunk"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_amount_of_padding_does_not_matter(kind, side):
    length = 70
    query, key, value = states(1, length, torch.float32)
    attend = {
        "window": lambda *qkv, **rest: local_attention(*qkv, radius=5, **rest),
        "chunk": lambda *qkv, **rest: chunk_attention(*qkv, chunk_size=6, **rest),
    }[kind]
    expected = attend(query, key, value)
    for padding in (1, 64, 100):
        if kind == "chunk" and side == "left":
            extra = {"positions": (torch.arange(length + padding) - padding)[None]}
        else:
            extra = {}
        filler = [torch.full((1, HEADS, padding, WIDTH), 1e3) for _ in range(3)]
        order = (lambda pad, real: [pad, real]) if side == "left" else (lambda pad, real: [real, pad])
        padded = [torch.cat(order(f, t), dim=2) for f, t in zip(filler, (query, key, value))]
        mask = torch.cat(order(torch.zeros(1, padding), torch.ones(1, length)), dim=1).bool()
        actual = attend(*padded, key_mask=mask, **extra)
        real = actual[:, :, padding:] if side == "left" else actual[:, :, :length]
        torch.testing.assert_close(real, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [6, 90])
def test_rows_without_keys_are_zero_with_finite_gradients(length):
    query, key, value = states(2, length, torch.float32)
    bias = torch.randn(HEADS, 5, requires_grad=True)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1] = False
    mask[0, :4] = False  # tokens 0 and 1 see keys -2 .. 3 only
    outputs = local_attention(query, key, value, radius=2, bias=bias, key_mask=mask)
    assert torch.equal(outputs[1], torch.zeros_like(outputs[1]))
    assert torch.equal(outputs[0, :, :2], torch.zeros_like(outputs[0, :, :2]))
    assert outputs[0, :, 2:].abs().min() > 0
    for gradient in torch.autograd.grad(outputs.square().sum(), (query, key, value, bias)):
        assert gradient.isfinite().all()


def test_rows_of_a_batch_are_independent():
    query, key, value = states(3, 90, torch.float32)
    mask = padding_mask("inside", 3, 90)
    together = local_attention(query, key, value, radius=7, key_mask=mask)
    for row in range(3):
        one = slice(row, row + 1)
        alone = local_attention(query[one], key[one], value[one], radius=7, key_mask=mask[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("causal", [False, True])
def test_receptive_field_is_exact(causal):
    """A changed key and value moves exactly the queries that may see it, the others not by a bit."""
    length, radius, changed = 150, 40, 77
    query, key, value = states(1, length, torch.float32)
    before = local_attention(query, key, value, radius=radius, causal=causal)
    key, value = key.detach().clone(), value.detach().clone()
    key[:, :, changed] += 1
    value[:, :, changed] += 1
    after = local_attention(query, key, value, radius=radius, causal=causal)
    moved = (after != before).any(-1).any(1)[0].nonzero().flatten().tolist()
    assert moved == list(range(changed if causal else changed - radius, changed + radius + 1))


@pytest.mark.parametrize("piece", [1, 2, 9, 64, 100])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_pieces_with_cached_keys_equal_one_pass(parts, kind, padding, piece):
    length, reach = 130, 12
    query, key, value = states(2, length)
    mask = padding_mask(padding, 2, length)
    if kind == "window":
        bias = torch.randn(HEADS, reach + 1, dtype=torch.float64)
        expected = local_attention(query, key, value, radius=reach, causal=True, bias=bias, key_mask=mask)
        options, positions = {"radius": reach, "bias": bias}, None
    else:
        bias = torch.randn(HEADS, 2 * reach + 1, dtype=torch.float64)
        options = {"chunk_size": reach + 1, "bias": bias}
        pads = torch.zeros(2, 1, dtype=torch.long) if mask is None else (~mask).sum(1, keepdim=True)
        positions = torch.arange(length) - pads
        expected = chunk_attention(query, key, value, causal=True, **options, key_mask=mask, positions=positions)
    for start in range(0, length, piece):
        stop = min(start + piece, length)
        kept = slice(max(0, start - reach), stop)  # what a cache of bounded size holds
        actual = cached_local_attention(
            query[:, :, start:stop],
            key[:, :, kept],
            value[:, :, kept],
            key_mask=None if mask is None else mask[:, kept],
            positions=None if positions is None else positions[:, kept],
            **options,
        )
        torch.testing.assert_close(actual, expected[:, :, start:stop], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(monkeypatch, dropout_p):
    for owner in (engine, module):
        monkeypatch.setattr(owner, "PAIRS_AT_A_TIME", 300)
    query, key, value = states(2, 70)
    bias = torch.randn(HEADS, 9, dtype=torch.float64, requires_grad=True)
    mask = padding_mask("full", 2, 70)

    def attend(*inputs):
        torch.manual_seed(1)  # the same dropout in every evaluation
        return local_attention(*inputs[:3], radius=4, bias=inputs[3], key_mask=mask, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(attend, (query, key, value, bias), fast_mode=True)


def test_dropout_keeps_the_mean_and_drops_the_stated_part():
    query, key, _ = states(1, 200, torch.float32)
    value = torch.ones_like(key)
    kept = [local_attention(query, key, value, radius=0, dropout_p=0.3) for _ in range(50)]
    kept = torch.stack(kept)
    assert ((kept == 0) | ((kept - 1 / 0.7).abs() < 1e-5)).all()
    assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    window = torch.stack([local_attention(query, key, value, radius=8, dropout_p=0.3) for _ in range(50)])
    assert window.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype):
    query, key, value = (t.detach().to(dtype).requires_grad_() for t in states(2, 140, torch.float32))
    bias = torch.randn(HEADS, 33, requires_grad=True)
    mask = padding_mask("full", 2, 140)
    actual = local_attention(query, key, value, radius=16, bias=bias, key_mask=mask)
    assert actual.dtype == dtype
    expected = local_attention_reference(
        query.float(), key.float(), value.float(), radius=16, bias=bias, key_mask=mask
    )
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad(actual.float().sum(), (query, key, value, bias))
    assert [g.dtype for g in gradients] == [dtype, dtype, dtype, torch.float32]
    assert all(g.isfinite().all() for g in gradients)


def test_autocast_does_not_lower_the_precision_inside():
    query, key, value = states(1, 100, torch.float32)
    expected = local_attention(query, key, value, radius=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = local_attention(query, key, value, radius=9)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("padding", ["none", "left", "inside", "full"])
def test_form_for_other_devices_is_the_same(monkeypatch, padding):
    """The form by scaled_dot_product_attention, which accelerators and exported graphs use."""

    def by_sdpa(query, key, value, blocks, *, bias, entries, key_mask=None, segments=None, scale=None, dropout_p=0.0):
        scale = WIDTH**-0.5 if scale is None else scale
        bias = query.new_zeros(1, entries) if bias is None else bias
        return masked_attention(query, key, value, blocks, bias, key_mask, segments, scale, dropout_p)

    monkeypatch.setattr(module, "blocked_attention", by_sdpa)
    for length in (1, 9, 131):
        query, key, value = states(2, length)
        mask = padding_mask(padding, 2, length)
        bias = torch.randn(HEADS, 11, dtype=torch.float64, requires_grad=True)
        inputs = (query, key, value, bias)
        options = {"bias": bias, "key_mask": mask}
        for causal in (False, True):
            assert_same_with_gradients(
                local_attention(query, key, value, radius=10 if causal else 5, causal=causal, **options),
                local_attention_reference(query, key, value, radius=10 if causal else 5, causal=causal, **options),
                inputs,
            )
            assert_same_with_gradients(
                chunk_attention(query, key, value, chunk_size=6, causal=causal, **options),
                chunk_attention_reference(query, key, value, chunk_size=6, causal=causal, **options),
                inputs,
            )


def test_compiles_in_one_graph_forward_and_backward():
    query, key, value = states(2, 170, torch.float32)
    bias = torch.randn(HEADS, 81, requires_grad=True)
    mask = padding_mask("left", 2, 170)

    def attend(query, key, value, bias, mask):
        window = local_attention(query, key, value, radius=40, bias=bias, key_mask=mask)
        return window + chunk_attention(query, key, value, chunk_size=16, causal=True, key_mask=mask)

    inputs = (query, key, value, bias)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same_with_gradients(compiled(*inputs, mask), attend(*inputs, mask), inputs, tolerance=1e-5)


def test_exports_without_an_own_operator():
    class Window(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return local_attention(query, key, value, radius=40, key_mask=mask)

    inputs = (*(t.detach() for t in states(2, 100, torch.float32)), padding_mask("right", 2, 100))
    exported = torch.export.export(Window(), inputs)
    assert not [node for node in exported.graph.nodes if "hf_hybrid" in str(node.target)]
    torch.testing.assert_close(exported.module()(*inputs), Window()(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.both_branches(only="cpu")
def test_long_input_makes_no_quadratic_tensor():
    """2^17 tokens: the square would be 64 GiB in float32; the largest tensor that is made stays near the inputs."""
    length, largest = 2**17, 0

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    query, key, value = states(1, length, torch.float32)
    with Recorder():
        local_attention(query, key, value, radius=16).sum().backward()
    assert largest <= 4 * query.numel() * query.element_size()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"radius": -1}, "radius"),
        ({"bias": torch.zeros(HEADS, 4)}, "bias"),
        ({"key_mask": torch.ones(2, 9)}, "key_mask"),
        ({"key_mask": torch.ones(2, 8, dtype=torch.bool)}, "key_mask"),
        ({"key": torch.zeros(2, HEADS, 10, WIDTH)}, "key"),
        ({"query": torch.zeros(2, HEADS, 0, WIDTH)}, "query"),
    ],
)
def test_bad_arguments_are_named(change, name):
    query, key, value = states(2, 9, torch.float32)
    arguments = {"query": query, "key": key, "value": value, "radius": 3} | change
    with pytest.raises(ValueError, match=f"`{name}`"):
        local_attention(**arguments)


def test_cached_form_needs_exactly_one_kind():
    query, key, value = states(1, 5, torch.float32)
    for options in ({}, {"radius": 2, "chunk_size": 3}):
        with pytest.raises(ValueError, match="exactly one"):
            cached_local_attention(query, key, value, **options)
    with pytest.raises(ValueError, match="positions"):
        cached_local_attention(query, key, value, chunk_size=3)


@pytest.mark.parametrize("radius", [0, 3, 40])
def test_a_piece_with_its_neighbours(radius: int) -> None:
    """The rows of a piece in one pass over the whole text, at its ends too, where the neighbours are masked."""
    query, key, value = states(2, 150)
    bias = torch.randn(HEADS, 2 * radius + 1, dtype=torch.float64)
    expected = local_attention(query, key, value, radius=radius, bias=bias)
    around = [torch.nn.functional.pad(part, (0, 0, radius, radius)) for part in (key, value)]
    mask = torch.nn.functional.pad(torch.ones(2, 150, dtype=torch.bool), (radius, radius))
    for start in (0, 50, 100):
        wide = slice(start, start + 50 + 2 * radius)
        piece = halo_attention(
            query[:, :, start : start + 50],
            *(part[:, :, wide] for part in around),
            radius=radius,
            bias=bias,
            key_mask=mask[:, wide],
        )
        torch.testing.assert_close(piece, expected[:, :, start : start + 50])
    with pytest.raises(ValueError, match="those of the piece and of both sides"):
        halo_attention(query, *around, radius=radius + 1)

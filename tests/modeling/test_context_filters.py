"""Filters of context states: every form against the recurrence or the convolution of the definition."""

from __future__ import annotations

import copy

import pytest
import torch
from dense_reference import dplr_dense_step
from hypothesis import given
from hypothesis import strategies as st
from transformers import initialization as init

from hf_hybrid.modeling.bst.context_filters import DiagonalFilters, DplrFilters, ExplicitFilters
from hf_hybrid.ops.diagonal_scan import block_divisor, decayed_state, diagonal_block_states
from hf_hybrid.ops.diagonal_ssm import diagonal_scan_reference
from hf_hybrid.ops.s4 import dplr_dense
from hf_hybrid.ops.windowed_filter import (
    filtered_block_ends,
    lag_features,
    windowed_filter_reference,
    windowed_filters,
)

D, FILTERS, BATCH = 3, 2, 2
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
KINDS = ["s4d", "s4", "explicit"]


def build(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "explicit":
            layer = ExplicitFilters(D, FILTERS, 7, feature_size=4)
        else:
            layer = (DiagonalFilters if kind == "s4d" else DplrFilters)(D, FILTERS, 6, dt_min=0.05, dt_max=0.5)
        layer.initialize(init)
    return layer.to(dtype).eval()


def reference(layer: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """(B, T, D) -> (B, F, D, T), token by token."""
    signal = inputs.transpose(1, 2)
    direct = layer.D.unsqueeze(-1) * signal.unsqueeze(1)
    if isinstance(layer, ExplicitFilters):
        weight, bias = (part.unflatten(0, (FILTERS, D)) for part in (layer.filter_proj.weight, layer.filter_proj.bias))
        features = lag_features(7, 4, layer.base, device=torch.device("cpu"), dtype=torch.float64)
        return windowed_filter_reference(signal, weight, bias, layer.alpha.double(), features) + direct
    if isinstance(layer, DiagonalFilters):
        return diagonal_scan_reference(signal, layer.system())[0] + direct
    dense, state, outputs = dplr_dense(layer.dplr_system(torch.float64)), None, []
    for position in range(inputs.shape[1]):
        output, state = dplr_dense_step(inputs[:, position], layer.raw_c(), dense, state)
        outputs.append(output)
    return torch.stack(outputs, dim=-1) + direct


def recent(state) -> torch.Tensor:
    return state if isinstance(state, torch.Tensor) else state.last(state.length)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kernel_is_the_response_to_one_input(kind: str) -> None:
    layer, impulse = build(kind), torch.zeros(1, 12, D, dtype=torch.float64)
    impulse[0, 0] = 1
    expected = layer(impulse)[0][0]
    expected[..., 0] -= layer.D
    torch.testing.assert_close(layer.kernel(12), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
class TestForms:
    @torch.no_grad()
    def test_pieces_steps_and_block_ends(self, kind: str) -> None:
        layer = build(kind)

        @given(cuts=st.sets(st.integers(1, 22), max_size=5), size=st.integers(1, 9), per_row=st.booleans())
        def check(cuts: set[int], size: int, per_row: bool) -> None:
            inputs = torch.randn(BATCH, 23, D, dtype=torch.float64)
            expected = reference(layer, inputs)
            state = None
            for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 23]):
                piece = inputs[:, first:last]
                outputs, after = layer(piece, state, True)
                torch.testing.assert_close(outputs, expected[..., first:last], **CLOSE)
                counts = torch.full((BATCH,), last - first) if per_row else None
                start = torch.full((BATCH,), first) if per_row else first
                ends, other = layer(piece, state, True, counts, size, start)
                places = [p for p in range(first, last) if p % size == size - 1]
                assert ends.shape[1] >= len(places)
                wanted = expected[..., places].permute(0, 3, 1, 2)
                torch.testing.assert_close(ends[:, : len(places)], wanted, **CLOSE)
                torch.testing.assert_close(recent(other), recent(after), **CLOSE)
                if last - first == 1:
                    stepped = layer.advance(piece, copy.deepcopy(state))
                    torch.testing.assert_close(recent(stepped), recent(after), **CLOSE)
                    for at_end in (False, True):
                        found = layer.read(piece, stepped, at_end)
                        torch.testing.assert_close(found, expected[..., first], **CLOSE)
                state = after

        check()

    @torch.no_grad()
    def test_long_decoding(self, kind: str) -> None:
        """Steps alone, over several refills of the history, with rows that pause."""
        layer = build(kind)
        inputs = torch.randn(BATCH, 40, D, dtype=torch.float64)
        expected, state = reference(layer, inputs), None
        for position in range(40):
            token = inputs[:, position : position + 1]
            if position == 20:
                paused = layer.advance(torch.randn_like(token), state, torch.zeros(BATCH).bool())
                torch.testing.assert_close(recent(paused), recent(state), **CLOSE)
                state = layer.advance(token, paused, torch.ones(BATCH).bool())
            else:
                state = layer.advance(token, state)
            torch.testing.assert_close(layer.read(token, state), expected[..., position], **CLOSE)

    @torch.no_grad()
    def test_rows_of_different_lengths(self, kind: str) -> None:
        layer, counts = build(kind), torch.tensor([5, 0, 11])
        first, second = (torch.randn(3, 11, D, dtype=torch.float64) for _ in range(2))
        first = first * (torch.arange(11) < counts.unsqueeze(1)).unsqueeze(-1)
        _, state = layer(first, None, True, counts)
        ends, after = layer(second, state, True, torch.tensor([11, 11, 11]), 4, counts)
        for row, count in enumerate(counts.tolist()):
            text = torch.cat([first[row, :count], second[row]]).unsqueeze(0)
            expected = reference(layer, text)
            places = [p for p in range(count, count + 11) if p % 4 == 3]
            torch.testing.assert_close(ends[row, : len(places)], expected[0][..., places].permute(2, 0, 1), **CLOSE)
            torch.testing.assert_close(recent(after)[row], recent(layer(text, None, True)[1])[0], **CLOSE)

    def test_gradients(self, kind: str) -> None:
        layer = build(kind)
        names = [name for name, _ in layer.named_parameters()]

        def run(block_size: int | None):
            def outputs(inputs: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
                call = {"block_size": block_size}
                return torch.func.functional_call(layer, dict(zip(names, parameters)), (inputs,), call)[0]

            return outputs

        inputs = torch.randn(1, 5, D, dtype=torch.float64, requires_grad=True)
        parameters = [parameter.detach().requires_grad_() for parameter in layer.parameters()]
        assert torch.autograd.gradcheck(run(None), (inputs, *parameters))
        assert torch.autograd.gradcheck(run(2), (inputs, *parameters))

    @torch.no_grad()
    def test_single_precision_and_casts(self, kind: str) -> None:
        layer = build(kind)
        inputs = torch.randn(BATCH, 50, D, dtype=torch.float64)
        expected = reference(layer, inputs)
        layer = layer.float().to(torch.bfloat16)
        assert all(value.dtype == torch.float32 for value in layer.state_dict().values() if value.is_floating_point())
        outputs, _ = layer(inputs.float())
        torch.testing.assert_close(outputs.double(), expected, rtol=1e-4, atol=2e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(inputs.float())[0], outputs, rtol=0, atol=0)

    @torch.no_grad()
    def test_kept_results_follow_the_tensors(self, kind: str) -> None:
        layer = build(kind)
        inputs = torch.randn(BATCH, 9, D, dtype=torch.float64)
        layer(inputs)
        for parameter in layer.parameters():
            parameter.data = parameter.data + 0.1
        torch.testing.assert_close(layer(inputs)[0], reference(layer, inputs), **CLOSE)


def test_one_token_of_tiny_steps_is_exact() -> None:
    """Where |dt A| is tiny, exp(dt A) - 1 keeps its digits in float32."""
    layer = build("s4d", torch.float32)
    with torch.no_grad():
        layer.log_dt.fill_(-12.0)
        layer.log_A_real.fill_(-1.0)
    system, wide = layer.system(), copy.deepcopy(layer).double()
    rate = torch.complex(-torch.exp(wide.log_A_real), wide.A_imag)
    exact = torch.expm1(rate * torch.exp(wide.log_dt).unsqueeze(-1)) / rate
    found = torch.complex(system.input_real.double(), system.input_imag.double())
    assert ((found - exact).abs() / exact.abs()).max() < 1e-7


@pytest.mark.parametrize("size", [1, 6, 7, 64, 97, 128, 192])
def test_groups_divide_blocks(size: int) -> None:
    group = block_divisor(size)
    assert size % group == 0 and (group >= 16 or group == size)


@torch.no_grad()
def test_real_systems_have_block_states_too() -> None:
    system = build("s4d").system()
    real = system._replace(log_decay_imag=None, input_imag=None, output_imag=None)
    inputs = torch.randn(BATCH, D, 12, dtype=torch.float64)
    found = diagonal_block_states(inputs, real, 4, group_size=2)
    for block in range(3):
        state = diagonal_scan_reference(inputs[..., : 4 * block + 4], real)[1]
        torch.testing.assert_close(found[:, block], state, **CLOSE)
    torch.testing.assert_close(
        decayed_state(found[:, 0], real, torch.tensor([3, 3])), decayed_state(found[:, 0], real, 3), **CLOSE
    )


def test_explicit_filters_are_their_definition() -> None:
    """The impulse response is K, plus D at lag 0, and zero from lag L on; results do not depend on the length."""
    layer = build("explicit")
    impulse = torch.zeros(1, 12, D, dtype=torch.float64)
    impulse[:, 0] = 1
    response = layer(impulse)[0][0]
    filters = layer.filters()
    torch.testing.assert_close(response[..., 0], filters[..., 0] + layer.D, **CLOSE)
    torch.testing.assert_close(response[..., 1:7], filters[..., 1:], **CLOSE)
    assert response[..., 7:].abs().max() < 1e-12
    torch.testing.assert_close(layer(impulse[:, :4])[0][0], response[..., :4], **CLOSE)
    lag, weight = 3, layer.filter_proj.weight.unflatten(0, (FILTERS, D))
    phases = [lag * 10000.0 ** (-2 * b / 4) for b in range(2)]
    phi = torch.tensor([*map(torch.tensor, phases)], dtype=torch.float64)
    phi = torch.cat([phi.sin(), phi.cos()])
    expected = torch.exp(-layer.alpha * lag / 6) * (weight @ phi)
    torch.testing.assert_close(filters[..., lag], expected, rtol=1e-6, atol=1e-6)


def test_initial_explicit_filters_have_unit_energy() -> None:
    torch.manual_seed(0)
    layer = ExplicitFilters(64, 8, 512, feature_size=32)
    layer.initialize(init)
    energy = layer.filters().square().sum(-1).mean()
    assert 0.8 < energy < 1.2


@given(length=st.integers(1, 20), step=st.integers(1, 5))
def test_block_ends_in_small_pieces(length: int, step: int) -> None:
    weight, bias = torch.randn(2, D, 4, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    alpha, features = (
        torch.rand(D, dtype=torch.float64),
        lag_features(9, 4, 100.0, device=torch.device("cpu"), dtype=torch.float64),
    )
    inputs = torch.randn(BATCH, D, length, dtype=torch.float64)
    ends = range(min(step, length) - 1, length, step)
    expected = windowed_filter_reference(inputs, weight, bias, alpha, features)[..., list(ends)].permute(0, 3, 1, 2)
    torch.testing.assert_close(filtered_block_ends(inputs, weight, bias, alpha, features, ends), expected, **CLOSE)
    assert windowed_filters(weight, bias, alpha, features).shape == (2, D, 9)


@pytest.mark.parametrize(
    ("build_wrong", "message"),
    [
        (lambda: DiagonalFilters(4, 1, 3), "even"),
        (lambda: DplrFilters(4, 1, 3), "even"),
        (lambda: ExplicitFilters(4, 1, 1), "at least 2"),
        (lambda: ExplicitFilters(4, 1, 8, feature_size=3), "even"),
    ],
)
def test_wrong_sizes(build_wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_wrong()

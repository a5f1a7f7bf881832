"""Damped moving average against sums over all pairs of tokens: kernels, states, truncation, padding, precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import initialization

from hf_hybrid.layers import ema as module
from hf_hybrid.layers.ema import MultiDimensionalDampedEma

D, N, B = 3, 4, 2


def make_layer(dtype: torch.dtype = torch.float64, **options) -> MultiDimensionalDampedEma:
    """A layer away from its initial values, with fast and slow decays."""
    layer = MultiDimensionalDampedEma(D, N, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.decay_factor.mul_(3).sub_(2)
    return layer


def by_definition(layer: MultiDimensionalDampedEma, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """All pairs of tokens, with the direct (K, N, L) kernel, after the formulas of the paper."""
    length = x.shape[1]
    p = torch.sigmoid(layer.damping_factor)
    q = 1 - p * torch.sigmoid(layer.decay_factor)
    powers = q ** torch.arange(length).to(x.dtype)  # (K, N, L)
    terms = layer.kernel_projection_matrix.unsqueeze(-1) / math.sqrt(N) * p * layer.ema_expansion_matrix * powers
    kernel = terms.sum(1)
    if layer.truncation is not None:
        kernel[:, layer.truncation :] = 0
    lag = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    matrix = torch.where(lag >= 0, kernel[:D, lag.clamp(min=0)], 0.0)  # (D, L, L)
    if layer.bidirectional:
        matrix = matrix + torch.where(lag <= 0, kernel[D:, (-lag).clamp(min=0)], 0.0)
    u = x if mask is None else x * mask.unsqueeze(-1)
    return F.silu(torch.einsum("dts,bsd->btd", matrix, u) + layer.residual_weight * x)


@pytest.fixture(params=["scan", "convolution"])
def form(request, monkeypatch) -> str:
    """Both ways to compute the same, whatever the length."""
    length = 1 if request.param == "scan" else 1 << 60
    monkeypatch.setattr(module, "_SCAN_LENGTH", length)
    monkeypatch.setattr(module, "_SCAN_LENGTH_BIDIRECTIONAL", length)
    return request.param


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("truncation", [None, 1, 2, 7, 100])
def test_equals_the_sum_over_all_pairs(form, bidirectional, truncation):
    layer = make_layer(bidirectional=bidirectional, truncation=truncation)
    for length in (1, 2, 7, 8, 33, 67):
        x = torch.randn(B, length, D, dtype=torch.float64)
        mask = torch.rand(B, length) > 0.3
        for given_mask in (None, mask, mask.long()):
            expected = by_definition(layer, x, given_mask)
            torch.testing.assert_close(layer(x, given_mask)[0], expected, rtol=1e-10, atol=1e-10)


def test_current_token_counts_twice_in_both_directions():
    layer = make_layer(bidirectional=True)
    x = torch.randn(1, 1, D, dtype=torch.float64)
    first = layer.kernel(1)[:, 0].view(2, D).sum(0)
    torch.testing.assert_close(layer(x)[0], F.silu((first + layer.residual_weight) * x))


@pytest.mark.parametrize("truncation", [None, 9])
def test_reversed_input_and_swapped_halves_give_reversed_output(form, truncation):
    layer = make_layer(bidirectional=True, truncation=truncation)
    x = torch.randn(B, 40, D, dtype=torch.float64)
    expected = layer(x.flip(1))[0].flip(1)
    swapped = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in swapped.named_parameters():
            if name != "residual_weight":
                parameter.copy_(torch.cat(parameter.chunk(2)[::-1]))
    torch.testing.assert_close(swapped(x)[0], expected)


@pytest.mark.parametrize("truncation", [None, 1, 5, 24])
@given(pieces=st.lists(st.integers(1, 40), min_size=1, max_size=4), steps=st.integers(0, 8), seed=st.integers(0, 99))
def test_any_split_equals_one_pass(truncation, pieces, steps, seed):
    torch.manual_seed(seed)
    layer = make_layer(truncation=truncation)
    pieces = [*pieces, *[1] * steps]
    x = torch.randn(B, sum(pieces), D, dtype=torch.float64)
    mask = torch.rand(B, sum(pieces)) > 0.3
    expected = layer(x, mask)[0]
    torch.testing.assert_close(expected, by_definition(layer, x, mask))
    for scan_length in (1, 1 << 60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_SCAN_LENGTH", scan_length)
            whole, final = layer(x, mask, return_state=True)
            torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-10)
            state, outputs = None, []
            for part, kept in zip(x.split(pieces, dim=1), mask.split(pieces, dim=1)):
                output, state = layer(part, kept, state, return_state=True)
                outputs.append(output)
            torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("truncation", [None, 64])
def test_float32_prefill_and_many_steps(truncation):
    """Slow decays: the tokens that leave a truncated average must take all they brought."""
    layer = make_layer(torch.float32, truncation=truncation)
    with torch.no_grad():
        layer.decay_factor.fill_(-6)
        layer.damping_factor.fill_(-2)  # 1 - q = 3e-4
    x = torch.randn(1, 600, D) + 1
    expected = by_definition(copy.deepcopy(layer).double(), x.double())
    outputs, state = layer(x[:, :50], return_state=True)
    outputs = [outputs]
    for token in x[:, 50:].split(1, dim=1):
        output, state = layer.step(token, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x)[0].double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("truncation", [None, 6])
def test_truncated_state_forgets(truncation):
    layer = make_layer(truncation=truncation)
    tail = torch.randn(1, 6, D, dtype=torch.float64)
    finals = []
    for head in (torch.zeros(1, 9, D), torch.ones(1, 9, D)):
        finals.append(layer(torch.cat([head.double(), tail], dim=1), return_state=True)[1])
    if truncation is None:
        assert (finals[0] - finals[1]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("truncation", [None, 9])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(bidirectional, truncation, side):
    layer = make_layer(bidirectional=bidirectional, truncation=truncation)
    x = torch.randn(1, 30, D, dtype=torch.float64)
    expected = layer(x)[0]
    for padding in (1, 13, 64):
        amounts = (padding, 0) if side == "left" else (0, padding)
        padded = F.pad(x, (0, 0, *amounts), value=1e3)
        mask = F.pad(torch.ones(1, 30), amounts)
        actual = layer(padded, mask)[0][:, amounts[0] : amounts[0] + 30]
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    if side == "left" and not bidirectional:
        state = layer(padded, mask, return_state=True)[1]
        torch.testing.assert_close(state, layer(x, return_state=True)[1])


def test_scan_is_causal_to_the_bit(monkeypatch):
    monkeypatch.setattr(module, "_SCAN_LENGTH", 1)
    layer = make_layer(torch.float32)
    x = torch.randn(1, 200, D)
    before = layer(x)[0]
    x[:, 120:] += 1
    assert torch.equal(layer(x)[0][:, :120], before[:, :120])


@pytest.mark.parametrize(
    "options", [{}, {"truncation": 5}, {"bidirectional": True}, {"bidirectional": True, "truncation": 5}]
)
def test_gradients_of_every_parameter(form, options):
    layer = make_layer(**options)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(B, 12, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(B, 12) > 0.3

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x, mask))[0]

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("truncation", [None, 5])
@pytest.mark.parametrize("length", [1, 9])
def test_gradients_through_the_state(form, truncation, length):
    layer = make_layer(truncation=truncation)
    x = torch.randn(B, length, D, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        state = layer(torch.randn(B, 8, D, dtype=torch.float64), return_state=True)[1]
    state = [state] if truncation is None else list(state)
    for part in state:
        part.requires_grad_()

    def run(x, *state):
        outputs, final = layer(x, None, state[0] if truncation is None else state, return_state=True)
        return (outputs, final) if truncation is None else (outputs, *final)

    assert torch.autograd.gradcheck(run, (x, *state), fast_mode=True)


def test_changed_weights_change_the_next_output():
    layer = make_layer().eval()
    x = torch.randn(1, 20, D, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)[0]
        layer.decay_factor.add_(1)
        after = layer(x)[0]
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, by_definition(layer, x))


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_kernel_of_bfloat16_weights_is_exact(length):
    """The half-precision kernel of Transformers 4.x was off by up to 0.59 of its peak."""
    layer = MultiDimensionalDampedEma(16, 16, bidirectional=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.damping_factor.sub_(2)
        layer.decay_factor.sub_(4)  # slow decays
    layer.bfloat16()
    kernel = layer.kernel(length)
    assert kernel.dtype == torch.float32
    for wide in (copy.deepcopy(layer).float(), copy.deepcopy(layer).double()):
        exact = wide.kernel(length)
        assert (kernel - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"truncation": 16}])
def test_half_precision_inputs_and_states(dtype, options):
    layer = make_layer(torch.float32, **options).to(dtype)
    x = torch.randn(B, 70, D).to(dtype).requires_grad_()
    actual = layer(x)[0]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), copy.deepcopy(layer).float()(x.float())[0], rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad(actual.float().sum(), (x, *layer.parameters()))
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)
    if not layer.bidirectional:
        state = layer(x, return_state=True)[1]
        assert {part.dtype for part in ([state] if isinstance(state, torch.Tensor) else state)} == {torch.float32}


def test_autocast_does_not_lower_the_precision_inside():
    layer = make_layer(torch.float32)
    x = torch.randn(1, 50, D)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x)[0], expected)


def test_saturated_decays_stay_finite():
    layer = make_layer(torch.float32)
    with torch.no_grad():
        layer.damping_factor.fill_(200.0)
        layer.decay_factor[:, ::2] = 200.0  # q = 0
        layer.decay_factor[:, 1::2] = -200.0  # q = 1
    x = torch.randn(1, 50, D)
    torch.testing.assert_close(layer(x)[0], by_definition(layer, x), rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(layer(x)[0].sum(), tuple(layer.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_tensor_of_all_components_of_all_tokens(form, bidirectional):
    layer = MultiDimensionalDampedEma(8, 16, bidirectional=bidirectional)
    x = torch.randn(1, 4096, 8, requires_grad=True)
    with LargestTensor() as largest:
        layer(x)[0].sum().backward()
    assert largest.numel <= 8 * 4096 * 4  # a complex spectrum of a signal of twice the length, in both directions


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"truncation": 9}])
def test_compiles_in_one_graph(options):
    layer = make_layer(torch.float32, **options)
    x = torch.randn(B, 30, D, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x)[0], layer(x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    inputs = (x, *layer.parameters())
    pairs = zip(torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_initial_values():
    layer = MultiDimensionalDampedEma(400, 16, bidirectional=True)
    assert layer.damping_factor.std().item() == pytest.approx(0.2, rel=0.05)
    assert layer.decay_factor.std().item() == pytest.approx(0.2, rel=0.05)
    assert layer.kernel_projection_matrix.std().item() == pytest.approx(1, rel=0.05)
    signs = layer.ema_expansion_matrix.mean(0).squeeze()
    torch.testing.assert_close(signs, torch.tensor([1.0, -1.0] * 8), rtol=0, atol=0.01)
    assert layer.ema_expansion_matrix[:, 0].std().item() == pytest.approx(0.02, rel=0.1)

    loaded = layer.decay_factor.detach().clone()
    layer.decay_factor._is_hf_initialized = True
    layer.initialize(initialization, delta_alpha_range=0.5, beta_range=0.1, gamma_omega_range=2.0)
    assert torch.equal(layer.decay_factor, loaded)
    assert layer.damping_factor.std().item() == pytest.approx(0.5, rel=0.05)
    assert layer.residual_weight.std().item() == pytest.approx(2.0, rel=0.15)


def test_constructs_on_the_meta_device():
    with torch.device("meta"):
        layer = MultiDimensionalDampedEma(D, N)
    assert layer.damping_factor.is_meta
    layer.load_state_dict(make_layer(torch.float32).state_dict(), assign=True)
    assert layer(torch.randn(B, 9, D))[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"truncation": 0}, "truncation"), ({"hidden_size": 0}, "hidden_size"), ({"ema_size": 0}, "ema_size")],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MultiDimensionalDampedEma(**{"hidden_size": D, **options})


def test_bad_inputs():
    x = torch.randn(B, 4, D)
    causal, both = MultiDimensionalDampedEma(D, N), MultiDimensionalDampedEma(D, N, bidirectional=True)
    for wrong in (x[0], x[:, :0], x[..., :2]):
        with pytest.raises(ValueError, match="hidden_states"):
            causal(wrong)
    with pytest.raises(ValueError, match="mask"):
        causal(x, torch.ones(B, 5))
    with pytest.raises(ValueError, match="whole sequences"):
        both(x, return_state=True)
    with pytest.raises(ValueError, match="shapes"):
        causal(x, None, torch.zeros(B, D, N + 1))
    with pytest.raises(ValueError, match="shapes"):
        MultiDimensionalDampedEma(D, N, truncation=3)(x, None, torch.zeros(B, D, N))

"""StateSpaceLayer: equivalences, precision, loading, kept kernels."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hybrid.layers import ssm
from hf_hybrid.layers.kept_results import frozen_results
from hf_hybrid.layers.ssm import StateSpaceLayer
from hf_hybrid.ops.s4 import truncate_c

TYPES = ("s4", "s4d")
WIDTH, SIZE = 6, 8


def make_layer(ssm_type: str, dtype: torch.dtype = torch.float64, **options: object) -> StateSpaceLayer:
    """Layer moved away from its initial values."""
    layer = StateSpaceLayer(WIDTH, SIZE, **{"ssm_type": ssm_type, "num_copies": 3, **options}).to(dtype)
    with torch.no_grad():
        for name in ("B", "P", "inv_w_real", "w_imag"):
            if hasattr(layer, name):
                getattr(layer, name).mul_(1 + 0.2 * torch.randn_like(getattr(layer, name)))
    return layer


def make_inputs(length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, dtype=dtype)


def truncated(layer: StateSpaceLayer, length: int) -> StateSpaceLayer:
    """The same layer with C-tilde in place of C."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.C.copy_(truncate_c(layer.C.double(), layer.dplr_system(torch.float64), length))
        layer.kernel_length.fill_(length)
    return layer


# ------------------------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("ssm_type", TYPES)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), steps=st.integers(0, 3))
def test_any_split_equals_one_pass(ssm_type: str, channels: int, lengths: list[int], steps: int) -> None:
    layer = make_layer(ssm_type, channels=channels)
    inputs = make_inputs(sum(lengths) + steps)
    expected, none = layer(inputs)
    assert none is None and expected.shape == (2, inputs.shape[1], channels * WIDTH)
    outputs, state = [], None
    for chunk in inputs[:, : sum(lengths)].split(lengths, dim=1):
        output, state = layer(chunk, state, return_state=True)
        outputs.append(output)
    for position in range(sum(lengths), inputs.shape[1]):
        output, state = layer.step(inputs[:, position : position + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(inputs, return_state=True)[1], state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ssm_type", TYPES)
def test_float32_prefill_and_steps(ssm_type: str) -> None:
    layer, inputs = make_layer(ssm_type, torch.float32), make_inputs(40, torch.float32)
    expected = layer(inputs)[0]
    output, state = layer(inputs[:, :30], return_state=True)
    assert state.dtype == torch.float32 and state.shape == (2, WIDTH, SIZE // 2, 2)
    outputs = [output]
    for position in range(30, 40):
        output, state = layer.step(inputs[:, position : position + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("is_trained", [False, True])
def test_scan_equals_convolution(bidirectional: bool, is_trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of computing s4d, outputs and gradients."""
    layer = make_layer("s4d", bidirectional=bidirectional, channels=2)
    inputs = make_inputs(100).requires_grad_()
    leaves = [inputs, *layer.parameters()]
    results = []
    for threshold in (1, 10**9):
        monkeypatch.setattr(ssm, "_SCAN_LENGTH", threshold)
        monkeypatch.setattr(ssm, "_SCAN_LENGTH_CACHED", threshold)
        outputs = layer(inputs)[0]
        results.append((outputs, torch.autograd.grad(outputs.square().sum(), leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ssm_type", TYPES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_on_either_side_changes_nothing(ssm_type: str, bidirectional: bool) -> None:
    layer, inputs = make_layer(ssm_type, bidirectional=bidirectional), make_inputs(30)
    expected = layer(inputs)[0]
    left = layer(torch.nn.functional.pad(inputs, (0, 0, 7, 0)))[0][:, 7:]
    right = layer(torch.nn.functional.pad(inputs, (0, 0, 0, 11)))[0][:, :30]
    torch.testing.assert_close(left, expected)
    torch.testing.assert_close(right, expected)


@pytest.mark.parametrize("ssm_type", TYPES)
def test_causality(ssm_type: str) -> None:
    layer, inputs = make_layer(ssm_type), make_inputs(30)
    changed = inputs.clone()
    changed[:, 20:] += 5
    before, after = layer(inputs)[0], layer(changed)[0]
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-10)
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3
    both = make_layer(ssm_type, bidirectional=True)
    assert (both(inputs)[0][:, :20] - both(changed)[0][:, :20]).abs().max() > 1e-3


@pytest.mark.parametrize("ssm_type", TYPES)
def test_copies_are_tiled(ssm_type: str) -> None:
    layer = make_layer(ssm_type, num_copies=2)
    untied = make_layer(ssm_type, num_copies=None)
    values = layer.state_dict()
    for name in ("B", "P", "inv_w_real", "w_imag"):
        if name in values:
            axis = 0 if values[name].dim() == 2 else 1
            values[name] = values[name].index_select(axis, torch.arange(WIDTH) % 2)
    untied.load_state_dict(values)
    inputs = make_inputs(20)
    torch.testing.assert_close(layer(inputs)[0], untied(inputs)[0])


def test_reach_is_truncated_only_in_the_convolution() -> None:
    layer = make_layer("s4", max_length=16)
    inputs = torch.zeros(2, 40, WIDTH, dtype=torch.float64)
    inputs[:, 0] = 1
    outputs = layer(inputs)[0]
    assert outputs[:, 16:].abs().max() < 1e-12 and outputs[:, 15].abs().min() > 0
    recurrent = layer(inputs, return_state=True)[0]
    torch.testing.assert_close(recurrent[:, :16], outputs[:, :16])
    assert recurrent[:, 16:].abs().min() > 0


@pytest.mark.parametrize("length", [1, 2, 16, 17])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_short_lengths_have_finite_gradients(length: int, bidirectional: bool) -> None:
    for layer in (
        make_layer("s4d", torch.float32, bidirectional=bidirectional),
        make_layer("s4", torch.float32, bidirectional=bidirectional, max_length=5),
    ):
        for used in (layer, truncated(layer, 5)) if layer.ssm_type == "s4" else (layer,):
            outputs = used(make_inputs(length, torch.float32))[0]
            gradients = torch.autograd.grad(outputs.square().sum(), list(used.parameters()))
            assert outputs.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


# ----------------------------------------------------------------------------------------------------- C and C-tilde


@pytest.mark.parametrize("max_length", [24, 64, None])
@pytest.mark.parametrize("internal", [24, 33])
def test_truncated_c_gives_the_same_layer(internal: int, max_length: int | None) -> None:
    """Convolution, recurrence, and (by recovering C) a reach beyond the stored length."""
    raw = make_layer("s4", max_length=max_length).eval()
    layer, inputs = truncated(raw, internal), make_inputs(50)
    kept = layer.C.clone()
    for tracked in (True, False):
        with torch.set_grad_enabled(tracked):
            for length in (20, 50):
                torch.testing.assert_close(
                    layer(inputs[:, :length])[0], raw(inputs[:, :length])[0], rtol=1e-7, atol=1e-7
                )
            actual, expected = layer(inputs, return_state=True), raw(inputs, return_state=True)
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(
                layer.step(inputs[:, :1], actual[1]), raw.step(inputs[:, :1], expected[1]), rtol=1e-7, atol=1e-7
            )
    assert torch.equal(layer.C, kept) and int(layer.kernel_length) == internal


def test_gradient_keeps_truncated_c_fixed() -> None:
    """With C-tilde stored, w, P, B and dt are differentiated at constant C-tilde, not at constant C."""
    layer = truncated(make_layer("s4", max_length=16), 16)
    inputs, weights = make_inputs(16), torch.randn(2, 16, WIDTH, dtype=torch.float64)
    direction = {name: torch.randn_like(value) for name, value in layer.named_parameters() if name not in ("C", "D")}

    def loss(distance: float) -> torch.Tensor:
        moved = {name: value + distance * direction.get(name, 0) for name, value in layer.named_parameters()}
        return (torch.func.functional_call(layer, moved, (inputs,))[0] * weights).sum()

    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    gradients = torch.autograd.grad(loss(0.0), [layer.get_parameter(name) for name in direction])
    actual = sum((gradient * step).sum() for gradient, step in zip(gradients, direction.values()))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"ssm_type": "s4"},
        {"ssm_type": "s4", "rank": 2, "bidirectional": True},
        {"ssm_type": "s4", "kernel_length": 8},
        {"ssm_type": "s4d"},
        {"ssm_type": "s4d", "discretization": "bilinear", "bidirectional": True},
    ],
    ids=str,
)
def test_gradients_of_every_parameter(options: dict[str, object]) -> None:
    layer = StateSpaceLayer(2, 4, num_copies=1, max_length=8, **options).double()
    names = [name for name, _ in layer.named_parameters()]
    leaves = [(value.detach() + 0.1 * torch.randn_like(value)).requires_grad_() for value in layer.parameters()]
    inputs = torch.randn(1, 8, 2, dtype=torch.float64, requires_grad=True)

    def apply(inputs: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (inputs,))[0]

    torch.autograd.gradcheck(apply, (inputs, *leaves))


@pytest.mark.parametrize("ssm_type", TYPES)
def test_gradients_through_the_state(ssm_type: str) -> None:
    layer = StateSpaceLayer(2, 4, ssm_type=ssm_type).double()
    inputs = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda inputs, state: layer(inputs, state, True), (inputs, state))
    torch.autograd.gradcheck(lambda inputs, state: layer.step(inputs[:, :1], state), (inputs, state))


# ------------------------------------------------------------------------------------------------------ kept kernels


def counted(layer: StateSpaceLayer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the kernels computed from now on."""
    lengths, compute = [], layer._compute_kernel
    monkeypatch.setattr(layer, "_compute_kernel", lambda length: lengths.append(length) or compute(length))
    return lengths


@pytest.mark.parametrize("ssm_type", TYPES)
@torch.no_grad()
def test_kernels_are_kept_while_frozen(ssm_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = make_layer(ssm_type, torch.float32).eval(), make_inputs(20, torch.float32)
    lengths = counted(layer, monkeypatch)
    expected = layer(inputs)[0]
    layer(inputs)
    assert len(lengths) == 2  # nothing is kept from call to call
    with frozen_results(layer):
        for length in (20, 17, 9, 20):
            outputs = layer(inputs[:, :length])[0]
            if not layer.bidirectional:
                torch.testing.assert_close(outputs, expected[:, :length], rtol=1e-5, atol=1e-5)
        assert len(lengths) == 4  # one for each power of two
        layer.load_state_dict(make_layer(ssm_type, torch.float32).state_dict())
        layer(inputs)
        assert len(lengths) == 5  # replaced by the means of the module
    layer(inputs)
    assert len(lengths) == 6


@torch.no_grad()
def test_frozen_kernel_does_not_depend_on_lengths_seen_before() -> None:
    first = make_layer("s4d", torch.float32, trainable=False)
    second, inputs = copy.deepcopy(first), make_inputs(50, torch.float32)
    with frozen_results(first), frozen_results(second):
        first(inputs)
        assert torch.equal(first(inputs[:, :20])[0], second(inputs[:, :20])[0])


def test_frozen_layer_refuses_gradients() -> None:
    layer, inputs = make_layer("s4d"), make_inputs(9)
    with frozen_results(layer), pytest.raises(RuntimeError, match="gradients are tracked"):
        layer(inputs)
    layer(inputs)


@pytest.mark.parametrize("ssm_type", TYPES)
@torch.no_grad()
def test_a_generation_keeps_what_its_steps_need(ssm_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, token, kept = make_layer(ssm_type).eval(), make_inputs(1), {}
    name = "diagonal_system" if ssm_type == "s4d" else "_step_constants"
    calls, compute = [], getattr(layer, name)
    monkeypatch.setattr(layer, name, lambda: calls.append(0) or compute())
    state = token.new_zeros(token.shape[0], layer.hidden_size, layer.state_size // 2, 2)
    for _ in range(3):
        outputs, state = layer(token, state, return_state=True, kept=kept)
    assert len(calls) == 1
    layer.C.mul_(2)  # seen by its version
    expected = layer(token, state, return_state=True)[0]
    torch.testing.assert_close(layer(token, state, return_state=True, kept=kept)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("ssm_type", TYPES)
def test_step_constants_follow_the_tensors(ssm_type: str) -> None:
    layer, token = make_layer(ssm_type).eval(), make_inputs(1)
    with torch.no_grad():
        before, _ = layer.step(token)
        layer.C.zero_()
        layer.D.zero_()
        after, _ = layer.step(token)
    assert before.abs().max() > 0 and (after == 0).all()


@pytest.mark.parametrize("ssm_type", TYPES)
def test_frozen_layer(ssm_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers only: the kernel may be kept in training too, and the gradient passes through to the input."""
    layer = make_layer(ssm_type, torch.float32, trainable=False)
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == set(make_layer(ssm_type).state_dict())
    lengths, inputs = counted(layer, monkeypatch), make_inputs(20, torch.float32).requires_grad_()
    with frozen_results(layer):
        with torch.inference_mode():
            layer(inputs)
        for _ in range(2):
            layer.train()
            layer(inputs)[0].sum().backward()
    assert len(lengths) == 1 and inputs.grad.abs().max() > 0


def test_a_frozen_kernel_leaves_training_alone() -> None:
    """It must not cut the gradient afterwards."""
    layer, inputs = make_layer("s4d").eval(), make_inputs(20)
    with torch.no_grad(), frozen_results(layer):
        layer(inputs)
    layer(inputs)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


# --------------------------------------------------------------------------------------- precision, loading, copying


@pytest.mark.parametrize("ssm_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", [True, False])
def test_casts_leave_the_tensors_in_float32(ssm_type: str, dtype: torch.dtype, trainable: bool) -> None:
    layer = make_layer(ssm_type, torch.float32, trainable=trainable)
    values, inputs = copy.deepcopy(layer.state_dict()), make_inputs(20, torch.float32).to(dtype)
    expected, expected_state = layer(inputs.float(), return_state=True)
    layer.to(dtype)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, values[name]) and value.dtype == values[name].dtype
    outputs, state = layer(inputs, return_state=True)
    assert outputs.dtype == dtype and state.dtype == torch.float32
    torch.testing.assert_close(outputs.float(), expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(state, expected_state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(inputs.float())[0], expected, rtol=1e-5, atol=1e-5)


def test_tensors_are_float32_under_a_half_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = StateSpaceLayer(WIDTH, SIZE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("ssm_type", TYPES)
def test_meta_construction_and_loading(ssm_type: str) -> None:
    source = make_layer(ssm_type, torch.float32)
    with torch.device("meta"):
        layer = StateSpaceLayer(WIDTH, SIZE, ssm_type=ssm_type, num_copies=3)
    assert layer.C.is_meta and layer.kernel_length.is_meta
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    inputs = make_inputs(20, torch.float32)
    torch.testing.assert_close(layer(inputs)[0], source(inputs)[0])
    with torch.device("meta"):
        layer = StateSpaceLayer(WIDTH, SIZE, ssm_type=ssm_type, num_copies=3)
    layer.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(layer(inputs)[0], source(inputs)[0])


def test_loaded_kernel_length_is_seen() -> None:
    raw = make_layer("s4", max_length=24).eval()
    layer, inputs = make_layer("s4", max_length=24).eval(), make_inputs(20)
    layer(inputs)
    for source in (truncated(raw, 24), raw, truncated(raw, 30)):
        layer.load_state_dict(source.state_dict())
        torch.testing.assert_close(layer(inputs)[0], raw(inputs)[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("ssm_type", TYPES)
def test_copy_and_pickle(ssm_type: str) -> None:
    layer, inputs = make_layer(ssm_type, torch.float32).eval(), make_inputs(20, torch.float32)
    with torch.no_grad():
        expected = layer(inputs)[0]
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(inputs)[0], expected)
            other.C.zero_()
            assert not torch.equal(other(inputs)[0], expected)
        assert torch.equal(layer(inputs)[0], expected)


@pytest.mark.parametrize(
    "ssm_type, init", [("s4", "legs"), ("s4d", "legs"), ("s4d", "lin"), ("s4d", "inv"), ("s4d", "real")]
)
def test_initial_values_go_through_the_given_functions(ssm_type: str, init: str) -> None:
    layer = StateSpaceLayer(WIDTH, SIZE, ssm_type=ssm_type, init=init, dt_min=0.01, dt_max=0.02)
    assert layer.log_dt.exp().min() >= 0.01 and layer.log_dt.exp().max() <= 0.02
    assert layer(make_inputs(9, torch.float32))[0].isfinite().all()
    written, loaded = [], layer.C.clone()

    def write(value: object):  # noqa: ANN202
        def into(tensor: torch.Tensor, *args: object, **kwargs: object) -> None:
            written.append(tensor)
            if tensor is not layer.C:  # as if C came from a checkpoint
                getattr(tensor, value)(*args, **kwargs)

        return into

    layer.initialize(SimpleNamespace(normal_=write("normal_"), uniform_=write("uniform_"), copy_=write("copy_")))
    assert {id(tensor) for tensor in written} == {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    assert torch.equal(layer.C, loaded)


@pytest.mark.parametrize("ssm_type", TYPES)
def test_gradient_checkpointing(ssm_type: str) -> None:
    layer, inputs = make_layer(ssm_type), make_inputs(20).requires_grad_()
    leaves = [inputs, *layer.parameters()]
    expected = torch.autograd.grad(layer(inputs)[0].square().sum(), leaves)
    for reentrant in (False, True):
        layer.zero_grad()
        inputs.grad = None
        outputs, _ = torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=reentrant)
        outputs.square().sum().backward()
        torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.parametrize("ssm_type", TYPES)
@pytest.mark.parametrize("bidirectional", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_compiles_in_full_graph(ssm_type: str, bidirectional: bool) -> None:
    torch._dynamo.reset()
    layer, inputs = make_layer(ssm_type, bidirectional=bidirectional), make_inputs(20)
    compiled, leaves = torch.compile(layer, fullgraph=True, backend="aot_eager"), list(layer.parameters())
    expected = torch.autograd.grad(layer(inputs)[0].square().sum(), leaves)
    actual = torch.autograd.grad(compiled(inputs)[0].square().sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    if not bidirectional:
        with torch.no_grad():
            state = layer(inputs, return_state=True)[1]
            torch.testing.assert_close(compiled(inputs, state, True), layer(inputs, state, True))


def test_compiled_layer_sees_a_loaded_kernel_length() -> None:
    torch._dynamo.reset()
    raw = make_layer("s4", max_length=24)
    layer, inputs = copy.deepcopy(raw), make_inputs(20)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = raw(inputs)[0]
        torch.testing.assert_close(compiled(inputs)[0], expected)
        layer.load_state_dict(truncated(raw, 24).state_dict())
        torch.testing.assert_close(compiled(inputs)[0], expected, rtol=1e-7, atol=1e-7)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ssm_type": "s5"}, "`ssm_type`"),
        ({"ssm_type": "s4", "init": "lin"}, "`init`"),
        ({"state_size": 7}, "`state_size`"),
        ({"num_copies": 4}, "`num_copies`"),
        ({"channels": 0}, "`channels`"),
        ({"dt_min": 0.1, "dt_max": 0.01}, "`dt_min`"),
        ({"max_length": 0}, "`max_length`"),
        ({"discretization": "euler"}, "`discretization`"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StateSpaceLayer(WIDTH, **options)


def test_bad_inputs() -> None:
    layer = make_layer("s4d")
    with pytest.raises(ValueError, match="`hidden_states` must have shape"):
        layer(torch.zeros(2, 5, WIDTH + 1))
    with pytest.raises(ValueError, match="`hidden_states` must have shape"):
        layer(make_inputs(0))
    with pytest.raises(ValueError, match="The state must have shape"):
        layer(make_inputs(4), torch.zeros(1, WIDTH, SIZE // 2, 2))
    both = make_layer("s4d", bidirectional=True)
    with pytest.raises(ValueError, match="no state"):
        both(make_inputs(4), return_state=True)
    with pytest.raises(ValueError, match="no state"):
        both.step(make_inputs(1))

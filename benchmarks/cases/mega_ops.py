"""Numerical core of Mega: the damped moving average and gated attention, forward and backward, float32, batch 1."""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer

FEATURES, COMPONENTS = 512, 16
SHARED, VALUES, CHUNK = 128, 1024, 128


def _train_step(function: Callable, inputs: list) -> Callable[[], object]:
    """Forward and backward of a function of tensors that need gradients."""
    import torch

    torch.manual_seed(1)
    gradient = torch.randn(function(*inputs).shape)
    return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def _check_same(functions: list[Callable], inputs: list, tolerance: float) -> None:
    """Outputs and gradients of all functions agree with the first, relative to the peak of each tensor."""
    import torch

    results = []
    for function in functions:
        outputs = function(*inputs)
        results.append((outputs.detach(), *torch.autograd.grad(outputs, inputs, torch.ones_like(outputs))))
    for other in results[1:]:
        for actual, expected in zip(other, results[0]):
            error = ((actual - expected).abs().amax() / expected.abs().amax()).item()
            if not error <= tolerance:
                raise AssertionError(f"relative error {error:.2e} exceeds {tolerance}")


# --------------------------------------------------------------------------------------------------- moving average


def _layer(bidirectional: bool):
    import torch

    from hf_hybrid.layers.ema import MultiDimensionalDampedEma

    torch.manual_seed(0)
    return MultiDimensionalDampedEma(FEATURES, COMPONENTS, bidirectional=bidirectional)


def _states(length: int):
    import torch

    return torch.randn(1, length, FEATURES, generator=torch.Generator().manual_seed(0))


def _ours(layer) -> Callable:
    import torch

    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *parameters: torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))[0]


def _direct(x, delta, alpha, beta, gamma, omega):
    """As published: the kernel from the tensor of all powers of all components, and an FFT of twice the length."""
    import torch

    length, features = x.shape[1:]
    p = torch.sigmoid(delta)
    log_q = torch.log(1 - p * torch.sigmoid(alpha))
    powers = torch.exp(log_q * torch.arange(length).view(1, 1, length))  # (K, N, L)
    kernel = torch.einsum("knl,kn->kl", p * beta * powers, gamma / COMPONENTS**0.5)
    n_fft = 2 * length
    if len(kernel) > features:
        forward, backward = kernel.split(features)
        kernel = torch.nn.functional.pad(forward, (0, length)) + torch.nn.functional.pad(
            backward.flip(-1), (length, 0)
        ).roll(1, -1)
    spectrum = torch.fft.rfft(x.mT, n=n_fft) * torch.fft.rfft(kernel, n=n_fft)
    return torch.nn.functional.silu(torch.fft.irfft(spectrum, n=n_fft)[..., :length].mT + omega * x)


def _ema_inputs(layer, length: int) -> list:
    return [_states(length).requires_grad_(), *layer.parameters()]


def ema(length: int, bidirectional: bool) -> Callable[[], object]:
    layer = _layer(bidirectional)
    return _train_step(_ours(layer), _ema_inputs(layer, length))


def ema_direct(length: int, bidirectional: bool) -> Callable[[], object]:
    return _train_step(_direct, _ema_inputs(_layer(bidirectional), length))


def check_ema(length: int, bidirectional: bool) -> None:
    layer = _layer(bidirectional)
    _check_same([_direct, _ours(layer)], _ema_inputs(layer, 2048), tolerance=1e-4)


def direct_tensor(length: int, bidirectional: bool) -> int:
    """One tensor of all powers, of which the direct form makes several; and 32 MB for libraries."""
    return (1 + bidirectional) * FEATURES * COMPONENTS * length * 4 + 2**25


# -------------------------------------------------------------------------------------------------------- attention


def _attention_inputs(length: int, entries: int) -> list:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = ((1, length, SHARED), (1, length, SHARED), (1, length, VALUES), (entries,))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _blocked(activation: str, chunked: bool) -> Callable:
    from hf_hybrid.ops.gated_attention import gated_attention

    options = {"activation": activation, "chunk_size": CHUNK if chunked else None, "causal": True}
    return lambda query, key, value, bias: gated_attention(query, key, value, bias=bias, **options)


def _dense(activation: str, chunked: bool) -> Callable:
    """All scores of all chunks in one tensor, as published."""
    import torch

    from hf_hybrid.ops.gated_scores import activate
    from hf_hybrid.ops.relative_position import toeplitz_bias

    def attend(query, key, value, bias):
        size = CHUNK if chunked else query.shape[1]
        query, key, value = (states.unflatten(1, (-1, size)) for states in (query, key, value))
        divisor = SHARED**0.5 if activation == "softmax" else torch.arange(1, size + 1).view(size, 1)
        scores = query @ key.mT / divisor + toeplitz_bias(bias, size, size, shift=size - 1)
        future = torch.ones(size, size, dtype=torch.bool).triu(1)
        return (activate(scores.masked_fill(future, -torch.inf), activation) @ value).flatten(1, 2)

    return attend


def _entries(length: int, chunked: bool) -> int:
    return 2 * (CHUNK if chunked else length) - 1


def attention(length: int, activation: str, chunked: bool) -> Callable[[], object]:
    return _train_step(_blocked(activation, chunked), _attention_inputs(length, _entries(length, chunked)))


def attention_dense(length: int, activation: str, chunked: bool) -> Callable[[], object]:
    return _train_step(_dense(activation, chunked), _attention_inputs(length, _entries(length, chunked)))


def check_attention(length: int, activation: str, chunked: bool) -> None:
    contenders = [_dense(activation, chunked), _blocked(activation, chunked)]
    _check_same(contenders, _attention_inputs(512, _entries(512, chunked)), tolerance=1e-4)


def _ema_case(name: str, bidirectional: bool, at_least: float) -> Case:
    directions = "both directions" if bidirectional else "causal"
    return Case(
        name=name,
        timed=f"damped moving average, {directions}, D {FEATURES}, N {COMPONENTS}, float32, forward and backward",
        build="ema",
        sizes=tuple({"length": length, "bidirectional": bidirectional} for length in (2048, 8192)),
        check="check_ema",
        peers=(Peer("kernel by all powers, FFT", "ema_direct", at_least=at_least),),
        memory_at_most="direct_tensor",
    )


def _attention_case(name: str, activation: str, chunked: bool, lengths: tuple[int, ...], at_least: float) -> Case:
    extent = f"chunks of {CHUNK}" if chunked else "whole sequence"
    return Case(
        name=name,
        timed=f"{activation} attention, {extent}, causal, Z {SHARED}, E {VALUES}, float32, forward and backward",
        build="attention",
        sizes=tuple({"length": length, "activation": activation, "chunked": chunked} for length in lengths),
        check="check_attention",
        peers=(Peer("all scores at once", "attention_dense", at_least=at_least),),
    )


CASES = (
    _ema_case("mega-ema", False, at_least=10.0),
    _ema_case("mega-ema-bidirectional", True, at_least=10.0),
    _attention_case("mega-attention-chunks", "softmax", True, (4096, 16384), at_least=0.9),
    _attention_case("mega-attention-chunks-laplace", "laplace", True, (4096, 16384), at_least=0.9),
    _attention_case("mega-attention", "softmax", False, (1024, 4096), at_least=1.0),
    _attention_case("mega-attention-laplace", "laplace", False, (1024, 4096), at_least=1.0),
)

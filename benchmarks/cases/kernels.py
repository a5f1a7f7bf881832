"""Convolution kernels of state space models."""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer

CHANNELS, MODES = 512, 16


def _diagonal_system(modes: int, channels: int = CHANNELS):
    import torch

    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(channels, modes, generator=generator)
    log_decay = -torch.rand(channels, modes, generator=generator) * 0.1
    return coefficients, log_decay


def diagonal_two_level(length: int) -> Callable[[], object]:
    from hf_hybrid.ops.diagonal_ssm import diagonal_kernel

    coefficients, log_decay = _diagonal_system(MODES)
    return lambda: diagonal_kernel(coefficients, None, log_decay, None, length)


def diagonal_direct(length: int) -> Callable[[], object]:
    from hf_hybrid.ops.diagonal_ssm import diagonal_kernel_reference

    coefficients, log_decay = _diagonal_system(MODES)
    return lambda: diagonal_kernel_reference(coefficients, None, log_decay, None, length)


def check_diagonal(length: int) -> None:
    import torch

    from hf_hybrid.ops.diagonal_ssm import diagonal_kernel, diagonal_kernel_reference

    system = [tensor.double() for tensor in _diagonal_system(MODES)]
    expected = diagonal_kernel_reference(system[0], None, system[1], None, length)
    actual = diagonal_kernel(system[0], None, system[1], None, length)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    single = diagonal_kernel(system[0].float(), None, system[1].float(), None, length)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


def quarter_of_direct_tensor(length: int) -> int:
    return CHANNELS * MODES * length * 4 // 4


def _state_space_layer(dtype: str = "float32", channels: int = CHANNELS):
    import torch

    from hf_hybrid.layers.ssm import StateSpaceLayer

    torch.manual_seed(0)
    return StateSpaceLayer(channels, 64, ssm_type="s4", max_length=16384).to(getattr(torch, dtype))


def s4_kernel(length: int) -> Callable[[], object]:
    """In training mode, so that no cached kernel is returned."""
    import torch

    layer = _state_space_layer()

    def step() -> object:
        with torch.no_grad():
            layer.train()
            return layer.kernel(length)

    return step


def check_s4(length: int) -> None:
    """Accuracy at the longest length, of some of the channels."""
    import torch

    with torch.no_grad():
        single, double = (_state_space_layer(dtype, 64).train().kernel(16384) for dtype in ("float32", "float64"))
    error = ((single.double() - double).abs().amax() / double.abs().amax()).item()
    if not error <= 1e-5:
        raise AssertionError(f"float32 S4 kernel: relative error {error:.2e} exceeds 1e-5")


CASES = (
    Case(
        name="diagonal-kernel",
        timed=f"kernel of a real diagonal system, D {CHANNELS}, N {MODES}, float32, forward; two-level product",
        build="diagonal_two_level",
        sizes=({"length": 4096}, {"length": 16384}),
        check="check_diagonal",
        peers=(Peer("direct", "diagonal_direct", at_least=25.0, floor_from=16384),),
        memory_at_most="quarter_of_direct_tensor",
    ),
    Case(
        name="s4-kernel",
        timed=f"DPLR kernel of {CHANNELS} features, N 64, float32, forward; checked to 1e-5 against float64",
        build="s4_kernel",
        sizes=({"length": 4096}, {"length": 16384}),
        check="check_s4",
    ),
)

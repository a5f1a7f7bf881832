"""Window attention with a learned relative bias: forward and backward, 8 heads of 64, radius 127, float32, batch 1."""

from __future__ import annotations

from collections.abc import Callable

from harness import Case, Peer

HEADS, WIDTH, RADIUS = 8, 64, 127


def _inputs(length: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, length, HEADS, WIDTH, generator=generator).transpose(1, 2) for _ in range(4)]
    bias = torch.randn(HEADS, 2 * RADIUS + 1, generator=generator)
    return [tensor.requires_grad_() for tensor in (*states[:3], bias)], states[3]


def _train_step(attend: Callable, length: int) -> Callable[[], object]:
    import torch

    inputs, gradient = _inputs(length)
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)


def _blocked(query, key, value, bias):
    from hf_hybrid.ops.local_attention import local_attention

    return local_attention(query, key, value, radius=RADIUS, bias=bias)


def _dense(query, key, value, bias):
    from hf_hybrid.ops.local_attention import local_attention_reference

    return local_attention_reference(query, key, value, radius=RADIUS, bias=bias)


def _sdpa_blocks(query, key, value, bias):
    """Blocks of r + 1 queries and `scaled_dot_product_attention`, which takes its unfused form for a trained bias."""
    import torch.nn.functional as F

    length, block = query.shape[2], RADIUS + 1
    span = block + 2 * RADIUS
    keys, values = (
        F.pad(s, (0, 0, RADIUS, RADIUS))[0].unfold(1, span, block).mT.transpose(0, 1) for s in (key, value)
    )
    extended = F.pad(bias, (block - 1, block - 1), value=-1e9)
    mask = extended.unfold(-1, span, 1).flip(-2).expand(length // block, -1, -1, -1).clone()
    mask[0, :, :, :RADIUS] = mask[-1, :, :, -RADIUS:] = -1e9
    queries = query[0].unflatten(1, (-1, block)).transpose(0, 1)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(0, 1).flatten(1, 2)[None]


def blocked(length: int) -> Callable[[], object]:
    return _train_step(_blocked, length)


def sdpa_blocks(length: int) -> Callable[[], object]:
    return _train_step(_sdpa_blocks, length)


def dense(length: int) -> Callable[[], object]:
    return _train_step(_dense, length)


def check(length: int) -> None:
    import torch

    inputs, gradient = _inputs(min(length, 1024))
    expected = _dense(*inputs)
    gradients = torch.autograd.grad(expected, inputs, gradient)
    for attend in (_blocked, _sdpa_blocks):
        actual = attend(*inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for got, wanted in zip(torch.autograd.grad(actual, inputs, gradient), gradients):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


CASES = (
    Case(
        name="local-attention",
        timed=__doc__,
        build="blocked",
        sizes=({"length": 2048}, {"length": 8192}),
        check="check",
        peers=(
            Peer("blocks by SDPA", "sdpa_blocks", at_least=1.0),
            Peer("dense with a band mask", "dense", at_least=2.0, sizes=(0,)),
        ),
    ),
)

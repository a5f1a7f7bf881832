"""Linear-time attention over quantised keys against its definition: lengths, chunks, padding, memory, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.ops import vq_attention as module
from hf_hybrid.ops import vq_scores
from hf_hybrid.ops.code_memory import CodeMemory, empty_memory, remember
from hf_hybrid.ops.vq_attention import vq_attention, vq_attention_reference, vq_token_attention

pytestmark = pytest.mark.both_branches

D, E = 3, 4
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(
    length: int,
    *,
    batch: int = 2,
    heads: int = 2,
    size: int = 5,
    window: int = 4,
    causal: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """Tensors of a call; query, key, value and bias take gradients."""
    entries = window if causal else 2 * window - 1
    trained = {
        "query": torch.randn(batch, heads, length, D, dtype=dtype),
        "key": torch.randn(batch, heads, length, D, dtype=dtype),
        "value": torch.randn(batch, heads, length, E, dtype=dtype),
        "window_bias": torch.randn(heads, entries, dtype=dtype),
    }
    return {name: tensor.requires_grad_() for name, tensor in trained.items()} | {
        "codes": torch.randint(size, (batch, heads, length)),
        "codebook": torch.randn(heads, size, D, dtype=dtype),
        "causal": causal,
    }


def padding(kind: str, batch: int, length: int) -> torch.Tensor | None:
    places = torch.arange(length).expand(batch, -1)
    if kind == "none":
        return None
    amounts = torch.randint(0, length + 1, (batch, 1))  # may be everything
    if kind == "left":
        return places >= amounts
    if kind == "right":
        return places < length - amounts
    return torch.rand(batch, length) > 0.5


def gradients(outputs: torch.Tensor, call: dict[str, torch.Tensor], weight: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = [name for name, tensor in call.items() if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    found = torch.autograd.grad(outputs, [call[name] for name in trained], weight)
    return dict(zip(trained, found))


def composed(
    call: dict[str, torch.Tensor],
    chunk_size: int,
    mask: torch.Tensor | None,
    memory=None,
    far_key_gradient: bool = True,
) -> torch.Tensor:
    """The form of accelerators and exported graphs."""
    names = ("query", "key", "value", "codes", "codebook", "window_bias")
    settings = mask, memory, chunk_size, call["causal"], far_key_gradient
    return module._composed_attention(*(call[name] for name in names), *settings)


@pytest.fixture(params=["one part", "many parts"])
def parts(request, monkeypatch) -> None:
    """With small parts, tiny inputs take the ways of long ones."""
    if request.param == "many parts":
        monkeypatch.setattr(vq_scores, "PAIRS_AT_A_TIME", 150)


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition_with_its_gradients(causal: bool, parts) -> None:
    """Any length, chunk, window, number of codewords (1, and more than tokens) and padding."""

    @given(
        length=st.integers(1, 45),
        window=st.integers(1, 6),
        more=st.integers(0, 9),
        size=st.sampled_from([1, 3, 60]),
        heads=st.integers(1, 2),
        kind=st.sampled_from(["none", "left", "right", "inside"]),
        far=st.booleans(),
    )
    def check(length: int, window: int, more: int, size: int, heads: int, kind: str, far: bool) -> None:
        chunk_size = max(window - 1, 1) + more
        call = inputs(length, heads=heads, size=size, window=window, causal=causal)
        mask = padding(kind, 2, length)
        options = {"chunk_size": chunk_size, "key_mask": mask, "far_key_gradient": far}
        expected = vq_attention_reference(**call, **options)
        weight = torch.randn_like(expected)
        wanted = gradients(expected, call, weight)
        for actual in (
            vq_attention(**call, **options),
            composed(call, chunk_size, mask, far_key_gradient=far),
        ):
            torch.testing.assert_close(actual, expected, **TIGHT)
            for name, gradient in gradients(actual, call, weight).items():
                torch.testing.assert_close(gradient, wanted[name], **TIGHT, msg=name)

    check()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 29])
def test_result_does_not_depend_on_the_chunks(causal: bool, length: int) -> None:
    call = inputs(length, window=5, causal=causal, dtype=torch.float32)
    expected = vq_attention(**call, chunk_size=64)
    for chunk_size in (4, 5, 8, 10, 29):
        torch.testing.assert_close(vq_attention(**call, chunk_size=chunk_size), expected, rtol=1e-5, atol=1e-5)


def test_float32_is_within_rounding_of_float64() -> None:
    call = inputs(200, size=8)
    low = {name: t.detach().float() if getattr(t, "dtype", None) == torch.float64 else t for name, t in call.items()}
    expected = vq_attention_reference(**call, chunk_size=16)
    torch.testing.assert_close(vq_attention(**low, chunk_size=16).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_of_values_and_bias(causal: bool) -> None:
    """With fixed codes, these gradients are those of the function itself."""
    call = inputs(11, batch=1, size=3, window=3, causal=causal)
    mask = torch.arange(11).unsqueeze(0) > 1

    def attend(query: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return vq_attention(
            query, call["key"].detach(), value, call["codes"], call["codebook"], bias, chunk_size=2, causal=causal,
            key_mask=mask,
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (call["query"], call["value"], call["window_bias"]))


def test_one_chunk_is_the_plain_straight_through_estimator() -> None:
    call = inputs(9)
    outputs = vq_attention(**call, chunk_size=9)
    weight = torch.randn_like(outputs)
    heads = torch.arange(2)[:, None]
    key = call["key"]
    through = key + (call["codebook"][heads, call["codes"]] - key).detach()
    scores = call["query"] @ through.mT
    distance = torch.arange(9)[:, None] - torch.arange(9)
    scores = scores + torch.where((distance >= 0) & (distance < 4), call["window_bias"][:, distance.clamp(0, 3)], 0)
    expected = torch.softmax(scores.masked_fill(distance < 0, -torch.inf), -1) @ call["value"]
    torch.testing.assert_close(outputs, expected, **TIGHT)
    wanted = gradients(expected, call, weight)
    for name, gradient in gradients(outputs, call, weight).items():
        torch.testing.assert_close(gradient, wanted[name], **TIGHT, msg=name)


class TestMemory:
    @pytest.mark.parametrize("window", [1, 2, 5])
    def test_any_split_of_the_text(self, window: int) -> None:
        """Pieces with a memory between them equal one pass; the memory is that of one pass."""
        length = 23
        call = inputs(length, window=window)
        call = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in call.items()}
        mask = padding("inside", 2, length)
        mask[1, :4] = False
        expected = vq_attention_reference(**call, chunk_size=4 + window, key_mask=mask)
        whole = remember(empty_memory(call["codes"], call["value"], 5, window), call["codes"], call["value"], mask)

        @given(cuts=st.sets(st.integers(1, length - 1), max_size=8), chunk_size=st.integers(max(window - 1, 1), 12))
        def check(cuts: set[int], chunk_size: int) -> None:
            memory, results = empty_memory(call["codes"], call["value"], 5, window), []
            for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), length]):
                piece = {
                    name: tensor[:, :, start:stop] if name in ("query", "key", "value", "codes") else tensor
                    for name, tensor in call.items()
                }
                part = mask[:, start:stop]
                actual = vq_attention(**piece, chunk_size=chunk_size, key_mask=part, memory=memory)
                torch.testing.assert_close(composed(piece, chunk_size, part, memory), actual, **TIGHT)
                results.append(actual)
                after = remember(memory, piece["codes"], piece["value"], part)
                if stop - start == 1:
                    copy = CodeMemory(*(tensor.clone() for tensor in memory))
                    piece = {name: tensor for name, tensor in piece.items() if name not in ("key", "causal")}
                    token, changed = vq_token_attention(**piece, memory=copy, key_mask=part)
                    for found, wanted in zip((token, *changed), (actual, *after)):
                        torch.testing.assert_close(found, wanted, **TIGHT)
                memory = after
            torch.testing.assert_close(torch.cat(results, dim=2), expected, **TIGHT)
            for actual, wanted in zip(memory, whole):
                torch.testing.assert_close(actual, wanted, **TIGHT)

        with torch.no_grad():
            check()

    def test_size_is_constant(self) -> None:
        call = inputs(40, dtype=torch.float32)
        shapes = []
        for length in (1, 3, 40):
            memory = empty_memory(call["codes"], call["value"], 5, 4)
            memory = remember(memory, call["codes"][..., :length], call["value"][:, :, :length].detach(), None)
            shapes.append([(part.shape, part.untyped_storage().nbytes()) for part in memory])
        assert shapes[0] == shapes[1] == shapes[2]

    @torch.no_grad()
    def test_a_token_in_one_graph(self) -> None:
        call = inputs(1)
        memory = empty_memory(call["codes"], call["value"], 5, 1)
        one_graph = torch.compile(remember, fullgraph=True, backend="eager")
        actual = one_graph(memory, call["codes"], call["value"], None)
        for part, wanted in zip(actual, remember(memory, call["codes"], call["value"], None)):
            torch.testing.assert_close(part, wanted, **TIGHT)

    def test_gradient_of_the_new_tokens(self) -> None:
        """A memory is a constant: the gradients of what follows are finite and the same in both forms."""
        call = inputs(11)
        memory = empty_memory(call["codes"], call["value"], 5, 4)
        memory = remember(memory, call["codes"].flip(-1), call["value"].detach().flip(2), None)
        outputs = vq_attention(**call, chunk_size=4, memory=memory)
        weight = torch.randn_like(outputs)
        wanted = gradients(composed(call, 4, None, memory), call, weight)
        for name, gradient in gradients(outputs, call, weight).items():
            torch.testing.assert_close(gradient, wanted[name], **TIGHT, msg=name)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_without_tokens_are_finite(causal: bool) -> None:
    call = inputs(9, causal=causal)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 5:7] = True
    for form in (lambda: vq_attention(**call, chunk_size=3, key_mask=mask), lambda: composed(call, 3, mask)):
        outputs = form()
        assert (outputs[1] == 0).all()
        assert not causal or (outputs[0, :, :5] == 0).all()
        found = gradients(outputs, call, torch.ones_like(outputs))
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert not any(found[name][1].any() for name in ("query", "key", "value"))


def test_causality_is_exact() -> None:
    call = inputs(30, dtype=torch.float32)
    call = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in call.items()}
    before = vq_attention(**call, chunk_size=4)
    changed = dict(call, value=call["value"].clone(), codes=call["codes"].clone())
    changed["value"][:, :, 17] += 1
    changed["codes"][:, :, 17] = (changed["codes"][:, :, 17] + 1) % 5
    after = vq_attention(**changed, chunk_size=4)
    assert torch.equal(before[:, :, :17], after[:, :, :17])
    assert (before[:, :, 17] != after[:, :, 17]).any()


def test_a_program_takes_any_length() -> None:
    """Of the form with chunks on both sides; causal models are exported whole in other tests."""
    long, short = (inputs(length, causal=False, dtype=torch.float32) for length in (31, 2))
    shared = {name: long[name].detach() for name in ("codebook", "window_bias")}

    class Attention(torch.nn.Module):
        def forward(self, query, key, value, codes):
            tokens = {"query": query, "key": key, "value": value, "codes": codes}
            return vq_attention(**tokens, **shared, causal=False, chunk_size=4)

    long, short = ([call[name].detach() for name in ("query", "key", "value", "codes")] for call in (long, short))
    shapes = tuple({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO} for _ in long)
    with torch.no_grad():
        program = torch.export.export(Attention(), tuple(long), dynamic_shapes=shapes).module()
        torch.testing.assert_close(program(*short), Attention()(*short), rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_type() -> None:
    call = inputs(20, dtype=torch.float32)
    low = {
        name: t.detach().bfloat16() if name in ("query", "key", "value", "window_bias") else t
        for name, t in call.items()
    }
    outputs = vq_attention(**low, chunk_size=4)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), vq_attention(**call, chunk_size=4), rtol=5e-2, atol=5e-2)


def test_bad_arguments() -> None:
    call = inputs(6, window=5)
    with pytest.raises(ValueError, match="`chunk_size` must be at least the window less one, 4"):
        vq_attention(**call, chunk_size=3)
    encoder = inputs(6, causal=False)
    memory = empty_memory(encoder["codes"], encoder["value"], 5, 4)
    with pytest.raises(ValueError, match="`memory` needs `causal=True`"):
        vq_attention(**encoder, chunk_size=4, memory=memory)

"""Attention over the packed stream of active tokens: equal to its definition for every activation, bias, window and density."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.ops import packed_attention as engine
from hf_hybrid.ops.compaction import (
    ActiveTokens,
    active_tokens,
    add_active,
    compacted_attention,
    compacted_attention_reference,
    gather_active,
    rotary_table,
    rotate_pairs,
)
from hf_hybrid.ops.working_memory import (
    WorkingMemory,
    continued_attention,
    empty_memory,
    enlarge_memory,
    memory_attention,
    token_attention,
    write_memory,
)

pytestmark = pytest.mark.both_branches

WIDTH, VALUES = 6, 5
ACTIVATIONS = ("softmax", "relu2", "laplace")
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def random_active(batch: int, length: int, density: float) -> torch.Tensor:
    if density == 0:
        return torch.zeros(batch, length, dtype=torch.bool)
    if density < 0:  # a single token
        active = torch.zeros(batch, length, dtype=torch.bool)
        active[-1, length // 2] = True
        return active
    return torch.rand(batch, length) < density


def random_biases(kind: str, window: int | None) -> dict[str, torch.Tensor]:
    if kind == "rank":
        return {} if window is None else {"rank_bias": torch.randn(2 * window + 1, dtype=torch.float64)}
    if kind == "position":
        return {"position_bias": torch.randn(2 * 9 + 1, dtype=torch.float64)}
    return {}


def states(batch: int, length: int) -> list[torch.Tensor]:
    return [torch.randn(batch, length, width, dtype=torch.float64) for width in (WIDTH, WIDTH, VALUES)]


def packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, active: torch.Tensor, capacity=None, **kwargs
) -> torch.Tensor:
    tokens = active_tokens(active, capacity)
    parts = [gather_active(part, tokens) for part in (query, key, value)]
    return scatter_active(compacted_attention(*parts, tokens, **kwargs), tokens, active.shape)


def scatter_active(states: torch.Tensor, tokens: ActiveTokens, shape: tuple[int, int]) -> torch.Tensor:
    """(C, X) to (B, L, X), zeros where nothing is active."""
    states = states.masked_fill((tokens.rows < 0).unsqueeze(-1), 0)
    return add_active(states.new_zeros(*shape, states.shape[-1]), states, tokens)


@st.composite
def settings(draw):
    return {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "window": draw(st.sampled_from([None, 1, 3, 8, 200])),
        "causal": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "rank", "position"])),
        "density": draw(st.sampled_from([0.0, -1.0, 0.1, 0.5, 1.0])),
        "batch": draw(st.integers(1, 4)),
        "length": draw(st.integers(1, 90)),
        "seed": draw(st.integers(0, 1000)),
    }


def check(options: dict, form: str) -> None:
    torch.manual_seed(options["seed"])
    active = random_active(options["batch"], options["length"], options["density"])
    inputs = [part.requires_grad_() for part in states(*active.shape)]
    biases = {name: bias.requires_grad_() for name, bias in random_biases(options["bias"], options["window"]).items()}
    common = {name: options[name] for name in ("activation", "window", "causal")} | biases
    expected = compacted_attention_reference(*inputs, active, **common)
    capacity = None
    if form != "packed":
        capacity = min(int(active.sum()) + 3, active.numel()) if form == "capacity" else active.numel()
    actual = packed(*inputs, active, capacity, static=form == "static", **common)
    torch.testing.assert_close(actual, expected, **CLOSE)
    weights = torch.randn_like(expected)
    tensors = [*inputs, *biases.values()]
    want, got = (torch.autograd.grad((out * weights).sum(), tensors) for out in (expected, actual))
    for first, second in zip(got, want):
        torch.testing.assert_close(first, second, **CLOSE)


@pytest.mark.parametrize("form", ["packed", "capacity", "static"])
def test_every_form_equals_the_definition(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @given(options=settings())
    def run(options: dict) -> None:
        check(options, form)

    run()
    # small blocks and parts: many of both, cut at the borders of rows
    monkeypatch.setattr(engine, "_BLOCK", 4)
    monkeypatch.setattr(engine, "PAIRS_AT_A_TIME", 100)
    run()
    monkeypatch.setattr(engine, "_REACH_OF_SINGLE_BLOCKS", 0)  # every block on its own
    run()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", ["rank", "position"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients(activation: str, bias: str, causal: bool) -> None:
    active = torch.tensor([[1, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1]]).bool()
    tokens = active_tokens(active)
    inputs = [gather_active(part, tokens).requires_grad_() for part in states(2, 6)]
    vector = next(iter(random_biases(bias, 2).values())).requires_grad_()

    def run(query, key, value, vector):
        options = {"activation": activation, "window": 2, "causal": causal, f"{bias}_bias": vector}
        return compacted_attention(query, key, value, tokens, **options)

    assert torch.autograd.gradcheck(run, (*inputs, vector))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_keys_have_no_weight(activation: str) -> None:
    """A windowed Laplace attention that gives them any lets the future through."""
    active = torch.ones(2, 40, dtype=torch.bool)
    query, key, value = states(2, 40)
    options = {"activation": activation, "window": 4, "causal": True}
    expected = packed(query, key, value, active, **options)
    key[:, 25:], value[:, 25:] = 7.0, -50.0
    torch.testing.assert_close(packed(query, key, value, active, **options)[:, :25], expected[:, :25], rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_do_not_see_one_another(activation: str) -> None:
    """Each row alone gives what it gives in the batch, fully active neighbours or not."""
    active = random_active(3, 50, 0.3)
    active[1] = True
    inputs = states(3, 50)
    for window in (5, None):
        options = {"activation": activation, "window": window, "causal": False}
        whole = packed(*inputs, active, **options)
        for row in range(3):
            part = slice(row, row + 1)
            single = packed(*(tensor[part] for tensor in inputs), active[part], **options)
            torch.testing.assert_close(whole[part], single, **CLOSE)


def test_dropout_is_the_same_in_the_backward_pass() -> None:
    active = random_active(2, 120, 0.8)
    inputs = states(2, 120)
    inputs[2].requires_grad_()
    torch.manual_seed(3)
    output = packed(*inputs, active, activation="softmax", window=9, causal=True, dropout_p=0.4)
    gradient = torch.autograd.grad(output.sum(), inputs[2])[0]
    # outputs are linear in the values: <gradient, values> is their sum exactly when the same weights were dropped
    torch.testing.assert_close((gradient * inputs[2]).sum(), output.sum(), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(output, packed(*inputs, active, activation="softmax", window=9, causal=True))


def test_half_precision_is_computed_in_float32() -> None:
    active = random_active(2, 70, 0.7)
    query, key, value = (part.bfloat16() for part in states(2, 70))
    options = {"activation": "softmax", "window": 6, "causal": True}
    actual = packed(query, key, value, active, **options)
    assert actual.dtype == torch.bfloat16
    exact = compacted_attention_reference(query.double(), key.double(), value.double(), active, **options)
    assert (actual.double() - exact).abs().max() < 1e-2


@pytest.mark.both_branches(only="cpu")
class TestPacking:
    @given(seed=st.integers(0, 100), batch=st.integers(1, 4), length=st.integers(1, 20))
    def test_there_and_back(self, seed: int, batch: int, length: int) -> None:
        torch.manual_seed(seed)
        active = random_active(batch, length, 0.4)
        data = torch.randn(batch, length, 3)
        expected = data.masked_fill(~active.unsqueeze(-1), 0)
        total = int(active.sum())
        for capacity in (None, min(total + 3, active.numel()), active.numel()):
            tokens = active_tokens(active, capacity)
            assert tokens.index.shape[0] == (total if capacity is None else capacity)
            assert torch.equal(scatter_active(gather_active(data, tokens), tokens, (batch, length)), expected)
            rows, columns = active.nonzero(as_tuple=True)
            assert torch.equal(tokens.rows[:total], rows) and torch.equal(tokens.positions[:total], columns)
            assert (tokens.rows[total:] == -1).all()
            assert torch.equal(tokens.ranks[:total], (active.long().cumsum(-1) - 1)[rows, columns])
            assert torch.equal(tokens.counts, active.sum(-1))

    def test_nothing_active_keeps_every_gradient(self) -> None:
        tokens = active_tokens(random_active(2, 9, 0.0))
        layer = torch.nn.Linear(4, 4)
        data = torch.randn(2, 9, 4, requires_grad=True)
        states = layer(gather_active(data, tokens))
        output = compacted_attention(states, states, states, tokens, activation="softmax", window=3, causal=True)
        scatter_active(output, tokens, (2, 9)).sum().backward()
        assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (data, layer.weight, layer.bias))


class TestRotary:
    def test_products_depend_on_differences(self) -> None:
        query, key = torch.randn(2, 8, dtype=torch.float64)
        products = []
        for shift in (0, 7, 100_000):
            table = rotary_table(torch.tensor([3 + shift, 11 + shift]), 8, torch.float64)
            products.append(rotate_pairs(query, table[0]) @ rotate_pairs(key, table[1]))
        torch.testing.assert_close(products[1], products[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(products[2], products[0], rtol=1e-8, atol=1e-8)

    def test_neighbours_are_turned(self) -> None:
        states = torch.randn(5, 6, dtype=torch.float64)
        actual = rotate_pairs(states, rotary_table(torch.arange(5), 6, torch.float64))
        pairs = torch.view_as_complex(states.view(5, 3, 2))
        angles = torch.arange(5.0, dtype=torch.float64).unsqueeze(1) * 10000 ** (-torch.arange(0, 6, 2) / 6.0).double()
        expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)

    def test_odd_width(self) -> None:
        with pytest.raises(ValueError, match="even width; got 5"):
            rotary_table(torch.arange(3), 5, torch.float32)


class TestMemory:
    """A text in pieces, through the ring of the last active tokens, gives what it gives in one pass."""

    @staticmethod
    def continue_with(memory, query, key, value, active, first, options, way):
        batch, length = active.shape
        biases = {name: options[name] for name in ("rank_bias", "position_bias") if name in options}
        common = {"activation": options["activation"], "window": options["window"]} | biases
        if options["window"] is None:
            needed = int(memory.counts.max()) + length + 1
            memory = enlarge_memory(memory, max(needed, memory.keys.shape[1]))
        if way == "few":
            if length == 1:
                with torch.no_grad():
                    output, after = token_attention(query, key, value, active, memory, first, **common)
                return output.masked_fill(~active.unsqueeze(-1), 0), after
            output = memory_attention(query, key, value, active, memory, first, **common)
            output = output.masked_fill(~active.unsqueeze(-1), 0)
        else:
            tokens = active_tokens(active, active.numel() if way == "static" else None)
            parts = [gather_active(part, tokens) for part in (query, key, value)]
            found = continued_attention(*parts, tokens, memory, first, **common)
            output = scatter_active(found, tokens, (batch, length))
        tokens = active_tokens(active)
        parts = [gather_active(part, tokens) for part in (key, value)]
        return output, write_memory(memory, *parts, tokens, first)

    @pytest.mark.parametrize("way", ["few", "stream", "static"])
    def test_any_split(self, way: str) -> None:
        @given(options=settings(), cuts=st.sets(st.integers(1, 89), max_size=5))
        def run(options: dict, cuts: set[int]) -> None:
            torch.manual_seed(options["seed"])
            active = random_active(options["batch"], options["length"], options["density"])
            query, key, value = states(*active.shape)
            length, window = options["length"], options["window"]
            common = {"activation": options["activation"], "window": window} | random_biases(options["bias"], window)
            expected = compacted_attention_reference(query, key, value, active, causal=True, **common)
            borders = sorted({0, length, *(cut for cut in cuts if cut < length)})
            if length < 20:
                borders = list(range(length + 1))
            memory, outputs = empty_memory(len(active), (window or 0) + 1, key, value), []
            for start, stop in zip(borders, borders[1:]):
                piece = slice(start, stop)
                parts = (part[:, piece] for part in (query, key, value, active))
                output, memory = self.continue_with(memory, *parts, start, common, way)
                outputs.append(output)
            torch.testing.assert_close(torch.cat(outputs, 1), expected, **CLOSE)
            assert torch.equal(memory.counts, active.sum(-1))

        run()


class TestBadInput:
    def test_values(self) -> None:
        tokens = active_tokens(torch.ones(1, 4, dtype=torch.bool))
        query, key, value = (part[0] for part in states(1, 4))
        options = {"activation": "softmax", "window": 2, "causal": True}
        for wrong, match in (
            ({"activation": "gelu"}, "`activation` must be one of .*got 'gelu'"),
            ({"window": 0}, "`window` must be a positive number of active tokens, or None.*got 0"),
            ({"rank_bias": torch.zeros(7)}, "`rank_bias` needs a window.*got window 2 and shape"),
            ({"rank_bias": torch.zeros(5), "window": None}, "`rank_bias` needs a window"),
            ({"position_bias": torch.zeros(4)}, "`position_bias` must be a vector of an odd number"),
        ):
            with pytest.raises(ValueError, match=match):
                compacted_attention(query, key, value, tokens, **options | wrong)
        with pytest.raises(ValueError, match="`query`, `key` and `value` must be"):
            compacted_attention(query, key, value[:3], tokens, **options)

    @pytest.mark.parametrize("is_static", [False, True])
    def test_a_piece_between_two_memories(self, is_static: bool) -> None:
        """What sees the future has the last active tokens in front of a piece, and the first ones behind it."""
        torch.manual_seed(1)
        active = random_active(3, 40, 0.4)
        active[1, 12:31] = False
        active[2, :12] = False
        query, key, value = states(3, 40)
        common = {"activation": "laplace", "window": 4} | random_biases("position", 4)
        expected = compacted_attention_reference(query, key, value, active, causal=False, **common)[:, 12:30]

        def memory_of(piece: slice, from_end: bool) -> WorkingMemory:
            tokens = active_tokens(active[:, piece])
            if from_end:
                tokens = tokens._replace(ranks=tokens.counts[tokens.rows] - 1 - tokens.ranks)
            parts = [gather_active(part[:, piece], tokens) for part in (key, value)]
            return write_memory(empty_memory(3, 4, key, value), *parts, tokens, piece.start)

        own = slice(12, 30)
        tokens = active_tokens(active[:, own], 3 * 18 if is_static else None)
        parts = [gather_active(part[:, own], tokens) for part in (query, key, value)]
        before, behind = memory_of(slice(0, 12), False), memory_of(slice(30, 40), True)
        found = continued_attention(*parts, tokens, before, 12, behind=behind, **common)
        torch.testing.assert_close(scatter_active(found, tokens, (3, 18)), expected, rtol=1e-9, atol=1e-9)


def test_nothing_quadratic_is_allocated() -> None:
    """The largest tensor of a forward and backward pass grows with the length, not with its square."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
            return output

    sizes = {}
    for length in (2048, 4096):
        active = torch.ones(1, length, dtype=torch.bool)
        inputs = [torch.randn(1, length, 4, requires_grad=True) for _ in range(3)]
        bias = torch.randn(2 * length + 1, requires_grad=True)
        with Largest() as mode:
            packed(*inputs, active, activation="softmax", window=32, causal=False, position_bias=bias).sum().backward()
        sizes[length] = mode.size
    assert sizes[4096] <= 2.1 * sizes[2048] < length * length / 8


def test_tokens_are_a_tuple() -> None:
    assert isinstance(active_tokens(torch.ones(1, 1, dtype=torch.bool)), ActiveTokens)

"""What only SeqBoat has: routers, attention counted in active tokens, its working memory, and what it says of its activations."""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch
from factories import Case, balance_routers, parametrize, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import DynamicCache, set_seed

from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.modeling.seqboat.seqboat_heads import SeqBoatForCausalLM, SeqBoatForMaskedLM, SeqBoatModel
from hf_hybrid.modeling.seqboat.seqboat_layers import FEW_TOKENS, SeqBoatUnit
from hf_hybrid.ops.compaction import compacted_attention_reference, rotary_table
from hf_hybrid.training.activations import activation_statistics, attention_spans, record_activations

CAUSAL = Case("seqboat", "AutoModelForCausalLM", "default")
MASKED = Case("seqboat", "AutoModelForMaskedLM", "default")
ACTIVATIONS = ("softmax", "relu2", "laplace")
BIASES = ("rotary", "distance", "rank", "t5")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
STATE = {"rtol": 1e-10, "atol": 1e-10}

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_bias = pytest.mark.parametrize("bias", BIASES)


def build(case: Case, activation: str = "softmax", bias: str = "rotary", window: int | None = 4, **kwargs):
    """A perturbed model in float64 whose routers activate about half of the tokens."""
    settings = {"attention_activation": activation, "position_bias": bias, "window_size": window and window + 1}
    return case.model(**settings | kwargs).double()


def force(router: torch.nn.Module, active: bool) -> None:
    """Makes a router activate everything, or nothing."""
    with torch.no_grad():
        router.bias.copy_(torch.tensor([-50.0, 50.0] if active else [50.0, -50.0]))


def pieces(model: torch.nn.Module, ids: torch.Tensor, cuts, mask: torch.Tensor | None = None):
    """Logits of a text read in pieces, and the cache."""
    borders = [0, *sorted(cuts), ids.shape[1]]
    past, parts = None, []
    for start, stop in zip(borders, borders[1:]):
        seen = None if mask is None else mask[:, :stop]
        outputs = model(ids[:, start:stop], attention_mask=seen, past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1), past


# --------------------------------------------------------------------------------------------------------- the equations


@every_activation
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [3, None])
def test_unit_follows_its_equations(activation: str, causal: bool, window: int | None) -> None:
    settings = {"attention_activation": activation, "window_size": window and window + 1, "position_bias": "distance"}
    model = (CAUSAL if causal else MASKED).model(**settings).double()
    unit, states = model.model.layers[0].unit, torch.randn(3, 20, 16, dtype=torch.float64)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 15:] = False
    with torch.no_grad():
        output, gate, _ = unit(states, mask)
        inner = F.silu(unit.ema(unit.norm(states), mask)[0])
        logits = F.linear(inner, unit.router.weight, unit.router.bias)
        active = (logits[..., 1] > logits[..., 0]) & mask
        probability = torch.softmax(logits / unit.router.log_temperature.exp(), dim=-1)[..., 1]
        torch.testing.assert_close(gate, torch.where(active, probability, 0), **EXACT)
        shared, reset, value = F.silu(unit.in_proj(inner)).split([8, 24, 24], dim=-1)
        query, key = (shared * unit.qk_weight[row] + unit.qk_bias[row] for row in (0, 1))
        attended = compacted_attention_reference(
            query,
            key,
            value,
            active,
            activation=activation,
            window=window,
            causal=causal,
            position_bias=unit.position_bias.rel_pos_bias,
        )
        branch = unit.out_proj(attended * reset) * gate.unsqueeze(-1)
        expected = F.silu(unit.skip_proj(inner) + branch + states)
    torch.testing.assert_close(output, expected, **EXACT)
    assert 0.2 < active.double().mean() < 0.8


def test_layer_in_which_nothing_is_active() -> None:
    """The output is silu(S h + x) exactly, and every parameter still gets a gradient, of zeros where it has no part."""
    model = build(CAUSAL, bias="rank")
    unit = model.model.layers[0].unit
    force(unit.router, active=False)
    states = torch.randn(2, 9, 16, dtype=torch.float64)
    output, gate, _ = unit(states)
    inner = F.silu(unit.ema(unit.norm(states))[0])
    torch.testing.assert_close(output, F.silu(unit.skip_proj(inner) + states), rtol=0, atol=0)
    assert not gate.any()
    output.square().sum().backward()
    silent = ("router", "in_proj", "out_proj", "qk_", "position_bias")
    for name, parameter in unit.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (not name.startswith(silent)), name


def test_layer_in_which_everything_is_active() -> None:
    """It is plain window attention; a window that holds all of them changes nothing for the softmax."""
    model = build(CAUSAL)
    other = build(CAUSAL, window=None)
    other.load_state_dict(model.state_dict())
    wide = build(CAUSAL, window=40)
    wide.load_state_dict(model.state_dict())
    for candidate in (model, other, wide):
        for layer in candidate.model.layers:
            force(layer.unit.router, active=True)
    ids = random_ids(2, 30)
    with torch.no_grad():
        outputs = model(ids)
        assert (outputs.activation_rate == 1).all()
        torch.testing.assert_close(wide(ids).logits, other(ids).logits, **EXACT)
        assert (outputs.logits - other(ids).logits).abs().max() > 1e-4
        free = build(CAUSAL, always_active=True)
        missing = free.load_state_dict(model.state_dict(), strict=False)
        assert not missing.missing_keys and all(".router." in name for name in missing.unexpected_keys)
        for layer in model.model.layers:  # gates near 1: the router has no part any more
            layer.unit.router.log_temperature.fill_(-5.0)
        torch.testing.assert_close(free(ids).logits, model(ids).logits, **EXACT)


# ---------------------------------------------------------------------------------------------------------- invariances


@every_activation
@every_bias
class TestInvariance:
    def test_the_future_is_hidden(self, activation: str, bias: str) -> None:
        """Also where one row of the batch is active throughout, and in a windowed Laplace attention."""
        model = build(CAUSAL, activation, bias)
        embeds = torch.randn(3, 24, 16, dtype=torch.float64)
        changed = embeds.clone()
        changed[:, 15:] = torch.randn(3, 9, 16, dtype=torch.float64)
        with torch.no_grad():
            first, second = (model(inputs_embeds=inputs).logits[:, :15] for inputs in (embeds, changed))
        torch.testing.assert_close(first, second, **EXACT)

    def test_rows_do_not_depend_on_the_batch(self, activation: str, bias: str) -> None:
        model = build(MASKED, activation, bias)
        ids = random_ids(3, 24)
        ids[1] = 7  # a constant row, which a router may take as a whole
        with torch.no_grad():
            whole = model(ids).logits
            for row in range(3):
                torch.testing.assert_close(model(ids[row : row + 1]).logits[0], whole[row], **EXACT)

    def test_padding_on_either_side(self, activation: str, bias: str) -> None:
        for case in (CAUSAL, MASKED):
            model = build(case, activation, bias, absolute_sinusoid=True)
            ids = random_ids(2, 13)
            with torch.no_grad():
                expected = model(ids).logits
                for left, right in ((5, 0), (0, 5), (3, 4)):
                    padded = F.pad(ids, (left, right))
                    mask = F.pad(torch.ones_like(ids), (left, right))
                    logits = model(padded, attention_mask=mask).logits[:, left : left + 13]
                    torch.testing.assert_close(logits, expected, **EXACT)


@every_activation
@every_bias
@pytest.mark.parametrize("window", [3, None, *(pytest.param(window, marks=pytest.mark.wide) for window in (1, 8, 60))])
def test_any_split_of_the_text(activation: str, bias: str, window: int | None) -> None:
    """Prefill in pieces around `FEW_TOKENS`, then single tokens, with left padding."""
    if bias == "rank" and window is None:
        pytest.skip("the table of ranks has the size of the window")
    model = build(CAUSAL, activation, bias, window)
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        for cuts in (range(1, 40), [7], [FEW_TOKENS + 3, 2 * FEW_TOKENS + 4], [2, 3, 30, 31]):
            logits, past = pieces(model, ids, cuts, mask)
            torch.testing.assert_close(logits[0], expected[0], **STATE)
            torch.testing.assert_close(logits[1, 6:], expected[1, 6:], **STATE)
    slots = {layer.keys.shape[1] for layer in past.layers}
    assert slots == {window + 1} if window else max(slots) <= 64


@pytest.mark.parametrize("truncation", [None, 5])
def test_state_after_a_text_does_not_depend_on_how_it_was_read(truncation: int | None) -> None:
    model = build(CAUSAL, ema_truncation=truncation)
    ids = random_ids(2, 30)
    with torch.no_grad():
        caches = [pieces(model, ids, cuts)[1] for cuts in ([], [11], range(1, 30))]
    for layers in zip(*(cache.layers for cache in caches)):
        reference = layers[0].memory
        # The slot of the next active token may hold an inactive one.
        held = reference.ranks() >= (reference.counts.unsqueeze(-1) - reference.keys.shape[1] + 1).clamp(min=0)
        for layer in layers[1:]:
            assert torch.equal(layer.counts, reference.counts)
            for name in ("keys", "values", "positions"):
                found, wanted = (getattr(memory, name)[held] for memory in (layer, reference))
                torch.testing.assert_close(found, wanted, **STATE)


@every_activation
@pytest.mark.parametrize("window", [3, None])
def test_generation_in_double_precision(activation: str, window: int | None) -> None:
    """Greedy and beams, left-padded, with scores of the cached run equal to those without a cache."""
    model = build(CAUSAL, activation, "distance", window)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for beams in (1, 3):
        runs = []
        for use_cache in (True, False):
            set_seed(0)
            options = {"num_beams": beams, "max_new_tokens": 20, "eos_token_id": None, "use_cache": use_cache}
            options |= {"return_dict_in_generate": True, "output_logits": True}
            runs.append(model.generate(ids, attention_mask=mask, **options))
        assert runs[0].sequences.tolist() == runs[1].sequences.tolist()
        for cached, whole in zip(runs[0].logits, runs[1].logits):
            torch.testing.assert_close(cached, whole, **STATE)


# --------------------------------------------------------------------------------------------------------------- router


def test_higher_act_bias_activates_less() -> None:
    model = build(CAUSAL)
    ids = random_ids(2, 40)
    before = None
    for bias in (-1e9, -0.2, 0.0, 0.2, 1e9):
        for layer in model.model.layers:
            layer.unit.router.act_bias = bias
        with torch.no_grad():
            active = model(ids, output_activations=True).active
        if before is not None:
            assert not (active[0] & ~before).any()  # of later layers the inputs change
        before = active[0]
    assert not before.any()


def test_longer_than_any_table() -> None:
    for bias in BIASES:
        model = build(CAUSAL, bias=bias, distance_table_size=8)
        with torch.no_grad():
            assert model(random_ids(1, 200)).logits.isfinite().all()


class TestExtremes:
    @every_activation
    def test_extreme_averages(self, activation: str) -> None:
        """Decays that underflow: a float32 logarithm of them would be infinite."""
        model = build(CAUSAL, activation).float()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.unit.ema.damping_factor.fill_(40.0)
                layer.unit.ema.decay_factor.fill_(40.0)
        outputs = model(random_ids(2, 30), labels=random_ids(2, 30))
        outputs.loss.backward()
        assert outputs.logits.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    @every_activation
    @pytest.mark.parametrize("window", [3, None])
    def test_rows_of_padding_and_single_tokens(self, activation: str, window: int | None) -> None:
        model = build(CAUSAL, activation, window=window)
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1] = 0
        for active in (True, False):
            for layer in model.model.layers:
                force(layer.unit.router, active)
            outputs = model(random_ids(2, 9), attention_mask=mask, use_cache=True)
            assert outputs.logits.isfinite().all() and model(random_ids(1, 1)).logits.isfinite().all()
            more = torch.cat([mask, torch.tensor([[1], [0]])], dim=1)
            past = outputs.past_key_values
            assert model(random_ids(2, 1), attention_mask=more, past_key_values=past).logits.isfinite().all()
        nothing = model(random_ids(2, 9), attention_mask=torch.zeros_like(mask), output_activations=True)
        assert nothing.logits.isfinite().all() and not nothing.activation_rate.any()

    def test_autocast_decides_like_float32(self) -> None:
        """Of one layer: what later layers see is rounded, so that tokens at the threshold may differ."""
        model = MASKED.model(hidden_size=64, num_hidden_layers=1)
        ids = random_ids(4, 200)
        with torch.no_grad():
            expected = model(ids, output_activations=True).active[0]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                actual = model(ids, output_activations=True).active[0]
        assert (actual == expected).double().mean() >= 0.99


# ----------------------------------------------------------------------------------------------------------- activations


class TestActivations:
    def test_outputs(self) -> None:
        model = build(CAUSAL)
        ids = random_ids(2, 12)
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        plain = model(ids, attention_mask=mask)
        assert plain.active is None and plain.gate_probs is None and plain.auxiliary_loss is None
        outputs = model(ids, attention_mask=mask, output_activations=True)
        assert len(outputs.active) == len(outputs.gate_probs) == 2
        for rate, active, gate in zip(outputs.activation_rate.unbind(-1), outputs.active, outputs.gate_probs):
            assert active.shape == gate.shape == (2, 12) and active.dtype == torch.bool
            assert torch.equal(active, gate > 0) and not active[1, 9:].any()
            assert (gate[active] > 0.5).all() and (gate <= 1).all()
            expected = active.sum(-1) / torch.tensor([12.0, 9.0])
            torch.testing.assert_close(rate, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(outputs.activation_rate, plain.activation_rate)
        by_config = CAUSAL.model(output_activations=True)(ids)
        assert by_config.active is not None

    @parametrize([Case("seqboat", f"AutoModelFor{name}Classification", "default") for name in ("Image", "Audio")])
    def test_outputs_of_real_valued_heads(self, case: Case) -> None:
        outputs = case.model()(**case.inputs(), output_activations=True)
        assert len(outputs.active) == 2 and outputs.activation_rate.shape == (2, 2)

    def test_spans(self) -> None:
        active = torch.tensor([[1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]).bool()
        nan = float("nan")
        for window, causal, expected in (
            (1, True, [nan, 3.0, 1.0, 2.0, nan]),
            (2, True, [nan, 3.0, 2.5, 2.5, nan]),
            (None, False, [13 / 3, 7 / 3, 7 / 3, 11 / 3, nan]),
        ):
            spans = attention_spans(active, window, causal)
            torch.testing.assert_close(spans, torch.tensor(expected).double(), equal_nan=True, rtol=1e-6, atol=0)
        assert attention_spans(torch.zeros(2, 5, dtype=torch.bool), 2, True).numel() == 0

    @given(seed=st.integers(0, 50), window=st.sampled_from([1, 3, None]), causal=st.booleans())
    def test_spans_from_their_definition(self, seed: int, window: int | None, causal: bool) -> None:
        torch.manual_seed(seed)
        active = torch.rand(2, 15) < 0.5
        expected = []
        for row in active:
            places = row.nonzero()[:, 0].tolist()
            for rank, place in enumerate(places):
                others = [
                    abs(place - key)
                    for other, key in enumerate(places)
                    if other != rank
                    and (window is None or abs(other - rank) <= window)
                    and (other < rank or not causal)
                ]
                expected.append(sum(others) / len(others) if others else float("nan"))
        found = attention_spans(active, window, causal)
        torch.testing.assert_close(found, torch.tensor(expected).double(), equal_nan=True, rtol=1e-6, atol=0)

    def test_statistics_leave_padding_out(self) -> None:
        model = build(MASKED)
        ids = random_ids(2, 14)
        plain = activation_statistics(model, [{"input_ids": ids}])
        mask = F.pad(torch.ones_like(ids), (3, 4))
        padded = activation_statistics(model, [{"input_ids": F.pad(ids, (3, 4)), "attention_mask": mask}])
        assert [layer.layer for layer in plain] == [0, 1]
        for first, second in zip(plain, padded):
            assert asdict(second) == pytest.approx(asdict(first), rel=1e-9)
        assert plain[0].sequences == 2 and 0 < plain[0].rate < 1 and plain[0].saving == 1 - plain[0].rate

    def test_statistics_of_generation_are_those_of_one_pass(self) -> None:
        model = build(CAUSAL)
        ids = random_ids(2, 8)
        with record_activations(model) as recorded:
            sequences = model.generate(ids, max_new_tokens=10, min_new_tokens=10, eos_token_id=None)
        gates = [torch.cat(layer, dim=1) for layer in recorded]
        whole = model(sequences[:, :-1], output_activations=True).gate_probs
        for found, expected in zip(gates, whole):
            torch.testing.assert_close(found, expected, **STATE)

    def test_generation_returns_them_for_every_pass(self) -> None:
        model = build(CAUSAL)
        ids = random_ids(2, 8)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        options = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
        found = model.generate(ids, output_activations=True, **options)
        assert [part[0].shape for part in found.active] == [(2, 8), *[(2, 1)] * 5]
        whole = F.pad(mask, (0, 5), value=1)
        expected = model(found.sequences[:, :-1], attention_mask=whole, output_activations=True)
        for name in ("active", "gate_probs"):
            for layer, parts in enumerate(zip(*found[name])):
                torch.testing.assert_close(torch.cat(parts, dim=1), getattr(expected, name)[layer], **STATE)
        beams = model.generate(ids, output_activations=True, num_beams=3, **options)
        assert beams.gate_probs[-1][0].shape == (6, 1)
        assert "active" not in model.generate(ids, **options) and not model._forward_hooks
        with pytest.raises(ValueError, match="`output_activations=True` needs `return_dict_in_generate=True`"):
            model.generate(ids, output_activations=True)
        assert torch.is_tensor(build(CAUSAL, output_activations=True).generate(ids, max_new_tokens=1))

    def test_penalty_of_pairs_counts_both_texts(self) -> None:
        case = Case("seqboat", "AutoModelForSequenceClassification", "default")
        settings = {"dead_layer_loss_weight": 1.0, "dead_layer_min_rate": 1.0}
        ids, others = random_ids(2, 6), random_ids(2, 9)
        pair = case.model(dual_encoder=True, **settings)
        expected = (pair.model(ids).auxiliary_loss + pair.model(others).auxiliary_loss) / 2
        torch.testing.assert_close(pair(ids, pair_input_ids=others).auxiliary_loss, expected)

    def test_dead_layers_are_revived_on_request(self) -> None:
        """Without the term of the loss a silent router has no gradient; with it training wakes the layer."""
        for weight, revived in ((0.0, False), (1.0, True)):
            model = CAUSAL.model(dead_layer_loss_weight=weight, dead_layer_min_rate=0.1).train()
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.unit.router.bias.copy_(torch.tensor([3.0, -3.0]))
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            ids = random_ids(2, 20)
            for _ in range(40):
                outputs = model(ids, labels=ids)
                optimizer.zero_grad()
                outputs.loss.backward()
                for layer in model.model.layers:
                    if not revived:
                        assert not layer.unit.router.bias.grad.any()
                for name, parameter in model.named_parameters():
                    if "router" not in name:
                        parameter.grad = None
                optimizer.step()
            assert (outputs.auxiliary_loss is not None) == revived
            assert bool((outputs.activation_rate.mean(0) >= 0.1).all()) == revived

    def test_penalty_vanishes_with_enough_active_tokens(self) -> None:
        model = CAUSAL.model(dead_layer_loss_weight=1.0)
        ids = random_ids(2, 20)
        outputs = model(ids, labels=ids)
        assert outputs.auxiliary_loss == 0 and (outputs.activation_rate.mean(0) > 0.02).all()
        other = CAUSAL.model()
        torch.testing.assert_close(other(ids, labels=ids).loss, outputs.loss)


# ------------------------------------------------------------------------------------------------------------ bad input


class TestBadInput:
    def test_heads_that_do_not_fit_the_stack(self) -> None:
        with pytest.raises(
            ValueError, match="SeqBoatForCausalLM needs a configuration with `is_decoder=True`; got False"
        ):
            SeqBoatForCausalLM(SeqBoatConfig())
        with pytest.raises(ValueError, match="SeqBoatForMaskedLM needs a configuration with `is_decoder=False`"):
            SeqBoatForMaskedLM(SeqBoatConfig(is_decoder=True))

    def test_foreign_caches(self) -> None:
        model = CAUSAL.model()
        ids = random_ids(2, 6)
        with pytest.raises(ValueError, match=r"`past_key_values` \(DynamicCache of 0 layers\).*leave .* unset"):
            model(ids, past_key_values=DynamicCache())
        other = CAUSAL.model(window_size=8)(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="`window_size` = 8, but this one has 5"):
            model(ids, past_key_values=other)
        past = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 rows but `past_key_values` holds 2"):
            model(random_ids(3, 1), past_key_values=past)
        with pytest.raises(ValueError, match="`past_key_values` need a decoder"):
            MASKED.model()(ids, past_key_values=past)

    def test_pairs(self) -> None:
        case = Case("seqboat", "AutoModelForSequenceClassification", "default")
        single, pair = case.model(), case.model(dual_encoder=True, pair_features=True)
        ids, others = random_ids(2, 6), random_ids(2, 9)
        assert pair(ids, pair_input_ids=others).logits.shape == (2, 2)
        with pytest.raises(ValueError, match="single texts"):
            single(ids, pair_input_ids=others)
        with pytest.raises(ValueError, match="pass `pair_input_ids`"):
            pair(ids)
        with pytest.raises(ValueError, match="`pair_input_ids` has 3 rows but `input_ids` has 2"):
            pair(ids, pair_input_ids=random_ids(3, 4))


# ---------------------------------------------------------------------------------------------------------------- speed


def test_state_is_copied_with_the_cache() -> None:
    """A step writes into the memory it was given; a copy made before must not change."""
    model = build(CAUSAL)
    with torch.no_grad():
        past = model(random_ids(2, 9), use_cache=True).past_key_values
        kept = copy.deepcopy(past)
        token = random_ids(2, 1)
        first = model(token, past_key_values=past).logits
        torch.testing.assert_close(model(token, past_key_values=kept).logits, first, rtol=0, atol=0)


@pytest.mark.slow
def test_sparse_units_are_faster() -> None:
    """At 5 % density a unit takes less than half of the time at 100 %."""
    import time

    config = SeqBoatConfig(hidden_size=256, is_decoder=True, window_size=513, vocab_size=64)
    unit = SeqBoatUnit(config).eval()
    states = torch.randn(1, 4096, 256)
    rotary = rotary_table(torch.arange(4096), config.qk_dim, torch.float32)
    times = {}
    with torch.no_grad():
        inner = F.silu(unit.ema(unit.norm(states))[0])
        for density in (0.05, 1.0):
            router = unit.router
            margins = inner @ (router.weight[1] - router.weight[0])
            router.bias[1] = -margins.quantile(1 - density) if density < 1 else 50.0
            runs = []
            for _ in range(4):
                start = time.perf_counter()
                gate = unit(states, None, rotary)[1]
                runs.append(time.perf_counter() - start)
            assert abs(float((gate > 0).float().mean()) - density) < 0.02
            times[density] = min(runs)
    assert times[0.05] < 0.5 * times[1.0]


def test_balanced_routers() -> None:
    """What the other tests rely on."""
    model = SeqBoatModel(CAUSAL.config())
    balance_routers(model, CAUSAL)
    assert ((model(random_ids(4, 30)).activation_rate.mean(0) - 0.5).abs() < 0.35).all()

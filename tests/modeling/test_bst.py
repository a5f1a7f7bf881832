"""What defines the Block-State Transformer, and the forms it must agree in: all blocks at once, in pieces, token by token."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from factories import VOCABULARY, Case, perturb, random_ids
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import Cache

from hf_hybrid.modeling.bst.bst_heads import BstForCausalLM
from hf_hybrid.modeling.bst.bst_layers import Passage
from hf_hybrid.modeling.bst.context_filters import InputHistory

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZE = 4  # of the blocks of the small models
KINDS = list(itertools.product(("sh", "mh", "mf"), ("s4d", "s4", "unstructured")))
EVERY_KIND = pytest.mark.parametrize(("variant", "ssm_type"), KINDS, ids=lambda value: value)


def build(variant: str = "sh", ssm_type: str = "s4d", dtype: torch.dtype = torch.float64, **fields) -> BstForCausalLM:
    case = Case("bst", "AutoModelForCausalLM", "default")
    return case.model(context_variant=variant, ssm_type=ssm_type, **fields).to(dtype)


def states(cache: Cache) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:
        found += [layer.keys, layer.values, layer.tensors()["counts"]]
        if layer.context_keys is not None:
            state = layer.state
            found += [layer.context_keys, layer.context_values]
            found.append(state.last(state.length) if isinstance(state, InputHistory) else state)
    return found


def in_pieces(model: BstForCausalLM, ids: torch.Tensor, cuts: list[int], mask: torch.Tensor | None = None):
    past, parts = None, []
    for first, last in zip([0, *cuts], [*cuts, ids.shape[1]]):
        seen = None if mask is None else mask[:, :last]
        outputs = model(ids[:, first:last], attention_mask=seen, past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1), past


@EVERY_KIND
class TestForms:
    @torch.no_grad()
    def test_any_split_gives_the_same_logits_and_state(self, variant: str, ssm_type: str) -> None:
        ids = random_ids(2, 21)
        for local_attention, qk_norm in itertools.product(("block", "sliding_window"), (True, False)):
            model = build(variant, ssm_type, local_attention=local_attention, qk_norm=qk_norm)
            expected = model(ids, use_cache=False).logits
            final = states(model(ids, use_cache=True).past_key_values)
            for cuts in (list(range(1, 21)), [3, 5, 13, 14], [4, 8, 16], [12]):
                logits, past = in_pieces(model, ids, cuts)
                torch.testing.assert_close(logits, expected, **CLOSE)
                for found, wanted in zip(states(past), final, strict=True):
                    torch.testing.assert_close(found, wanted, **CLOSE)

    @torch.no_grad()
    def test_padding_anywhere_equals_rows_alone(self, variant: str, ssm_type: str) -> None:
        """Padding in front, behind and inside, by amounts that no block divides, in one pass and in pieces."""
        model = build(variant, ssm_type, local_attention="sliding_window")
        ids = random_ids(4, 19)
        mask = torch.ones(4, 19, dtype=torch.long)
        mask[0, :3] = mask[1, :9] = mask[2, 14:] = 0
        mask[3, [0, 1, 5, 6, 11]] = 0
        expected = [model(ids[row : row + 1, mask[row].bool()], use_cache=True) for row in range(4)]
        for cuts in ([], [2, 7, 8], list(range(1, 19))):
            logits, past = in_pieces(model, ids, cuts, mask)
            for row, single in enumerate(expected):
                torch.testing.assert_close(logits[row, mask[row].bool()], single.logits[0], **CLOSE)
                for found, wanted in zip(states(past), states(single.past_key_values), strict=True):
                    torch.testing.assert_close(found[row], wanted[0], **CLOSE)

    @torch.no_grad()
    def test_left_padded_batches_go_on_like_rows_alone(self, variant: str, ssm_type: str) -> None:
        model = build(variant, ssm_type)
        ids, mask = random_ids(3, 11), torch.ones(3, 11, dtype=torch.long)
        mask[1, :3] = mask[2, :10] = 0
        new = 2 * SIZE + 1
        settings = {"max_new_tokens": new, "eos_token_id": None}
        batch = model.generate(ids, attention_mask=mask, **settings)
        for row in range(3):
            single = model.generate(ids[row : row + 1, mask[row].bool()], **settings)
            assert batch[row, 11:].tolist() == single[0, -new:].tolist()

    @torch.no_grad()
    def test_rows_of_the_state_can_be_reordered(self, variant: str, ssm_type: str) -> None:
        model, ids = build(variant, ssm_type), random_ids(3, 9)
        past = model(ids, use_cache=True).past_key_values
        order = torch.tensor([2, 0, 0])
        chosen = copy.deepcopy(past)
        chosen.reorder_cache(order)
        for token in (random_ids(3, 1), random_ids(3, 1), random_ids(3, 6)):
            expected = model(token, past_key_values=past).logits
            torch.testing.assert_close(model(token[order], past_key_values=chosen).logits, expected[order], **CLOSE)

    def test_one_layer_passes_gradcheck(self, variant: str, ssm_type: str) -> None:
        model = build(variant, ssm_type, num_hidden_layers=1, bst_layers=[0], intermediate_size=4, block_size=2)
        layer = model.model.layers[0]
        names = [name for name, _ in layer.named_parameters() if name.startswith(("context", "ssm"))]
        parameters = [layer.get_parameter(name).detach().requires_grad_() for name in names]

        def run(hidden_states: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(layer, dict(zip(names, values)), (hidden_states, Passage()))

        hidden_states = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(run, (hidden_states, *parameters), fast_mode=True)

    def test_segments_equal_one_pass_without_gradients_between_them(self, variant: str, ssm_type: str) -> None:
        model, ids = build(variant, ssm_type).train(), random_ids(2, 18)
        expected = model(ids).logits
        embeds = [model.get_input_embeddings()(part).detach().requires_grad_() for part in ids.split(6, dim=1)]
        past = model.model.build_cache()
        for index, segment in enumerate(embeds):
            outputs = model(inputs_embeds=segment, past_key_values=past)
            torch.testing.assert_close(outputs.logits, expected[:, 6 * index : 6 * index + 6], **CLOSE)
            past.detach()
        grads = torch.autograd.grad(outputs.logits.square().sum(), embeds, allow_unused=True)
        assert grads[0] is None and grads[1] is None and grads[2].abs().max() > 0

    @torch.no_grad()
    def test_a_row_may_begin_a_new_text(self, variant: str, ssm_type: str) -> None:
        """Between two segments some rows are reset; those go on as if nothing had been before them."""
        model, ids, rows = build(variant, ssm_type), random_ids(3, 17), torch.tensor([True, False, True])
        for length in (1, 8):
            past = model(ids[:, :6], use_cache=True).past_key_values
            past.reset_rows(rows)
            first = model(ids[:, 6 : 6 + length], past_key_values=past).logits
            second = model(ids[:, 6 + length :], past_key_values=past).logits
            logits = torch.cat([first, second], dim=1)
            torch.testing.assert_close(logits[rows], model(ids[rows, 6:]).logits, **CLOSE)
            torch.testing.assert_close(logits[1:2], model(ids[1:2]).logits[:, 6:], **CLOSE)

    def test_gradients_of_a_later_segment(self, variant: str, ssm_type: str) -> None:
        """Where the rows stand does not change the gradients: at one place, or at places of their own, or begun anew."""
        model, ids, later = build(variant, ssm_type).train(), random_ids(2, 18), random_ids(2, 13)

        def gradients(past: Cache | None) -> list[torch.Tensor]:
            loss = model(later, labels=later, past_key_values=past).loss
            return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

        def after(ids: torch.Tensor) -> Cache:
            past = model(ids, use_cache=True).past_key_values
            past.detach()
            return past

        own_places, begun_anew = after(ids), after(ids)
        for layer in own_places.layers:
            layer.positions = torch.tensor([18, 18])
        begun_anew.reset_rows(torch.tensor([True, True]))
        for found, expected in ((own_places, after(ids)), (begun_anew, None)):
            for actual, wanted in zip(gradients(found), gradients(expected)):
                torch.testing.assert_close(actual, wanted, **CLOSE)

    def test_every_parameter_has_a_gradient_even_when_unused(self, variant: str, ssm_type: str) -> None:
        """One block, or a later segment without a block end: distributed training waits for all gradients."""
        model = build(variant, ssm_type).train()
        past = model.model.build_cache()
        for length in (3, 2, 3, 1):
            model.zero_grad()
            model(random_ids(2, length), past_key_values=past).logits.sum().backward()
            missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
            assert not missing
            past.detach()

    @pytest.mark.parametrize("autocast", [False, True])
    def test_initial_gradients_are_finite(self, variant: str, ssm_type: str, autocast: bool) -> None:
        case = Case("bst", "AutoModelForCausalLM", "default")
        model = case.model_class(case.config(context_variant=variant, ssm_type=ssm_type)).train()
        ids = random_ids(2, 23)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@EVERY_KIND
@torch.no_grad()
def test_float32_pieces(variant: str, ssm_type: str) -> None:
    model, ids = build(variant, ssm_type, torch.float32), random_ids(2, 21)
    expected = model(ids).logits
    for cuts in (list(range(1, 21)), [3, 5, 13, 14]):
        torch.testing.assert_close(in_pieces(model, ids, cuts)[0], expected, rtol=0, atol=5e-5)


@EVERY_KIND
@torch.no_grad()
def test_only_later_tokens_change(variant: str, ssm_type: str) -> None:
    model, ids = build(variant, ssm_type), random_ids(1, 19)
    expected = model(ids).logits
    for position in (0, 6, 11):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 1) % VOCABULARY
        change = (model(other).logits - expected).abs().amax(-1)[0]
        assert change[:position].sum() <= 1e-12 * (1 + expected.abs().max())
        assert change[position:].max() > 1e-6


@torch.no_grad()
def influence(model: BstForCausalLM, ids: torch.Tensor, position: int = 0) -> torch.Tensor:
    other = ids.clone()
    other[0, position] = (ids[0, position] + 1) % VOCABULARY
    return (model(other).logits - model(ids).logits).abs().amax(-1)[0]


class TestReach:
    """A single layer, in which attention does not leave its block: what is farther comes through the filters."""

    @pytest.mark.parametrize("variant", ["sh", "mh"])
    def test_state_spaces_reach_the_last_block(self, variant: str) -> None:
        model = build(variant, num_hidden_layers=1, bst_layers=[0])
        assert (influence(model, random_ids(1, 5 * SIZE))[4 * SIZE :] > 1e-9).all()
        plain = build(num_hidden_layers=1, bst_layers=[])
        assert not influence(plain, random_ids(1, 5 * SIZE))[SIZE:].any()

    def test_contexts_reach_the_next_block(self) -> None:
        model = build("mf", num_hidden_layers=1, bst_layers=[0])
        assert (influence(model, random_ids(1, 3 * SIZE))[SIZE:] > 1e-9).all()

    def test_explicit_filters_reach_as_far_as_they_are_long(self) -> None:
        model = build("mf", "unstructured", num_hidden_layers=1, bst_layers=[0], ssm_filter_length=6)
        change = influence(model, random_ids(1, 4 * SIZE), position=3)
        assert (change[SIZE : 3 * SIZE] > 1e-9).all()  # lags 0 and 4 of the ends of blocks 0 and 1
        assert change[3 * SIZE :].max() < 1e-12  # lag 8

    def test_the_first_block_does_not_see_the_filters(self) -> None:
        model = build("mf")
        ids = random_ids(1, SIZE)
        expected = model(ids).logits
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".ssm." in name:
                    parameter.add_(0.3)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
        assert not torch.equal(model(random_ids(1, SIZE + 1)).logits[:, :1], expected[:, :1])


@torch.no_grad()
def test_block_states_equal_the_whole_convolution() -> None:
    """The states at block ends give what the filters of a whole pass give there."""
    for ssm_type in ("s4d", "s4", "unstructured"):
        filters = build("mf", ssm_type).model.layers[1].ssm
        hidden_states = torch.randn(2, 23, 16, dtype=torch.float64)
        ends, _ = filters(hidden_states, block_size=SIZE)
        everywhere = filters(hidden_states)[0][..., SIZE - 1 :: SIZE].permute(0, 3, 1, 2)
        torch.testing.assert_close(ends, everywhere, **CLOSE)


@torch.no_grad()
def test_order_of_the_filters_and_signs_of_the_scales_do_not_matter() -> None:
    for ssm_type in ("s4d", "unstructured"):
        model, ids = build("mf", ssm_type), random_ids(2, 15)
        expected = model(ids).logits
        order = torch.tensor([2, 0, 1])
        layer = model.model.layers[1]
        for owner, name in ((layer.context, "ids"), (layer.context, "initial"), (layer.ssm, "D")):
            getattr(owner, name).copy_(getattr(owner, name)[order])
        if ssm_type == "s4d":
            layer.ssm.C.copy_(layer.ssm.C[order])
        else:
            for parameter in layer.ssm.filter_proj.parameters():
                parameter.copy_(parameter.unflatten(0, (3, 16))[order].flatten(0, 1))
        for part in (layer.context, layer.attn, model.model.layers[0].attn):
            part.qk_scale.neg_()
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_the_first_loss_is_near_that_of_logits_of_unit_variance() -> None:
    """The embedding has unit variance and the logits are divided by sqrt(D): ln V + 1/2, and more for the tied matrix, which
    favours the token that was just read."""
    config = Case("bst", "AutoModelForCausalLM", "mf").config(vocab_size=4000, hidden_size=256)
    model, ids = BstForCausalLM(config).eval(), torch.randint(3, 4000, (2, 40))
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert 0.3 < loss - 8.294 < 1.5


@torch.no_grad()
def test_deep_settings() -> None:
    """Layers with context at any places, head widths that do not divide D, a block of one token."""
    for fields in ({"bst_layers": [-1, 0], "num_hidden_layers": 3}, {"block_size": 1}, {"logits_scaling": 2.0}):
        for variant in ("sh", "mf"):
            model, ids = build(variant, **fields), random_ids(2, 7)
            logits, _ = in_pieces(model, ids, [2, 3, 6])
            torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


@torch.no_grad()
def test_hypothesis_over_lengths_and_blocks() -> None:
    @given(length=st.integers(1, 14), size=st.integers(1, 6), variant=st.sampled_from(["sh", "mh", "mf"]))
    def check(length: int, size: int, variant: str) -> None:
        model = build(variant, block_size=size, local_attention="sliding_window")
        ids = random_ids(1, length)
        outputs = model(ids, use_cache=True)
        assert outputs.logits.shape == (1, length, VOCABULARY)
        assert outputs.past_key_values.layers[1].keys.shape == (1, 2, size, 6)
        logits, _ = in_pieces(model, ids, list(range(1, length)))
        torch.testing.assert_close(logits, outputs.logits, **CLOSE)

    check()


class TestSavedFilters:
    def test_decays_of_explicit_filters_are_saved(self, tmp_path) -> None:
        model = build(ssm_type="unstructured", dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[1].ssm.alpha.mul_(1.5)
        model.save_pretrained(tmp_path)
        loaded = BstForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded.model.layers[1].ssm.alpha, model.model.layers[1].ssm.alpha)
        ids = random_ids(1, 9)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


class TestBadCalls:
    def test_caches_of_other_models(self) -> None:
        model, ids = build(), random_ids(2, 6)
        with pytest.raises(ValueError, match=r"`past_key_values` \(DynamicCache of 0 layers\).*leave .* unset"):
            model(ids, past_key_values=DynamicCache())
        for fields, text in (
            ({"block_size": 8}, "`block_size` = 8, but this one has 4"),
            ({"variant": "mf"}, "`context_variant` = mf, but this one has sh"),
            ({"ssm_state_size": 4}, "`ssm_state_size` = 4"),
            ({"bst_layers": [0]}, r"`bst_layers` = \[0\]"),
            ({"num_hidden_layers": 3}, "3 layers"),
        ):
            past = build(**fields)(ids, use_cache=True).past_key_values
            with pytest.raises(ValueError, match=text):
                model(random_ids(2, 1), past_key_values=past)

    def test_other_rows_than_those_of_the_cache(self) -> None:
        model = build()
        past = model(random_ids(2, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 rows but `past_key_values` holds 2"):
            model(random_ids(3, 1), past_key_values=past)

    def test_assisted_decoding(self) -> None:
        model = build(dtype=torch.float32)
        for options in ({"assistant_model": build(dtype=torch.float32)}, {"prompt_lookup_num_tokens": 2}):
            with pytest.raises(ValueError, match="stateful"):
                model.generate(random_ids(1, 6), max_new_tokens=3, **options)

    def test_other_caches_of_generate(self) -> None:
        settings = GenerationConfig(max_new_tokens=2, cache_implementation="offloaded")
        with pytest.raises(ValueError, match="`cache_implementation='offloaded'.*constant size"):
            build().generate(random_ids(1, 6), generation_config=settings)

    def test_shifted_labels(self) -> None:
        model, ids = build(), random_ids(2, 6)
        shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
        with pytest.raises(ValueError, match="`shift_labels` must have the shape"):
            model(ids, shift_labels=shifted[:, 1:])


def test_perturbed_filters_are_stable() -> None:
    """The factory moves the parameters of the filters; they must still decay."""
    model = perturb(build("mf"))
    with torch.no_grad():
        assert model(random_ids(1, 400)).logits.isfinite().all()

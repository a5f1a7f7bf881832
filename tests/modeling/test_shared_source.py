"""Beams and samples share their source: its keys, values and states exist once per row of the batch, with the results of
repeating it for every target."""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload
from factories import Case, all_variants, parametrize, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import generate
from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin

from hf_hybrid.modeling.generation import StateGenerationMixin
from hf_hybrid.modeling.spade import spade_layers

SEQ2SEQ = all_variants("AutoModelForSeq2SeqLM")
DEFAULTS = [case for case in SEQ2SEQ if case.variant == "default"]
EXACT = {"rtol": 1e-5, "atol": 1e-5}
SCORES = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}


@contextmanager
def source_repeated():
    """`generate` as Transformers has it: the source is repeated for every target and reordered with the beams."""

    def reorder(_model: Any, cache: Any, beam_idx: torch.Tensor) -> Any:
        cache.reorder_cache(beam_idx)
        return cache

    with (
        mock.patch.object(
            StateGenerationMixin,
            "_expand_inputs_for_generation",
            inspect.getattr_static(GenerationMixin, "_expand_inputs_for_generation"),  # static in older Transformers
        ),
        mock.patch.object(StateGenerationMixin, "_reorder_cache", reorder),
    ):
        yield


def source_rows(cache: Any) -> set[int]:
    """Rows of the tensors of the source in a cache."""
    if isinstance(cache, EncoderDecoderCache):
        return {layer.keys.shape[0] for layer in cache.cross_attention_cache.layers}
    return {tensor.shape[0] for name, tensor in cache.tensors().items() if name in cache.source_axes}


def padded_source(batch: int, length: int, side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sources of different lengths, the first of them whole, padded on one side."""
    ids, places = random_ids(batch, length), torch.arange(length)
    kept = torch.tensor([max(1, length - (5 * row + seed) % length * (row > 0)) for row in range(batch)])[:, None]
    mask = places < kept if side == "right" else places >= length - kept
    return {"input_ids": ids, "attention_mask": mask.long()}


def both_ways(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **strategy: Any) -> None:
    """Compares tokens and scores of `generate` with those of the source repeated."""
    shared = generate(model, inputs, **SCORES, **strategy)
    with source_repeated():
        repeated = generate(model, copy.deepcopy(inputs), **SCORES, **strategy)
    assert torch.equal(shared.sequences, repeated.sequences)
    torch.testing.assert_close(torch.stack(shared.scores), torch.stack(repeated.scores), **EXACT)
    if strategy.get("num_beams", 1) > 1:
        torch.testing.assert_close(shared.sequences_scores, repeated.sequences_scores, **EXACT)
        assert torch.equal(shared.beam_indices, repeated.beam_indices)
    if shared.past_key_values is not None:
        batch = len(next(iter(inputs.values())))
        assert source_rows(shared.past_key_values) == {batch} and source_rows(repeated.past_key_values) == {
            len(shared.scores[0])
        }


@parametrize(SEQ2SEQ)
class TestGenerate:
    def test_equals_the_source_repeated(self, case: Case) -> None:
        model = case.model()

        @settings(max_examples=4)
        @given(data=st.data())
        def check(data: st.DataObject) -> None:
            inputs = padded_source(
                data.draw(st.integers(1, 3)),
                data.draw(st.integers(2, 9)),
                data.draw(st.sampled_from(["left", "right"])),
                data.draw(st.integers(0, 5)),
            )
            beams = data.draw(st.integers(1, 4))
            strategy: dict[str, Any] = {"num_beams": beams, "new_tokens": data.draw(st.integers(1, 6))}
            strategy["do_sample"] = data.draw(st.booleans()) or beams == 1
            strategy["num_return_sequences"] = data.draw(st.integers(1, beams if beams > 1 else 3))
            strategy["use_cache"] = data.draw(st.booleans())
            both_ways(model, inputs, **strategy)

        check()

    def test_prompts_of_the_decoder(self, case: Case) -> None:
        """Several tokens of each target read the source at once; the prompts of the rows are padded differently."""
        model, source = case.model(), padded_source(2, 7, "left")
        prompts, mask = random_ids(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        prompts[0, 0] = prompts[1, 2] = model.config.decoder_start_token_id
        inputs = source | {"decoder_input_ids": prompts, "decoder_attention_mask": mask}
        both_ways(model, inputs, num_beams=3, num_return_sequences=2, new_tokens=4)

    def test_encoder_outputs_and_embeddings(self, case: Case) -> None:
        model, source = case.model(), padded_source(2, 7, "right")
        expected = generate(model, source, num_beams=3, eos_token_id=None)
        mask = {"attention_mask": source["attention_mask"]}
        encoded = {"encoder_outputs": model.get_encoder()(**source)}
        assert torch.equal(generate(model, encoded | mask, num_beams=3, eos_token_id=None), expected)
        assert encoded["encoder_outputs"].last_hidden_state.shape[0] == 2
        embeds = {"inputs_embeds": model.get_input_embeddings()(source["input_ids"])}
        assert torch.equal(generate(model, embeds | mask, num_beams=3, eos_token_id=None), expected)

    def test_weights_of_cross_attention(self, case: Case) -> None:
        model = case.model()
        if hasattr(model, "set_attn_implementation") and case.model_type == "spade":
            model.set_attn_implementation("eager")
        source = padded_source(2, 7, "right")
        options = {"num_beams": 3, "new_tokens": 3, "output_attentions": True, **SCORES}
        shared = generate(model, source, **options)
        with source_repeated():
            repeated = generate(model, source, **options)
        for step, expected in zip(shared.cross_attentions, repeated.cross_attentions):
            torch.testing.assert_close(step, expected, **EXACT)

    def test_continued_samples(self, case: Case) -> None:
        """The cache of samples that share a source goes on with the source repeated, as a caller passes it."""
        model, source = case.model(), padded_source(2, 7, "right")
        first = generate(model, source, 4, do_sample=True, num_return_sequences=3, **SCORES)
        repeated = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in source.items()}
        given_target = {
            "decoder_input_ids": first.sequences,
            "decoder_attention_mask": torch.ones_like(first.sequences),
        }
        expected = generate(model, repeated | given_target, 5, eos_token_id=None)
        rest = given_target | {"past_key_values": first.past_key_values}
        assert torch.equal(generate(model, repeated | rest, 5, eos_token_id=None), expected)


@parametrize(SEQ2SEQ)
class TestForward:
    def test_several_targets_of_each_source(self, case: Case) -> None:
        """Logits and gradients equal those with the encoder output repeated; a mismatch of rows is still refused."""
        model, source = case.model(), padded_source(2, 7, "left")
        target = random_ids(6, 5)
        mask = source["attention_mask"]
        hidden = model.get_encoder()(**source).last_hidden_state.detach().requires_grad_()
        found = model(
            encoder_outputs=(hidden,), attention_mask=mask, decoder_input_ids=target, targets_per_source=3
        ).logits
        (gradient,) = torch.autograd.grad(found.square().mean(), hidden)
        repeated = hidden.detach().repeat_interleave(3, dim=0).requires_grad_()
        expected = model(
            encoder_outputs=(repeated,), attention_mask=mask.repeat_interleave(3, 0), decoder_input_ids=target
        ).logits
        torch.testing.assert_close(found, expected, **EXACT)
        (wanted,) = torch.autograd.grad(expected.square().mean(), repeated)
        torch.testing.assert_close(gradient, wanted.unflatten(0, (2, 3)).sum(1), **EXACT)
        for rows, targets in ((6, 1), (4, 3), (2, 2)):
            with pytest.raises(ValueError, match=f"has {rows} rows but the encoder output has 2"):
                model(encoder_outputs=(hidden,), decoder_input_ids=target[:rows], targets_per_source=targets)

    @torch.no_grad()
    def test_selected_rows_of_a_cache(self, case: Case) -> None:
        """Rows may be chosen, repeated and moved across sources; each goes on with its own source."""
        model, source, target = case.model(), padded_source(2, 7, "right"), random_ids(2, 4)
        start = model(**source, decoder_input_ids=target, use_cache=True).past_key_values
        new, whole = random_ids(4, 1), [0, 0, 1, 1]

        def step(cache: Any, rows: list[int]) -> None:
            inputs = {name: tensor[rows] for name, tensor in source.items()}
            tokens = new[: len(rows)]
            expected = model(**inputs, decoder_input_ids=torch.cat([target[rows], tokens], dim=1)).logits[:, -1:]
            found = model(**inputs, decoder_input_ids=tokens, past_key_values=cache).logits
            torch.testing.assert_close(found, expected, **EXACT)

        def repeated() -> Any:
            cache = copy.deepcopy(start)
            cache.batch_repeat_interleave(2)
            assert source_rows(cache) == {2}
            return cache

        step(repeated(), whole)
        for indices in ([3, 0, 2, 1], [1, 1, 3, 0], [2, 3, 1, 0]):
            cache = repeated()
            cache.reorder_cache(torch.tensor(indices))
            step(cache, [whole[index] for index in indices])
        cache = repeated()
        cache.batch_select_indices(torch.tensor([1, 2, 3]))
        step(cache, [0, 1, 1])


@parametrize(DEFAULTS)
def test_time_and_memory_of_the_source_do_not_grow_with_the_beams(case: Case) -> None:
    """Neither the encoder states, nor keys and values of the source are repeated or moved in any step."""
    model, source = case.model(), {"input_ids": random_ids(2, 33)}
    elements = 2 * 33 * min(8, model.config.hidden_size)  # the smallest tensor of the source
    copies: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.index_select, torch.ops.aten.index, torch.ops.aten.repeat):
                if 33 in result.shape and result.numel() >= elements:
                    copies.append(tuple(result.shape))
            return result

    encoder_outputs = model.get_encoder()(**source)
    with Watch():
        generate(model, {"encoder_outputs": encoder_outputs}, 6, num_beams=4, eos_token_id=None)
    assert copies == []


@parametrize(DEFAULTS)
def test_offloaded_weights(case: Case) -> None:
    """Hooks that bring the weights for every call pass the shared source on."""
    source = padded_source(2, 7, "right")
    expected = generate(case.model(), source, num_beams=3, eos_token_id=None)
    model = cpu_offload(case.model(), execution_device=torch.device("cpu"))
    assert torch.equal(generate(model, source, num_beams=3, eos_token_id=None), expected)


def test_caches_of_transformers() -> None:
    """A decoder with full attention takes growing and fixed caches of Transformers, which hold the source once, too."""
    case = next(case for case in DEFAULTS if case.model_type == "spade")
    model, source = case.model(), padded_source(2, 7, "right")
    expected = generate(model, source, num_beams=3, eos_token_id=None)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    outputs = generate(model, source | {"past_key_values": cache}, num_beams=3, **SCORES)
    assert torch.equal(outputs.sequences, expected)
    assert source_rows(outputs.past_key_values) == {2}
    static = generate(model, source, num_beams=3, eos_token_id=None, cache_implementation="static")
    assert torch.equal(static, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_long_sources_in_the_form_for_few_queries(beams: int) -> None:
    """Equal to attention by the implementation that the configuration names, in float64."""
    (case,) = (case for case in DEFAULTS if case.model_type == "spade")
    model = case.model().double().eval()
    source = padded_source(2, 300, "right")
    with mock.patch.object(spade_layers, "is_few_queries", wraps=spade_layers.is_few_queries) as few:
        found = model.generate(**source, **SCORES, num_beams=beams, do_sample=False, max_new_tokens=5)
        assert few.called
    with mock.patch.object(spade_layers, "is_few_queries", return_value=False):
        expected = model.generate(**source, **SCORES, num_beams=beams, do_sample=False, max_new_tokens=5)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_values_of_the_source_lie_as_their_attention_reads_them() -> None:
    """In the order of few queries only where steps take that form; otherwise each step would copy them."""
    (case,) = (case for case in DEFAULTS if case.model_type == "spade")

    def is_turned(model: Any, beams: int = 1, length: int = 300, has_gradients: bool = False) -> bool:
        targets = {"decoder_input_ids": random_ids(2 * beams, 1), "targets_per_source": beams}
        with torch.set_grad_enabled(has_gradients):
            cache = model(input_ids=random_ids(2, length), **targets, use_cache=True).past_key_values
        (turned,) = {layer.values.stride(-1) != 1 for layer in cache.cross_attention_cache.layers}
        return turned

    model = case.model().eval()
    assert is_turned(model) and is_turned(model, beams=8)
    assert not is_turned(model, beams=9)
    assert not is_turned(model, length=200)
    assert not is_turned(model, has_gradients=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_turned(model)
    model.set_attn_implementation("eager")
    assert not is_turned(model)
    assert not is_turned(case.model().eval().bfloat16())

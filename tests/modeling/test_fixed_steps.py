"""Steps of fixed shapes at fixed addresses, as graphs of a device need them, in every model: the text of other steps.

Uncompiled here, in the forms for accelerators; `test_compiled_generation` compiles them.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from device_work import counted_work
from factories import Case, all_variants, parametrize, random_ids
from transformers import CompileConfig

from hf_hybrid.modeling import fixed_steps, generation
from hf_hybrid.modeling.fixed_steps import FixedSteps
from hf_hybrid.ops.branches import forced_branch

SEQ2SEQ = "AutoModelForSeq2SeqLM"
GENERATIVE = all_variants(SEQ2SEQ) + all_variants("AutoModelForCausalLM")
COMPILED = CompileConfig(backend="eager", mode=None, fullgraph=True)
SETTINGS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """The steps that `generate` takes, uncompiled."""
    step = mock.Mock(side_effect=fixed_steps.next_step)
    monkeypatch.setattr(fixed_steps.torch, "compile", lambda function, **options: step)
    yield step


def prompt(case: Case, length: int = 7) -> dict[str, torch.Tensor]:
    """Ids with a row that is padded on the left; of the source in encoder-decoders."""
    ids = random_ids(2, length)
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def addresses(call: Any) -> dict[str, int]:
    """Address of every tensor that a step, a call of the mock, reads and changes."""
    return {name: tensor.data_ptr() for name, tensor in call.args[2].all().items()}


@parametrize(GENERATIVE)
def test_the_text_is_that_of_other_steps(case: Case, steps: mock.Mock) -> None:
    """With a padded row, over windows and chunks, with beams; and the cache that is returned goes on."""
    model, inputs = case.model().double(), prompt(case)
    options = SETTINGS | {"max_new_tokens": 9, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options, output_scores=True)
    expected_beams = model.generate(**inputs, **options, num_beams=2)
    assert not steps.called
    with forced_branch("accelerator"):
        found = model.generate(**inputs, **options, output_scores=True, compile_config=COMPILED)
        assert steps.call_count == 8
        beams = model.generate(**inputs, **options, num_beams=2, compile_config=COMPILED)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(beams.sequences, expected_beams.sequences)
    for scores, wanted in zip(found.scores, expected.scores):
        torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-6)
    results = []
    for outputs in (found, expected):
        cache, prefix = outputs.past_key_values, "decoder_" if case.is_seq2seq else ""
        mask = torch.ones(2, cache.get_seq_length() + 3, dtype=torch.long)
        if not case.is_seq2seq:
            mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        again = {f"{prefix}input_ids": torch.arange(6).view(2, 3) + 3, f"{prefix}attention_mask": mask}
        with torch.no_grad():
            results.append(model(**inputs | again, past_key_values=cache).logits)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@parametrize(GENERATIVE)
def test_steps_have_the_same_shapes_at_the_same_addresses(case: Case, steps: mock.Mock) -> None:
    """No host read, no operation of another shape, and the next text lies where the last one lay."""
    model, works, options = case.model(), [], SETTINGS | {"max_new_tokens": 8, "compile_config": COMPILED}

    def counted(*args: Any, **kwargs: Any) -> Any:
        with counted_work() as work:
            outputs = fixed_steps.next_step(*args, **kwargs)
        works.append(work)
        return outputs

    steps.side_effect = counted
    with forced_branch("accelerator"):
        for length in (7, 4):
            model.generate(**prompt(case, length), **options)
    assert len(works) == 14
    assert all(work.shapes == works[0].shapes and not work.reads for work in works)
    assert all(addresses(call) == addresses(steps.call_args_list[0]) for call in steps.call_args_list)


def test_texts_at_the_same_time_have_their_own_tensors(steps: mock.Mock) -> None:
    model = Case("spade_lm", "AutoModelForCausalLM", "default").model()
    ids = random_ids(1, 5)
    expected = model.generate(ids, **SETTINGS, max_new_tokens=5)
    call = model.get_compiled_call(COMPILED)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        outputs = call(input_ids=expected[:, 5:6], past_key_values=cache)  # a text that has not ended
        assert torch.equal(model.generate(ids, **SETTINGS, max_new_tokens=5, compile_config=COMPILED), expected)
        state = outputs.past_key_values
        for place in (6, 7, 8):
            outputs = call(input_ids=expected[:, place : place + 1], past_key_values=state)
    assert torch.equal(outputs.logits[:, -1].argmax(-1), expected[:, 9])
    assert state.release() is cache and cache.get_seq_length() == 9
    assert state.release() is None  # given away: the model, which keeps the fixed tensors, does not keep it alive


def test_texts_that_begin_at_the_same_moment_have_their_own_tensors(
    steps: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Case("spade_lm", "AutoModelForCausalLM", "default").model()
    prompts = [random_ids(1, 5), random_ids(1, 5).flip(1)]
    options = SETTINGS | {"max_new_tokens": 5}
    expected = [model.generate(ids, **options) for ids in prompts]
    model.generate(prompts[0], **options, compile_config=COMPILED)  # its tensors are free
    meeting, compare, found = threading.Barrier(2), fixed_steps._same_shapes, {}

    def compare_together(*tensors: Any) -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(timeout=1)
        return compare(*tensors)

    def write(number: int) -> None:
        found[number] = model.generate(prompts[number], **options, compile_config=COMPILED)

    monkeypatch.setattr(fixed_steps, "_same_shapes", compare_together)
    threads = [threading.Thread(target=write, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fixed = {id(call.args[2]) for call in steps.call_args_list[-8:]}
    assert len(fixed) == 2 and all(torch.equal(found[number], expected[number]) for number in (0, 1))


def test_a_text_may_be_longer_than_announced(steps: mock.Mock) -> None:
    model = Case("mega", "AutoModelForCausalLM", "default").model()
    tokens = random_ids(1, 80)
    with torch.no_grad():
        expected = model(tokens).logits[:, -1]
        state = model(tokens[:, :5], use_cache=True).past_key_values
        call = model.get_compiled_call(COMPILED)
        for place in range(5, 80):
            outputs = call(input_ids=tokens[:, place : place + 1], past_key_values=state)
            state = outputs.past_key_values
    torch.testing.assert_close(outputs.logits[:, -1], expected, rtol=1e-4, atol=1e-5)
    shapes = {call.args[2].mask.shape[1] for call in steps.call_args_list}
    assert shapes == {64, 128}


@pytest.mark.parametrize("case", [Case("bst", "AutoModelForCausalLM", "default"), Case("mega", SEQ2SEQ, "default")])
def test_a_continued_text_has_room_for_its_tokens(case: Case, steps: mock.Mock) -> None:
    """Neither twice for those that the cache holds, nor too little: of 64 or 128 slots, whether ids are those of the whole text,
    of its new tokens, or embedded."""
    model, prefix = case.model(), "decoder_" if case.is_seq2seq else ""
    whole = random_ids(1, 63)
    source = {"input_ids": random_ids(1, 5)} if case.is_seq2seq else {}
    for past, length, slots in ((30, 40, 64), (40, 63, 128)):
        mask = torch.ones(1, length, dtype=torch.long)
        continued = [{f"{prefix}input_ids": whole[:, :length]}, {f"{prefix}input_ids": whole[:, past:length]}]
        if not case.is_seq2seq:
            continued.append({"inputs_embeds": model.get_input_embeddings()(whole[:, :length])})
        for inputs in continued:
            with torch.no_grad():
                cache = model(**source, **{f"{prefix}input_ids": whole[:, :past]}, use_cache=True).past_key_values
            steps.reset_mock()
            options = SETTINGS | {"max_new_tokens": 6, f"{prefix}attention_mask": mask, "past_key_values": cache}
            model.generate(**source, **inputs, **options, compile_config=COMPILED)
            assert [call.args[2].mask.shape[1] for call in steps.call_args_list] == [slots] * 5


def test_a_copy_of_a_model_has_its_own_steps(steps: mock.Mock) -> None:
    model, ids = Case("bst", "AutoModelForCausalLM", "default").model(), random_ids(1, 4)
    options = SETTINGS | {"max_new_tokens": 6}
    model.generate(ids, **options, compile_config=COMPILED)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    assert torch.equal(other.generate(ids, **options, compile_config=COMPILED), other.generate(ids, **options))


def test_a_row_that_began_anew(steps: mock.Mock) -> None:
    """What a row had read before `reset_rows` stays hidden."""
    for name in ("spade_lm", "mega", "seqboat", "bst"):
        model = Case(name, "AutoModelForCausalLM", "default").model()
        texts = []
        for config in (None, COMPILED):
            torch.manual_seed(0)
            with torch.no_grad():
                cache = model(random_ids(2, 6), use_cache=True).past_key_values
                cache.reset_rows(torch.tensor([True, False]))
                new = random_ids(2, 3)
                mask = torch.ones(2, 9, dtype=torch.long)
                options = SETTINGS | {"max_new_tokens": 6, "attention_mask": mask, "past_key_values": cache}
                texts.append(model.generate(new, **options, compile_config=config))
        assert torch.equal(*texts), name


def test_layers_of_compiled_steps_are_those_of_torch(steps: mock.Mock) -> None:
    """However `generate` is told to compile: a graph holds the products of `torch.nn.Linear`."""
    model, ids = Case("bst", "AutoModelForCausalLM", "default").model(), random_ids(2, 4)
    config = copy.deepcopy(model.generation_config)
    config.compile_config = COMPILED
    options = SETTINGS | {"max_new_tokens": 2}
    with mock.patch.object(generation, "few_rows", wraps=generation.few_rows) as few_rows:
        model.generate(ids, config, **options)
        model.generate(ids, generation_config=config, **options)
        model.generate(ids, compile_config=COMPILED, **options)
        assert steps.call_count == 3 and not few_rows.called
        model.generate(ids, **options)
        assert few_rows.called


def test_what_cannot_be_compiled_is_refused() -> None:
    model = Case("bst", "AutoModelForCausalLM", "default").model()
    with pytest.raises(ValueError, match="`compile_config` needs .* generates here without a cache"):
        model.generate(random_ids(1, 4), max_new_tokens=2, compile_config=COMPILED, use_cache=False)
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": 0}
    with pytest.raises(ValueError, match="`compile_config` needs .* is offloaded to the CPU"):
        model.generate(random_ids(1, 4), max_new_tokens=2, compile_config=COMPILED)


def test_steps_of_a_static_cache_are_compiled_on_accelerators() -> None:
    for case in (GENERATIVE[0], Case("seqboat", "AutoModelForCausalLM", "unlimited_t5")):
        model, inputs = case.model(), prompt(case)
        options = SETTINGS | {"max_new_tokens": 4}
        expected = model.generate(**inputs, **options)
        with mock.patch.object(FixedSteps, "compiled") as compiled:
            assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)
        assert not compiled.called  # a CPU gains nothing
        settings = copy.deepcopy(model.generation_config)
        settings.cache_implementation = "static"
        state = {
            "past_key_values": model.get_decoder().build_cache() if case.is_seq2seq else model.model.build_cache()
        }
        with forced_branch("accelerator"):
            assert model._valid_auto_compile_criteria(state, settings)
            settings.disable_compile = True
            assert not model._valid_auto_compile_criteria(state, settings)


def test_pieces_of_a_prompt_are_not_compiled(steps: mock.Mock) -> None:
    case = Case("longvq", "AutoModelForCausalLM", "default")
    model, inputs = case.model(), prompt(case, 8)
    options = SETTINGS | {"max_new_tokens": 4, "prefill_chunk_size": 3}
    found = model.generate(**inputs, **options, compile_config=COMPILED)
    assert steps.call_count == 3 and torch.equal(found, model.generate(**inputs, **options))

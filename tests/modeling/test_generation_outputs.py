"""What `generate` returns and accepts besides ids: outputs of each step, caches, texts without a prompt, compiled models."""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_variants, parametrize, random_ids
from test_generation import STRATEGIES, generate
from transformers import EncoderDecoderCache
from transformers.utils import ModelOutput

SEQ2SEQ = all_variants("AutoModelForSeq2SeqLM")
CAUSAL = all_variants("AutoModelForCausalLM")
DEFAULTS = [case for case in SEQ2SEQ + CAUSAL if case.variant == "default"]
PROMPT, NEW = 9, 5


def decoder_layers(model: torch.nn.Module) -> int:
    return model.config.get_text_config(decoder=True).num_hidden_layers


def step_shapes(states: tuple, depth: int, rows: int) -> list[int]:
    """Number of tokens of each step, after a check of everything else about the hidden states of all steps."""
    for step in states:
        assert len(step) == depth + 1
        assert len({state.shape for state in step}) == 1 and step[0].shape[0] == rows
    return [step[0].shape[1] for step in states]


@parametrize(DEFAULTS)
class TestDictionaryOfOutputs:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_outputs_of_each_step(self, case: Case, strategy: str, use_cache: bool) -> None:
        """The dictionary holds the ids of the plain call, and scores, logits and hidden states of every step."""
        model, options = case.model(), STRATEGIES[strategy] | {"use_cache": use_cache, "eos_token_id": None}
        inputs = {"input_ids": random_ids(2, PROMPT)}
        ids = generate(model, inputs, NEW, **options)
        outputs = generate(
            model,
            inputs,
            NEW,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
            **options,
        )
        assert isinstance(outputs, ModelOutput)
        assert torch.equal(outputs.sequences, ids)
        rows = 2 * options.get("num_beams", 1)
        vocabulary = model.config.vocab_size
        for kind in (outputs.scores, outputs.logits):
            assert [tuple(step.shape) for step in kind] == [(rows, vocabulary)] * NEW
        states = outputs.decoder_hidden_states if case.is_seq2seq else outputs.hidden_states
        first = 1 if case.is_seq2seq else PROMPT
        expected = [first, *[1] * (NEW - 1)] if use_cache else list(range(first, first + NEW))
        assert step_shapes(states, decoder_layers(model), rows) == expected
        if case.is_seq2seq:
            assert len(outputs.encoder_hidden_states) == model.config.encoder_layers + 1
        if "beam" in strategy:
            assert outputs.beam_indices.shape == (ids.shape[0], NEW)
            assert outputs.sequences_scores.shape == (ids.shape[0],)
        assert (outputs.past_key_values is not None) == use_cache

    def test_format_of_the_cache(self, case: Case) -> None:
        """One layer per layer of the decoder, rows of the batch first, and a count of the tokens it has seen. A row of the
        source serves all beams of the row."""
        model = case.model()
        inputs = {"input_ids": random_ids(2, PROMPT)}
        cache = generate(
            model, inputs, NEW, eos_token_id=None, return_dict_in_generate=True, num_beams=3
        ).past_key_values
        seen = NEW if case.is_seq2seq else PROMPT + NEW - 1
        assert cache.get_seq_length() == seen
        parts, source = [cache], getattr(cache, "source_axes", {})
        if isinstance(cache, EncoderDecoderCache):
            parts = [cache.self_attention_cache, cache.cross_attention_cache]
        for part in parts:
            assert len(part.layers) == decoder_layers(model)
            tensors = part.tensors()
            assert {name.split(".")[0] for name in tensors} == {str(index) for index in range(len(part.layers))}
        for name, tensor in cache.tensors().items():
            assert tensor.shape[0] == (2 if name in source else 6) and tensor.isfinite().all()


@parametrize(CAUSAL)
def test_text_without_a_prompt(case: Case) -> None:
    """Without input ids generation starts from the token of the beginning."""
    model = case.model()
    for strategy in ({}, {"num_beams": 3}):
        free = generate(model, {}, NEW, bos_token_id=2, **strategy)
        assert torch.equal(free, generate(model, {"input_ids": torch.tensor([[2]])}, NEW, **strategy))
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generation_config.bos_token_id = None
        model.generate(max_new_tokens=NEW)


@parametrize(SEQ2SEQ)
class TestContinuedTargets:
    def test_continuation_with_the_returned_cache(self, case: Case) -> None:
        """A target that was generated in two calls is the target of one call."""
        model = case.model()
        inputs = {"input_ids": random_ids(2, PROMPT)}
        expected = generate(model, inputs, 9, eos_token_id=None)
        first = generate(model, inputs, 4, eos_token_id=None, return_dict_in_generate=True)
        rest = {"decoder_input_ids": first.sequences, "past_key_values": first.past_key_values}
        mask = {"decoder_attention_mask": torch.ones_like(first.sequences)}  # a generated pad token is no padding
        continued = generate(model, inputs | rest | mask, 5, eos_token_id=None)
        assert torch.equal(continued, expected)

    def test_static_cache(self, case: Case) -> None:
        """Fixed shapes give what others give."""
        model = case.model()
        inputs = {"input_ids": random_ids(2, PROMPT)}
        for strategy in ({}, {"num_beams": 3}):
            static = generate(model, inputs, 6, cache_implementation="static", **strategy)
            assert torch.equal(static, generate(model, inputs, 6, **strategy))


@parametrize(SEQ2SEQ + CAUSAL)
def test_embeddings_with_and_without_a_cache(case: Case) -> None:
    model = case.model()
    embeds = {"inputs_embeds": model.get_input_embeddings()(random_ids(2, 7))}
    for strategy in ({}, {"num_beams": 3}):
        cached = generate(model, embeds, NEW, **strategy)
        assert torch.equal(cached, generate(model, embeds, NEW, use_cache=False, **strategy))


@pytest.mark.slow
@parametrize(DEFAULTS)
def test_compiled_forward_pass_generates_the_same(case: Case) -> None:
    """Prefill and decoding steps are one graph each, without a break."""
    model = case.model()
    inputs = {"input_ids": random_ids(2, PROMPT)}
    expected = generate(model, inputs, NEW, eos_token_id=None)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(generate(model, inputs, NEW, eos_token_id=None), expected)

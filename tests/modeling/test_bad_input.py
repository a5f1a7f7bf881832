"""Wrong calls end in an error that names the argument, the value, what is accepted and the remedy."""

from __future__ import annotations

import logging

import pytest
import torch
from factories import VOCABULARY, Case, all_heads, all_variants, parametrize, random_ids
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from hf_hybrid.layers import ssm

SEQ2SEQ = Case("spade", "AutoModelForSeq2SeqLM", "default")
CAUSAL = Case("spade_lm", "AutoModelForCausalLM", "default")


@parametrize(all_heads())
class TestEveryHead:
    def test_neither_or_both_inputs(self, case: Case) -> None:
        model, inputs = case.model(), case.inputs()
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**inputs, inputs_embeds=embeds)
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**inputs | {"input_ids": None})

    @pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
    def test_empty_input(self, case: Case, shape: tuple[int, int]) -> None:
        inputs = case.inputs() | {"input_ids": torch.zeros(shape, dtype=torch.long)}
        with pytest.raises(ValueError, match="`input_ids` is empty"):
            case.model()(**inputs)

    def test_unbatched_input(self, case: Case) -> None:
        with pytest.raises(ValueError, match=r"`input_ids` must have 2 dimensions.*\(7,\)"):
            case.model()(**case.inputs() | {"input_ids": random_ids(1, 7)[0]})

    @pytest.mark.parametrize("wrong", [VOCABULARY, VOCABULARY + 100, -1])
    def test_ids_outside_the_vocabulary(self, case: Case, wrong: int) -> None:
        inputs = case.inputs()
        inputs["input_ids"][1, 2] = wrong
        with pytest.raises(ValueError, match=f"`input_ids` contains the id {wrong},.*{VOCABULARY} tokens"):
            case.model()(**inputs)

    @pytest.mark.parametrize("shape", [(2, 10), (1, 11), (2, 12), (2, 1, 11, 11), (11,)])
    def test_mask_of_another_shape(self, case: Case, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"`attention_mask` has shape .*needs \(2, 11\)"):
            case.model()(**case.inputs(batch=2, length=11), attention_mask=torch.ones(shape))


class TestEncoderDecoder:
    def test_decoder_inputs(self) -> None:
        model, inputs = SEQ2SEQ.model(), SEQ2SEQ.inputs()
        source = {"input_ids": inputs["input_ids"]}
        with pytest.raises(ValueError, match="exactly one of `decoder_input_ids` and `decoder_inputs_embeds`"):
            model(**source)
        embeds = model.get_input_embeddings()(inputs["decoder_input_ids"])
        with pytest.raises(ValueError, match="exactly one of `decoder_input_ids` and `decoder_inputs_embeds`"):
            model(**inputs, decoder_inputs_embeds=embeds)
        with pytest.raises(ValueError, match="`decoder_input_ids` is empty"):
            model(**source, decoder_input_ids=torch.zeros(2, 0, dtype=torch.long))
        with pytest.raises(ValueError, match="`decoder_input_ids` contains the id 99"):
            model(**source, decoder_input_ids=torch.full((2, 3), 99))
        with pytest.raises(ValueError, match="`decoder_attention_mask` has shape"):
            model(**inputs, decoder_attention_mask=torch.ones(2, 2))

    def test_batches_that_differ(self) -> None:
        with pytest.raises(ValueError, match="`decoder_input_ids`.* has 3 rows but the encoder output has 2"):
            SEQ2SEQ.model()(random_ids(2, 5), decoder_input_ids=random_ids(3, 4))

    def test_mask_that_does_not_fit_given_encoder_outputs(self) -> None:
        model = SEQ2SEQ.model()
        encoder_outputs = model.get_encoder()(random_ids(2, 5))
        target = {"encoder_outputs": encoder_outputs, "decoder_input_ids": random_ids(2, 4)}
        with pytest.raises(ValueError, match=r"`attention_mask` has shape .*needs \(2, 5\)"):
            model(**target, attention_mask=torch.ones(2, 6))

    def test_targets_longer_than_the_position_table(self) -> None:
        model = SEQ2SEQ.model(max_target_positions=10)
        model(random_ids(1, 5), decoder_input_ids=random_ids(1, 10))
        with pytest.raises(ValueError, match="11 tokens.*`max_target_positions` = 10"):
            model(random_ids(1, 5), decoder_input_ids=random_ids(1, 11))
        with pytest.raises(ValueError, match="`max_target_positions`"):
            model(random_ids(1, 5), labels=random_ids(1, 11))

    def test_labels_without_special_tokens(self) -> None:
        model = SEQ2SEQ.model(decoder_start_token_id=None)
        with pytest.raises(ValueError, match="`decoder_start_token_id` and `pad_token_id`"):
            model(random_ids(1, 5), labels=random_ids(1, 4))


class TestLanguageModel:
    def test_mask_must_cover_the_cached_tokens(self) -> None:
        model = CAUSAL.model()
        past = model(random_ids(2, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"needs \(2, 9\).*6 of them cached"):
            model(random_ids(2, 3), past_key_values=past, attention_mask=torch.ones(2, 3))

    def test_foreign_cache(self) -> None:
        with pytest.raises(ValueError, match=r"`past_key_values` \(DynamicCache of 0 layers\).*leave .* unset"):
            CAUSAL.model()(random_ids(2, 6), past_key_values=DynamicCache())
        other = CAUSAL.model(ssm_layers=[1])(random_ids(2, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"`ssm_layers` = \[1\], but this one has \[0\]"):
            CAUSAL.model()(random_ids(2, 1), past_key_values=other)
        with pytest.raises(ValueError, match="EncoderDecoderCache.*DynamicCache"):
            SEQ2SEQ.model()(**SEQ2SEQ.inputs(), past_key_values=DynamicCache())

    def test_cache_of_another_batch(self) -> None:
        model = CAUSAL.model()
        past = model(random_ids(2, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 rows but `past_key_values` holds 2"):
            model(random_ids(3, 1), past_key_values=past)


@parametrize([case for case in all_variants() if case.variant in ("official", "stack_s4")])
def test_input_longer_than_the_reach_warns_once(case: Case) -> None:
    """Beyond `ssm_max_length` the input is processed with a truncated reach, and the remedy is named."""
    transformers_logging.warning_once.cache_clear()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(ssm.__name__)
    logger.addHandler(handler)
    try:
        model = case.model(ssm_max_length=16)
        with torch.no_grad():
            model(**case.inputs(length=16), use_cache=False)
            assert not messages
            for _ in range(3):
                outputs = model(**case.inputs(length=23), use_cache=False)
    finally:
        logger.removeHandler(handler)
    assert outputs.logits.isfinite().all()
    assert len(messages) == 1
    assert "23" in messages[0] and "16" in messages[0] and "ssm_max_length" in messages[0]

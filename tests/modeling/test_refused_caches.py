"""What generation and continuation cannot do is refused by name, in every model that generates, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_variants, parametrize, random_ids

SEQ2SEQ = all_variants("AutoModelForSeq2SeqLM")
CAUSAL = all_variants("AutoModelForCausalLM")
DEFAULTS = [case for case in SEQ2SEQ + CAUSAL if case.variant == "default"]
KINDS = ("offloaded", "offloaded_static", "quantized")


def right_padded(case: Case, rows: int = 2) -> tuple[torch.nn.Module, dict, torch.Tensor, torch.Tensor, str]:
    """Model, source, ids whose first row ends with four padded tokens, mask, and the prefix of the names of both."""
    ids, mask = random_ids(rows, 9), torch.ones(rows, 9, dtype=torch.long)
    mask[0, 5:] = 0
    source = {"input_ids": random_ids(rows, 7)} if case.is_seq2seq else {}
    return case.model(), source, ids, mask, "decoder_" if case.is_seq2seq else ""


@parametrize(CAUSAL + SEQ2SEQ)
class TestPaddingOnTheRight:
    @torch.no_grad()
    def test_a_continued_cache_is_right_or_refused(self, case: Case) -> None:
        model, source, ids, mask, prefix = right_padded(case)
        new, longer = random_ids(2, 3), torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
        past = model(
            **source, **{f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}, use_cache=True
        ).past_key_values
        arguments = {**source, f"{prefix}input_ids": new, "past_key_values": past}
        if case.model_type != "bst":
            with pytest.raises(ValueError, match=f"`{prefix}attention_mask` has padding behind real tokens"):
                model(**arguments, **{f"{prefix}attention_mask": longer})
            return
        logits = model(**arguments, **{f"{prefix}attention_mask": longer}).logits
        alone = model(torch.cat([ids[:1, :5], new[:1]], dim=1)).logits
        torch.testing.assert_close(logits[0], alone[0, 5:], rtol=1e-5, atol=1e-5)

    def test_text_that_was_read_cannot_be_hidden(self, case: Case) -> None:
        """Rows of a batch end at different places; what `generate` wrote behind the end went into the state."""
        model, source, ids, mask, prefix = right_padded(case)
        past = model(**source, **{f"{prefix}input_ids": ids}, use_cache=True).past_key_values
        longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
        arguments = source | {f"{prefix}input_ids": random_ids(2, 3), f"{prefix}attention_mask": longer}
        with pytest.raises(
            ValueError, match=f"`{prefix}attention_mask` (has padding behind real tokens|hides 4 tokens)"
        ):
            model(**arguments, past_key_values=past)

    def test_prompts_are_refused(self, case: Case) -> None:
        model, source, ids, mask, prefix = right_padded(case)
        for use_cache in (True, False):
            with pytest.raises(ValueError, match=f"`{prefix}attention_mask` ends with padding"):
                model.generate(
                    **source,
                    **{f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask},
                    max_new_tokens=2,
                    use_cache=use_cache,
                )


@parametrize(DEFAULTS)
class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds_of_transformers(self, case: Case, kind: str) -> None:
        model = case.model()
        message = (
            f"`cache_implementation='{kind}'` (is not available for {type(model).__name__}|moves keys and values from)"
        )
        with pytest.raises(ValueError, match=message):
            model.generate(random_ids(1, 4), max_new_tokens=2, cache_implementation=kind)

    def test_continuous_batching(self, case: Case) -> None:
        model = case.model()
        message = f"`generate_batch`, `cache_implementation='paged'`.*not available for {type(model).__name__}"
        with pytest.raises(ValueError, match=message):
            model.generate(random_ids(1, 4), max_new_tokens=2, cache_implementation="paged")
        with pytest.raises(ValueError, match=message):
            model.generate_batch([[3, 4, 5]], max_new_tokens=2)
        with pytest.raises(ValueError, match=message):
            model.init_continuous_batching()


@parametrize(CAUSAL + SEQ2SEQ)
@torch.no_grad()
def test_crop(case: Case) -> None:
    """Keys and values of full attention can be taken back; a recurrent state cannot."""
    model, source, ids, _, prefix = right_padded(case)
    past = model(**source, **{f"{prefix}input_ids": ids}, use_cache=True).past_key_values
    past.crop(0)
    if model._is_stateful:
        with pytest.raises(NotImplementedError, match="cannot be cropped.*cannot be rolled back"):
            past.crop(-2)
        return
    past.crop(-2)
    assert past.get_seq_length() == 7
    found = model(**source, **{f"{prefix}input_ids": ids[:, 7:]}, past_key_values=past).logits
    expected = model(**source, **{f"{prefix}input_ids": ids}, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@parametrize(SEQ2SEQ)
def test_a_target_is_continued_without_a_mask(case: Case) -> None:
    """Only what the cache does not hold is processed, as with a mask."""
    model, source = case.model(), random_ids(2, 7)
    settings = {"eos_token_id": None, "return_dict_in_generate": True, "output_hidden_states": True}
    expected = model.generate(source, max_new_tokens=9, eos_token_id=None)
    first = model.generate(source, max_new_tokens=4, **settings)
    again = {"decoder_input_ids": first.sequences, "past_key_values": first.past_key_values}
    continued = model.generate(source, **again, max_new_tokens=5, **settings)
    assert torch.equal(continued.sequences, expected)
    assert [step[0].shape[1] for step in continued.decoder_hidden_states] == [1] * 5
    past = model.generate(source, max_new_tokens=4, **settings).past_key_values
    with pytest.raises(ValueError, match="`decoder_input_ids` has 4 tokens, but `past_key_values` holds 4"):
        model.generate(source, decoder_input_ids=first.sequences[:, :4], past_key_values=past, max_new_tokens=5)


@parametrize(CAUSAL + SEQ2SEQ)
def test_a_text_without_new_tokens_is_refused(case: Case) -> None:
    """What the cache holds is not read a second time; new tokens alone need the mask of the whole text."""
    model, source, text, _, prefix = right_padded(case)
    name, arguments = f"{prefix}input_ids", {"max_new_tokens": 3, "eos_token_id": None}
    if case.is_seq2seq:
        text[:, 0] = model.config.decoder_start_token_id
    with torch.no_grad():
        past = model(**source, **{name: text}, use_cache=True).past_key_values
    for given in (text, text[:, :3]):  # all of it, and a turn of a conversation
        for mask in ({}, {f"{prefix}attention_mask": torch.ones_like(given)}):
            message = f"`{name}` has {given.shape[1]} tokens, but `past_key_values` holds 9 already"
            with pytest.raises(ValueError, match=message):
                model.generate(**source | {name: given} | mask, past_key_values=past, **arguments)
    if case.is_causal:
        embeddings = model.get_input_embeddings()(text)
        with pytest.raises(ValueError, match="`inputs_embeds` has 9 tokens, but `past_key_values` holds 9 already"):
            model.generate(inputs_embeds=embeddings, past_key_values=past, **arguments)
    new = random_ids(2, 2)
    whole = torch.cat([text, new], dim=1)
    expected = model.generate(**source | {name: whole}, use_cache=False, **arguments)[:, -3:]
    mask = {f"{prefix}attention_mask": torch.ones_like(whole)}
    alone = model.generate(**source | {name: new} | mask, past_key_values=past, **arguments)
    assert alone[:, -3:].tolist() == expected.tolist()

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

"""A state that is carried through the segments of texts: cut off the graph, begun anew in single rows, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_variants, parametrize, random_ids
from transformers import DynamicCache, PreTrainedModel

from hf_hybrid.modeling import cache as caches
from hf_hybrid.modeling.cache import StateCache
from hf_hybrid.modeling.call_cache import detach_cache, reset_rows

CAUSAL = all_variants("AutoModelForCausalLM")
SEQ2SEQ = all_variants("AutoModelForSeq2SeqLM")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64


def new_cache(model: PreTrainedModel) -> StateCache:
    return model.base_model.build_cache()


@parametrize(CAUSAL)
class TestLanguageModel:
    def test_segments_equal_one_pass_without_gradients_between_them(self, case: Case) -> None:
        model, ids = case.model().double().train(), random_ids(2, 18)
        expected = model(ids, use_cache=False).logits
        embeds = [model.get_input_embeddings()(part).detach().requires_grad_() for part in ids.split(6, dim=1)]
        past = new_cache(model)
        for index, segment in enumerate(embeds):
            outputs = model(inputs_embeds=segment, past_key_values=past)
            torch.testing.assert_close(outputs.logits, expected[:, 6 * index : 6 * index + 6], **CLOSE)
            detach_cache(past)
            assert not any(tensor.requires_grad for tensor in past.tensors().values())
        grads = torch.autograd.grad(outputs.logits.square().sum(), embeds, allow_unused=True)
        assert grads[0] is None and grads[1] is None and grads[2].abs().max() > 0

    @torch.no_grad()
    @pytest.mark.parametrize("surplus", [1, caches.SURPLUS_TOKENS], ids=["dropped past", "kept past"])
    def test_a_row_may_begin_a_new_text(self, case: Case, surplus: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows that begin anew go on as if nothing had been before them, the others as if nothing had happened."""
        monkeypatch.setattr(caches, "SURPLUS_TOKENS", surplus)
        model, ids = case.model().double(), random_ids(3, 25)
        begins = torch.tensor([0, 0, 0])
        past = new_cache(model)
        model(ids[:, :6], past_key_values=past)
        for rows, first, last in (([0, 2], 6, 7), ([1], 7, 15), ([], 15, 16), ([0, 1, 2], 16, 25)):
            if rows:
                chosen = torch.zeros(3, dtype=torch.bool).index_fill(0, torch.tensor(rows), True)
                reset_rows(past, chosen)
                begins[chosen] = first
            logits = model(ids[:, first:last], past_key_values=past).logits
            for row, begin in enumerate(begins.tolist()):
                alone = model(ids[row : row + 1, begin:last], use_cache=False).logits[0, first - begin :]
                torch.testing.assert_close(logits[row], alone, **CLOSE)

    @torch.no_grad()
    def test_padding_at_the_end_of_a_text_that_is_over(self, case: Case) -> None:
        """Rows whose text ended earlier than those of others were padded on the right; what begins anew goes on."""
        model, ids = case.model().double(), random_ids(2, 15)
        past, mask = new_cache(model), torch.ones(2, 15, dtype=torch.long)
        mask[0, 4:6] = 0
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=past)
        reset_rows(past, torch.tensor([True, False]))
        logits = model(ids[:, 6:], attention_mask=mask, past_key_values=past).logits
        torch.testing.assert_close(logits[0], model(ids[:1, 6:], use_cache=False).logits[0], **CLOSE)
        torch.testing.assert_close(logits[1], model(ids[1:], use_cache=False).logits[0, 6:], **CLOSE)

    @torch.no_grad()
    def test_padding_in_front_of_a_text_that_begins_later(self, case: Case) -> None:
        model, ids = case.model().double(), random_ids(2, 15)
        past = new_cache(model)
        model(ids[:, :6], past_key_values=past)
        reset_rows(past, torch.tensor([True, False]))
        mask = torch.ones(2, past.get_seq_length() + 9, dtype=torch.long)
        mask[0, -9:-6] = 0
        logits = model(ids[:, 6:], attention_mask=mask, past_key_values=past).logits
        torch.testing.assert_close(logits[0, 3:], model(ids[:1, 9:], use_cache=False).logits[0], **CLOSE)
        torch.testing.assert_close(logits[1], model(ids[1:], use_cache=False).logits[0, 6:], **CLOSE)

    @torch.no_grad()
    def test_a_saved_state_goes_on_bitwise(self, case: Case) -> None:
        model, ids = case.model(), random_ids(2, 14)
        past, loaded = new_cache(model), new_cache(model)
        model(ids[:, :5], past_key_values=past)
        reset_rows(past, torch.tensor([False, True]))
        model(ids[:, 5:9], past_key_values=past)
        loaded.load_saved(past.saved(), model.device)
        expected, found = (model(ids[:, 9:], past_key_values=state).logits for state in (past, loaded))
        assert torch.equal(found, expected)

    def test_nothing_to_begin_anew(self, case: Case) -> None:
        """Nothing to begin anew before the first call; caches of other models are refused by name."""
        past = new_cache(case.model())
        reset_rows(past, torch.tensor([True]))
        assert past.get_seq_length() == 0 and not past.tensors()
        case.model()(random_ids(2, 3), past_key_values=past)
        with pytest.raises(ValueError, match=r"`rows` must be booleans of shape \(2,\)"):
            reset_rows(past, torch.tensor([True]))
        for operation in (detach_cache, lambda cache: reset_rows(cache, torch.tensor([True]))):
            with pytest.raises(ValueError, match="DynamicCache cannot be carried"):
                operation(DynamicCache())


@parametrize(SEQ2SEQ)
@torch.no_grad()
def test_a_target_may_begin_anew(case: Case) -> None:
    """The source stays; in the other rows the target goes on."""
    model, source, ids = case.model().double(), random_ids(2, 7), random_ids(2, 12)
    past = model(source, decoder_input_ids=ids[:, :5], use_cache=True).past_key_values
    detach_cache(past)
    reset_rows(past, torch.tensor([True, False]))
    logits = model(source, decoder_input_ids=ids[:, 5:], past_key_values=past).logits
    for row, begin in ((0, 5), (1, 0)):
        alone = model(source[row : row + 1], decoder_input_ids=ids[row : row + 1, begin:], use_cache=False).logits
        torch.testing.assert_close(logits[row], alone[0, 5 - begin :], **CLOSE)

"""Padding, batching and the reach of each token: what a token may depend on, and what it must not."""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_heads, all_variants, main_output, parametrize, random_ids
from hypothesis import given
from hypothesis import strategies as st

EXACT = {"rtol": 1e-5, "atol": 1e-5}
EVERY_CASE = list(dict.fromkeys(all_heads() + all_variants()))


def pad_source(inputs: dict[str, torch.Tensor], left: int, right: int) -> tuple[dict[str, torch.Tensor], slice]:
    """The inputs with random tokens as padding on both sides of the source, and the places of the real tokens."""
    ids = inputs["input_ids"]
    batch, length = ids.shape
    padded = torch.cat([random_ids(batch, left), ids, random_ids(batch, right)], dim=1)
    mask = torch.zeros(padded.shape, dtype=torch.long)
    mask[:, left : left + length] = 1
    return inputs | {"input_ids": padded, "attention_mask": mask}, slice(left, left + length)


def per_token(case: Case, outputs: torch.Tensor, real: slice) -> torch.Tensor:
    """Drops the padded positions, if the output has one entry per source token."""
    return outputs if case.is_seq2seq or outputs.dim() == 2 else outputs[:, real]


@parametrize(EVERY_CASE)
class TestPadding:
    @torch.no_grad()
    def test_padding_on_either_side_changes_nothing(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs(length=13)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = main_output(model(**inputs))

        @given(left=st.integers(0, 9), right=st.integers(0, 9))
        def check(left: int, right: int) -> None:
            padded, real = pad_source(inputs, left, right)
            actual = per_token(case, main_output(model(**padded)), real)
            torch.testing.assert_close(actual, expected, **EXACT)

        check()

    @torch.no_grad()
    def test_rows_of_different_lengths(self, case: Case) -> None:
        """Each row of a padded batch equals the row alone."""
        model = case.model()
        lengths = (12, 7, 1)
        for side in ("left", "right"):
            inputs = case.inputs(batch=3, length=12)
            steps = torch.arange(12)
            real = [steps >= 12 - n if side == "left" else steps < n for n in lengths]
            inputs["attention_mask"] = torch.stack(real).long()
            batch = main_output(model(**inputs))
            for row, keep in enumerate(real):
                single = {name: value[row : row + 1] for name, value in inputs.items()}
                single |= {
                    "input_ids": single["input_ids"][:, keep],
                    "attention_mask": single["attention_mask"][:, keep],
                }
                actual = batch[row] if case.is_seq2seq or batch.dim() == 2 else batch[row, keep]
                torch.testing.assert_close(actual, main_output(model(**single))[0], **EXACT)

    @torch.no_grad()
    def test_hidden_tokens_anywhere_have_no_influence(self, case: Case) -> None:
        """The ids under a mask of 0 do not matter, inside the text as little as at its ends."""
        model = case.model()
        inputs = case.inputs(length=16)
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, [0, 4, 5, 11]] = 0
        mask[1, [6, 7, 8, 9, 15]] = 0
        inputs["attention_mask"] = mask
        first = main_output(model(**inputs))
        other = inputs | {"input_ids": torch.where(mask.bool(), inputs["input_ids"], random_ids(2, 16))}
        second = main_output(model(**other))
        if not (case.is_seq2seq or first.dim() == 2):
            first, second = first[mask.bool()], second[mask.bool()]
        torch.testing.assert_close(first, second, **EXACT)

    @torch.no_grad()
    def test_fully_padded_row_is_finite_and_harms_no_other(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs(batch=2, length=9)
        inputs["attention_mask"] = torch.tensor([[1] * 9, [0] * 9])
        outputs = main_output(model(**inputs))
        assert outputs.isfinite().all()
        single = main_output(model(**{name: value[:1] for name, value in inputs.items()}))
        torch.testing.assert_close(outputs[:1], single, **EXACT)

    @torch.no_grad()
    def test_order_of_the_batch(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs(batch=4, length=10)
        order = torch.tensor([2, 0, 3, 1])
        shuffled = main_output(model(**{name: value[order] for name, value in inputs.items()}))
        torch.testing.assert_close(shuffled, main_output(model(**inputs))[order], **EXACT)

    @torch.no_grad()
    def test_lengths_around_the_window(self, case: Case) -> None:
        """With and without a mask that hides nothing, for lengths at which blocks are cut differently."""
        model = case.model()
        for length in (1, 2, 3, 4, 5, 17, 31):
            inputs = case.inputs(length=length)
            with_mask = main_output(model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])))
            torch.testing.assert_close(with_mask, main_output(model(**inputs)), **EXACT)


@parametrize([case for case in all_variants() if case.is_seq2seq])
def test_padded_targets(case: Case) -> None:
    """Padding behind the targets, or in front of them with a mask, leaves the real logits as they are."""
    model = case.model()
    inputs = case.inputs(target=6)
    expected = model(**inputs).logits
    target = inputs["decoder_input_ids"]
    after = inputs | {"decoder_input_ids": torch.cat([target, random_ids(2, 4)], dim=1)}
    torch.testing.assert_close(model(**after).logits[:, :6], expected, **EXACT)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[:, :4] = 0
    before = {"decoder_input_ids": torch.cat([random_ids(2, 4), target], dim=1), "decoder_attention_mask": mask}
    torch.testing.assert_close(model(**(inputs | before)).logits[:, 4:], expected, **EXACT)
    nothing = before | {"decoder_attention_mask": torch.zeros(2, 10)}
    assert model(**(inputs | nothing)).logits.isfinite().all()


class TestReach:
    @parametrize([case for case in all_variants() if case.is_causal])
    def test_language_models_see_the_past_only(self, case: Case) -> None:
        model = case.model()
        ids = random_ids(1, 20)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden_states = model.base_model(inputs_embeds=embeds).last_hidden_state
        gradient = torch.autograd.grad(hidden_states[0, 12].square().sum(), embeds)[0][0].abs().sum(-1)
        assert gradient[13:].max() <= 1e-5 * gradient.max()
        changed = ids.clone()
        changed[0, 13:] = random_ids(1, 7)
        with torch.no_grad():
            torch.testing.assert_close(model(changed).logits[:, :13], model(ids).logits[:, :13], **EXACT)

    @parametrize([case for case in all_variants() if case.is_seq2seq])
    def test_decoders_see_the_past_only(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs(target=12)
        expected = model(**inputs).logits[:, :7]
        inputs["decoder_input_ids"] = torch.cat([inputs["decoder_input_ids"][:, :7], random_ids(2, 5)], dim=1)
        torch.testing.assert_close(model(**inputs).logits[:, :7], expected, **EXACT)

    @pytest.mark.parametrize("ssm_layers", [[], [0]])
    def test_receptive_field_of_the_spade_encoder(self, ssm_layers: list[int]) -> None:
        """Without an SSM, position i depends on |i - j| <= layers * radius exactly; with one, on every position."""
        model = Case("spade", "AutoModelForTextEncoding", "default").model(ssm_layers=ssm_layers)
        radius, layers, middle = model.config.window_size - 1, model.config.num_hidden_layers, 30
        embeds = torch.randn(1, 61, model.config.hidden_size, requires_grad=True)
        output = model(inputs_embeds=embeds).last_hidden_state
        influence = torch.autograd.grad(output[0, middle].square().sum(), embeds)[0][0].abs().sum(-1)
        distance = (torch.arange(61) - middle).abs()
        assert (influence[distance <= layers * radius] > 0).all()
        if ssm_layers:
            assert (influence > 1e-6 * influence.max()).all()
        else:
            assert (influence[distance > layers * radius] == 0).all()

    def test_receptive_field_of_the_chunked_spade_encoder(self) -> None:
        """Without an SSM nothing crosses the borders of a chunk."""
        case = Case("spade", "AutoModelForTextEncoding", "default")
        model = case.model(ssm_layers=[], local_attention_type="chunk", window_size=5)
        embeds = torch.randn(1, 18, model.config.hidden_size, requires_grad=True)
        output = model(inputs_embeds=embeds).last_hidden_state
        influence = torch.autograd.grad(output[0, 7].square().sum(), embeds)[0][0].abs().sum(-1)
        assert torch.equal(influence > 0, (torch.arange(18) // 5) == 1)

    def test_receptive_field_of_the_spade_language_model(self) -> None:
        model = Case("spade_lm", "AutoModelForCausalLM", "default").model(ssm_layers=[])
        reach = (model.config.window_size - 1) * model.config.num_hidden_layers
        embeds = torch.randn(1, 24, model.config.hidden_size, requires_grad=True)
        output = model.model(inputs_embeds=embeds).last_hidden_state
        influence = torch.autograd.grad(output[0, 20].square().sum(), embeds)[0][0].abs().sum(-1)
        behind = 20 - torch.arange(24)
        assert torch.equal(influence > 0, (behind >= 0) & (behind <= reach))

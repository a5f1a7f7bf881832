"""The forms of input and output that every Transformers model offers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from factories import Case, all_heads, all_variants, main_output, parametrize, perturb
from transformers.utils import ModelOutput

EXACT = {"rtol": 1e-5, "atol": 1e-5}
EVERY_CASE = list(dict.fromkeys(all_heads() + all_variants()))


def flatten(value: object) -> list[torch.Tensor]:
    """All tensors of nested tuples and outputs, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, ModelOutput):
        value = value.to_tuple()
    return [tensor for item in value for tensor in flatten(item)] if isinstance(value, tuple) else []


@parametrize(EVERY_CASE)
class TestForms:
    @torch.no_grad()
    def test_tuple_equals_dictionary(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs()
        inputs |= case.labels(inputs) | {"output_hidden_states": True}
        as_dictionary, as_tuple = model(**inputs), model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        pairs = list(zip(flatten(as_dictionary.to_tuple()), flatten(as_tuple), strict=True))
        assert len(pairs) >= 3
        for first, second in pairs:
            torch.testing.assert_close(first, second, rtol=0, atol=0)
        if case.labels(inputs):
            torch.testing.assert_close(as_tuple[0], as_dictionary.loss, rtol=0, atol=0)

    @torch.no_grad()
    def test_embeddings_equal_ids(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs()
        expected = main_output(model(**inputs))
        table = model.get_input_embeddings()
        embedded = {name.replace("input_ids", "inputs_embeds"): table(ids) for name, ids in inputs.items()}
        torch.testing.assert_close(main_output(model(**embedded)), expected, rtol=0, atol=0)

    @torch.no_grad()
    def test_hidden_states(self, case: Case) -> None:
        """One entry for the embeddings and one per layer; the last one is what the head reads."""
        model = case.model()
        config, inputs = model.config, case.inputs(batch=2, length=11, target=6)
        outputs = model(**inputs, output_hidden_states=True)
        assert "hidden_states" not in model(**inputs) and "encoder_hidden_states" not in model(**inputs)
        if case.is_seq2seq:
            stacks = [
                (outputs.encoder_hidden_states, config.num_hidden_layers, 11, outputs.encoder_last_hidden_state),
                (outputs.decoder_hidden_states, config.decoder_layers, 6, outputs.get("last_hidden_state")),
            ]
        else:
            stacks = [(outputs.hidden_states, config.num_hidden_layers, 11, outputs.get("last_hidden_state"))]
        for hidden_states, depth, length, last in stacks:
            assert [tuple(state.shape) for state in hidden_states] == [(2, length, config.hidden_size)] * (depth + 1)
            assert len({float(state.sum()) for state in hidden_states}) == depth + 1
            if last is not None:
                torch.testing.assert_close(hidden_states[-1], last, rtol=0, atol=0)

    @torch.no_grad()
    def test_the_same_again(self, case: Case) -> None:
        """No state is carried from one forward pass to the next; a copy of the model is the model."""
        model = case.model()
        inputs = case.inputs()
        expected = main_output(model(**inputs))
        main_output(model(**case.inputs(length=29)))
        torch.testing.assert_close(main_output(model(**inputs)), expected, rtol=0, atol=0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(main_output(other(**inputs)), expected, rtol=0, atol=0)

    @torch.no_grad()
    def test_changed_weights_are_used_at_once(self, case: Case) -> None:
        """Nothing that was computed from the weights outlives them."""
        model, other = case.model(), case.model_class(case.config()).eval()
        inputs = case.inputs()
        main_output(model(**inputs))
        perturb(other, seed=7)
        expected = main_output(other(**inputs))
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(main_output(model(**inputs)), expected, **EXACT)
        perturb(model, seed=8)
        other.load_state_dict(model.state_dict())
        fresh = main_output(copy.deepcopy(other)(**inputs))
        torch.testing.assert_close(main_output(model(**inputs)), fresh, **EXACT)
        assert (fresh - expected).abs().max() > 1e-2


@parametrize([case for case in all_variants() if case.model_type == "spade"])
class TestDecoderAttention:
    @torch.no_grad()
    def test_attention_weights(self, case: Case) -> None:
        model = case.model()
        model.set_attn_implementation("eager")
        config, inputs = model.config, case.inputs(batch=2, length=11, target=6)
        inputs["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
        inputs["attention_mask"][1, 8:] = 0
        outputs = model(**inputs, output_attentions=True)
        assert len(outputs.cross_attentions) == config.decoder_layers
        for weights in outputs.cross_attentions:
            assert weights.shape == (2, config.num_attention_heads, 6, 11)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, config.num_attention_heads, 6))
            assert not weights[1, ..., 8:].any()
        if config.decoder_window_size is None:
            assert len(outputs.decoder_attentions) == config.decoder_layers
            for weights in outputs.decoder_attentions:
                assert weights.shape == (2, config.num_attention_heads, 6, 6)
                assert not weights.triu(1).any()

    @torch.no_grad()
    @pytest.mark.parametrize("empty", [False, True])
    def test_sdpa_equals_eager(self, case: Case, empty: bool) -> None:
        """Also where a row has no source: it reads zeros."""
        model = case.model()
        inputs = case.inputs(length=9, target=7)
        inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
        inputs["attention_mask"][0, :4] = 0
        inputs["decoder_attention_mask"] = torch.ones(2, 7, dtype=torch.long)
        inputs["decoder_attention_mask"][1, :2] = 0
        logits = {}
        if empty:
            inputs["attention_mask"][1] = 0
        for kind in ("sdpa", "eager"):
            model.set_attn_implementation(kind)
            assert model.config._attn_implementation == kind
            logits[kind] = model(**inputs).logits
        real = inputs["decoder_attention_mask"].bool()
        torch.testing.assert_close(logits["sdpa"][real], logits["eager"][real], **EXACT)

    @torch.no_grad()
    def test_encoder_outputs_can_be_given(self, case: Case) -> None:
        model = case.model()
        inputs = case.inputs()
        expected = model(**inputs).logits
        encoder_outputs = model.get_encoder()(inputs["input_ids"])
        target = {"decoder_input_ids": inputs["decoder_input_ids"]}
        torch.testing.assert_close(model(encoder_outputs=encoder_outputs, **target).logits, expected)
        as_tuple = (encoder_outputs.last_hidden_state,)
        torch.testing.assert_close(model(encoder_outputs=as_tuple, **target).logits, expected)


@parametrize(all_heads())
def test_embeddings_can_be_replaced(case: Case) -> None:
    model = case.model()
    new = torch.nn.Embedding(55, model.config.hidden_size)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new


@parametrize(all_heads())
def test_unknown_arguments_do_not_reach_the_layers(case: Case) -> None:
    """Tokenizers return more than these models need; `token_type_ids` must not be an obstacle."""
    model = case.model()
    inputs = case.inputs()
    expected = main_output(model(**inputs))
    actual = main_output(model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_classifier_pooling(pooling: str) -> None:
    case = Case("spade", "AutoModelForSequenceClassification", "default")
    model = case.model(pooling=pooling)
    inputs = case.inputs(length=9)
    inputs["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    inputs["attention_mask"][0, :3] = 0
    states = model.model(**inputs).last_hidden_state
    pooled = {"mean": states[0, 3:].mean(0), "first": states[0, 3], "last": states[0, -1]}[pooling]
    torch.testing.assert_close(model(**inputs).logits[0], model.classifier(pooled), **EXACT)


def test_language_model_classifier_reads_the_last_real_token() -> None:
    case = Case("spade_lm", "AutoModelForSequenceClassification", "default")
    model = case.model()
    inputs = case.inputs(length=9)
    short = model(input_ids=inputs["input_ids"][:, :6]).logits
    padded = inputs["input_ids"].clone()
    padded[:, 6:] = model.config.pad_token_id
    torch.testing.assert_close(model(input_ids=padded).logits, short, **EXACT)

"""Arguments of a wrong type, shape or range are named, whatever the head; unusual ones that mean something are computed."""

from __future__ import annotations

import inspect

import pytest
import torch
from factories import Case, all_heads, all_variants, parametrize, random_ids
from torch.nn import functional as F

from hf_hybrid.modeling.inputs import flatten_choices, kept_positions, read_encoder_outputs
from hf_hybrid.modeling.losses import classification_loss, mean_over_labels, span_loss

HEADS = all_heads() + all_heads(other_inputs=True)
SWITCHES = {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_activations"}
SWITCHES |= {"output_quantization"}
OTHERS = {"targets_per_source", "logits_to_keep", "num_items_in_batch", "encoder_outputs"}


def arguments_of(case: Case) -> list[str]:
    names = inspect.signature(case.model_class.forward).parameters
    return [name for name in names if name not in {"self", "kwargs", *OTHERS}]


@parametrize(HEADS)
class TestEveryHead:
    def test_values_of_another_type(self, case: Case) -> None:
        model, inputs = case.model(), case.inputs()
        for name in arguments_of(case):
            for wrong in ("a text", [[1, 2]], object()):
                with pytest.raises(TypeError, match=f"`{name}` must be"):
                    model(**inputs | {name: wrong})
        for name in ("return_dict", "output_hidden_states", "output_attentions"):
            with pytest.raises(TypeError, match=f"`{name}` must be True, False or None"):
                model(**inputs, **{name: torch.ones(2)})

    def test_numbers_of_another_kind(self, case: Case) -> None:
        """Complex numbers anywhere, integers instead of states, double instead of single precision."""
        model, inputs = case.model(), case.inputs()
        for name in set(arguments_of(case)) - SWITCHES - {"past_key_values"}:
            with pytest.raises(ValueError, match=f"`{name}` must hold"):
                model(**inputs | {name: torch.ones(2, 11, dtype=torch.complex64)})
        for name in set(arguments_of(case)) & {
            "inputs_embeds",
            "decoder_inputs_embeds",
            "input_values",
            "pixel_values",
        }:
            with pytest.raises(ValueError, match=f"`{name}` must hold floating-point numbers"):
                model(**inputs | {name: torch.ones(2, 11, 16, dtype=torch.long)})
            with pytest.raises(ValueError, match=rf"`{name}` is of type torch.float64.*`{name}.to\(model.dtype\)`"):
                model(**inputs | {name: torch.ones(2, 11, 16, dtype=torch.float64)})

    def test_configuration_that_asks_for_tuples(self, case: Case) -> None:
        model, inputs = case.model(), case.inputs()
        with torch.no_grad():
            expected = model(**inputs)
            model.config.return_dict = False
            actual = model(**inputs)
        assert isinstance(actual, tuple) and len(actual) == len(expected.to_tuple())
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)

    def test_labels_that_are_all_ignored(self, case: Case) -> None:
        """The loss is 0, and so are the gradients; a mean over nothing would be NaN."""
        model, inputs = case.model().train(), case.inputs()
        labels = {name: torch.full_like(tensor, -100) for name, tensor in case.labels(inputs).items()}
        if not labels:
            return  # a bare model
        loss = model(**inputs, **labels).loss
        loss.backward()
        assert loss == 0
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())

    def test_labels_of_another_shape(self, case: Case) -> None:
        model, inputs = case.model(), case.inputs()
        labels = case.labels(inputs)
        for name, tensor in labels.items():
            with pytest.raises(ValueError, match=f"`{name}` must have the shape"):
                model(**inputs, **labels | {name: torch.cat([tensor, tensor])})

    def test_a_wrong_call_changes_nothing(self, case: Case) -> None:
        """Transformers records on the first call with labels what the model is trained for."""
        model, inputs = case.model(), case.inputs()
        labels = case.labels(inputs)
        if "labels" not in labels:
            return
        expected = model(**inputs, **labels).loss
        with pytest.raises(ValueError, match="`labels`"):
            model(**inputs, labels=labels["labels"] + 0.5)
        torch.testing.assert_close(model(**inputs, **labels).loss, expected, rtol=0, atol=0)
        assert model.config.problem_type is None


@parametrize(all_variants("AutoModelForCausalLM"))
def test_loss_is_of_all_positions_whatever_logits_are_kept(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    expected = model(**inputs, labels=inputs["input_ids"])
    for kept, index in ((1, slice(-1, None)), (torch.tensor([0, 5]), [0, 5]), (100, slice(None))):
        outputs = model(**inputs, labels=inputs["input_ids"], logits_to_keep=kept)
        torch.testing.assert_close(outputs.loss, expected.loss)
        torch.testing.assert_close(outputs.logits, expected.logits[:, index])


@pytest.mark.parametrize(
    "wrong", [-1, torch.tensor([0.0]), torch.tensor([[1]]), torch.tensor([7]), torch.tensor([-8])]
)
def test_positions_to_keep(wrong: object) -> None:
    with pytest.raises(ValueError, match="`logits_to_keep`"):
        kept_positions(wrong, 7)
    with pytest.raises(TypeError, match="`logits_to_keep`.*list"):
        kept_positions([1], 7)


@pytest.mark.parametrize("wrong", [-1, float("nan"), torch.tensor(-1)])
def test_number_of_items(wrong: object) -> None:
    total, labels = torch.tensor(6.0), torch.tensor([1, -100, 2])
    with pytest.raises(ValueError, match="`num_items_in_batch`"):
        mean_over_labels(total, labels, wrong)
    for unknown in ("1", [1], torch.ones(2)):
        with pytest.raises(TypeError, match="`num_items_in_batch`"):
            mean_over_labels(total, labels, unknown)
    for none in (0, torch.tensor(0)):
        assert mean_over_labels(torch.tensor(0.0), labels, none) == 0


class _Settings:
    def __init__(self, num_labels: int, problem_type: str | None = None) -> None:
        self.num_labels, self.problem_type = num_labels, problem_type


def test_losses_of_classifiers() -> None:
    logits = torch.randn(3, 4)
    classes = torch.tensor([0, 3, -100])
    expected = F.cross_entropy(logits[:2], classes[:2])
    torch.testing.assert_close(classification_loss(logits, classes, _Settings(4)), expected)
    torch.testing.assert_close(classification_loss(logits, classes[:, None], _Settings(4)), expected)
    several = torch.randint(2, (3, 4))
    expected = F.binary_cross_entropy_with_logits(logits, several.float())
    torch.testing.assert_close(classification_loss(logits, several.float(), _Settings(4)), expected)
    several_only = _Settings(4, "multi_label_classification")
    torch.testing.assert_close(classification_loss(logits, several, several_only), expected)
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(3,\).*single_label.*got \(3, 4\)"):
        classification_loss(logits, several, _Settings(4))
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(3, 4\).*multi_label.*got \(3,\)"):
        classification_loss(logits, torch.randn(3), _Settings(4))
    with pytest.raises(ValueError, match="`labels` contain 4; accepted are 0 to 3"):
        classification_loss(logits, torch.tensor([0, 1, 4]), _Settings(4))


def test_answers_outside_the_input_are_ignored() -> None:
    logits = torch.randn(4, 6)
    positions = torch.tensor([5, 6, -100, 0])
    torch.testing.assert_close(
        span_loss(logits, positions, "start_positions"), F.cross_entropy(logits[[0, 3]], positions[[0, 3]])
    )


@pytest.mark.parametrize("wrong", ["states", (), (None,), torch.ones(2, 5, 8)])
def test_encoder_outputs_of_another_type(wrong: object) -> None:
    with pytest.raises(TypeError, match="`encoder_outputs`"):
        read_encoder_outputs(wrong, 8)
    with pytest.raises(ValueError, match=r"`encoder_outputs`.*\(batch, length, 8\)"):
        read_encoder_outputs((torch.ones(2, 5, 7),), 8)


def test_choices_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \(2, 3, 5\)"):
        flatten_choices({"input_ids": random_ids(6, 5).view(2, 3, 5), "attention_mask": torch.ones(2, 5)}, (2, 3, 5))


class TestMega:
    """Its token types, and the pooled state that it has besides those of its tokens."""

    def test_token_types(self) -> None:
        case = Case("mega", "AutoModelForMaskedLM", "chunk_softmax_simple")
        model, inputs = case.model(), case.inputs()
        for wrong in (torch.zeros(1, 11), torch.zeros(2, 10), torch.zeros(11)):
            with pytest.raises(ValueError, match="`token_type_ids` must have the shape"):
                model(**inputs, token_type_ids=wrong.long())
        with pytest.raises(ValueError, match="`token_type_ids` contain 2; accepted are 0 to 1"):
            model(**inputs, token_type_ids=torch.full((2, 11), 2))

    def test_choices_of_packed_documents(self) -> None:
        """A choice has one pooled state, that of its first token, whatever it is made of."""
        case = Case("mega", "AutoModelForMultipleChoice", "default")
        model, inputs = case.model(), case.inputs()
        positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]).expand(2, 3, 11)
        ids = inputs["input_ids"][..., :5]
        torch.testing.assert_close(model(**inputs, position_ids=positions).logits, model(ids).logits)


@parametrize(all_variants("AutoModelForSeq2SeqLM") + all_variants("AutoModelForCausalLM"))
def test_what_generate_cannot_read(case: Case) -> None:
    """Before Transformers asks it for its shape."""
    model, ids = case.model(), random_ids(2, 5)
    names = ["input_ids", "decoder_input_ids"] if case.is_seq2seq else ["input_ids"]
    inputs = dict.fromkeys(names, ids)
    for name in [*names, "attention_mask", "inputs_embeds"]:
        for wrong in ([[1, 2]], "a text", object()):
            with pytest.raises(TypeError, match=f"`{name}` must be a torch.Tensor"):
                model.generate(**inputs | {name: wrong}, max_new_tokens=2)
    for wrong in ([[1, 2]], "a text"):
        with pytest.raises(TypeError, match="`input_ids` must be a torch.Tensor"):
            model.generate(wrong, max_new_tokens=2)
    for name in names:
        for wrong in (ids[0], ids[None], ids[:, :0], ids[:0], ids.double(), ids.bool()):
            with pytest.raises(ValueError, match=rf"`{name}` must hold token ids .*\(batch, length\)"):
                model.generate(**inputs | {name: wrong}, max_new_tokens=2)
    for wrong in (0, -1, 1.5, "3"):
        with pytest.raises(ValueError, match="`prefill_chunk_size` must be a number of tokens"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=wrong)
    for name in ("num_beams", "num_return_sequences"):
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1"):
                model.generate(**inputs, max_new_tokens=2, do_sample=True, **{name: wrong})
    if not case.is_seq2seq:
        embeds = model.get_input_embeddings()(ids)
        with pytest.raises(ValueError, match="`input_ids` has 1 rows, `inputs_embeds` 2"):
            model.generate(ids[:1], inputs_embeds=embeds, max_new_tokens=2)

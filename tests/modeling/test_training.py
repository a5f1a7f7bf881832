"""Training: losses and their scaling, gradients, checkpointing, and that the models learn."""

from __future__ import annotations

import math

import pytest
import torch
from factories import Case, all_heads, all_variants, enable_checkpointing, main_output, parametrize, random_ids
from torch.nn import functional as F

EVERY_HEAD = all_heads() + all_heads(other_inputs=True)
WITH_LOSS = [case for case in dict.fromkeys(EVERY_HEAD + all_variants()) if case.labels(case.inputs())]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def loss_and_gradients(model: torch.nn.Module, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


@parametrize(WITH_LOSS)
class TestGradients:
    def test_every_parameter_learns(self, case: Case) -> None:
        """All parameters receive a gradient, except those cut off on purpose."""
        model = case.model().train()
        inputs = case.inputs(length=19)
        _, found = loss_and_gradients(model, **inputs, **case.labels(inputs))
        for name, parameter in model.named_parameters():
            assert name in found, name
            assert found[name].isfinite().all(), name
            # A bias that all choices share cancels in the softmax over them: its gradient is rounding, or exactly zero.
            is_choice = case.auto_name == "AutoModelForMultipleChoice"
            cancels = is_choice and name.endswith("bias") and parameter.numel() == 1
            assert cancels or found[name].abs().max() > 0, name
            assert found[name].dtype == parameter.dtype

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_changes_nothing(self, case: Case, use_reentrant: bool) -> None:
        model = case.model(hidden_dropout=0.1).train()
        inputs = case.inputs(length=19)
        inputs |= case.labels(inputs)
        tolerance = {"rtol": 1e-5, "atol": 1e-7}
        if use_reentrant:  # forward runs without gradients, where attention takes another kernel, with other roundings
            model, tolerance = model.double(), {"rtol": 1e-8, "atol": 1e-10}
            inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        results = []
        for checkpointing in (False, True):
            if checkpointing:
                enable_checkpointing(model, {"use_reentrant": use_reentrant})
            torch.manual_seed(5)
            results.append(loss_and_gradients(model, **inputs))
        (loss, plain), (again, checkpointed) = results
        assert plain.keys() == checkpointed.keys()
        if not use_reentrant:
            assert torch.equal(loss, again)
        torch.testing.assert_close(again, loss, **tolerance)
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, **tolerance, msg=name)

    def test_one_step_lowers_the_loss(self, case: Case) -> None:
        model = case.model().train()
        inputs = case.inputs(batch=4, length=19)
        inputs |= case.labels(inputs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        before = model(**inputs).loss
        before.backward()
        optimizer.step()
        with torch.no_grad():
            assert model(**inputs).loss < before


TOKEN_LOSS = [
    case
    for case in WITH_LOSS
    if case.auto_name
    in ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification")
]


@parametrize(TOKEN_LOSS)
class TestTokenLoss:
    def test_mean_over_the_labels_that_count(self, case: Case) -> None:
        model = case.model()  # in evaluation the adaptive softmax returns its logits as well
        inputs = case.inputs(batch=3, length=12, target=12)
        labels = case.labels(inputs)["labels"]
        labels[:, 9:] = -100
        labels[1, 2:] = -100
        outputs = model(**inputs, labels=labels)
        shifted = labels
        if case.is_causal:
            shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
        expected = F.cross_entropy(outputs.logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)
        torch.testing.assert_close(outputs.loss, expected)
        scaled = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
        torch.testing.assert_close(scaled, expected * (shifted != -100).sum() / 7)

    def test_accumulated_gradients_equal_those_of_the_whole_batch(self, case: Case) -> None:
        """Micro-batches with different numbers of labels, scaled the way `Trainer` scales them."""
        model = case.model().train()
        assert getattr(model, "accepts_loss_kwargs", True)
        inputs = case.inputs(batch=4, length=12, target=12)
        labels = case.labels(inputs)["labels"]
        labels[0, 5:] = -100
        labels[2, 1:] = -100
        loss, expected = loss_and_gradients(model, **inputs, labels=labels)
        counted = labels[:, 1:] if case.is_causal else labels
        items = (counted != -100).sum()
        model.zero_grad()
        total = torch.zeros(())
        for rows in (slice(0, 1), slice(1, 4)):
            part = {name: value[rows] for name, value in inputs.items()}
            partial = model(**part, labels=labels[rows], num_items_in_batch=items).loss
            partial.backward()
            total += partial.detach()
        torch.testing.assert_close(total, loss)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    def test_batch_without_labels_that_count(self, case: Case) -> None:
        model = case.model().train()
        inputs = case.inputs()
        labels = torch.full_like(case.labels(inputs)["labels"], -100)
        loss, found = loss_and_gradients(model, **inputs, labels=labels, num_items_in_batch=torch.tensor(5))
        assert loss == 0
        assert not any(gradient.any() for gradient in found.values())
        assert model(**inputs, labels=labels).loss == 0

    def test_a_single_token(self, case: Case) -> None:
        """Causal models have nothing to predict there."""
        model = case.model()
        inputs = case.inputs(length=1, target=1)
        loss = model(**inputs, **case.labels(inputs)).loss
        assert loss.isfinite() and (loss == 0) == case.is_causal

    def test_labels_of_another_shape(self, case: Case) -> None:
        inputs = case.inputs(length=9, target=9)
        with pytest.raises(ValueError):
            case.model()(**inputs, labels=random_ids(2, 4))


@parametrize(all_variants("AutoModelForSeq2SeqLM"))
class TestEncoderDecoderLoss:
    def test_labels_give_the_decoder_inputs(self, case: Case) -> None:
        model = case.model()
        source, labels = random_ids(2, 9), random_ids(2, 6)
        labels[1, 4:] = -100
        start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
        shifted = torch.cat([torch.full((2, 1), start), labels[:, :-1]], dim=1)
        shifted[shifted == -100] = pad
        assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), shifted)
        outputs = model(source, labels=labels)
        expected = model(source, decoder_input_ids=shifted, labels=labels)
        torch.testing.assert_close(outputs.loss, expected.loss)
        assert outputs.past_key_values is None

    def test_no_shift_between_logits_and_labels(self, case: Case) -> None:
        """The label at position t is scored by the logits at position t, not by those before it."""
        model = case.model()
        inputs = case.inputs(target=5)
        logits = model(**inputs).logits
        labels = torch.full((2, 5), -100)
        labels[0, 2] = 17
        torch.testing.assert_close(model(**inputs, labels=labels).loss, -logits[0, 2].log_softmax(-1)[17])


@pytest.mark.parametrize("model_type", ["spade", "spade_lm", "mega", "seqboat", "longvq", "bst"])
class TestSequenceLoss:
    def case(self, model_type: str) -> Case:
        return Case(model_type, "AutoModelForSequenceClassification", "default")

    def test_the_trainer_divides(self, model_type: str) -> None:
        """The loss is a mean over rows: `Trainer` has to divide by the accumulation steps itself."""
        assert self.case(model_type).model_class.accepts_loss_kwargs is False

    def test_regression(self, model_type: str) -> None:
        case = self.case(model_type)
        model = case.model(num_labels=1)
        inputs, labels = case.inputs(batch=3), torch.tensor([0.5, -1.0, 2.0])
        outputs = model(**inputs, labels=labels)
        torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits.squeeze(-1), labels))

    def test_many_labels_at_once(self, model_type: str) -> None:
        case = self.case(model_type)
        model = case.model(num_labels=4, problem_type="multi_label_classification")
        inputs, labels = case.inputs(batch=3), torch.randint(2, (3, 4)).float()
        outputs = model(**inputs, labels=labels)
        torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))

    def test_classes(self, model_type: str) -> None:
        case = self.case(model_type)
        model = case.model(num_labels=5)
        inputs, labels = case.inputs(batch=3), torch.tensor([4, 0, 2])
        outputs = model(**inputs, labels=labels)
        assert outputs.logits.shape == (3, 5)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))


def test_question_answering_loss() -> None:
    case = Case("spade", "AutoModelForQuestionAnswering", "default")
    model = case.model()
    inputs = case.inputs(batch=3, length=9)
    start, end = torch.tensor([1, 4, 50]), torch.tensor([3, 4, 60])  # the last answer lies outside the input
    outputs = model(**inputs, start_positions=start, end_positions=end)
    expected = [
        F.cross_entropy(logits[:2], target[:2])
        for logits, target in ((outputs.start_logits, start), (outputs.end_logits, end))
    ]
    torch.testing.assert_close(outputs.loss, sum(expected) / 2)


def test_official_encoder_decoder_lets_no_gradient_through_its_state_space() -> None:
    """The published code runs the SSM without gradients: its input gets gradients through the attention only."""
    case = Case("spade", "AutoModelForTextEncoding", "official")
    model = case.model()
    embeds = torch.randn(1, 40, model.config.hidden_size, requires_grad=True)
    output = model(inputs_embeds=embeds).last_hidden_state
    influence = torch.autograd.grad(output[0, 0].square().sum(), embeds)[0][0].abs().sum(-1)
    reach = (model.config.window_size - 1) * model.config.num_hidden_layers
    assert (influence[: reach + 1] > 0).all() and not influence[reach + 1 :].any()
    flowing = case.model(ssm_stop_gradient=False)
    output = flowing(inputs_embeds=embeds).last_hidden_state
    assert torch.autograd.grad(output[0, 0].square().sum(), embeds)[0][0, reach + 1 :].any()


WIDE = {
    "spade": {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "decoder_layers": 2,
        "head_dim": 64,
    },
    "spade_lm": {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1024, "num_hidden_layers": 2},
    "mega": {"hidden_size": 512, "intermediate_size": 1024, "nffn_hidden_size": 1024, "num_hidden_layers": 2},
    "seqboat": {"hidden_size": 512, "num_hidden_layers": 2},
    "longvq": {"hidden_size": 512, "num_hidden_layers": 2, "codebook_size": 64},
}


@pytest.mark.parametrize("model_type", list(WIDE))
def test_new_models_start_near_the_uniform_loss(model_type: str) -> None:
    """Default settings of a realistic width: the first loss is near ln V, not the 100 nats of the published initialisation."""
    case = Case(model_type, "AutoModelForSeq2SeqLM" if model_type == "spade" else "AutoModelForCausalLM", "default")
    config = type(case.config())(vocab_size=8000, **WIDE[model_type], **case.head_settings)
    model = case.model_class(config)
    inputs = {name: torch.randint(3, 8000, ids.shape) for name, ids in case.inputs(length=24, target=24).items()}
    labels = torch.randint(3, 8000, (2, 24)) if model_type == "spade" else inputs["input_ids"]
    loss = float(model(**inputs, labels=labels).loss.detach())
    assert abs(loss - math.log(8000)) < 0.5


def overfit(model: torch.nn.Module, inputs: dict[str, torch.Tensor], steps: int = 500, lr: float = 5e-3) -> None:
    """Trains until the loss is below 0.03: below 0.1 a single token may still be wrong."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        if loss < 0.03:
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError(f"loss {float(loss):.3f} after {steps} steps")


SMALL = {
    "spade": {"hidden_size": 32, "head_dim": 16, "intermediate_size": 64},
    "spade_lm": {"hidden_size": 32, "intermediate_size": 64},
    "mega": {"hidden_size": 32, "intermediate_size": 64, "nffn_hidden_size": 64},
    "seqboat": {"hidden_size": 32, "value_dim": 64},
    "longvq": {"hidden_size": 32, "value_size": 64, "freeze_codebook": False},
    "bst": {"hidden_size": 32, "head_dim": 16, "intermediate_size": 64},
}


@pytest.mark.parametrize(
    ("model_type", "variant"),
    [
        ("spade", "default"),
        *(pytest.param(*case, marks=pytest.mark.wide) for case in (("spade", "official"), ("mega", "default"))),
    ],
)
def test_encoder_decoder_learns_eight_pairs(model_type: str, variant: str) -> None:
    """The loss vanishes in at most 500 steps, and `generate` returns the targets."""
    case = Case(model_type, "AutoModelForSeq2SeqLM", variant)
    model = case.model_class(case.config(**SMALL[model_type]))
    source, target = random_ids(8, 12), random_ids(8, 7)
    target[:, -1] = model.config.eos_token_id
    overfit(model, {"input_ids": source, "labels": target})
    model.eval()
    for strategy in ({}, {"num_beams": 3}):
        generated = model.generate(source, max_new_tokens=7, **strategy)
        assert generated[:, 1:].tolist() == target.tolist()


@pytest.mark.parametrize(
    ("model_type", "variant"),
    [
        ("spade_lm", "official"),
        pytest.param("spade_lm", "default", marks=pytest.mark.wide),
        ("mega", "chunk_relu2_adaptive"),
        ("seqboat", "default"),
        ("longvq", "default"),
        ("bst", "default"),
    ],
)
def test_language_model_learns_eight_texts(model_type: str, variant: str) -> None:
    case = Case(model_type, "AutoModelForCausalLM", variant)
    model = case.model_class(case.config(**SMALL[model_type]))
    texts = random_ids(8, 14)
    texts[:, 0] = 3 + torch.arange(8)  # the first token tells which text it is
    texts[:, -1] = model.config.eos_token_id
    overfit(model, {"input_ids": texts, "labels": texts})
    generated = model.eval().generate(texts[:, :1], max_new_tokens=13)
    assert generated.tolist() == texts.tolist()


@parametrize(all_variants())
def test_training_and_evaluation_agree_without_dropout(case: Case) -> None:
    """Frozen or cached kernels of evaluation give the outputs of training."""
    model = case.model()
    inputs = case.inputs(length=25)
    with torch.no_grad():
        evaluated = main_output(model(**inputs))
    torch.testing.assert_close(main_output(model.train()(**inputs)), evaluated, rtol=1e-5, atol=1e-5)

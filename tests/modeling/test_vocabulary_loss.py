"""The loss of a long text is computed some tokens at a time, with the results of all tokens at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import VOCABULARY, Case, all_variants, parametrize, random_ids
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from hf_hybrid.modeling import vocabulary_loss
from hf_hybrid.modeling.vocabulary_loss import LossOptions, logits_and_loss
from hf_hybrid.training.trainer import HybridTrainer

AUTO_NAMES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForTokenClassification",
)
HEADS = [
    case
    for name in AUTO_NAMES
    for case in all_variants(name)
    if not ("MaskedLM" in name and "adaptive" in case.variant)  # which the configuration refuses
]
EXACT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns the pieces on for any text (`pieces(n)`: logits of a piece), or off (`pieces(None)`)."""

    def choose(elements: int | None) -> None:
        monkeypatch.setattr(vocabulary_loss, "WHOLE_ELEMENTS", 1 << 60 if elements is None else 0)
        monkeypatch.setattr(vocabulary_loss, "PIECE_ELEMENTS", elements or 1)

    return choose


def head_and_states(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(11, (2, 9))
    labels[0, 5:] = -100
    return nn.Linear(6, 11).to(dtype), torch.randn(2, 9, 6, dtype=dtype, requires_grad=True), labels


@pytest.mark.parametrize("elements", [1, 22, 50, 1000])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 30}, {"label_smoothing": 0.2}, {"skip_logits": True}])
def test_equals_all_tokens_at_once(pieces: Any, elements: int, options: dict[str, Any]) -> None:
    head, states, labels = head_and_states()
    results = []
    for size in (None, elements):
        pieces(size)
        logits, loss = logits_and_loss(head, states, labels, LossOptions(**options), 11)
        gradients = torch.autograd.grad(3 * loss, [states, *head.parameters()], retain_graph=True)
        results.append((logits, loss, *gradients))
        if logits is not None:  # they stay part of the graph
            results[-1] += torch.autograd.grad(logits.square().sum() + loss, [states, *head.parameters()])
        with torch.no_grad():
            results[-1] += logits_and_loss(head, states, labels, LossOptions(**options), 11)
    for expected, found in zip(*results, strict=True):
        if expected is None:
            assert found is None and options.get("skip_logits")
        else:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


def test_no_label_that_counts_and_some_logits(pieces: Any) -> None:
    head, states, labels = head_and_states()
    pieces(22)
    loss = logits_and_loss(head, states, torch.full_like(labels, -100), LossOptions(), 11)[1]
    loss.backward()
    assert loss == 0 and not states.grad.any()
    logits, _ = logits_and_loss(head, states, labels, LossOptions(), 11, torch.tensor([1, 4]))
    torch.testing.assert_close(logits, head(states[:, [1, 4]]))
    with pytest.raises(ValueError, match="`skip_logits=True` leaves nothing to compute without labels"):
        logits_and_loss(head, states, None, LossOptions(skip_logits=True), 11)
    with pytest.raises(ValueError, match="`labels` contain 11; accepted are 0 to 10"):
        logits_and_loss(head, states, labels.masked_fill(labels == labels[1, 1], 11), LossOptions(), 11)


def test_gradient(pieces: Any) -> None:
    head, states, labels = head_and_states(torch.float64)
    pieces(22)
    for options in (LossOptions(skip_logits=True), LossOptions(label_smoothing=0.3)):

        def loss(inputs: torch.Tensor, weight: torch.Tensor, options: LossOptions = options) -> torch.Tensor:
            return logits_and_loss(lambda part: F.linear(part, weight, head.bias), inputs, labels, options, 11)[1]

        assert torch.autograd.gradcheck(loss, (states, head.weight))


def test_half_precision_and_dropout_of_the_head(pieces: Any) -> None:
    """Pieces are float32 one at a time; dropout in the head is the same in both passes."""
    head, states, labels = head_and_states(torch.bfloat16)
    pieces(22)
    logits, loss = logits_and_loss(head, states, labels, LossOptions(), 11)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()), **EXACT)
    noisy = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 11))
    inputs = states.detach().float().requires_grad_()
    logits, loss = logits_and_loss(noisy, inputs, labels, LossOptions(), 11)
    (found,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), inputs)
    torch.testing.assert_close(found, expected, **EXACT)


def loss_and_gradients(model: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    outputs = model(**batch, **options)
    outputs.loss.backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@parametrize(HEADS)
def test_every_head(pieces: Any, case: Case) -> None:
    """Loss, logits and gradients in training and evaluation, with smoothing, without logits."""
    model = case.model()
    inputs = case.inputs()
    batch = inputs | case.labels(inputs)
    batch["labels"][1, -2:] = -100
    is_adaptive = getattr(model.config, "adaptive_cutoffs", None) is not None and "CausalLM" in case.auto_name
    smoothing = {} if is_adaptive else {"label_smoothing": 0.1}
    for training, options in ((False, {}), (True, {"num_items_in_batch": 30}), (True, smoothing)):
        model.train(training)
        pieces(None)
        expected, gradients = loss_and_gradients(model, batch, **options)
        pieces(3 * VOCABULARY)
        found, found_gradients = loss_and_gradients(model, batch, **options)
        alone, alone_gradients = loss_and_gradients(model, batch, **options, skip_logits=True)
        assert alone.logits is None
        torch.testing.assert_close([found.loss, alone.loss], [expected.loss] * 2, **EXACT)
        torch.testing.assert_close([found_gradients, alone_gradients], [gradients] * 2, rtol=1e-5, atol=1e-6)
        assert (found.logits is None) == (expected.logits is None)
        if found.logits is not None:
            torch.testing.assert_close(found.logits, expected.logits, **EXACT)
    with pytest.raises(ValueError, match="skip_logits=True"):
        model.eval()(**inputs, skip_logits=True) if not is_adaptive else logits_and_loss(
            model.lm_head, None, None, LossOptions(skip_logits=True), 1
        )


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@parametrize([case for case in HEADS if case.variant == "default" and "Token" not in case.auto_name])
def test_no_logits_of_the_whole_text_exist(pieces: Any, case: Case) -> None:
    model = case.model(vocab_size=900).train()
    inputs = case.inputs(length=64, target=64)
    batch = inputs | case.labels(inputs) | {"skip_logits": True}
    for elements, expected in ((None, True), (4 * 900, False)):
        pieces(elements)
        with Largest() as largest:
            model(**batch).loss.backward()
        assert (largest.elements >= 2 * 64 * 900) == expected


def test_the_trainer_asks_for_logits_only_where_they_are_read(tmp_path: Path) -> None:
    case = next(case for case in HEADS if case.model_type == "spade" and case.variant == "default")
    model, seen = case.model(), []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.get("logits") is None))
    rows = [{name: tensor[0] for name, tensor in case.inputs(batch=1).items()} for _ in range(2)]
    data = [{"input_ids": row["input_ids"], "labels": random_ids(1, 6)[0]} for row in rows]
    args = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, max_steps=1, save_strategy="no", label_smoothing_factor=0.1
    )
    trainer = HybridTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    assert seen == [True, True]
    predictions = trainer.predict(data).predictions
    first = predictions[0] if isinstance(predictions, tuple) else predictions
    assert seen == [True, True, False] and first.shape == (2, 6, VOCABULARY)


@pytest.mark.slow
@parametrize([case for case in HEADS if case.variant == "default"])
def test_compiles_in_one_graph(pieces: Any, case: Case) -> None:
    pieces(3 * VOCABULARY)
    model = case.model().train()
    inputs = case.inputs()
    batch = inputs | case.labels(inputs)
    expected, gradients = loss_and_gradients(model, batch, skip_logits=True)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    found, found_gradients = loss_and_gradients(model, batch, skip_logits=True)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-4, atol=1e-5)

"""The forms of operations for accelerators, run on a CPU: the same results, and no value that the host waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_work import DeviceWork, fused_norms, work_of
from factories import Case, all_heads, all_variants, main_output, parametrize
from transformers.modeling_outputs import BaseModelOutput

from hf_hybrid.ops.branches import forced_branch

LENGTH, TARGET = 64, 32


def training_inputs(case: Case, padded: str | None, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Inputs and labels; what models return at padding is unspecified, so no label counts there."""
    inputs = case.inputs(length=length, target=TARGET)
    labels = case.labels(inputs)
    if padded is not None and "input_ids" in inputs and inputs["input_ids"].dim() == 2:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, slice(0, 5) if padded == "left" else slice(-5, None)] = 0
        inputs["attention_mask"] = mask
        if "labels" in labels and labels["labels"].shape == mask.shape:
            labels["labels"] = labels["labels"].masked_fill(mask == 0, -100)
    return inputs | labels


def loss_and_gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
    outputs = model(**inputs)
    loss = outputs.get("loss")
    if loss is None:
        states = main_output(outputs).square()
        mask = inputs.get("attention_mask")
        if mask is not None and states.shape[:2] == mask.shape:
            states = states * mask.unsqueeze(-1)
        loss = states.mean()
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@parametrize(all_variants() + all_heads())
def test_training_step_is_that_of_the_other_branch(case: Case) -> None:
    model = case.model().double().train()
    scores_padding = case.auto_name == "AutoModelForQuestionAnswering"
    for padded in (None,) if scores_padding else (None, "left", "right"):
        inputs = training_inputs(case, padded)
        expected, expected_gradients = loss_and_gradients(model, inputs)
        with forced_branch("accelerator"):
            loss, gradients = loss_and_gradients(model, inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
        for (name, _), found, wanted in zip(model.named_parameters(), gradients, expected_gradients):
            wanted = torch.zeros(()) if wanted is None else wanted  # fixed shapes reach parameters that have no part
            found = torch.zeros(()) if found is None else found
            message = f"{name} with padding: {padded}"
            torch.testing.assert_close(found, wanted.expand_as(found).to(found), rtol=1e-6, atol=1e-8, msg=message)


GENERATIVE = [case for case in all_variants() if case.auto_name.endswith("LM")]


@parametrize(GENERATIVE)
def test_generation_is_that_of_the_other_branch(case: Case) -> None:
    model = case.model().double()
    inputs = case.inputs(length=21)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :7] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    inputs = {"input_ids": inputs["input_ids"]}
    expected = model.generate(**inputs, **settings, num_beams=2)
    with forced_branch("accelerator"):
        assert torch.equal(model.generate(**inputs, **settings, num_beams=2), expected)


def saved_bytes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that a training step keeps for its backward pass, without the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(**inputs)
    (outputs.loss if "loss" in outputs else main_output(outputs).square().mean()).backward()
    return sum(kept.values())


# Streams of fixed size hold every token, those of the other branch the active half.
MOST_KEPT = {"seqboat": 2.1}


@parametrize(all_variants())
def test_training_step_keeps_no_more_than_on_the_other_branch(case: Case) -> None:
    """Bytes per token: the difference of two lengths, so that kernels and tables, which do not grow, do not count."""
    model = case.model().train()
    grown = []
    for name in ("cpu", "accelerator"):
        with forced_branch(name), fused_norms():
            short, long = (saved_bytes(model, training_inputs(case, "left", length)) for length in (256, 512))
        grown.append((long - short) / 256)
    assert grown[1] <= MOST_KEPT.get(case.model_type, 1.1) * grown[0]


def training_work(case: Case, padded: str | None) -> DeviceWork:
    model, inputs = case.model().train(), training_inputs(case, padded)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        outputs = model(**inputs)
        (outputs.loss if "loss" in outputs else main_output(outputs).square().mean()).backward()

    return work_of(step, warm_ups=2)


def decoding_step(model: torch.nn.Module, case: Case, padded: str | None) -> Callable[[], None]:
    """A function that reads one token more of a text each time it is called."""
    inputs = training_inputs(case, padded)
    mask = inputs.get("attention_mask")
    if case.is_seq2seq:
        outputs = model(**{name: inputs[name] for name in inputs if name != "labels"}, use_cache=True)
        source = BaseModelOutput(outputs.encoder_last_hidden_state)
        fixed = {"encoder_outputs": source, "attention_mask": mask, "past_key_values": outputs.past_key_values}
        token = inputs["decoder_input_ids"][:, :1]
        return lambda: model(decoder_input_ids=token, use_cache=True, **fixed)
    cache = model(inputs["input_ids"], attention_mask=mask, use_cache=True).past_key_values
    masks = [mask]

    def step() -> None:
        if masks[0] is not None:
            masks[0] = torch.cat([masks[0], masks[0].new_ones(len(masks[0]), 1)], dim=1)
        model(inputs["input_ids"][:, :1], attention_mask=masks[0], past_key_values=cache, use_cache=True)

    return step


def decoding_work(case: Case, padded: str | None) -> DeviceWork:
    model = case.model()
    with torch.no_grad(), forced_branch("accelerator"):
        return work_of(decoding_step(model, case, padded), warm_ups=2)


@parametrize(all_variants() + all_heads() + all_heads(other_inputs=True))
def test_training_step_reads_nothing(case: Case) -> None:
    for padded in (None, "left"):
        assert not training_work(case, padded).reads, padded


@parametrize(GENERATIVE)
def test_decoding_step_reads_nothing(case: Case) -> None:
    for padded in (None, "left"):
        assert not decoding_work(case, padded).reads, padded


def test_the_count_sees_reads_and_operators() -> None:
    from hf_hybrid.ops.gated_attention import gated_attention

    states = torch.randn(1, 8, 4, requires_grad=True)

    def call() -> None:
        outputs = gated_attention(states, states, states, activation="softmax")
        outputs[outputs > 0].sum().backward()
        outputs.sum().item()
        states.detach().cumsum(0).tolist()

    work = work_of(call)
    products = sum(number for name, number in work.kernels.items() if "bmm" in name)
    assert products >= 5  # two of the forward pass, at least three of the backward pass
    assert sum(work.reads.values()) == 4  # the index, its gradient, the number, the list
    with pytest.raises(ValueError, match="`name` must be"), forced_branch("gpu"):
        pass

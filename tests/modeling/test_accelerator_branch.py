"""The forms of operations for accelerators, run on a CPU: the same results, and no value that the host waits for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from device_work import DeviceWork, counted_work, fused_norms, work_of
from factories import Case, all_heads, all_variants, main_output, parametrize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from hf_hybrid.layers.kept_results import KeepsResults
from hf_hybrid.modeling.decoding_step import DecodingStep
from hf_hybrid.ops import flex_local
from hf_hybrid.ops.branches import forced_branch
from hf_hybrid.ops.full_products import full_matmul

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
MOST_KEPT = {"seqboat": 2.2}


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


def training_work(case: Case, padded: str | None, length: int = LENGTH, **overrides: Any) -> DeviceWork:
    model, inputs = case.model(**overrides).train(), training_inputs(case, padded, length)

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


# Kernels of a step, as a multiple of those of Llama at the same depth: what was measured, and a little room. Their number depends neither on
# the length of the text nor on the batch. What is above 1.5 (training) or 1.25 (decoding) stands in docs/guides/gpu.md, by operations of the
# mathematics.
MOST_KERNELS = {
    ("spade", "default"): (1.3, 0.4),
    ("spade", "official"): (0.8, 0.25),
    ("spade", "local_decoder_chunk"): (2.4, 0.7),
    ("spade_lm", "default"): (1.85, 0.6),
    ("spade_lm", "official"): (1.9, 1.05),
    ("mega", "default"): (1.9, 0.75),
    ("mega", "chunk_laplace"): (2.4, 1.0),
    ("seqboat", "default"): (2.15, 1.2),
    ("seqboat", "unlimited_t5"): (2.35, 1.4),
    ("longvq", "default"): (2.45, 1.25),
    ("longvq", "heads_s4d"): (4.0, 1.45),
    ("bst", "default"): (2.05, 1.1),
    ("bst", "mf_unstructured"): (1.4, 0.8),
}
BOUNDED = [case for case in GENERATIVE if (case.model_type, case.variant) in MOST_KERNELS]


@lru_cache
def kernels_of_llama(layers: int) -> tuple[int, int]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=layers, pad_token_id=0, **sizes))
    ids = torch.randint(3, 40, (2, LENGTH))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    training = work_of(step).launches
    with torch.no_grad():
        cache = model.eval()(ids, use_cache=True).past_key_values
        return training, work_of(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True)).launches


@parametrize(BOUNDED, kept=BOUNDED)
def test_kernels_are_bounded(case: Case) -> None:
    config = case.config()
    layers = config.num_hidden_layers * (2 if case.model_type == "mega" and case.is_seq2seq else 1)
    layers += config.decoder_layers if case.model_type == "spade" else 0
    for most, work, peer in zip(
        MOST_KERNELS[case.model_type, case.variant],
        (training_work(case, None), decoding_work(case, None)),
        kernels_of_llama(layers),
    ):
        assert work.launches <= most * peer, f"{work.launches / peer:.2f} times those of Llama"


@parametrize(GENERATIVE)
def test_kernels_do_not_grow_with_the_text(case: Case) -> None:
    """No loop over tokens, windows, chunks or blocks."""
    if getattr(case.config(), "relative_positional_bias", None) == "simple":
        return  # the table of biases ends at 512 tokens
    short, long = (training_work(case, "left", length).launches for length in (128, 512))
    assert long <= short + 40  # doubling adds a few


def test_kernels_of_long_windows() -> None:
    """Windows of SeqBoat: what is one loop per 64 tokens on a CPU is not one on accelerators."""
    case = Case("seqboat", "AutoModelForCausalLM", "default")
    numbers = [training_work(case, None, 1536, window_size=window).launches for window in (64, 512, 1024)]
    assert max(numbers) <= min(numbers) + 20  # a loop would add hundreds


@parametrize(GENERATIVE)
def test_decoding_steps_have_the_same_shapes(case: Case) -> None:
    """What a graph of the device needs: the same operations with the same shapes in every step, and no read."""
    step = DecodingStep(case.model())
    if step.is_growing or step.has_encoder:
        return  # the keys of all tokens are kept
    tokens = case.inputs(length=12)["input_ids"]
    mask, works = torch.ones_like(tokens[:, :1]), []
    with torch.no_grad(), forced_branch("accelerator"):
        state = step.start(batch_size=len(tokens))
        for position in range(12):
            with counted_work() as work:
                state = step(tokens[:, position : position + 1], mask, state)["state"]
            works.append(work)
    assert all(work.shapes == works[2].shapes and not work.reads for work in works[2:])


FLEX = [Case("spade", "AutoModelForTextEncoding", name) for name in ("default", "chunk_gated", "rotary_add")]
FLEX += [Case(name, "AutoModelForCausalLM", "default") for name in ("spade_lm", "bst")]
FLEX += [Case("spade_lm", "AutoModelForCausalLM", "chunk_gated"), Case("bst", "AutoModelForCausalLM", "mh_sliding")]


@parametrize(FLEX, kept=FLEX)
def test_flex_attention_is_local_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In models, with padding on either side; one block mask of each pattern for all layers of a forward pass."""
    is_bst = case.model_type == "bst"  # which has two in turn
    sizes = {"hidden_size": 32} | ({} if case.model_type == "spade_lm" else {"head_dim": 16})
    model = case.model(**sizes | ({"num_hidden_layers": 4, "bst_layers": [1, 3]} if is_bst else {}))
    made: list[int] = []
    monkeypatch.setattr(flex_local, "_last", {})
    original = flex_local.create_block_mask
    monkeypatch.setattr(
        flex_local, "create_block_mask", lambda *args, **kwargs: made.append(1) or original(*args, **kwargs)
    )
    inputs = {"input_ids": case.inputs(length=19)["input_ids"]}
    with torch.no_grad(), forced_branch("accelerator"):
        for padded in (None, "left", "right"):
            mask = torch.ones(2, 19, dtype=torch.long)
            mask[0, :5] = padded != "left"
            mask[1, -4:] = padded != "right"
            options = inputs if padded is None else inputs | {"attention_mask": mask}
            model.set_attn_implementation("sdpa")
            expected = main_output(model(**options, use_cache=False))
            model.set_attn_implementation("flex_attention")
            before = len(made)
            actual = main_output(model(**options, use_cache=False))
            assert len(made) - before <= (2 if is_bst else 1)
            torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert made


def test_products_in_state_spaces_ignore_tf32_and_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (torch.randn(2, 5, 5, requires_grad=True) for _ in range(2))
    expected = left @ right
    wanted = torch.autograd.grad(expected.sum(), (left, right))
    seen, original = [], torch.bmm
    settings = torch.backends.cuda.matmul

    def spy(*args: torch.Tensor) -> torch.Tensor:
        seen.append(settings.fp32_precision)
        return original(*args)

    monkeypatch.setattr(torch, "bmm", spy)
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        with forced_branch("accelerator"), torch.autocast("cpu", dtype=torch.bfloat16):
            actual = full_matmul(left, right)
            gradients = torch.autograd.grad(actual.sum(), (left, right))
        assert seen == ["ieee"] * 3 and settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before
    torch.testing.assert_close(actual, expected)
    for found, gradient in zip(gradients, wanted):
        torch.testing.assert_close(found, gradient)


@parametrize([case for case in all_variants() if case.auto_name != "AutoModel"])
def test_autocast_leaves_state_spaces_alone(case: Case) -> None:
    """Kernels and states under autocast are those without; every layer with float32 tensors of its own is looked at."""
    model = case.model()
    layers = [module for module in model.modules() if isinstance(module, KeepsResults) and hasattr(module, "kernel")]
    for layer in layers:
        with forced_branch("accelerator"), torch.no_grad():
            expected = layer.kernel(16)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                states = torch.randn(1, 16, layer.hidden_size)
                outputs = layer(states)[0]
            assert torch.equal(layer.kernel(16), expected) and outputs.isfinite().all()
            torch.testing.assert_close(outputs, layer(states)[0], rtol=1e-6, atol=1e-6)

"""`torch.compile` in one graph, forward and backward, and `torch.export`: the same numbers as eager.

Compared in float64: some operations have another form in a graph, and norms of small states amplify float32 rounding.
"""

from __future__ import annotations

import pytest
import torch
from factories import Case, all_heads, main_output, one_each, parametrize

ENCODERS = [Case("spade", "AutoModelForTextEncoding", variant) for variant in ("default", "official")]
MEGA = [
    Case("mega", "AutoModelForMaskedLM", "chunk_laplace"),
    Case("mega", "AutoModelForCausalLM", "default"),
    Case("mega", "AutoModelForCausalLM", "chunk_softmax_simple"),
    Case("mega", "AutoModelForCausalLM", "chunk_laplace"),
    Case("mega", "AutoModelForCausalLM", "chunk_relu2_adaptive"),
    Case("mega", "AutoModelForSeq2SeqLM", "relu2_untied"),
]
SEQBOAT = [
    Case("seqboat", "AutoModelForCausalLM", "default"),
    Case("seqboat", "AutoModelForMaskedLM", "relu2_distance"),
    Case("seqboat", "AutoModelForCausalLM", "laplace_rank"),
    Case("seqboat", "AutoModelForCausalLM", "unlimited_t5"),
    Case("seqboat", "AutoModelForTokenClassification", "always_active"),
]
LONGVQ = [
    Case("longvq", "AutoModelForCausalLM", "default"),
    Case("longvq", "AutoModelForMaskedLM", "heads_s4d"),
    Case("longvq", "AutoModelForTokenClassification", "plain_keys"),
]
SEQ2SEQ = [Case("spade", "AutoModelForSeq2SeqLM", variant) for variant in ("default", "local_decoder_chunk")]
CAUSAL = [Case("spade_lm", "AutoModelForCausalLM", variant) for variant in ("default", "official", "chunk_gated")]
BST = [
    Case("bst", "AutoModelForCausalLM", name) for name in ("default", "mf", "mh_sliding", "mf_unstructured", "mh_s4")
]
COMPILED = ENCODERS + SEQ2SEQ + CAUSAL + MEGA + SEQBOAT + LONGVQ + BST
QUICK = [ENCODERS[0], SEQ2SEQ[0], CAUSAL[0], MEGA[0], MEGA[2], *SEQBOAT[:2], LONGVQ[0], *BST[:2]]
QUICK_KEPT = [SEQ2SEQ[0], MEGA[2], SEQBOAT[0], BST[0]]
GENERATIVE = [SEQ2SEQ[0], CAUSAL[0], MEGA[1], MEGA[5], SEQBOAT[0], LONGVQ[0], BST[0]]
OTHER_HEADS = [case for case in all_heads() + all_heads(other_inputs=True) if case not in COMPILED]
CLOSE = {"rtol": 1e-6, "atol": 1e-8}
# Angles of rotary positions are float32 in every model, and Inductor's powers and sines differ from eager ones in the last bit.
CLOSE_AS_ANGLES = {"rtol": 1e-6, "atol": 1e-6}


def padded_inputs(case: Case) -> dict[str, torch.Tensor]:
    inputs = case.inputs(length=21, target=6)
    if "pixel_values" not in inputs:
        inputs["attention_mask"] = torch.ones(next(iter(inputs.values())).shape, dtype=torch.long)
        inputs["attention_mask"][1, ..., :4] = 0
    return inputs | ({} if case.auto_name == "AutoModelForTextEncoding" else case.labels(inputs))


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    outputs = model(**inputs)
    loss = outputs.loss if "loss" in outputs else main_output(outputs).square().mean()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), {name: grad for name, grad in zip(parameters, gradients) if grad is not None}


def check_compiled_training(
    case: Case, backend: str, *, shallow: bool = False, close: dict[str, float] = CLOSE
) -> None:
    torch._dynamo.reset()
    model = (case.shallow_model() if shallow else case.model()).double().train()
    inputs = padded_inputs(case)
    loss, gradients = run(model, inputs)
    model.compile(fullgraph=True, backend=backend)
    compiled_loss, compiled_gradients = run(model, inputs)
    torch.testing.assert_close(compiled_loss, loss, **close)
    # A compiled graph gives zeros to parameters that the loss does not depend on (the pooler of a base model), eager mode nothing.
    unused = [compiled_gradients.pop(name) for name in compiled_gradients.keys() - gradients.keys()]
    assert not any(gradient.any() for gradient in unused)
    assert compiled_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, **close, msg=name)


@parametrize(QUICK, kept=QUICK_KEPT)
def test_one_graph_forward_and_backward(case: Case) -> None:
    check_compiled_training(case, "aot_eager")


@parametrize(OTHER_HEADS, kept=one_each(OTHER_HEADS)[::2])
def test_every_head_is_one_graph(case: Case) -> None:
    check_compiled_training(case, "aot_eager", shallow=True)


@pytest.mark.slow
@parametrize([ENCODERS[1], SEQ2SEQ[1], *CAUSAL[1:], MEGA[1], *MEGA[3:], *SEQBOAT[2:], *BST[2:]])
def test_one_graph_forward_and_backward_of_the_other_variants(case: Case) -> None:
    check_compiled_training(case, "aot_eager")


@pytest.mark.slow
@parametrize(COMPILED)
def test_inductor(case: Case) -> None:
    check_compiled_training(case, "inductor", close=CLOSE_AS_ANGLES if case in SEQ2SEQ else CLOSE)


@parametrize([ENCODERS[1]])
def test_compiled_evaluation_follows_changed_weights(case: Case) -> None:
    """The compiler may not freeze a kernel that was computed from the weights."""
    torch._dynamo.reset()
    model = case.model().double()
    inputs = padded_inputs(case)
    inputs.pop("labels", None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = main_output(compiled(**inputs))
        torch.testing.assert_close(first, main_output(model(**inputs)), **CLOSE)
        for name, tensor in model.state_dict().items():
            if name.endswith((".ssm.C", ".ssm.D", ".ssm.log_dt")):
                tensor.add_(0.3)
        second = main_output(compiled(**inputs))
        torch.testing.assert_close(second, main_output(model(**inputs)), **CLOSE)
    assert (first - second).abs().max() > 1e-3


@parametrize(GENERATIVE, kept=[CAUSAL[0], MEGA[5], SEQBOAT[0], BST[0]])
def test_compiled_forward_makes_a_cache(case: Case) -> None:
    """As any call without labels does; the text goes on from it."""
    torch._dynamo.reset()
    model = case.model().double().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = case.inputs(length=12, target=6)
    with torch.no_grad():
        expected, actual = model(**inputs), compiled(**inputs)
        torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
        name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        inputs[name] = inputs[name][:, -1:]
        for outputs in (expected, actual):
            outputs.next_logits = model(**inputs, past_key_values=outputs.past_key_values).logits
    assert actual.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() > 1
    torch.testing.assert_close(actual.next_logits, expected.next_logits, **CLOSE)


@pytest.mark.slow
@parametrize(GENERATIVE, kept=GENERATIVE)
def test_dynamic_lengths(case: Case) -> None:
    torch._dynamo.reset()
    model = case.model().double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for length in (12, 33, 50):
            inputs = case.inputs(length=length)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **CLOSE)


@parametrize([SEQ2SEQ[0], CAUSAL[0], MEGA[1], *SEQBOAT[:2], *BST[:2]], kept=[SEQ2SEQ[0], MEGA[1], SEQBOAT[0], BST[0]])
def test_export(case: Case) -> None:
    model = case.model().double()
    inputs = padded_inputs(case)
    inputs.pop("labels", None)
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs=inputs | {"use_cache": False}, strict=False)
        other = padded_inputs(case)
        other.pop("labels", None)
        exported = main_output(program.module()(**other, use_cache=False))
        torch.testing.assert_close(exported, main_output(model(**other)), **CLOSE)

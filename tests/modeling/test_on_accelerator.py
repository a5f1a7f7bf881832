"""On an accelerator: what the forms for it compute there, against the CPU (`make gpu-check`).

Without one these tests are skipped. `HF_HYBRID_CHECK_DEVICE=cpu` lets the CPU stand in, with the same forms, to try the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from factories import Case, all_variants, main_output, parametrize
from test_accelerator_branch import loss_and_gradients, training_inputs
from transformers import CompileConfig

from hf_hybrid.ops.branches import forced_branch

pytestmark = pytest.mark.gpu
GENERATIVE = [case for case in all_variants() if case.auto_name.endswith("LM")]
DEFAULTS = [case for case in GENERATIVE if case.variant == "default"] + [
    Case("mega", "AutoModelForSeq2SeqLM", "default")
]


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The accelerator, or the CPU standing in for one."""
    name = os.environ.get("HF_HYBRID_CHECK_DEVICE")
    if name is None and not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    found = torch.device(name) if name is not None else torch.accelerator.current_accelerator()
    with forced_branch("accelerator") if found.type == "cpu" else nullcontext():
        yield found


def moved(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def check_gradients(names: list[str], found: list[torch.Tensor | None], wanted: list[torch.Tensor | None]) -> None:
    """Within a hundredth of their norms; some are zero but for rounding, as that of a bias of keys under a softmax."""
    least = 1e-4 * max(gradient.norm().item() for gradient in wanted if gradient is not None)
    for name, gradient, expected in zip(names, found, wanted):
        if gradient is not None and expected is not None:
            error = (gradient.cpu() - expected.cpu()).norm() / expected.norm().cpu().clamp(min=least)
            assert error < 1e-2, f"{name}: {error:.1e} of its norm"


@parametrize(all_variants(), kept=all_variants())
def test_loss_and_gradients_are_those_of_the_cpu(case: Case, device: torch.device) -> None:
    model = case.model().train()
    for padded in (None, "left"):
        inputs = training_inputs(case, padded)
        with forced_branch("cpu"):
            expected, expected_gradients = loss_and_gradients(model, inputs)
        loss, gradients = loss_and_gradients(model.to(device), moved(inputs, device))
        model.cpu()
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)
        check_gradients([name for name, _ in model.named_parameters()], gradients, expected_gradients)


@parametrize(all_variants(), kept=all_variants())
def test_half_precision_follows_float32(case: Case, device: torch.device) -> None:
    model, inputs = case.model(), training_inputs(case, None)
    inputs.pop("labels", None)
    with torch.no_grad(), forced_branch("cpu"):
        expected = main_output(model(**inputs))
    with torch.no_grad():
        actual = main_output(model.to(device, torch.bfloat16)(**moved(inputs, device))).float().cpu()
    assert actual.isfinite().all()
    # A router that decides otherwise, or a key with another code, changes single tokens as a whole: most of them are compared.
    error = (actual - expected).abs().flatten(2).amax(-1) / expected.abs().max()
    assert error.median() < 3e-2


@parametrize(GENERATIVE, kept=GENERATIVE)
def test_generates_the_tokens_of_the_cpu(case: Case, device: torch.device) -> None:
    model, inputs = case.model(), case.inputs(length=21)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :7] = 0
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with forced_branch("cpu"):
        expected = model.generate(**inputs, **settings)
    actual = model.to(device).generate(**moved(inputs, device), **settings).cpu()
    assert (actual == expected).float().mean() > 0.9  # equal scores may be ordered otherwise


@parametrize(all_variants(), kept=all_variants())
def test_memory_per_token_is_linear(case: Case, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs the memory statistics of CUDA")
    if getattr(case.config(), "relative_positional_bias", None) == "simple":
        pytest.skip("the table of biases ends at 512 tokens")
    is_quadratic = case.model_type == "mega" and not case.config().use_chunking
    model, peaks = case.model().train().to(device), []
    for length in (1024, 4096, 16384):
        inputs = moved(training_inputs(case, None, length), device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss_and_gradients(model, inputs)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    grown = (peaks[2] - peaks[0]) / (peaks[1] - peaks[0])
    assert is_quadratic or grown < 5.5  # 5 for a linear growth


@pytest.mark.parametrize("model_type", ["spade_lm", "bst"])
def test_flex_attention_trains_like_sdpa(model_type: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("FlexAttention has gradients on CUDA alone")
    case = Case(model_type, "AutoModelForCausalLM", "default")
    overrides = (
        {"hidden_size": 64, "head_dim": 32}
        if model_type == "bst"
        else {"hidden_size": 64, "head_dim": 32, "intermediate_size": 64}
    )
    model, inputs = case.model(**overrides).train().to(device), moved(training_inputs(case, "left", 300), device)
    expected, expected_gradients = loss_and_gradients(model, inputs)
    model.set_attn_implementation("flex_attention")
    loss, gradients = loss_and_gradients(model, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    check_gradients([name for name, _ in model.named_parameters()], gradients, expected_gradients)


@parametrize(DEFAULTS, kept=DEFAULTS)
def test_compiled_steps_write_the_same_text(case: Case, device: torch.device) -> None:
    """`generate` with graphs of the device, twice; every kernel is compiled, so each model has one layer."""
    torch._dynamo.reset()
    model, inputs = case.shallow_model().to(device), moved(case.inputs(length=5), device)
    ids = inputs["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_logits": True}
    backend = {"backend": "aot_eager", "mode": None} if device.type == "cpu" else {}
    for _ in range(2):
        expected = model.generate(ids, **settings)
        actual = model.generate(ids, **settings, compile_config=CompileConfig(fullgraph=True, **backend))
        for step, (logits, wanted) in enumerate(zip(actual.logits, expected.logits)):
            if not torch.equal(actual.sequences[:, : 5 + step], expected.sequences[:, : 5 + step]):
                break  # equal scores may be ordered otherwise
            torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
        assert step > 0

"""A module's weights are read while that module runs, and at no other time.

Offload hooks, shards, adapters and quantised layers bring a weight, or stand in for it, in the call of the module that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .factories import Case, all_heads, all_variants, main_output, parametrize


@contextmanager
def hidden_weights(model: nn.Module) -> Iterator[None]:
    """Every parameter is NaN unless a module that holds it is being called."""
    values = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    running: dict[int, int] = dict.fromkeys(values, 0)

    def enter(module: nn.Module, _inputs: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if running[id(parameter)] == 0:
                parameter.data = values[id(parameter)].clone()
            running[id(parameter)] += 1

    def leave(module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        for parameter in module.parameters(recurse=False):
            running[id(parameter)] -= 1
            if running[id(parameter)] == 0:
                # Another tensor, as offload hooks leave: what the call saved for the backward pass stays.
                parameter.data = torch.full_like(parameter, torch.nan)

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        for parameter in model.parameters():
            parameter.data = torch.full_like(parameter, torch.nan)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.data = values[id(parameter)]


def run(model: nn.Module, case: Case, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Output and loss; of a model with a cache also the outputs of a prefill in two pieces and of single tokens."""
    outputs = model(**inputs)
    results = [outputs["loss"] if "loss" in outputs else None]
    if not (
        model.training and "loss" in outputs and "logits" not in outputs
    ):  # the adaptive softmax has the loss alone
        results.append(main_output(outputs))
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    if case.is_causal and model.config.use_cache:
        ids, cache = inputs["input_ids"], None
        for first, last in [(0, 5), (5, 8), *((token, token + 1) for token in range(8, ids.shape[1]))]:
            step = model(ids[:, first:last], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            results.append(main_output(step))
    elif case.is_seq2seq:
        ids, cache, encoder = inputs["decoder_input_ids"], None, None
        for first, last in [(0, 2), (2, 4), *((token, token + 1) for token in range(4, ids.shape[1]))]:
            step = model(
                input_ids=inputs["input_ids"],
                decoder_input_ids=ids[:, first:last],
                encoder_outputs=encoder,
                past_key_values=cache,
                use_cache=True,
            )
            cache, encoder = step.past_key_values, BaseModelOutput(step.encoder_last_hidden_state)
            results.append(main_output(step))
    return [result for result in results if result is not None]


def check(case: Case) -> None:
    model = case.model()  # without dropout
    inputs = case.inputs()
    inputs |= case.labels(inputs)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            expected = run(model.train(training), case, inputs)
            with hidden_weights(model):
                actual = run(model, case, inputs)
        assert len(actual) == len(expected)
        for first, second in zip(actual, expected):
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@parametrize(all_variants())
def test_variants_read_weights_in_calls(case: Case) -> None:
    check(case)


@parametrize(all_heads() + all_heads(other_inputs=True))
def test_heads_read_weights_in_calls(case: Case) -> None:
    check(case)


@parametrize(all_variants())
@torch.no_grad()
def test_offloaded_to_the_cpu(case: Case) -> None:
    """Every module brings its own weights, as `accelerate.cpu_offload` does it."""
    from accelerate import cpu_offload

    model, inputs = case.model(), case.inputs()
    inputs |= case.labels(inputs)
    expected = run(model, case, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    actual = run(model, case, inputs)
    for first, second in zip(actual, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@parametrize(all_heads())
@torch.no_grad()
def test_offloaded_to_disk(case: Case, tmp_path: Path) -> None:
    """`from_pretrained` with a `device_map`."""
    model, inputs = case.model(), case.inputs()
    inputs |= case.labels(inputs)
    model.save_pretrained(tmp_path / "model")
    expected = run(model, case, inputs)
    offloaded = case.model_class.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload", offload_buffers=True
    ).eval()
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    actual = run(offloaded, case, inputs)
    for first, second in zip(actual, expected, strict=True):
        # Not bitwise: tensors that a file holds are aligned differently, which changes the order of sums.
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)

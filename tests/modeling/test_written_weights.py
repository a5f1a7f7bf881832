"""Weights that were written, by whatever means, are those that the next forward pass uses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from .factories import Case, all_variants, main_output, parametrize


def _numpy_view(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    getattr(owner, name).detach().numpy()[...] = value.numpy()


def _swapped(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    kind = nn.Parameter if name in owner._parameters else (lambda tensor: tensor)
    setattr(owner, name, kind(value.clone()))


WAYS: dict[str, Callable[[nn.Module, str, torch.Tensor], Any]] = {
    "data": lambda owner, name, value: getattr(owner, name).data.copy_(value),
    "data_swapped": lambda owner, name, value: setattr(getattr(owner, name), "data", value.clone()),
    "in_place": lambda owner, name, value: getattr(owner, name).copy_(value),
    "set": lambda owner, name, value: getattr(owner, name).set_(value.clone()),
    "numpy_view": _numpy_view,
    "swapped": _swapped,
}


def outputs_of(model: nn.Module, case: Case, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A forward pass, and where there is a cache a prefill and two steps."""
    results = [main_output(model(**inputs))]
    name = "decoder_input_ids" if case.is_seq2seq else "input_ids"
    if case.is_seq2seq or (case.is_causal and model.config.use_cache):
        ids, cache = inputs[name], None
        for first, last in [(0, 4), (4, 5), (5, 6)]:
            step = model(**inputs | {name: ids[:, first:last]}, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            results.append(main_output(step))
    return results


@parametrize(all_variants())
@torch.no_grad()
def test_weights_written_in_any_way(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    for way, write in WAYS.items():
        outputs_of(model, case, inputs)
        fresh = copy.deepcopy(model)
        for tensor in fresh.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
        values = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            write(model.get_submodule(path), leaf, value.detach())
        model.tie_weights()
        actual, expected = outputs_of(model, case, inputs), outputs_of(fresh, case, inputs)
        for first, second in zip(actual, expected):
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6, msg=lambda text, way=way: f"{way}: {text}")


@parametrize(all_variants())
def test_a_frozen_model_computes_the_same(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    with torch.no_grad():
        expected = outputs_of(model, case, inputs)
        with model.frozen():
            for _ in range(2):
                for first, second in zip(outputs_of(model, case, inputs), expected):
                    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
        fresh = copy.deepcopy(model)
        for first, second in zip(outputs_of(model, case, inputs), outputs_of(fresh, case, inputs)):
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@parametrize([case for case in all_variants() if case.variant == "default"])
def test_a_frozen_model_refuses_gradients(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    with model.frozen(), pytest.raises(RuntimeError, match="gradients are tracked"):
        model(**inputs)
    main_output(model(**inputs)).sum().backward()

"""Models without a device, and models split over several: as with a `device_map`, where nothing may mix tensors of two layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from factories import Case, all_heads, all_variants, main_output, parametrize
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary


class EmulatedDevices(TorchFunctionMode):
    """Lets tensors in the memory of the CPU lie on devices `cpu:0`, `cpu:1` …, between which only explicit moves are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Any = WeakTensorKeyDictionary()

    def place(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        self.places[tensor] = index
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            index = self.places.get(args[0])
            return torch.device("cpu") if index is None else torch.device("cpu", index)
        target = None
        if func == torch.Tensor.to:
            args = list(args)
            for number, argument in enumerate(args[1:], 1):
                if isinstance(argument, torch.Tensor):
                    target, args[number] = self.places.get(argument), argument.dtype
                elif isinstance(argument, (torch.device, str)):
                    target, args[number] = torch.device(argument).index, torch.device("cpu")
        if kwargs.get("device") is not None:
            target, kwargs["device"] = torch.device(kwargs["device"]).index, torch.device("cpu")
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        found = {self.places[tensor] for tensor in tensors if tensor in self.places}
        if len(found) > 1 and target is None:
            raise RuntimeError(f"Expected all tensors to be on the same device; {func} got {sorted(found)}.")
        result = func(*args, **kwargs)
        index = target if target is not None else next(iter(found), None)
        if index is not None:
            inputs = {id(tensor) for tensor in tensors}
            for leaf in tree_flatten(result)[0]:
                if isinstance(leaf, torch.Tensor):
                    if id(leaf) in inputs and target is not None and self.places.get(leaf) != index:
                        with torch._C.DisableTorchFunction():
                            return self.place(leaf.view_as(leaf), index)  # a move that changed nothing
                    self.place(leaf, index)
        return result


@contextmanager
def split_over_devices(model: nn.Module) -> Iterator[EmulatedDevices]:
    """The layers of a model on two devices by turns, what follows them on the second; hooks move the inputs of each module."""
    devices, handles = EmulatedDevices(), []
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    inside = {id(child): number % 2 for number, layer in enumerate(layers) for child in layer.modules()}

    def bring(index: int) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            def move(tensor: torch.Tensor) -> torch.Tensor:
                return tensor.to(torch.device("cpu", index))

            moved = {name: value for name, value in kwargs.items() if name != "past_key_values"}
            return tree_map_only(torch.Tensor, move, args), kwargs | tree_map_only(torch.Tensor, move, moved)

        return hook

    embedding = {id(tensor) for tensor in model.get_input_embeddings().parameters()}
    for module in model.modules():
        own = [*module.parameters(recurse=False)]
        is_first = any(id(tensor) in embedding for tensor in module.parameters())
        index = inside.get(id(module), 0 if is_first else 1)
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            devices.place(tensor, index)
        if (own and id(module) not in inside) or any(module is layer for layer in layers):
            handles.append(module.register_forward_pre_hook(bring(index), with_kwargs=True))
    try:
        with devices:
            yield devices
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, case: Case, inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """Decoding with a cache, of prompts that are padded on the left; else a forward pass."""
    if case.is_seq2seq:
        ids, cache, outputs = inputs["decoder_input_ids"], None, []
        for first, last in [(0, 3), (3, 4), (4, 5)]:
            step = model(
                input_ids=inputs["input_ids"],
                attention_mask=mask,
                decoder_input_ids=ids[:, first:last],
                past_key_values=cache,
                use_cache=True,
            )
            cache = step.past_key_values
            outputs.append(main_output(step))
        return outputs
    if not (case.is_causal and model.config.use_cache and "ForCausalLM" in case.auto_name):
        return [main_output(model(**inputs, attention_mask=mask if inputs["input_ids"].dim() == 2 else None))]
    ids, cache, outputs = inputs["input_ids"], None, []
    for first, last in [(0, 6), (6, 7), (7, 8), (8, 11)]:
        step = model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        outputs.append(main_output(step))
    return outputs


@parametrize(all_variants() + all_heads())
def test_split_over_devices(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    with torch.no_grad():
        expected = run(model, case, inputs, mask)
        with split_over_devices(model) as devices:
            for tensor in (*inputs.values(), mask):
                devices.place(tensor, 0)
            actual = run(model, case, inputs, mask)
    for first, second in zip(actual, expected):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    labels = case.labels(inputs)
    if not labels:
        return
    inputs |= labels
    expected_loss = model.train()(**inputs).loss
    with split_over_devices(model) as devices:
        for tensor in inputs.values():
            devices.place(tensor, 0)
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected_loss)


def test_the_emulation_finds_mixed_devices() -> None:
    with EmulatedDevices() as devices:
        first, second = (devices.place(torch.ones(2), index) for index in (0, 1))
        assert (first + 1).device == torch.device("cpu", 0)
        with pytest.raises(RuntimeError, match="same device"):
            first + second
        assert (first + second.to(first.device)).sum() == 4


@parametrize(all_variants() + all_heads() + all_heads(other_inputs=True))
def test_forward_pass_on_the_meta_device(case: Case) -> None:
    """Shapes alone, as tools ask them that count operations or plan memory."""
    model, inputs = case.model(), case.inputs()
    expected = main_output(model(**inputs))
    model = model.to("meta")
    outputs = model(**{name: tensor.to("meta") for name, tensor in inputs.items()})
    found = main_output(outputs)
    assert found.is_meta and found.shape == expected.shape and found.dtype == expected.dtype

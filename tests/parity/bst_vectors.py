"""The Block-State Transformer against the stored outputs of an independent float64 implementation of its definition.

Everything is computed in float64 in three ways: in one pass, token by token, and in pieces of different lengths; the rows are
the largest errors of the three. Logits, loss and hidden states in one pass, and states, are also compared in float32. What
stands at padded positions does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comparison import Row, largest_error

from hf_hybrid.configuration.configuration_bst import BstConfig
from hf_hybrid.modeling.bst.bst_heads import BstForCausalLM
from hf_hybrid.modeling.bst.context_filters import InputHistory
from hf_hybrid.ops.block_state import restore_rows

Tensors = Mapping[str, torch.Tensor]

FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 2e-5  # logits, loss, hidden states
FLOAT32_STATE_TOLERANCE = 1e-4
PIECES = (5, 1, 11, 2, 3)  # lengths, over and over


def _part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def build(config: Mapping[str, Any], parameters: Tensors, dtype: torch.dtype) -> BstForCausalLM:
    """The model of a file in evaluation mode."""
    model = BstForCausalLM(BstConfig(**config)).to(dtype)
    incompatible = model.load_state_dict(dict(parameters), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert not incompatible.unexpected_keys and set(incompatible.missing_keys) <= tied, incompatible
    return model.eval()


class _Recorder:
    """What the parts of the layers with context states compute, in the order of the input, (B, T, ...)."""

    def __init__(self, model: BstForCausalLM) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}
        self.handles = []
        for index, layer in enumerate(model.model.layers):
            if layer.context is None:
                continue
            for name, module in (("attn", layer.attn), ("cross", layer.context)):
                self.handles.append(module.register_forward_hook(self._keep_heads(f"{name}.{index}")))
            self.handles.append(layer.context.register_forward_hook(self._keep_filters(f"ssm.{index}")))

    def _keep_heads(self, name: str) -> Any:
        def keep(_module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            passage = next(part for part in arguments if hasattr(part, "order"))
            states = output.transpose(1, 2).flatten(2)
            states = states if passage.order is None else restore_rows(states, passage.order)
            self.values.setdefault(name, []).append(states)

        return keep

    def _keep_filters(self, name: str) -> Any:
        def keep(_module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            states, filters, passage, memory = arguments
            if memory is not None:
                return  # with a state, what the filters compute shows in the attention to it
            outputs = filters(states)[0].permute(0, 3, 1, 2)  # (B, T, F, D)
            if passage.order is not None:
                outputs = restore_rows(outputs.flatten(2), passage.order).view(outputs.shape)
            self.values.setdefault(name, []).append(outputs)

        return keep

    def found(self) -> dict[str, torch.Tensor]:
        for handle in self.handles:
            handle.remove()
        return {name: torch.cat(parts, dim=1) for name, parts in self.values.items()}


def _states(cache: Any) -> dict[str, torch.Tensor]:
    found = {}
    for index, layer in enumerate(cache.layers):
        found |= {f"state.{index}.key_ring": layer.keys, f"state.{index}.value_ring": layer.values}
        if layer.context_keys is None:
            continue
        found |= {
            f"state.{index}.context_key": layer.context_keys,
            f"state.{index}.context_value": layer.context_values,
        }
        if isinstance(layer.state, InputHistory):
            newest_first = layer.state.last(layer.state.length).flip(-1).transpose(1, 2)
            found[f"state.{index}.ssm_history"] = newest_first
        else:
            found[f"state.{index}.ssm"] = layer.state
    return found


def _whole(model: BstForCausalLM, inputs: Tensors) -> dict[str, torch.Tensor]:
    recorder, ids, mask = _Recorder(model), inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # pairs of real neighbours only
    last: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _m, _a, output: last.append(output))
    outputs = model(**inputs, labels=labels, output_hidden_states=True)
    handle.remove()
    hidden = [*outputs.hidden_states[:-1], last[0]]  # the library replaces the last one by what its norm returns
    found = {"logits": outputs.logits, "loss": outputs.loss.view(1)} | recorder.found()
    return found | {f"hidden.{index}": states for index, states in enumerate(hidden)}


def _in_pieces(model: BstForCausalLM, inputs: Tensors, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    recorder, past, logits, first = _Recorder(model), None, [], 0
    total, turn = inputs["input_ids"].shape[1], 0
    while first < total:
        last = min(total, first + lengths[turn % len(lengths)])
        mask = inputs["attention_mask"][:, :last]
        outputs = model(inputs["input_ids"][:, first:last], mask, past_key_values=past, use_cache=True)
        past, first, turn = outputs.past_key_values, last, turn + 1
        logits.append(outputs.logits)
    return {"logits": torch.cat(logits, dim=1)} | recorder.found() | _states(past)


@torch.no_grad()
def check(path: Path, config: Mapping[str, Any], tensors: Tensors) -> list[Row]:
    """Rows for every stored output, and for those compared in float32 as well."""
    parameters, inputs, stored = (_part(tensors, f"{kind}.") for kind in ("param", "input", "output"))
    real = inputs["attention_mask"].bool()

    def error(name: str, value: torch.Tensor) -> float:
        if value.numel() == 0 and value.shape == stored[name].shape:
            return 0.0  # the ring of a window of one token
        if name == "loss" or name.startswith("state."):
            return largest_error(value, stored[name])
        return largest_error(value, stored[name], real.view(*real.shape, *[1] * (value.dim() - 2)))

    errors: dict[str, float] = {}
    model = build(config, parameters, torch.float64)
    runs = [_whole(model, inputs), *(_in_pieces(model, inputs, lengths) for lengths in ((1,), PIECES))]
    for found in runs:
        for name, value in ((name, value) for name, value in found.items() if name in stored):
            errors[name] = max(errors.get(name, 0.0), error(name, value))
    rows = [Row(f"output.{name}", largest, FLOAT64_TOLERANCE) for name, largest in errors.items()]
    model = build(config, {name: value.float() for name, value in parameters.items()}, torch.float32)
    single = _whole(model, inputs) | {
        name: value for name, value in _in_pieces(model, inputs, PIECES).items() if name.startswith("state.")
    }
    for name, value in ((name, value) for name, value in single.items() if name in stored):
        tolerance = FLOAT32_STATE_TOLERANCE if name.startswith("state.") else FLOAT32_TOLERANCE
        if name == "logits" or name.startswith(("hidden.", "state.", "loss")):
            rows.append(Row(f"float32 {name}", error(name, value), tolerance))
    return rows

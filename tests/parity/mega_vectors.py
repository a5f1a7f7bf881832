"""Mega against stored outputs of the official code (through our converter) and of Transformers 4.57.6 (names unchanged).

Everything is computed twice: in float32 for `output.*`, in float64 for `output64.*`. Official files are compared at real
positions only. Two outputs of Transformers 4.57.6 show a defect of its decoding and are no target: there our own decoding is
compared with the parallel run that it has to equal.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comparison import Row, largest_error

from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.conversion.mega import config_from_official, model_class, state_dict_from_official
from hf_hybrid.modeling.mega import mega_heads

Tensors = Mapping[str, torch.Tensor]
Found = dict[str, tuple[torch.Tensor, torch.Tensor | None]]  # output name: value, mask of the entries that count

ABSOLUTE, RELATIVE = 2e-5, 1e-4  # float32: |difference| <= ABSOLUTE + RELATIVE * |stored|
FLOAT64_TOLERANCE = 1e-11
FLOAT64_ROTARY_TOLERANCE = 1e-6  # the reference keeps sines and cosines in float32


def _excess(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None) -> float:
    """Largest difference beyond the relative tolerance, or 0."""
    allowed = RELATIVE * expected.double().abs()
    difference = (actual.detach().double() - expected.double()).abs()
    largest_error(actual, expected, mask)  # refuses other shapes
    return largest_error((difference - allowed).clamp(min=0).nan_to_num(torch.inf), torch.zeros_like(allowed), mask)


def _part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _state(cache: Any, layer: int) -> torch.Tensor:
    """State of the moving average, without the inputs that truncation keeps beside it."""
    state = cache.layers[layer].state
    return state[0] if isinstance(state, tuple) else state


# -------------------------------------------------------------------------------------------------- Transformers 4.x


def _build_transformers(config: Mapping[str, Any], parameters: Tensors) -> torch.nn.Module:
    model_config = MegaConfig(**{name: value for name, value in config.items() if name != "model_type"})
    model = getattr(mega_heads, config["architectures"][0])(model_config)
    known = {name: tensor for name, tensor in parameters.items() if not name.endswith("_float_tensor")}
    model.load_state_dict(known)
    return model


def _steps(model: torch.nn.Module, ids: torch.Tensor, **source: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Logits of one token after the other, and the cache at the end."""
    past, parts = None, []
    for position in range(ids.shape[1]):
        outputs = model(ids[:, position : position + 1], past_key_values=past, use_cache=True, **source)
        past = outputs.past_key_values
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1), past


def _cached_tensors(cache: Any, chunk: int | None, prefix: str) -> dict[str, torch.Tensor]:
    """Every tensor of the decoding state; of the keys and values those of the last, unfinished chunk."""
    found = {}
    for index, layer in enumerate(cache.layers):
        visible = layer.get_seq_length() if chunk is None else layer.get_seq_length() % chunk
        found[f"{prefix}.{index}.ema_state"] = _state(cache, index)
        if visible:
            found[f"{prefix}.{index}.self_key"] = layer.keys[:, -visible:]
            found[f"{prefix}.{index}.self_value"] = layer.values[:, -visible:]
        if layer.cross_keys is not None:
            found[f"{prefix}.{index}.cross_key"] = layer.cross_keys
            found[f"{prefix}.{index}.cross_value"] = layer.cross_values
    return found


def _after_prefill(
    model: torch.nn.Module, ids: torch.Tensor, parallel: torch.Tensor, stored: torch.Tensor, **source: torch.Tensor
) -> torch.Tensor:
    """Logits of the steps after a prefill, or, when a file stands for every prefill, one step after each.

    The files do not say how long their prefill was: it is the length after which the parallel run comes nearest to what is stored.
    """
    size, length = stored.shape[1], ids.shape[1]
    starts = list(range(1, length - size + 1))
    if size == length - 1 > 1:
        starts, size = list(range(1, length)), 1
    else:
        distances = [float((parallel[:, start : start + size] - stored).abs().max()) for start in starts]
        starts = [starts[distances.index(min(distances))]]
    parts = []
    for start in starts:
        past = model(ids[:, :start], use_cache=True, **source).past_key_values
        parts.append(model(ids[:, start : start + size], past_key_values=past, use_cache=True, **source).logits)
    return torch.cat(parts, dim=1)


def _transformers_outputs(model: torch.nn.Module, inputs: Tensors, stored: Tensors) -> Found:
    call = {name: tensor for name, tensor in inputs.items() if name != "step_ids"}
    outputs = model(**call, output_hidden_states=True, output_attentions=True)
    found: dict[str, torch.Tensor] = {
        name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)
    }
    for name in ("hidden_states", "attentions"):
        found |= {f"{name}.{index}": value for index, value in enumerate(outputs.get(name) or ())}
    for index, value in enumerate(
        outputs.get("cross_attentions") or ()
    ):  # Transformers 4.57 had no dimension of heads there
        found[f"cross_attentions.{index}"] = value.squeeze(1)
    if "loss" in found:
        found["loss"] = found["loss"].view(1)
    if model.config.is_decoder and "logits" in found and "input_ids" in inputs:
        chunk = model.config.attention_chunk
        found |= _cached_tensors(outputs.past_key_values, chunk, "cache")
        found["logits_no_cache"] = model(**call, use_cache=False).logits
        source = {name: tensor for name, tensor in inputs.items() if name.startswith("encoder_")}
        ids = inputs.get("step_ids", inputs["input_ids"])
        steps, cache = _steps(model, ids, **source)
        found["parallel_step_logits"] = model(ids, **source).logits
        found["hf_step_logits"] = steps
        is_whole = "attention_mask" not in inputs or bool(inputs["attention_mask"].all())
        if chunk is not None and is_whole:  # the reference cannot decode here: the parallel run is the target
            found["logits"] = steps if "step_ids" not in inputs else _steps(model, inputs["input_ids"], **source)[0]
        name = "hf_step_after_prefill_logits"
        if name in stored:
            found[name] = _after_prefill(model, ids, found["parallel_step_logits"], stored[name], **source)
        found |= _cached_tensors(cache, chunk, "step_cache")
    return {name: (value, None) for name, value in found.items() if name in stored}


def _without_defects(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The stored outputs, with the parallel run in place of those that show a defect of decoding.

    Its steps are wrong with laplace and relu2, and with any cross attention. The length of the prefill cannot be told from wrong
    logits; every length is compared then: all steps but the first.
    """
    targets = dict(tensors)
    if config.get("attention_activation", "softmax") == "softmax" and not config.get("add_cross_attention", False):
        return targets
    for prefix in ("output.", "output64."):
        parallel = targets.get(f"{prefix}parallel_step_logits")
        if f"{prefix}hf_step_logits" in targets:
            targets[f"{prefix}hf_step_logits"] = parallel
        if f"{prefix}hf_step_after_prefill_logits" in targets:
            targets[f"{prefix}hf_step_after_prefill_logits"] = parallel[:, 1:]
    return targets


# ---------------------------------------------------------------------------------------------------------- official


class _Recorder:
    """Outputs of modules during the next forward passes; only the first of each module is kept."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def watch(self, name: str, module: torch.nn.Module) -> None:
        def hook(_module: torch.nn.Module, _inputs: tuple, output: Any) -> None:
            self.values.setdefault(name, output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(hook)

    def watch_stack(self, prefix: str, stack: torch.nn.Module) -> None:
        for index, layer in enumerate(stack.layers):
            self.watch(f"{prefix}layers.{index}.out", layer)
            self.watch(f"{prefix}layers.{index}.mega_layer.out", layer.mega_layer)
            self.watch(f"{prefix}layers.{index}.mega_layer.move.out", layer.mega_layer.ema_gate)
            if layer.cross_attn is not None:
                self.watch(f"{prefix}layers.{index}.cross_attn.out", layer.cross_attn)


def _time_first(states: torch.Tensor, mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L, D) as the (length, B, D) of the official code, which pads to whole chunks; the mask leaves padding out."""
    missing = length - states.shape[1]
    states = torch.nn.functional.pad(states, (0, 0, 0, missing))
    mask = torch.nn.functional.pad(mask, (0, missing))
    return states.transpose(0, 1), mask.transpose(0, 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])


def _cached(name: str, caches: Mapping[str, Any], source_mask: torch.Tensor | None) -> torch.Tensor:
    """A tensor of the decoding state by its official name: `after_….state.decoder.layers.i.(…).prev_…`."""
    when, index, owner, kind = re.fullmatch(
        r"(after_\w+)\.state\.decoder\.layers\.(\d+)\.([\w.]+)\.(prev_\w+)", name
    ).groups()
    cache = caches[when]
    layer = cache.layers[int(index)]
    if owner == "cross_attn":
        if kind == "prev_key_padding_mask":
            return ~source_mask
        return layer.cross_keys if kind == "prev_key" else layer.cross_values
    if kind == "prev_state":
        return _state(cache, int(index))
    chunk = layer.layout["chunk_size"]
    visible = layer.get_seq_length() if chunk is None else layer.get_seq_length() % chunk
    return (layer.keys if kind == "prev_key" else layer.values)[:, -visible:]


def _decode(
    model, ids: torch.Tensor, names: set[str], size: int = 1, **source
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits and features of a text in pieces, and copies of the cache where the names ask for them."""
    moments = {int(name[len("after_step") :].split(".")[0]) for name in names if name.startswith("after_step")}
    features: list[torch.Tensor] = []
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    stack = model.decoder if model.config.is_encoder_decoder else model.mega
    handle = stack.register_forward_hook(lambda _module, _inputs, output: features.append(output.last_hidden_state))
    past, parts, caches = None, [], {}
    for start in range(0, ids.shape[1], size):
        outputs = model(**{key: ids[:, start : start + size]}, past_key_values=past, use_cache=True, **source)
        past = outputs.past_key_values
        parts.append(outputs.logits)
        if start in moments:
            caches[f"after_step{start}"] = copy.deepcopy(past)
    handle.remove()
    caches["after_last_step"] = past
    return torch.cat(parts, dim=1), torch.cat(features, dim=1), caches


def _classifier_outputs(model: torch.nn.Module, inputs: Tensors, recorder: _Recorder) -> Found:
    recorder.watch_stack("encoder.encoder.", model.mega)
    pooled: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _module, arguments: pooled.append(arguments[0]))
    tokens = inputs["src_tokens"]
    if model.config.input_type == "values":
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        key = model.main_input_name
        outputs = model(**{key: tokens.to(model.dtype)})
        representations = {"sentence_rep": pooled[0]}
    else:
        pad = model.config.pad_token_id
        mask = tokens != pad
        call = {"input_ids": tokens, "attention_mask": mask}
        if "src1_tokens" in inputs:
            call |= {"pair_input_ids": inputs["src1_tokens"], "pair_attention_mask": inputs["src1_tokens"] != pad}
        outputs = model(**call)
        width = model.config.hidden_size
        representations = {"sentence_rep": pooled[0][:, -width:], "sentence_rep1": pooled[0][:, :width]}
    found: Found = {name: (value, None) for name, value in representations.items()}
    return found | {"logits": (outputs.logits, None), "mask": (mask, None)}


def _language_model_outputs(model: torch.nn.Module, inputs: Tensors, recorder: _Recorder, names: set[str]) -> Found:
    recorder.watch_stack("decoder.", model.mega)
    tokens = inputs["src_tokens"]
    mask = tokens != model.config.pad_token_id
    logits = model(tokens, attention_mask=mask).logits
    real = mask.unsqueeze(-1)
    found: Found = {"logits": (logits, real), "log_probs_logits": (logits, real), "mask": (mask, None)}
    found["features"] = (model.mega(tokens, attention_mask=mask).last_hidden_state, real)
    if "step_tokens" not in inputs:
        return found
    steps, features, caches = _decode(model, inputs["step_tokens"], names)
    found |= {"step_logits": (steps, None), "step_features": (features, None)}
    segment = model.config.attention_chunk or 5
    found["segment_logits"] = (_decode(model, inputs["step_tokens"], set(), segment)[0], None)
    return found | {name: (_cached(name, caches, None), None) for name in names if name.startswith("after_")}


def _translation_outputs(model: torch.nn.Module, inputs: Tensors, recorder: _Recorder, names: set[str]) -> Found:
    recorder.watch_stack("encoder.", model.encoder)
    recorder.watch_stack("decoder.", model.decoder)
    pad = model.config.pad_token_id
    source_mask, target = inputs["src_tokens"] != pad, inputs["prev_output_tokens"]
    source = {"input_ids": inputs["src_tokens"], "attention_mask": source_mask}
    target_mask = target != pad
    outputs = model(
        **source, decoder_input_ids=target, decoder_attention_mask=target_mask, output_attentions=True, use_cache=False
    )
    encoded, encoded_mask = _time_first(outputs.encoder_last_hidden_state, source_mask, source_mask.shape[1])
    found: Found = {
        "logits": (outputs.logits, target_mask.unsqueeze(-1)),
        "attn": (outputs.cross_attentions[-1].squeeze(1), target_mask.unsqueeze(-1)),
        "encoder_out": (encoded, encoded_mask),
        "mask": (target_mask, None),
        "source_mask": (source_mask, None),
    }
    if "step_tokens" not in inputs:
        return found
    steps, _, caches = _decode(model, inputs["step_tokens"], names, **source)
    found["step_logits"] = (steps, None)
    return found | {name: (_cached(name, caches, source_mask), None) for name in names if name.startswith("after_")}


def _official_outputs(model: torch.nn.Module, config: Mapping, inputs: Tensors, stored: Tensors) -> Found:
    recorder, names = _Recorder(), set(stored)
    if config["model"] in ("lra", "sc_raw"):
        found = _classifier_outputs(model, inputs, recorder)
    elif config["model"] == "mega_lm":
        found = _language_model_outputs(model, inputs, recorder, names)
    else:
        found = _translation_outputs(model, inputs, recorder, names)
    mask, source_mask = found.pop("mask")[0], found.pop("source_mask", (None, None))[0]
    for name, states in recorder.values.items():
        if name in stored:
            real = source_mask if name.startswith("encoder.layers.") else mask
            found[name] = _time_first(states, real, stored[name].shape[0])
    return {name: value for name, value in found.items() if name in stored}


# ------------------------------------------------------------------------------------------------------------- check


@torch.no_grad()
def check(path: Path, config: Mapping[str, Any], tensors: Tensors) -> list[Row]:
    """Rows for every stored output that is known here."""
    parameters, inputs = _part(tensors, "param."), _part(tensors, "input.")
    is_official = "args" in config
    if is_official:
        options = dict(config["args"]) | {"model": config["model"]}
        model_config = config_from_official(options, vocab_size=config.get("vocab_size"))
        model_config.pad_token_id = config["pad_index"] if "pad_index" in config else model_config.pad_token_id
        model = model_class(model_config)(model_config)
        incompatible = model.load_state_dict(state_dict_from_official(parameters, model_config), strict=False)
        tied = set(model._tied_weights_keys or {}) if model_config.tie_word_embeddings else set()
        assert not incompatible.unexpected_keys and set(incompatible.missing_keys) <= tied, incompatible
    else:
        model = _build_transformers(config, parameters)
        tensors = _without_defects(tensors, config)
    rotary = model.config.relative_positional_bias == "rotary"
    rows = []
    for prefix, dtype in (("output.", torch.float32), ("output64.", torch.float64)):
        stored = _part(tensors, prefix)
        model = model.to(dtype).eval()
        typed = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        if is_official:
            found = _official_outputs(model, config, typed, stored)
        else:
            found = _transformers_outputs(model, typed, stored)
        for name, (value, mask) in found.items():
            if dtype == torch.float32:
                rows.append(Row(prefix + name, _excess(value, stored[name], mask), ABSOLUTE))
            else:
                tolerance = FLOAT64_ROTARY_TOLERANCE if rotary else FLOAT64_TOLERANCE
                rows.append(Row(prefix + name, largest_error(value, stored[name], mask), tolerance))
    return rows

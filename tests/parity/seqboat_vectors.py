"""SeqBoat against stored outputs of the official code, through our converter.

Float32 outputs are compared within |difference| <= 2e-5 + 1e-4 |stored|, float64 ones within 1e-9, gradients relative to their largest
entry, decisions of the routers exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comparison import Row, largest_error
from safetensors import safe_open

from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.conversion.seqboat import (
    config_from_official,
    model_class,
    split_router,
    state_dict_from_official,
    tensor_names,
    unit_names,
)
from hf_hybrid.modeling.seqboat.seqboat_layers import SeqBoatUnit
from hf_hybrid.ops.compaction import rotary_table
from hf_hybrid.training.activations import attention_spans

Tensors = Mapping[str, torch.Tensor]

ABSOLUTE, RELATIVE = 2e-5, 1e-4
FLOAT64_TOLERANCE = 1e-9
GRADIENT_TOLERANCE = 1e-4


def _excess(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Largest difference beyond the relative tolerance, or 0."""
    allowed = RELATIVE * expected.double().abs()
    difference = (actual.detach().double() - expected.double()).abs()
    largest_error(actual, expected, mask)  # refuses other shapes
    return largest_error((difference - allowed).clamp(min=0).nan_to_num(torch.inf), torch.zeros_like(allowed), mask)


def _part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _Recorder:
    """What the units of a model compute during its first forward pass."""

    def __init__(self, units: list[SeqBoatUnit]) -> None:
        self.units = units
        self.values: list[dict[str, Any]] = [{} for _ in units]
        self.handles = []
        for unit, found in zip(units, self.values):
            for name in ("ema", "router", "out_proj"):
                self._watch(getattr(unit, name), name, found)
            self._watch(unit, "unit", found)

    def _watch(self, module: torch.nn.Module, name: str, found: dict[str, Any]) -> None:
        def hook(_module: torch.nn.Module, _inputs: tuple, output: Any) -> None:
            found.setdefault(name, output)

        self.handles.append(module.register_forward_hook(hook))

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()

    def layer_outputs(self, index: int, stored: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """Ours by official name, with the mask of the entries that count."""
        found, unit = self.values[index], self.units[index]
        routing = found["router"]
        active = routing.active
        compressed = stored["gau_compressed"]
        slots = torch.arange(compressed.shape[1]) < active.sum(-1, keepdim=True)
        packed = compressed.new_zeros(compressed.shape, dtype=found["out_proj"].dtype)
        if slots.any():
            packed[slots] = found["out_proj"]
        rates = active.double().mean(-1)
        moments = torch.stack([rates.mean(), rates.std()])
        spans = attention_spans(active, unit.window, unit.is_causal)
        spans = spans[~spans.isnan()]
        span = spans.mean() if spans.numel() else torch.zeros((), dtype=torch.float64)
        return {
            "ema_out": (found["ema"][0], None),
            "router_logits": (routing.logits, None),
            "router_probs": (unit.router.probabilities(routing.logits), None),
            "active": (active, None),
            "gate": (routing.gate, None),
            "gau_compressed": (packed, slots.unsqueeze(-1)),
            "output": (found["unit"][0], None),
            "act_time_mean_std": (moments, None),
            "avg_span": (span.reshape(1), None),
        }


def _layer_rows(recorder: _Recorder, tensors: Tensors) -> list[Row]:
    rows = []
    for index in range(len(recorder.units)):
        prefix = f"output.layer{index}."
        stored = _part(tensors, prefix)
        for name, (value, mask) in recorder.layer_outputs(index, stored).items():
            if name not in stored:
                continue
            if mask is not None and not mask.any():
                rows.append(Row(prefix + name, 0.0, ABSOLUTE))
                continue
            if name == "active":
                rows.append(Row(prefix + name, float((value != stored[name].bool()).sum()), 0.0))
            else:
                mask = None if mask is None else mask.expand(stored[name].shape)
                rows.append(Row(prefix + name, _excess(value, stored[name], mask), ABSOLUTE))
    return rows


# ------------------------------------------------------------------------------------------------------------- models


def _with_input_type(config: Mapping[str, Any], parameters: Tensors, inputs: Tensors) -> Mapping[str, Any]:
    """The options with the kind of input, which some files leave to their tensors: real numbers are pixels or a waveform.

    Waveforms always have sinusoids; for pixels they are an option.
    """
    if "input_type" in config or not inputs["tokens"].is_floating_point():
        return config
    has_sinusoids = "encoder.encoder.pos_emb.scale" in parameters
    return {**config, "input_type": "speech" if has_sinusoids and not config.get("add_apos", False) else "image"}


def _build(config: Mapping[str, Any], parameters: Tensors, inputs: Tensors) -> torch.nn.Module:
    config = _with_input_type(config, parameters, inputs)
    model_config = config_from_official(config, vocab_size=config.get("vocab_size"))
    if config.get("padding_idx") is not None:
        model_config.pad_token_id = config["padding_idx"]
    model = model_class(model_config)(model_config)
    incompatible = model.load_state_dict(state_dict_from_official(parameters, model_config), strict=False)
    tied = set(model._tied_weights_keys or {}) if model_config.tie_word_embeddings else set()
    assert not incompatible.unexpected_keys and set(incompatible.missing_keys) <= tied, incompatible
    return model.eval()


def _call(model: torch.nn.Module, inputs: Tensors) -> dict[str, torch.Tensor]:
    mask = ~inputs["padding_mask"].bool()
    tokens = inputs["tokens"]
    if model.config.input_type == "values":
        return {model.main_input_name: tokens.to(model.dtype)}
    call = {"input_ids": tokens, "attention_mask": mask}
    if "tokens2" in inputs:
        call |= {"pair_input_ids": inputs["tokens2"], "pair_attention_mask": ~inputs["padding_mask2"].bool()}
    return call


def _pieces(model: torch.nn.Module, ids: torch.Tensor, cuts: list[int]) -> tuple[torch.Tensor, Any]:
    past, parts = None, []
    for start, stop in zip(cuts, cuts[1:]):
        outputs = model(ids[:, start:stop], past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1), past


def _decoding_rows(model: torch.nn.Module, tensors: Tensors, facts: Mapping[str, Any]) -> list[Row]:
    stored, ids = _part(tensors, "output."), tensors["input.tokens"]
    rows = []
    row = slice(facts.get("row", 0), facts.get("row", 0) + 1)
    found: dict[str, torch.Tensor] = {}
    if "incremental_chunks.logits" in stored:
        cuts = facts["cuts"]
        length = stored["incremental_chunks.logits"].shape[1]
        found["incremental_chunks.logits"] = _pieces(model, ids[row, :length], cuts)[0]
    if "incremental_1step.logits" in stored:
        length = stored["incremental_1step.logits"].shape[1]
        logits, past = _pieces(model, ids[row, :length], list(range(length + 1)))
        found["incremental_1step.logits"] = logits
        for index, layer in enumerate(past.layers):
            state = layer.state[0] if isinstance(layer.state, tuple) else layer.state
            found[f"incremental_1step.layer{index}.ema_state"] = state
    if "greedy.tokens" in stored:
        prompt = facts["greedy_prompt_len"]
        expected = stored["greedy.tokens"]
        new = expected.shape[1] - prompt if torch.equal(expected[:, :prompt], ids[row, :prompt]) else expected.shape[1]
        generated = model.generate(
            ids[row, :prompt],
            attention_mask=torch.ones_like(ids[row, :prompt]),
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            do_sample=False,
            suppress_tokens=[model.config.pad_token_id],
        )
        generated = generated[:, -expected.shape[1] :]
        rows.append(Row("output.greedy.tokens", float((generated != expected).sum()), 0.0))
    rows += [Row(f"output.{name}", _excess(value, stored[name]), ABSOLUTE) for name, value in found.items()]
    return rows


def _gradient_rows(model: torch.nn.Module, inputs: Tensors, tensors: Tensors) -> list[Row]:
    """Gradients of sum(logits * weight) of our parameters, against the official ones under our names."""
    stored = _part(tensors, "output.grad.")
    if not stored:
        return []
    model.zero_grad()
    (model(**_call(model, inputs)).logits * inputs["grad_weight"]).sum().backward()
    names = tensor_names(model.config)
    parameters = dict(model.named_parameters())
    rows = []
    for name, gradient in stored.items():
        pieces = split_router({name: gradient}, model.config)
        errors = []
        for piece, expected in pieces.items():
            ours = parameters[names.ours[names.aliases.get(piece, piece)]].grad
            errors.append(largest_error(ours, expected) / max(float(gradient.abs().max()), 1e-12))
        rows.append(Row(f"output.grad.{name}", max(errors), GRADIENT_TOLERANCE))
    return rows


def _check_model(config: Mapping[str, Any], tensors: Tensors, facts: Mapping[str, Any]) -> list[Row]:
    parameters, inputs = _part(tensors, "param."), _part(tensors, "input.")
    model = _build(config, parameters, inputs)
    real = ~inputs["padding_mask"].bool()
    recorder = _Recorder([layer.unit for layer in model.model.layers])
    pooled: list[torch.Tensor] = []
    if hasattr(model, "classifier"):
        handle = model.classifier.register_forward_pre_hook(lambda _module, arguments: pooled.append(arguments[0]))
    states: list[torch.Tensor] = []
    state_handle = model.model.register_forward_hook(lambda _m, _i, output: states.append(output.last_hidden_state))
    with torch.no_grad():
        logits = model(**_call(model, inputs)).logits
    recorder.stop()
    state_handle.remove()
    mask = real.unsqueeze(-1).expand(logits.shape) if logits.dim() == 3 else None
    rows = _layer_rows(recorder, tensors)
    found = {"output.logits": (logits, mask)}
    if pooled:
        handle.remove()
        width = model.config.hidden_size
        first = pooled[0][:, width : 2 * width] if model.config.dual_encoder else pooled[0]
        found |= {"output.sentence_rep": (first, None), "output.encoder_last": (states[0], None)}
    for name, (value, counts) in found.items():
        if name in tensors:
            rows.append(Row(name, _excess(value, tensors[name], counts), ABSOLUTE))
    with torch.no_grad():
        rows += _decoding_rows(model, tensors, facts)
    rows += _gradient_rows(model, inputs, tensors)
    if "output.float64.logits" not in tensors:
        return rows
    with torch.no_grad():
        double = model.double()(**_call(model.double(), inputs)).logits
    error = largest_error(double, tensors["output.float64.logits"], mask)
    return [*rows, Row("output.float64.logits", error, FLOAT64_TOLERANCE)]


def _check_layer(config: Mapping[str, Any], tensors: Tensors) -> list[Row]:
    window = config["chunk_size"] if config["chunk_size"] and config["chunk_size"] > 0 else None
    bias = config["rel_pos_bias"]
    has_ranks = bias == "simple" and window is not None and config.get("local_pos", False)
    settings = SeqBoatConfig(
        hidden_size=config["embed_dim"],
        qk_dim=config["zdim"],
        value_dim=config["hdim"],
        ema_dim=config["ndim"],
        window_size=None if window is None else window + 1,
        ema_truncation=config["truncation"],
        attention_activation=config["attention_activation"],
        position_bias="rank" if has_ranks else {"simple": "distance"}.get(bias, bias),
        distance_table_size=config["max_positions"],
        norm_first=config["prenorm"],
        norm_type=config.get("norm_type", "layernorm"),
        router_act_bias=config.get("act_bias", 0.0),
        always_active=config.get("always_act", False),
        is_decoder=config["causal"],
        hidden_dropout=0.0,
    )
    unit = SeqBoatUnit(settings).eval()
    names = unit_names("unit.", "", settings)
    official = split_router(_part(tensors, "param."), settings)
    unit.load_state_dict({names[name]: tensor for name, tensor in official.items()})
    mask = ~tensors["input.padding_mask"].bool()
    recorder = _Recorder([unit])
    rows: list[Row] = []
    for dtype in (torch.float32, torch.float64):
        unit, states = unit.to(dtype), tensors["input.x"].to(dtype)
        rotary = None
        if settings.position_bias == "rotary":
            rotary = rotary_table(torch.arange(states.shape[1]), settings.qk_dim, dtype)
        with torch.no_grad():
            output = unit(states, mask, rotary)[0]
        if dtype == torch.float32:
            rows += _layer_rows(recorder, tensors)
            recorder.stop()
    if "output.float64.output" not in tensors:
        return rows
    error = largest_error(output, tensors["output.float64.output"])
    return [*rows, Row("output.float64.output", error, FLOAT64_TOLERANCE)]


def check(path: Path, config: Mapping[str, Any], tensors: Tensors) -> list[Row]:
    """Rows for every stored output that is known here."""
    with safe_open(path, framework="pt") as file:
        gates = json.loads(file.metadata()["gates"])
    facts: dict[str, Any] = {}
    for entry in gates:
        facts |= {name: value for name, value in entry.items() if "layer" not in entry}
    if config["task"] == "single_layer":
        return _check_layer(config, tensors)
    return _check_model(config, tensors, facts)

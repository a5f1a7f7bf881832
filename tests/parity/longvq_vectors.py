"""LongVQ against stored outputs of a plain float64 implementation of its definition, dense and with loops.

Everything is computed in float32 against the tolerances of the files' description, and in float64 within 1e-9. The stored names of the
moving averages' tensors are translated; all others are ours. What a file holds tells what is checked: keys are an update of the
codebook, token ids a model, hidden states a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comparison import Row, largest_error

from hf_hybrid.configuration.configuration_longvq import LongVQConfig
from hf_hybrid.modeling.longvq.longvq_cache import CodeMemoryLayer
from hf_hybrid.modeling.longvq.longvq_heads import LongVQForCausalLM, LongVQForMaskedLM
from hf_hybrid.modeling.longvq.longvq_layers import LongVQMixer
from hf_hybrid.ops.codebook import (
    Codebook,
    CodeStatistics,
    average_codebook,
    averaging_decay,
    code_counts,
    look_up,
    nearest_codes,
    perplexity,
)

Tensors = Mapping[str, torch.Tensor]

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE, FLOAT64_TOLERANCE = 2e-5, 2e-4, 1e-6, 1e-9
COLLAPSED_UPDATE_TOLERANCE = 5e-6  # most keys in few sums: longer and larger than those of an even use
INPUT_ROUNDING = 2**-23  # of a quotient of two numbers that the file keeps in float32 and the reference had in float64
_EMA = {
    "delta": "damping_factor",
    "alpha": "decay_factor",
    "beta": "ema_expansion_matrix",
    "gamma": "kernel_projection_matrix",
    "omega": "residual_weight",
}
EXACT = ("code_indices", "greedy_tokens", "batch_count", "new.num_updates", "revived", "window_mask")


def _part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _our_name(name: str, config: LongVQConfig) -> str:
    front, dot, leaf = name.rpartition(".")
    is_average = config.ssm_type == "ema" and front.endswith("ssm")
    return front + dot + _EMA[leaf] if is_average else name


def _config(settings: Mapping[str, Any]) -> LongVQConfig:
    return LongVQConfig(**settings, hidden_dropout=0.0, activation_dropout=0.0, pad_token_id=None, eos_token_id=None)


def _load(module: torch.nn.Module, parameters: Tensors, config: LongVQConfig, left_out: set[str]) -> None:
    renamed = {_our_name(name, config): tensor for name, tensor in parameters.items()}
    incompatible = module.load_state_dict(renamed, strict=False)
    missing = {name for name in incompatible.missing_keys if not name.endswith("num_updates")}
    assert not incompatible.unexpected_keys and missing == left_out, incompatible


class _Run:
    """Our values in one precision, by the stored names without `output.`, with the mask of the entries that count."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.masks: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        self.values[name] = value.detach()
        if mask is not None:
            self.masks[name] = mask

    def error(self, name: str, expected: torch.Tensor) -> float:
        actual, mask = self.values[name], self.masks.get(name)
        if name in EXACT or name.endswith("window_codes"):
            expected = expected.to(actual.dtype)
        if name.startswith("state.window_") and actual.shape == expected.shape:
            if expected.numel() == 0 or (mask is not None and not mask.any()):
                return 0.0  # a window of one token, or without real tokens: shape and window_mask say it all
        return largest_error(actual, expected, mask, relative=".grad." in name)


def _is_collapsed(stored: Tensors) -> bool:
    """Whether a batch used less than half of the codewords, measured by perplexity."""
    return "batch_count" in stored and bool((stored["perplexity"] < stored["batch_count"].shape[-1] / 2).any())


def _tolerance(name: str, stored: Tensors) -> float:
    if name.rpartition("state.")[2] in (*EXACT, "window_codes"):
        return 0.0
    if name.startswith(("new.", "decay", "batch_sum")):
        return COLLAPSED_UPDATE_TOLERANCE if _is_collapsed(stored) else UPDATE_TOLERANCE
    return GRADIENT_TOLERANCE if ".grad." in name else OUTPUT_TOLERANCE


def _rows(single: _Run, double: _Run, stored: Tensors) -> list[Row]:
    rows = []
    for name, expected in stored.items():
        if name not in single.values:
            continue
        error, error64 = single.error(name, expected), double.error(name, expected)
        tolerance = _tolerance(name, stored)
        rounding = INPUT_ROUNDING * float(expected.abs().max()) if name.startswith("new.") else 0.0
        if (
            error64 > FLOAT64_TOLERANCE + rounding
        ):  # worse than float32 is allowed to be: fails whatever the float32 error
            error = max(error, tolerance + error64)
        rows.append(Row(f"output.{name}", error, tolerance, error64))
    return rows


# -------------------------------------------------------------------------------------------------------------- layers


def _run_layer(config: LongVQConfig, tensors: Tensors, dtype: torch.dtype) -> _Run:
    mixer = LongVQMixer(config)
    _load(mixer, _part(tensors, "param."), config, set())
    mixer = mixer.to(dtype).eval()
    run, states = _Run(), tensors["input.hidden_states"].to(dtype)
    mask = tensors["input.attention_mask"].bool()
    real, heads = mask.unsqueeze(-1), mask[:, None, :, None]
    seen: dict[str, Any] = {}
    mixer.quantizer.register_forward_hook(lambda _m, inputs, output: seen.update(key=inputs[0], quantized=output))
    mixer.ssm.register_forward_hook(lambda _m, _inputs, output: seen.update(ssm=output[0]))
    attend = mixer._attend

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any) -> torch.Tensor:
        output = attend(query, key, value, *arguments)
        seen.update(query=query, value=value, attn=output)
        return output

    mixer._attend = watched  # type: ignore[method-assign]
    with torch.no_grad():
        output, commitment, used = mixer(states, mask)
    run.add("hidden_states", output, real)
    run.add("commitment_loss", commitment)
    run.add("perplexity", used)
    quantized = seen["quantized"]
    run.add("code_indices", quantized.codes, mask.unsqueeze(1))
    counts = code_counts(quantized.codes, mask, config.codebook_size, dtype)
    run.add("batch_count", counts)
    run.add("ssm", seen["ssm"], real)
    for name, value in (("q", "query"), ("k", "key"), ("v", "value"), ("attn", "attn")):
        run.add(name, seen[value], heads)
    if config.is_decoder:
        layer = CodeMemoryLayer({})
        with torch.no_grad():
            mixer(states, mask, cache_layer=layer)
        run.add("state.ssm_state", layer.state)
        run.add("state.code_count", layer.code_count)
        run.add("state.code_value_mean", layer.code_value_mean)
        kept = layer.window_mask.unsqueeze(1)
        run.add("state.window_codes", layer.window_codes, kept)
        run.add("state.window_values", layer.window_values, kept.unsqueeze(-1))
        run.add("state.window_mask", layer.window_mask)
    if "output.train.loss" in tensors:
        _train_layer(config, mixer, states.clone().requires_grad_(), mask, tensors, run)
    return run


def _train_layer(
    config: LongVQConfig, mixer: LongVQMixer, states: torch.Tensor, mask: torch.Tensor, tensors: Tensors, run: _Run
) -> None:
    before = {name: buffer.clone() for name, buffer in mixer.named_buffers()}
    output, commitment, _ = mixer.train()(states, mask)
    weight = tensors["input.train.output_weight"].to(states.dtype)
    loss = (output * weight * mask.unsqueeze(-1)).sum() + 10 * commitment
    run.add("train.loss", loss)
    loss.backward()
    run.add("train.grad.hidden_states", states.grad)
    gradients = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    for name in _part(tensors, "output.train.grad."):
        if name != "hidden_states":
            run.add(f"train.grad.{name}", gradients[_our_name(name, config)])
    assert all(torch.equal(buffer, before[name]) for name, buffer in mixer.named_buffers())


# --------------------------------------------------------------------------------------------------------------- model


def _run_model(config: LongVQConfig, tensors: Tensors, dtype: torch.dtype) -> _Run:
    model = (LongVQForCausalLM if config.is_decoder else LongVQForMaskedLM)(config)
    parameters = _part(tensors, "param.")
    tied = set(model._tied_weights_keys or {}) if config.tie_word_embeddings else set()
    _load(model, parameters, config, tied - set(parameters))
    model = model.to(dtype).eval()
    names = ("input_ids", "attention_mask", "labels")
    call = {name: tensors[f"input.{name}"] for name in names if f"input.{name}" in tensors}
    mask, run = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool(), _Run()
    codes: list[torch.Tensor] = []
    handles = [
        quantizer.register_forward_hook(lambda _m, _inputs, output: codes.append(output.codes))
        for quantizer in model._quantizers()
    ]
    with torch.no_grad():
        outputs = model(**call, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    run.add("logits", outputs.logits, mask.unsqueeze(-1))
    run.add("last_hidden_state", outputs.hidden_states[-1], mask.unsqueeze(-1))
    run.add("commitment_loss", outputs.commitment_loss)
    run.add("codebook_perplexity", outputs.codebook_perplexity)
    run.add("code_indices", torch.stack(codes), mask[:, None])
    if "output.greedy_tokens" in tensors:
        new = tensors["output.greedy_tokens"].shape[1]
        prompt = {name: value for name, value in call.items() if name != "labels"}
        generated = model.generate(
            **prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        run.add("greedy_tokens", generated[:, -new:])
    if "labels" in call:
        run.add("eval_loss", outputs.loss)
        loss = model.train()(**call).loss
        run.add("train.loss", loss)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name in _part(tensors, "output.train.grad."):
            run.add(f"train.grad.{name}", gradients[_our_name(name, config)])
    return run


# ------------------------------------------------------------------------------------------------------------ codebook


def _run_update(config: LongVQConfig, tensors: Tensors, dtype: torch.dtype) -> _Run:
    before = _part(tensors, "param.quantizer.")
    codebook = Codebook(
        before["codebook"].to(dtype), before["ema_count"].to(dtype), before["ema_sum"].to(dtype), before["num_updates"]
    )
    keys, mask = tensors["input.keys"].to(dtype), tensors["input.attention_mask"].bool()
    run = _Run()
    codes = nearest_codes(keys, codebook.words)
    counts = code_counts(codes, mask, config.codebook_size, dtype)
    run.add("code_indices", codes, mask.unsqueeze(1))
    run.add("batch_count", counts)
    run.add("perplexity", perplexity(counts))
    error = (keys - look_up(codebook.words, codes)).square().sum(-1) * mask.unsqueeze(1)
    run.add("commitment_loss", error.sum() / (mask.sum() * keys.shape[1] * keys.shape[3]))
    hot = torch.nn.functional.one_hot(codes, config.codebook_size).to(dtype) * mask[:, None, :, None]
    sums = torch.einsum("bhls,bhld->hsd", hot, keys)
    run.add("batch_sum", sums)
    candidates = tensors["input.candidates"].to(dtype)
    statistics = CodeStatistics(counts, sums, candidates, torch.ones(candidates.shape[1], dtype=dtype))
    new, revived = average_codebook(
        codebook,
        statistics,
        decay=config.codebook_decay,
        decay_warmup=config.codebook_decay_warmup,
        dead_code_threshold=config.dead_code_threshold,
    )
    decay = averaging_decay(codebook.num_updates, config.codebook_decay, config.codebook_decay_warmup)
    run.add("decay", decay)
    run.add("revived", revived)
    for name, value in zip(("codebook", "ema_count", "ema_sum", "num_updates"), new):
        run.add(f"new.{name}", value)
    return run


def check(path: Path, config: Mapping[str, Any], tensors: Tensors) -> list[Row]:
    """Rows for every stored output that is known here."""
    if "input.keys" in tensors:
        run = _run_update
    else:
        run = _run_model if "input.input_ids" in tensors else _run_layer
    settings = _config(config)
    single, double = (run(settings, tensors, dtype) for dtype in (torch.float32, torch.float64))
    return _rows(single, double, _part(tensors, "output."))

"""SPADE against stored outputs of the official code, through our converter.

The configuration of a file is turned into official options, those into ours, and its parameters are converted like a
checkpoint. Only real positions are compared. SSM parameters are the raw C unless the file says otherwise (length `L`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comparison import Row, largest_error

from hf_hybrid.conversion.spade import (
    config_from_official,
    model_class,
    state_dict_from_official,
    tensor_names,
    vocabulary_size,
)
from hf_hybrid.ops.s4 import (
    DplrSystem,
    dplr_dense,
    matrix_power,
    output_from_real_basis,
    output_to_real_basis,
    truncate_c,
)

Tensors = Mapping[str, torch.Tensor]
Found = dict[str, tuple[torch.Tensor, torch.Tensor | None]]  # output name: value, mask of real positions

HIDDEN_TOLERANCE = 5e-5  # hidden states, keys, values, log-probabilities
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # of the largest entry

# Keys of the language model files that are spelled differently in fairseq.
_FAIRSEQ_NAMES = {
    "d_model": "decoder_embed_dim",
    "ffn_dim": "decoder_ffn_embed_dim",
    "num_layers": "decoder_layers",
    "num_heads": "decoder_attention_heads",
    "activation": "activation_fn",
    "normalize_before": "decoder_normalize_before",
    "tie_word_embeddings": "share_decoder_input_output_embed",
}


def _part(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _language_model_options(stored: Mapping[str, Any], parameters: Tensors) -> dict[str, Any]:
    """Options of fairseq from those of a file."""
    untied = "decoder.output_projection.weight" in parameters
    options = {
        "arch": "spade_lm",
        "attention_type": "local",
        "no_token_positional_embeddings": True,
        "tie_word_embeddings": not untied,
    } | dict(stored)
    options["no_decoder_final_norm"] = not options.pop("decoder_final_norm", True)
    if options.pop("adaptive", False):
        for side in ("input", "softmax"):
            options[f"adaptive_{side}_cutoff"] = options["cutoffs"]
            options[f"adaptive_{side}_factor"] = options["adaptive_factor"]
        options |= {"adaptive_input": True, "tie_adaptive_weights": True}
    return {_FAIRSEQ_NAMES.get(name, name): value for name, value in options.items()}


def _build(stored: Mapping[str, Any], parameters: Tensors, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a file in evaluation mode."""
    if stored["model"] == "spade_lm":
        options = _language_model_options(stored, parameters)
        config = config_from_official(options, vocab_size=vocabulary_size(parameters))
        # Constants of fairseq, but entries of the files.
        config.layer_norm_eps = stored.get("layer_norm_eps", config.layer_norm_eps)
        config.pad_token_id = stored.get("pad_token_id", config.pad_token_id)
    else:
        config = config_from_official(stored)
    state = state_dict_from_official(parameters, config)
    model = model_class(config)(config)
    incompatible = model.load_state_dict(state, strict=False)
    tied = set(model._tied_weights_keys or {}) if config.tie_word_embeddings else set()
    assert not incompatible.unexpected_keys and set(incompatible.missing_keys) <= tied, incompatible
    return model.to(dtype).eval()


class _Recorder:
    """Keeps inputs and outputs of modules during a forward pass."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def output(self, name: str, module: torch.nn.Module) -> None:
        def hook(_module: torch.nn.Module, _inputs: tuple, output: Any) -> None:
            self.values[name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)

    def input(self, name: str, module: torch.nn.Module) -> None:
        def hook(_module: torch.nn.Module, inputs: tuple) -> None:
            self.values[name] = inputs[0]

        module.register_forward_pre_hook(hook)


# ------------------------------------------------------------------------------------------------- encoder-decoder


def _encoder_decoder_outputs(model: torch.nn.Module, inputs: Tensors, steps: int) -> tuple[Found, torch.Tensor]:
    """Every output that a file may hold, and the loss with its graph."""
    ids, target_ids = inputs["input_ids"], inputs["decoder_input_ids"]
    source_mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
    target_mask = target_ids != model.config.pad_token_id
    if "decoder_attention_mask" in inputs:
        target_mask &= inputs["decoder_attention_mask"].bool()
    common = {
        "attention_mask": source_mask.long(),
        "decoder_input_ids": target_ids,
        "decoder_attention_mask": target_mask.long(),
    }
    recorder = _Recorder()
    for index, layer in enumerate(model.model.encoder.layers):
        recorder.output(f"enc{index}_local_attn", layer.mixer.attention)
        recorder.input(
            f"enc{index}_attn_sublayer", layer.feed_forward_norm if model.config.norm_first else layer.feed_forward
        )
        if layer.mixer.ssm is not None:
            recorder.output(f"enc{index}_s4", layer.mixer.ssm)
    outputs = model(ids, labels=inputs.get("labels"), use_cache=True, output_hidden_states=True, **common)
    found: Found = {name: (value, source_mask[..., None]) for name, value in recorder.values.items()}
    for index, states in enumerate(outputs.encoder_hidden_states):
        found[f"encoder_hidden.{index}"] = states, source_mask[..., None]
    for index, states in enumerate(outputs.decoder_hidden_states):
        found[f"decoder_hidden.{index}"] = states, target_mask[..., None]
    cache = outputs.past_key_values
    for kind, part, mask in (
        ("self", cache.self_attention_cache, target_mask),
        ("cross", cache.cross_attention_cache, source_mask),
    ):
        for index, layer in enumerate(part.layers):
            found[f"dec{index}_{kind}_k"] = layer.keys, mask[:, None, :, None]
            found[f"dec{index}_{kind}_v"] = layer.values, mask[:, None, :, None]
    found["logits"] = outputs.logits, target_mask[..., None]
    if outputs.loss is not None:
        found["loss"] = outputs.loss, None
    if steps:
        logits = _decode_stepwise(model, ids, source_mask, target_ids[:, :steps], target_mask[:, :steps])
        found["incremental_logits"] = logits, target_mask[:, :steps, None]
    return found, outputs.loss


@torch.no_grad()
def _decode_stepwise(
    model: torch.nn.Module,
    ids: torch.Tensor,
    source_mask: torch.Tensor,
    target_ids: torch.Tensor,
    target_mask: torch.Tensor,
) -> torch.Tensor:
    """Logits of teacher-forced decoding, one token per call.

    Padding behind a text is fed like tokens, whose logits nobody reads; only padding in front of one has to be told.
    """
    is_left_padded = not bool(target_mask[:, 0].all())
    encoded = model.get_encoder()(ids, attention_mask=source_mask.long())
    cache, logits = None, []
    for step in range(target_ids.shape[1]):
        outputs = model(
            attention_mask=source_mask.long(),
            encoder_outputs=encoded,
            decoder_input_ids=target_ids[:, step : step + 1],
            decoder_attention_mask=target_mask[:, : step + 1].long() if is_left_padded else None,
            past_key_values=cache,
            use_cache=True,
        )
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


# -------------------------------------------------------------------------------------------------- language model


def _language_model_outputs(model: torch.nn.Module, inputs: Tensors) -> tuple[Found, torch.Tensor]:
    """Every output that a file may hold, and the summed loss with its graph."""
    ids = inputs["tokens"]
    mask = ids != model.config.pad_token_id
    recorder = _Recorder()
    for index, layer in enumerate(model.model.layers):
        recorder.output(f"l{index}_local_attn", layer.mixer.attention.o_proj)
        if layer.mixer.ssm is not None:
            recorder.output(f"l{index}_s4", layer.mixer.ssm)
    if model.model.final_norm is not None:
        recorder.input(f"hidden.{len(model.model.layers)}", model.model.final_norm)
    outputs = model(ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True)
    found: Found = {name: (value, mask[..., None]) for name, value in recorder.values.items()}
    final = outputs.hidden_states[-1]  # after the final norm, if there is one; the stored hidden state is before it
    for index, states in enumerate(outputs.hidden_states):
        found.setdefault(f"hidden.{index}", (states, mask[..., None]))
    adaptive = model.config.adaptive_cutoffs is not None
    log_probs = outputs.logits if adaptive else outputs.logits.log_softmax(-1)
    found["final"] = (final if adaptive else outputs.logits), mask[..., None]
    found["log_probs"] = log_probs, mask[..., None]
    loss = outputs.logits.new_zeros(())
    if "target" in inputs:
        target = inputs["target"]
        scores = log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        loss = -scores[target != model.config.pad_token_id].sum()
        found["loss_sum"] = loss, None
    return found, loss


# ----------------------------------------------------------------------------------------------------------- rows


def _outputs(model: torch.nn.Module, inputs: Tensors, stored_outputs: Tensors) -> tuple[Found, torch.Tensor]:
    if model.config.model_type == "spade_lm":
        return _language_model_outputs(model, inputs)
    incremental = stored_outputs.get("incremental_logits")
    return _encoder_decoder_outputs(model, inputs, 0 if incremental is None else incremental.shape[1])


def _tolerance(name: str, config: Any, inputs: Tensors) -> float:
    if name == "loss_sum":  # a sum of that many log-probabilities
        return HIDDEN_TOLERANCE * int((inputs["target"] != config.pad_token_id).sum())
    is_plain_head = config.model_type == "spade_lm" and config.adaptive_cutoffs is None
    if name in ("logits", "incremental_logits", "loss") or (name == "final" and is_plain_head):
        return LOGIT_TOLERANCE
    return HIDDEN_TOLERANCE


def _output_errors(model: torch.nn.Module, inputs: Tensors, stored: Tensors) -> dict[str, float]:
    found, _ = _outputs(model, inputs, stored)
    errors = {}
    for name in stored.keys() & found.keys():
        value, mask = found[name]
        try:
            errors[f"output.{name}"] = largest_error(value, stored[name], mask)
        except ValueError as error:
            raise ValueError(f"output.{name}: {error}") from error
    return errors


def _doubled(c_tilde: torch.Tensor, system: DplrSystem, length: int) -> torch.Tensor:
    """C-tilde for twice the length: C~ (I + A^length)."""
    row = output_to_real_basis(c_tilde)  # (S, H, N)
    power = matrix_power(dplr_dense(system).transition, length)
    return output_from_real_basis(row + torch.einsum("shn,hnm->shm", row, power))


def _post_c(layer: torch.nn.Module, greatest: int, used: int) -> tuple[torch.Tensor, int]:
    """C-tilde and its length in the official module after a pass over `used` tokens.

    A raw C is truncated for the greatest length; a truncated one that is too short is doubled until it suffices.
    """
    length, system = int(layer.kernel_length), layer.dplr_system(torch.float64)
    if length == 0:
        return truncate_c(layer.C.double(), system, greatest), greatest
    c_tilde = layer.C.double()
    while length < min(used, greatest):
        c_tilde, length = _doubled(c_tilde, system, length), 2 * length
    return c_tilde, length


def _post_errors(model: torch.nn.Module, inputs: Tensors, stored: Tensors) -> dict[str, float]:
    """Tensors that the official module has changed in its first forward pass."""
    names, errors = tensor_names(model.config).ours, {}
    used = inputs["tokens" if model.config.model_type == "spade_lm" else "input_ids"].shape[1]
    for name, expected in stored.items():
        if name not in names:
            continue
        path, leaf = names[name].rsplit(".", 1)
        module = model.get_submodule(path)
        if leaf in ("C", "kernel_length"):
            c_tilde, length = _post_c(module, model.config.ssm_max_length, used)
            actual = c_tilde if leaf == "C" else torch.tensor(length)
        else:
            actual = getattr(module, leaf)
        errors[f"post.{name}"] = largest_error(actual, expected)
    return errors


def _gradient_errors(model: torch.nn.Module, inputs: Tensors, stored: Tensors) -> dict[str, float]:
    """Gradients of the stored loss; an absent gradient counts as zero."""
    _, loss = _outputs(model, inputs, {})
    loss.backward()
    names = tensor_names(model.config).ours
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    errors = {}
    for name, expected in stored.items():
        if name in names:
            tensor = tensors[names[name]]
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            errors[f"grad.{name}"] = largest_error(gradient, expected, relative=True)
    if model.config.ssm_stop_gradient:
        own = [
            tensor.grad.abs().max().item()
            for name, tensor in tensors.items()
            if ".ssm." in name and tensor.grad is not None
        ]
        errors["the SSM has no gradient"] = max(own, default=0.0)
    return errors


def _all_errors(config: Mapping[str, Any], tensors: Tensors, dtype: torch.dtype) -> tuple[dict[str, float], Any]:
    parameters, inputs = _part(tensors, "param."), _part(tensors, "input.")
    post, gradients = _part(tensors, "post."), _part(tensors, "grad.")
    model = _build(config, parameters, dtype)
    with torch.no_grad():
        errors = _output_errors(model, inputs, _part(tensors, "output."))
    errors |= _post_errors(model, inputs, post)
    if gradients:  # the stored ones hold C-tilde fixed, so it has to be the leaf
        errors |= _gradient_errors(_build(config, {**parameters, **post}, dtype), inputs, gradients)
    return errors, model.config


def check(path: Path, config: Mapping[str, Any], tensors: Tensors) -> list[Row]:
    """Compares every stored output, changed parameter and gradient that this adapter knows.

    Args:
        path: the file, for messages.
        config: the JSON `config` of its metadata.
        tensors: its tensors.

    Returns:
        One row per tensor in the order of the file; tensors that are not known have none.

    Raises:
        ValueError: the configuration has an unsupported option, or the tensors do not fit it.
    """
    errors, ours = _all_errors(config, tensors, torch.float32)
    errors64, _ = _all_errors(config, tensors, torch.float64)
    inputs = _part(tensors, "input.")
    rows = []
    for name, error in errors.items():
        kind, _, leaf = name.partition(".")
        if kind == "output":
            tolerance = _tolerance(leaf, ours, inputs)
        elif kind == "grad":
            tolerance = GRADIENT_TOLERANCE
        elif kind == "post" and not leaf.endswith(".L"):
            tolerance = LOGIT_TOLERANCE
        else:
            tolerance = 0.0
        rows.append(Row(name, error, tolerance, errors64[name]))
    order = {name: place for place, name in enumerate(sorted(tensors))}
    return sorted(rows, key=lambda row: order.get(row.name, len(order)))

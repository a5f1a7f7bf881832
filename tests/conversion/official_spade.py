"""Official SPADE checkpoints for tests: the stored ones, and small random ones of every variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hf_hybrid.conversion.spade import config_from_official, model_class, state_dict_to_official

VECTORS = Path(__file__).parents[1] / "parity" / "vectors" / "spade"

ENCODER_DECODER = {
    "model_type": "msrlongt5",
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "local_radius": 3,
    "s4_state_dim": 4,
    "s4_n_ssm": 2,
    "s4_every_n_layers": 1000,
    "max_position_embeddings": 16,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 2,
}

LANGUAGE_MODEL = {
    "arch": "spade_lm_wiki103",
    "attention_type": "local",
    "no_token_positional_embeddings": True,
    "decoder_embed_dim": 8,
    "decoder_input_dim": 8,
    "decoder_output_dim": 8,
    "decoder_ffn_embed_dim": 12,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "local_radius": 3,
    "use_relative_attention": True,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "s4_state_dim": 4,
    "s4_n_ssm": 2,
    "s4_every_n_layers": 100,
    "s4_local_combine": "concat",
    "max_target_positions": 16,
    "no_decoder_final_norm": True,
    "share_decoder_input_output_embed": True,
    "lr": [1.0],
    "optimizer": "nag",
}

ADAPTIVE = {
    "share_decoder_input_output_embed": False,
    "adaptive_input": True,
    "adaptive_input_cutoff": "6,12",
    "adaptive_softmax_cutoff": "6,12",
    "adaptive_input_factor": 2,
    "adaptive_softmax_factor": 2,
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
    "adaptive_softmax_dropout": 0.2,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "encdec": ENCODER_DECODER,
    "encdec_untied_bias": ENCODER_DECODER | {"tie_word_embeddings": False, "have_bias": True},
    "encdec_gated_every_layer": ENCODER_DECODER
    | {"feed_forward_proj": "gated-gelu", "s4_every_n_layers": 1, "normalize_before": True},
    "encdec_gated_bias": ENCODER_DECODER | {"feed_forward_proj": "gated-gelu", "have_bias": True, "s4_n_ssm": 8},
    "lm_tied": LANGUAGE_MODEL,
    "lm_untied_add": LANGUAGE_MODEL
    | {"share_decoder_input_output_embed": False, "s4_local_combine": "add", "s4_weight": 0.3},
    "lm_stack_no_bias": LANGUAGE_MODEL
    | {"s4_local_combine": "stack", "s4_every_n_layers": 1, "use_relative_attention": False, "activation_fn": "gelu"},
    "lm_adaptive": LANGUAGE_MODEL | ADAPTIVE,
    "lm_adaptive_own_projections": LANGUAGE_MODEL | ADAPTIVE | {"tie_adaptive_proj": False},
    "lm_normformer": LANGUAGE_MODEL
    | {"scale_attn": True, "scale_fc": True, "scale_resids": True, "no_decoder_final_norm": False},
}


def variant_config(options: dict[str, Any]) -> Any:
    """Our configuration for the options of a variant."""
    return config_from_official(options, vocab_size=20 if "arch" in options else None)


def random_official(options: dict[str, Any], *, with_copies: bool = True) -> dict[str, torch.Tensor]:
    """A random official state dict; `with_copies`: with tied copies, sharing memory, and marks, as in the official files."""
    config = variant_config(options)
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state_dict_to_official(state, config, with_copies=with_copies)


def stored_parameters(name: str, *, after_forward: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and parameters of a vector file, with raw C (before the first forward pass) or C-tilde (after it)."""
    with safe_open(VECTORS / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    state = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    if after_forward:
        state |= {key.removeprefix("post."): value for key, value in tensors.items() if key.startswith("post.")}
    return config, state

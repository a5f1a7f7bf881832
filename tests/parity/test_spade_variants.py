"""Options for which no official vectors are stored: files written by the dense reference pass the harness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from check import check_file, read_vectors
from official_spade import ADAPTIVE, ENCODER_DECODER, LANGUAGE_MODEL, random_official
from safetensors.torch import save_file
from spade_reference import encoder_decoder, language_model

VECTORS = Path(__file__).parent / "vectors" / "spade"

ENCODER_DECODER_FILE = ENCODER_DECODER | {
    "model": "spade_encoder_decoder",
    "layer_norm_epsilon": 1e-6,
    "normalize_before": False,
    "feed_forward_proj": "relu",
    "pad_token_id": 1,
    "eos_token_id": 2,
}

LANGUAGE_MODEL_FILE = {
    "model": "spade_lm",
    "d_model": 8,
    "num_heads": 2,
    "ffn_dim": 12,
    "num_layers": 3,
    "local_radius": 3,
    "vocab_size": 20,
    "s4_local_combine": "concat",
    "s4_weight": 0.5,
    "s4_every_n_layers": 100,
    "use_relative_attention": True,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "adaptive": False,
    "cutoffs": None,
    "adaptive_factor": 2,
    "tie_adaptive_proj": True,
    "s4_state_dim": 4,
    "s4_n_ssm": 4,
    "s4_channels": 1,
    "max_target_positions": 32,
    "decoder_final_norm": False,
    "activation": "relu",
    "normalize_before": True,
    "no_scale_embedding": False,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def parameters_of(options: dict) -> dict[str, torch.Tensor]:
    """Random parameters of usual magnitudes."""
    parameters = random_official(options, with_copies=False)
    for name, tensor in parameters.items():
        if name.endswith("log_dt"):
            parameters[name] = -2 + 0.5 * tensor
        elif name.endswith("inv_w_real"):
            parameters[name] = -0.7 + 0.1 * tensor
        elif tensor.is_floating_point() and "kernel" not in name and "norm.weight" not in name:
            parameters[name] = 0.4 * tensor
    return parameters


def run(tmp_path: Path, config: dict, parameters: dict, inputs: dict) -> None:
    reference = encoder_decoder if config["model"] == "spade_encoder_decoder" else language_model
    outputs = reference(config, parameters, inputs)
    tensors = {f"param.{name}": tensor for name, tensor in parameters.items()}
    tensors |= {f"input.{name}": tensor for name, tensor in inputs.items()}
    tensors |= {f"output.{name}": tensor.float().contiguous() for name, tensor in outputs.items()}
    path = tmp_path / "case.safetensors"
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"config": json.dumps(config)}
    )
    report = check_file(path)
    assert not report.problem
    assert not [row for row in report.rows if not row.is_ok]
    assert {row.name for row in report.rows} >= {name for name in tensors if name.startswith("output.")}


@pytest.mark.parametrize("stem", ["encdec_postnorm_relu", "encdec_prenorm_gated_bias", "lm_concat_adaptive"])
def test_the_reference_agrees_with_the_official_code(stem):
    config, tensors = read_vectors(VECTORS / f"{stem}.safetensors")
    parts = {
        kind: {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        for kind in ("param.", "input.", "output.")
    }
    reference = language_model if config["model"] == "spade_lm" else encoder_decoder
    outputs = reference(config, parts["param."], parts["input."])
    for name in ("logits", "log_probs", "loss", "loss_sum"):
        if name in outputs and name in parts["output."]:
            actual, expected = outputs[name].float(), parts["output."][name]
            if name == "logits":
                real = parts["input."]["decoder_input_ids"] != 1
                actual, expected = actual[real], expected[real]
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("left", {}),
        ("right", {"normalize_before": True, "feed_forward_proj": "gelu", "s4_every_n_layers": 2, "num_layers": 3}),
        ("none", {"feed_forward_proj": "gated-gelu", "have_bias": True, "s4_every_n_layers": 1}),
        ("left", {"tie_word_embeddings": False, "have_bias": True, "d_kv": 2, "num_heads": 4, "s4_n_ssm": 1}),
        ("right", {"max_position_embeddings": 8, "local_radius": 1, "num_decoder_layers": 2, "s4_n_ssm": 8}),
        ("left", {"local_radius": 40, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
    ],
    ids=["plain", "gelu_every2", "gated_bias", "untied_heads", "truncated", "wide"],
)
def test_encoder_decoder(tmp_path, side, change):
    config = ENCODER_DECODER_FILE | change
    parameters = parameters_of(config)
    ids = torch.randint(3, 20, (2, 13))
    mask = torch.ones(2, 13)
    if side != "none":
        padded = slice(0, 5) if side == "left" else slice(8, None)
        mask[1, padded], ids[1, padded] = 0.0, 1
    targets = torch.randint(3, 20, (2, 6))
    labels = torch.cat([targets[:, 1:], torch.full((2, 1), 2)], dim=1)
    targets[:, 0] = 2
    targets[1, 4:], labels[1, 4:] = 1, -100
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets, "labels": labels}
    run(tmp_path, config, parameters, inputs)


ADAPTIVE_FILE = {"adaptive": True, "cutoffs": [6, 12]}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"s4_local_combine": "stack", "s4_every_n_layers": 2, "decoder_final_norm": True, "s4_n_ssm": 8},
        {"s4_local_combine": "add", "s4_weight": 0.2, "activation": "gelu", "max_target_positions": 6, "untied": True},
        {"scale_attn": True, "scale_fc": True, "scale_resids": True},
        {"scale_attn": True, "s4_local_combine": "stack", "no_scale_embedding": True},
        ADAPTIVE_FILE | {"decoder_final_norm": True},
        ADAPTIVE_FILE | {"cutoffs": [5], "adaptive_factor": 4, "tie_adaptive_proj": False},
        ADAPTIVE_FILE | {"cutoffs": [4, 9, 15], "use_relative_attention": False, "s4_every_n_layers": 1},
        {"local_radius": 30, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    ],
    ids=["plain", "stack", "add_untied", "normformer", "stack_attn_ln", "adaptive", "own_proj", "four_bands", "wide"],
)
def test_language_model(tmp_path, change):
    config = LANGUAGE_MODEL_FILE | change
    untied = config.pop("untied", False)
    options = LANGUAGE_MODEL | {
        "decoder_layers": config["num_layers"],
        "share_decoder_input_output_embed": not untied and not config["adaptive"],
        "no_decoder_final_norm": not config["decoder_final_norm"],
        "activation_fn": config["activation"],
    }
    if config["adaptive"]:
        bands = {f"adaptive_{side}_cutoff": config["cutoffs"] for side in ("input", "softmax")}
        factors = {f"adaptive_{side}_factor": config["adaptive_factor"] for side in ("input", "softmax")}
        options |= ADAPTIVE | bands | factors
    shared = {
        name: value for name, value in config.items() if name in options or name.startswith(("scale", "tie", "s4"))
    }
    parameters = parameters_of(options | shared)
    tokens = torch.randint(3, 20, (2, 11))
    target = torch.cat([tokens[:, 1:], torch.full((2, 1), 2)], dim=1)
    tokens[1, 7:], target[1, 7:] = 1, 1
    run(tmp_path, config, parameters, {"tokens": tokens, "target": target})

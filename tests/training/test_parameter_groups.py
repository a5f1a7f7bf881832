"""Each trainable parameter is in the right optimizer group, also after loading; schedules keep the ratios."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, get_linear_schedule_with_warmup

import hf_hybrid  # noqa: F401
from hf_hybrid.configuration.configuration_spade import SpadeConfig
from hf_hybrid.training.parameter_groups import group_of, parameter_groups


def tiny_spade(**overrides):
    config = SpadeConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_heads=2, encoder_layers=2, decoder_layers=1,
        attention_window=4, ssm_state_size=4, max_position_embeddings=32, **overrides,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


def membership(model, **options):
    groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}, groups


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("ssm_type", ["s4d", "s4"])
def test_spade_groups(tmp_path, reload, ssm_type):
    model = tiny_spade(ssm_type=ssm_type, norm_type="layer_norm", attention_bias=True)
    if reload:
        model.save_pretrained(tmp_path)
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    members, groups = membership(model)
    assert sum(len(names) for names in members.values()) == len([p for p in model.parameters() if p.requires_grad])
    assert members["ssm"] == {name for name, _ in model.named_parameters() if ".ssm." in name}
    assert {name.rsplit(".", 1)[-1] for name in members["ssm"]} >= {"C", "D", "log_dt", "B", "inv_w_real", "w_imag"}
    for name in members["no_decay"]:
        assert "norm" in name or name.endswith("bias") or "embed" in name or "shared" in name or "relative" in name
    assert all(parameter.ndim == 2 for parameter in groups[0]["params"])
    assert not any("relative_attention_bias" in name or "embed_positions" in name for name in members["decay"])
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"decay": (1e-2, 0.1), "no_decay": (1e-2, 0.0), "ssm": (1e-3, 0.0)}


def test_frozen_parameters_are_left_out():
    model = tiny_spade(ssm_trainable=False)
    members, _ = membership(model)
    assert "ssm" not in members
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        membership(model)


def test_ssm_rate_defaults_to_the_learning_rate():
    _, groups = membership(tiny_spade(), ssm_learning_rate=None)
    assert {group["lr"] for group in groups} == {1e-2}


def test_negative_rates_are_refused():
    with pytest.raises(ValueError, match="`ssm_learning_rate` must not be negative"):
        membership(nn.Linear(2, 2), ssm_learning_rate=-1.0)


@pytest.mark.parametrize(
    ("name", "ndim", "group"),
    [
        ("encoder.layers.0.mixer.ssm.C", 3, "ssm"),
        ("model.layers.3.ema.alpha", 2, "ssm"),
        ("shared.weight", 2, "no_decay"),
        ("decoder.embed_positions.weight", 2, "no_decay"),
        ("encoder.layers.0.relative_attention_bias.weight", 2, "no_decay"),
        ("encoder.layers.0.self_attn.q_proj.weight", 2, "decay"),
        ("encoder.layers.0.self_attn.q_proj.bias", 1, "no_decay"),
        ("encoder.final_norm.weight", 1, "no_decay"),
        ("lm_head.weight", 2, "decay"),
        ("encoder.layers.0.gate", 1, "no_decay"),
    ],
)
def test_group_by_name(name, ndim, group):
    assert group_of(name, nn.Parameter(torch.zeros([2] * ndim))) == group


def test_schedulers_keep_the_ratio():
    _, groups = membership(tiny_spade())
    optimizer = torch.optim.AdamW(groups)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["ssm"] == pytest.approx(rates["decay"] / 10)

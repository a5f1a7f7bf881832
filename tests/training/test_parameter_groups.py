"""Each trainable parameter is in the right optimizer group, also after loading; schedules keep the ratios."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from factories import VARIANTS, Case, parametrize, random_ids
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, get_linear_schedule_with_warmup

import hf_hybrid  # noqa: F401
from hf_hybrid.auto import ARCHITECTURES, Architecture
from hf_hybrid.configuration.configuration_spade import SpadeConfig
from hf_hybrid.training.adapters import add_lora
from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.parameter_groups import group_of, parameter_groups
from hf_hybrid.training.trainer import HybridTrainer

EVERY_MODEL = [
    Case(architecture.model_type, auto_name, variant)
    for architecture in ARCHITECTURES
    for auto_name in architecture.heads
    for variant in VARIANTS[architecture.model_type]
]


def tiny_spade(**overrides):
    config = SpadeConfig(
        vocab_size=64, hidden_size=16, head_dim=8, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, decoder_layers=1,
        window_size=5, ssm_state_size=4, max_target_positions=32, **overrides,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


def membership(model, **options):
    groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}, groups


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("ssm_type", ["s4d", "s4"])
def test_spade_groups(tmp_path, reload, ssm_type):
    model = tiny_spade(ssm_type=ssm_type, norm_type="layernorm", attention_bias=True)
    if reload:
        model.save_pretrained(tmp_path)
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    members, groups = membership(model)
    assert sum(len(names) for names in members.values()) == len([p for p in model.parameters() if p.requires_grad])
    assert members["state"] == {name for name, _ in model.named_parameters() if ".ssm." in name}
    assert {name.rsplit(".", 1)[-1] for name in members["state"]} >= {"C", "D", "log_dt", "B", "inv_w_real", "w_imag"}
    for name in members["no_decay"]:
        assert "norm" in name or name.endswith("bias") or "embed" in name or "shared" in name or "relative" in name
    assert all(parameter.ndim == 2 for parameter in groups[0]["params"])
    assert not any("relative_attention_bias" in name or "embed_positions" in name for name in members["decay"])
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"decay": (1e-2, 0.1), "no_decay": (1e-2, 0.0), "state": (1e-3, 0.0)}


@pytest.mark.parametrize("muon_learning_rate", [None, 1e-3])
def test_modules_of_the_head_have_their_own_rate(muon_learning_rate):
    model = AutoModelForSequenceClassification.from_config(tiny_spade().config)
    members, groups = membership(model, head_learning_rate=5e-2, muon_learning_rate=muon_learning_rate)
    head = {name for name, _ in model.named_parameters() if name.startswith("classifier.")}
    assert members["head_decay"] | members["head_no_decay"] == head
    assert members["head_no_decay"] == {name for name in head if name.endswith("bias")}
    assert [group["lr"] for group in groups if group["name"].startswith("head_")] == [5e-2, 5e-2]
    assert sum(map(len, members.values())) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = tiny_spade(ssm_trainable=False)
    members, _ = membership(model)
    assert "state" not in members
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        membership(model)


def test_ssm_rate_defaults_to_the_learning_rate():
    _, groups = membership(tiny_spade(), ssm_learning_rate=None)
    assert {group["lr"] for group in groups} == {1e-2}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda found: found.model_type)
def test_muon_takes_the_matrices_of_the_blocks(architecture: Architecture) -> None:
    model = next(case for case in EVERY_MODEL if case.model_type == architecture.model_type).model()
    plain, _ = membership(model)
    members, groups = membership(model, muon_learning_rate=2e-2)
    assert members["muon"] | members.get("decay", set()) == plain["decay"]
    assert members["no_decay"] == plain["no_decay"] and members.get("state") == plain.get("state")
    assert any(name.endswith("_proj.weight") for name in members["muon"])
    first = groups[0]
    assert (first["name"], first["lr"], first["weight_decay"], first["muon"]) == ("muon", 2e-2, 0.1, True)
    assert all(parameter.ndim == 2 for parameter in first["params"])
    assert not any(group["muon"] for group in groups[1:])


def test_heads_are_not_trained_by_muon():
    model = tiny_spade(tie_word_embeddings=False)
    members, _ = membership(model, muon_learning_rate=1e-2)
    assert members["decay"] == {"lm_head.weight"}


def test_negative_rates_are_refused():
    with pytest.raises(ValueError, match="`ssm_learning_rate` must not be negative"):
        membership(nn.Linear(2, 2), ssm_learning_rate=-1.0)


@parametrize(EVERY_MODEL)
def test_the_record_names_every_tensor_once(case: Case) -> None:
    """No trainable tensor of any head in any variant is left to its shape, and none is of two kinds."""
    with torch.device("meta"):
        try:
            model = case.model_class(case.config())
        except (ValueError, StrictDataclassError):
            pytest.skip("the head does not exist in this variant")
    wrong = {
        name: kinds for name, _ in model.named_parameters() if len(kinds := case.architecture.kinds_of(name)) != 1
    }
    assert not wrong, "name each in one of `state_modules`, `undecayed`, `decayed` or `lora_targets` of the record"
    for name, parameter in model.named_parameters():
        assert parameter.ndim > 1 or case.architecture.kinds_of(name) != ["decay"], name


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda found: found.model_type)
def test_every_rule_of_the_record_is_used(architecture: Architecture) -> None:
    names = set()
    for case in EVERY_MODEL:
        if case.architecture is architecture:
            with torch.device("meta"), contextlib.suppress(ValueError, StrictDataclassError):
                names |= {f".{name}." for name, _ in case.model_class(case.config()).named_parameters()}
    for rule in (*architecture.state_modules, *architecture.undecayed, *architecture.decayed):
        assert any(re.search(rf"\.{rule}\.", name) for name in names), rule


@pytest.mark.parametrize("model_type", [found.model_type for found in ARCHITECTURES])
def test_a_trainer_trains_the_state_at_its_own_rate(tmp_path, model_type: str) -> None:
    case = Case(model_type, "AutoModelForSequenceClassification", next(iter(VARIANTS[model_type])))
    model = case.model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(random_ids(8, 12))]
    options = {
        "learning_rate": 0.0,
        "ssm_learning_rate": 1e-2,
        "max_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
    }
    args = HybridTrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **options)
    HybridTrainer(model=model, args=args, train_dataset=rows).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all(case.architecture.kinds_of(name) == ["state"] for name in changed)


def test_tensors_that_others_add_are_named_in_a_warning(caplog) -> None:
    model = tiny_spade()
    model.extra = nn.Linear(2, 2)
    members, _ = membership(model)
    assert "extra.weight" in members["decay"] and "extra.bias" in members["no_decay"]
    assert "does not name 1 tensors" in caplog.text and "extra.weight" in caplog.text


def test_adapters_keep_the_groups() -> None:
    pytest.importorskip("peft")
    model = tiny_spade()
    members, _ = membership(add_lora(model, 2, modules_to_save=["ssm"]))
    assert members["state"] and all(".ssm.modules_to_save." in name for name in members["state"])
    assert members["decay"] and all(".lora_" in name for name in members["decay"])
    assert "no_decay" not in members


@pytest.mark.parametrize(
    ("name", "ndim", "group"),
    [
        ("layers.0.ssm.C", 3, "state"),
        ("shared.weight", 2, "no_decay"),
        ("embeddings.word_embeddings.weight", 2, "no_decay"),
        ("decoder.embed_positions.weight", 2, "no_decay"),
        ("encoder.layers.0.relative_attention_bias.weight", 2, "no_decay"),
        ("encoder.layers.0.self_attn.q_proj.weight", 2, "decay"),
        ("encoder.layers.0.self_attn.q_proj.bias", 1, "no_decay"),
        ("encoder.final_norm.weight", 1, "no_decay"),
        ("lm_head.weight", 2, "decay"),
        ("encoder.layers.0.gate", 1, "no_decay"),
    ],
)
def test_models_of_other_libraries(name: str, ndim: int, group: str) -> None:
    assert group_of(name, nn.Parameter(torch.zeros([2] * ndim))) == group


def test_schedulers_keep_the_ratio():
    _, groups = membership(tiny_spade())
    optimizer = torch.optim.AdamW(groups)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["state"] == pytest.approx(rates["decay"] / 10)

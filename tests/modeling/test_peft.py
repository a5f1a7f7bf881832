"""LoRA on every head of every architecture: attach, train, save, load, merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import VARIANTS, Case, all_heads, enable_checkpointing, main_output, parametrize
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from hf_hybrid.auto import ARCHITECTURES
from hf_hybrid.training.adapters import (
    add_lora,
    base_model,
    head_modules,
    load_adapter,
    lora_target_modules,
    lora_task_type,
    state_modules,
)

peft = pytest.importorskip("peft")

HEADS = all_heads() + all_heads(other_inputs=True)
# Options that change which linear maps there are.
FURTHER = [
    Case("spade", "AutoModelForSequenceClassification", "official"),
    Case("spade", "AutoModelForTokenClassification", "chunk_gated"),
    Case("spade_lm", "AutoModelForCausalLM", "official"),
    Case("mega", "AutoModelForSequenceClassification", "laplace_simple"),
    Case("bst", "AutoModelForCausalLM", "mh_sliding"),
    Case("bst", "AutoModelForSequenceClassification", "mf"),
]


def loss_of(case: Case, model: Any, inputs: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the head; for bare models the mean square of the output."""
    outputs = model(**inputs, **labels)
    return outputs.loss if labels else main_output(outputs).square().mean()


def frozen_tensors(adapted: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the model below an adapter, by their names in the plain model."""
    tensors = {}
    for name, tensor in adapted.get_base_model().state_dict().items():
        if ".lora_" not in name and ".modules_to_save." not in name:
            tensors[name.replace(".base_layer", "").replace(".original_module", "")] = tensor
    return tensors


@parametrize(HEADS + FURTHER)
def test_attach_train_save_merge(case: Case, tmp_path: Path) -> None:
    model = case.model()
    inputs = case.inputs()
    labels = case.labels(inputs)
    with torch.no_grad():
        expected = main_output(model(**inputs))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = add_lora(model, 4)
    touched = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapter.named_parameters() if ".lora_A" in name
    }
    assert touched == set(lora_target_modules(case.model()))
    torch.testing.assert_close(main_output(adapter.eval()(**inputs)), expected, rtol=1e-5, atol=1e-5)

    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    adapter.train()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(case, adapter, inputs, labels)
        loss.backward()
        for name, parameter in adapter.named_parameters():
            assert ".lora_" not in name or parameter.grad is not None, f"{name} is not used"
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = frozen_tensors(adapter)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), f"{name} has changed"

    adapter.eval()
    trained = main_output(adapter(**inputs)).detach()
    assert (trained - expected).abs().max() > 1e-3
    adapter.save_pretrained(tmp_path)
    # the same weights, but the order of a float32 sum may depend on where in memory they lie
    restored = load_adapter(case.model(), tmp_path).eval()
    torch.testing.assert_close(main_output(restored(**inputs)), trained, rtol=1e-5, atol=1e-5)

    adapter.double()
    inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    unmerged = main_output(adapter(**inputs)).detach()
    merged: Any = adapter.merge_and_unload()
    assert type(merged) is case.model_class
    torch.testing.assert_close(main_output(merged(**inputs)), unmerged, rtol=1e-9, atol=1e-9)
    merged.float()
    inputs = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    error = (main_output(merged(**inputs)).detach() - trained).abs().max() / trained.abs().max()
    # Merged weights are rounded to float32 once more than the sums they replace; in float64, above, nothing differs.
    assert error <= 2e-6, f"merged weights differ by {error:.1e} of the largest output"


@parametrize([case for case in HEADS + FURTHER if str(lora_task_type(case.model())).endswith("_LM")])
def test_adapted_models_generate(case: Case) -> None:
    model = case.model()
    ids = case.inputs()["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=6)
    assert add_lora(model, 4).eval().generate(input_ids=ids, max_new_tokens=6).tolist() == expected.tolist()


def representative(model_type: str) -> Case:
    """A causal or sequence-to-sequence model of the architecture, else its first head."""
    heads = next(item.heads for item in ARCHITECTURES if item.model_type == model_type)
    generative = [name for name in heads if name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")]
    return Case(model_type, [*generative, *heads][0], next(iter(VARIANTS[model_type])))


@pytest.mark.parametrize("model_type", [item.model_type for item in ARCHITECTURES])
def test_recurrent_parts_can_be_trained_in_full_beside_the_adapter(model_type: str, tmp_path: Path) -> None:
    case = representative(model_type)
    model = case.model()
    inputs = case.inputs()
    labels = case.labels(inputs)
    adapter = add_lora(model, 2, modules_to_save=state_modules(model)).train()
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        loss_of(case, adapter, inputs, labels).backward()
        optimizer.step()
    trained = {name for name, p in adapter.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert trained and all(any(f".{part}." in name for part in state_modules(model)) for name in trained)
    adapter.eval().save_pretrained(tmp_path)
    expected = main_output(adapter(**inputs)).detach()
    restored = load_adapter(case.model(), tmp_path).eval()
    torch.testing.assert_close(main_output(restored(**inputs)), expected, rtol=1e-5, atol=1e-5)
    merged: Any = restored.merge_and_unload()
    torch.testing.assert_close(main_output(merged(**inputs)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", [item.model_type for item in ARCHITECTURES])
def test_the_lists_name_what_there_is(model_type: str) -> None:
    """Every target occurs in some variant of some head, no linear map of a block is forgotten, and state parts exist."""
    linear, modules = set(), set()
    architecture = next(item for item in ARCHITECTURES if item.model_type == model_type)
    for auto_name in architecture.heads:
        for variant in VARIANTS[model_type]:
            try:
                model = Case(model_type, auto_name, variant).model()
            except (ValueError, TypeError, StrictDataclassError):  # a head that this variant does not have
                continue
            stack = getattr(model, model.base_model_prefix, model)  # without the layers of a classifier
            names = [(name, module) for name, module in stack.named_modules() if ".layers." in f".{name}"]
            linear |= {name.rpartition(".")[2] for name, module in names if isinstance(module, torch.nn.Linear)}
            modules |= {name.rpartition(".")[2] for name, _ in names}
    assert linear == set(architecture.lora_targets)
    assert architecture.state_modules and set(architecture.state_modules) <= modules
    assert set(architecture.statistics_modules) <= modules


def test_heads_are_trained_in_full() -> None:
    assert head_modules(Case("spade", "AutoModelForSequenceClassification", "default").model()) == ["classifier"]
    assert head_modules(Case("spade", "AutoModelForSeq2SeqLM", "default").model()) == []
    assert head_modules(Case("mega", "AutoModelForMultipleChoice", "default").model()) == ["classifier", "mega.pooler"]


def test_running_statistics_belong_to_the_adapter(tmp_path: Path) -> None:
    case = Case("mega", "AutoModelForSequenceClassification", "default")
    model = case.model(normalization_type="batchnorm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = add_lora(model, 2).train()
    inputs = case.inputs()
    adapter(**inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen_tensors(adapter).items())
    adapter.eval().save_pretrained(tmp_path)
    restored = load_adapter(case.model(normalization_type="batchnorm"), tmp_path).eval()
    torch.testing.assert_close(main_output(restored(**inputs)), main_output(adapter(**inputs)))


@pytest.mark.parametrize("model_type", [item.model_type for item in ARCHITECTURES])
def test_checkpointing_with_an_adapter(model_type: str) -> None:
    case = representative(model_type)
    model = case.model()
    enable_checkpointing(model)
    model.enable_input_require_grads()
    adapter = add_lora(model, 4).train()
    inputs = case.inputs()
    loss_of(case, adapter, inputs, case.labels(inputs)).backward()
    assert all(p.grad is not None for name, p in adapter.named_parameters() if ".lora_B" in name)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    add_lora(Case("spade", "AutoModelForSequenceClassification", "default").model(), 4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "overrides", "problem"),
    [
        (Case("mega", "AutoModelForSequenceClassification", "default"), {}, "which the model does not have"),
        (Case("spade_lm", "AutoModelForSequenceClassification", "default"), {}, "which the model does not have"),
        (Case("spade", "AutoModelForSequenceClassification", "default"), {"intermediate_size": 40}, "40 outputs"),
        (Case("spade", "AutoModelForSequenceClassification", "default"), {"num_labels": 7}, r"out_proj.* of shape"),
        (Case("spade", "AutoModelForSequenceClassification", "default"), {"num_hidden_layers": 2}, r"layers\.2\."),
        (Case("spade", "AutoModelForTokenClassification", "default"), {}, "classifier"),
    ],
)
def test_adapters_of_another_model_are_refused(saved: Path, case: Case, overrides: dict, problem: str) -> None:
    model = case.model(**overrides)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"made for another model.*{problem}"):
        load_adapter(model, saved)
    assert before.keys() == model.state_dict().keys(), "a refused adapter leaves the model as it was"


def test_damaged_adapters_are_refused(saved: Path, tmp_path: Path) -> None:
    model = Case("spade", "AutoModelForSequenceClassification", "default").model()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text((saved / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        load_adapter(model, tmp_path)
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file(
        {f"base_model.model.other.{name}": tensor for name, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="made for another model"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "`lora_rank` must be positive"),
        ({"rank": -3}, "`lora_rank` must be positive"),
        ({"rank": 10**9}, "`lora_rank` is 1000000000, but no linear map to adapt has a rank above"),
        ({"rank": 4, "alpha": 0.0}, "`lora_alpha` must be positive"),
        ({"rank": 4, "dropout": 1.0}, "`lora_dropout`"),
        ({"rank": 4, "target_modules": ["query"]}, "`target_modules` names 'query'"),
        ({"rank": 4, "modules_to_save": ["ema_gate"]}, "`modules_to_save` names 'ema_gate'.*recurrent parts: ssm"),
        ({"rank": 4, "untrained": ["model.encoder.layers.0.mixer.ssm.C"]}, "freeze them at random values"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    model = Case("spade", "AutoModelForSeq2SeqLM", "default").model()
    with pytest.raises(ValueError, match=match):
        add_lora(model, **options)
    assert base_model(model) is model and not hasattr(model, "peft_config")


def test_other_architectures_get_the_defaults_of_peft() -> None:
    from transformers import BertConfig

    assert lora_target_modules(BertConfig()) == "all-linear"
    assert state_modules(BertConfig()) == []

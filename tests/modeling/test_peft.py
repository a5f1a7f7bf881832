"""LoRA on every kind of head: attach, train, save, load, merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import Case, main_output, parametrize

peft = pytest.importorskip("peft")

TARGETS = {
    "spade": ["q_proj", "k_proj", "v_proj", "o_proj", "wi", "wi_0", "wi_1", "wo", "aggregate"],
    "mega": ["v_proj", "mx_proj", "h_proj", "fc1", "fc2"],
    "bst": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
}
TOUCHED = {
    "spade": {"q_proj", "k_proj", "v_proj", "o_proj", "wo", "aggregate"},
    "mega": set(TARGETS["mega"]),
    "bst": set(TARGETS["bst"]),
}
CASES = {
    Case("spade", "AutoModelForSeq2SeqLM", "default"): "SEQ_2_SEQ_LM",
    Case("spade", "AutoModelForSequenceClassification", "official"): "SEQ_CLS",
    Case("spade", "AutoModelForTokenClassification", "chunk_gated"): "TOKEN_CLS",
    Case("spade", "AutoModelForQuestionAnswering", "default"): "QUESTION_ANS",
    Case("spade_lm", "AutoModelForCausalLM", "default"): "CAUSAL_LM",
    Case("spade_lm", "AutoModelForCausalLM", "official"): "CAUSAL_LM",
    Case("spade_lm", "AutoModelForSequenceClassification", "default"): "SEQ_CLS",
    Case("mega", "AutoModelForCausalLM", "default"): "CAUSAL_LM",
    Case("mega", "AutoModelForSeq2SeqLM", "default"): "SEQ_2_SEQ_LM",
    Case("mega", "AutoModelForSequenceClassification", "laplace_simple"): "SEQ_CLS",
    Case("bst", "AutoModelForCausalLM", "mh_sliding"): "CAUSAL_LM",
    Case("bst", "AutoModelForSequenceClassification", "mf"): "SEQ_CLS",
}


def family(case: Case) -> str:
    return case.model_type.partition("_")[0]


def adapted(case: Case, model: torch.nn.Module, **kwargs) -> torch.nn.Module:
    config = peft.LoraConfig(task_type=CASES[case], r=4, target_modules=TARGETS[family(case)], lora_alpha=16, **kwargs)
    return peft.get_peft_model(model, config)


@parametrize(list(CASES))
def test_attach_train_save_merge(case: Case, tmp_path: Path) -> None:
    model = case.model()
    inputs = case.inputs()
    labels = case.labels(inputs)
    expected = main_output(model(**inputs)).detach()
    adapter = adapted(case, model)
    touched = {
        name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in adapter.named_parameters() if ".lora_A" in name
    }
    assert TOUCHED[family(case)] <= touched
    torch.testing.assert_close(main_output(adapter.eval()(**inputs)), expected, rtol=1e-5, atol=1e-5)

    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    adapter.train()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = adapter(**inputs, **labels).loss
        loss.backward()
        for name, parameter in adapter.named_parameters():
            if ".lora_" in name:
                assert parameter.grad is not None, f"{name} is not used"
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

    adapter.eval()
    trained = main_output(adapter(**inputs)).detach()
    assert (trained - expected).abs().max() > 1e-3
    adapter.save_pretrained(tmp_path)
    restored = peft.PeftModel.from_pretrained(case.model(), tmp_path)
    # the same weights, but the order of a float32 sum may depend on where in memory they lie
    torch.testing.assert_close(main_output(restored(**inputs)), trained, rtol=1e-5, atol=1e-5)
    merged = adapter.merge_and_unload()
    assert type(merged) is case.model_class
    torch.testing.assert_close(main_output(merged(**inputs)), trained, rtol=1e-4, atol=1e-4)


@parametrize([case for case, task in CASES.items() if task.endswith("_LM")])
def test_adapted_models_generate(case: Case) -> None:
    model = case.model()
    ids = case.inputs()["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=6)
    assert adapted(case, model).eval().generate(input_ids=ids, max_new_tokens=6).tolist() == expected.tolist()


def test_state_space_can_be_trained_in_full_beside_the_adapter() -> None:
    case = Case("spade_lm", "AutoModelForCausalLM", "default")
    adapter = adapted(case, case.model(), modules_to_save=["ssm"]).train()
    inputs = case.inputs()
    adapter(**inputs, **case.labels(inputs)).loss.backward()
    trained = {name for name, parameter in adapter.named_parameters() if parameter.grad is not None}
    assert any("modules_to_save" in name and name.endswith(".C") for name in trained)


def test_checkpointing_with_an_adapter() -> None:
    case = Case("spade", "AutoModelForSeq2SeqLM", "default")
    model = case.model()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    adapter = adapted(case, model).train()
    inputs = case.inputs()
    adapter(**inputs, **case.labels(inputs)).loss.backward()
    assert all(p.grad is not None for name, p in adapter.named_parameters() if ".lora_B" in name)

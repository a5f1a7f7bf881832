"""Adapters of PEFT other than LoRA: they train and merge, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import Case, all_variants, main_output, parametrize

peft = pytest.importorskip("peft")

GENERATIVE = all_variants() + [Case("mega", "AutoModelForSeq2SeqLM", "default")]


def settings(case: Case) -> dict[str, Any]:
    return {"task_type": "SEQ_2_SEQ_LM" if case.is_seq2seq else "CAUSAL_LM", "num_virtual_tokens": 3}


def is_adaptive(case: Case) -> bool:
    return getattr(case.config(), "adaptive_cutoffs", None) is not None


@parametrize(GENERATIVE)
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_learned_prompts(case: Case, method: str) -> None:
    """Prompt tuning and P-tuning: all of their parameters get a gradient, and the model generates behind the prompt."""
    model = peft.get_peft_model(case.model(), getattr(peft, method)(**settings(case))).train()
    inputs = case.inputs()
    inputs |= case.labels(inputs) | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    inputs.pop("decoder_input_ids", None)
    model(**inputs).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    model.eval()
    found = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2)
    assert found.shape[0] == 2


@parametrize(GENERATIVE)
def test_prefix_tuning_is_refused_where_a_state_is_kept(case: Case) -> None:
    config = peft.PrefixTuningConfig(**settings(case))
    inputs = case.inputs()
    labels = case.labels(inputs)
    inputs.pop("decoder_input_ids", None)
    if case.model_type == "spade" and not case.variant.startswith("local_decoder"):
        peft.get_peft_model(case.model(), config)(
            **inputs, **labels
        ).loss.backward()  # keys and values of full attention
        return
    with pytest.raises(ValueError, match="Prefix tuning"):
        peft.get_peft_model(case.model(), config)(**inputs, **labels)


@parametrize(GENERATIVE + [Case("mega", "AutoModelForMaskedLM", "default")])
@torch.no_grad()
def test_trainable_tokens(case: Case) -> None:
    """New rows of the embeddings, of tied ones in the head too, merged = apart; or a refusal."""
    model, inputs = case.model(), case.inputs()
    inputs["input_ids"][:, 2] = 5
    expected = main_output(model(**inputs))
    config = peft.TrainableTokensConfig(token_indices=[5, 6, 7])
    if is_adaptive(case):
        with pytest.raises(AttributeError, match="adaptive_cutoffs=None"):
            peft.get_peft_model(model, config)
        return
    head = model.get_output_embeddings()
    is_left_out = head.bias is not None and head.weight is model.get_input_embeddings().weight
    adapted = peft.get_peft_model(model, config).eval()
    if is_left_out:
        with pytest.raises(ValueError, match="bias of an output layer"):
            adapted(**inputs)
        return
    torch.testing.assert_close(main_output(adapted(**inputs)), expected, rtol=1e-5, atol=1e-5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    apart = main_output(adapted(**inputs))
    assert (apart - expected).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(main_output(merged(**inputs)), apart, rtol=1e-4, atol=1e-4)

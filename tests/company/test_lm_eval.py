"""lm-evaluation-harness: what it generates and scores is what the model does, at lengths beyond its own default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import Case, all_heads, parametrize
from word_tokenizer import word_tokenizer
from works_with import working

from hf_hybrid.recipes import lm_eval as recipe

harness = pytest.importorskip("lm_eval.models.huggingface")
from lm_eval.api.instance import Instance  # noqa: E402

pytestmark = pytest.mark.company

HEADS = working(
    "lm-evaluation-harness",
    [case for case in all_heads() if case.auto_name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")],
)
LONG = 2500  # words, more than the harness keeps where it finds no length


def harness_of(case: Case, folder: Path) -> tuple[Any, Any]:
    """(the harness around a checkpoint, the model)."""
    model = case.model()
    model.save_pretrained(folder)
    word_tokenizer(model_max_length=10**30).save_pretrained(folder)
    words = recipe.with_backend(["--model_args", f"pretrained={folder}"])
    options: dict[str, Any] = dict(option.split("=") for option in words[1].split(","))
    options["max_length"] = int(options["max_length"])
    return harness.HFLM(**options, device="cpu", batch_size=1), model


def text(length: int) -> str:
    return " ".join(f"w{3 + (7 * place + place // 11) % 30}" for place in range(length))


@parametrize(HEADS)
def test_generation_reads_the_whole_source(case: Case, tmp_path: Path) -> None:
    lm, model = harness_of(case, tmp_path)
    limit = model.config.max_source_length()
    source = text(LONG if limit is None else limit - 10)
    settings = {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False}
    request = Instance(request_type="generate_until", doc={}, arguments=(source, settings), idx=0)
    (answer,) = lm.generate_until([request], disable_tqdm=True)
    tokenizer = word_tokenizer(model_max_length=10**30)
    ids = tokenizer(source, return_tensors="pt")["input_ids"]
    length = {"max_length": ids.shape[1] + 6} if case.is_seq2seq else {"max_new_tokens": 6}
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)[0]
    expected = expected[0 if case.is_seq2seq else ids.shape[1] :]
    assert answer.split() == tokenizer.decode(expected, skip_special_tokens=True).split()


@parametrize(HEADS)
def test_scores_depend_on_the_first_token_of_a_long_text(case: Case, tmp_path: Path) -> None:
    lm, model = harness_of(case, tmp_path)
    if model.config.max_source_length() is not None:
        pytest.skip("the model limits its inputs")
    source, target = text(LONG), " w5 w6"
    request = Instance(request_type="loglikelihood", doc={}, arguments=(source, target), idx=0)
    ((score, _),) = lm.loglikelihood([request], disable_tqdm=True)
    tokenizer = word_tokenizer(model_max_length=10**30)
    ids = tokenizer(source, return_tensors="pt")["input_ids"]
    labels = tokenizer(target, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if case.is_seq2seq:
            logits = model(input_ids=ids, labels=labels).logits
        else:
            logits = model(input_ids=torch.cat([ids, labels], dim=1)).logits[:, ids.shape[1] - 1 : -1]
    expected = logits.log_softmax(-1).gather(2, labels[..., None]).sum()
    assert score == pytest.approx(float(expected), rel=1e-4, abs=1e-4)

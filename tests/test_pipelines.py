"""Own pipelines: text from text, summaries, answers; batches, long inputs, bad input, the tasks after `import hf_hybrid`."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import Case, all_heads, parametrize
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from word_tokenizer import word_tokenizer

import hf_hybrid
from hf_hybrid.auto import PIPELINES
from hf_hybrid.pipelines import (
    ExtractiveQuestionAnsweringPipeline,
    Seq2SeqSummarizationPipeline,
    Seq2SeqText2TextPipeline,
)

SEQ2SEQ = [case for case in all_heads() if case.auto_name == "AutoModelForSeq2SeqLM"]
ANSWERING = [case for case in all_heads() if case.auto_name == "AutoModelForQuestionAnswering"]
TEXTS = ["w3 w4 w5 w6 w7", "w8", "w9 w10 w11"]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 3, "do_sample": False}


@parametrize(SEQ2SEQ)
def test_text_from_text(case: Case) -> None:
    model, tokenizer = case.model(), word_tokenizer(ends=True)
    rewrite = pipeline("seq2seq-text2text", model=model, tokenizer=tokenizer)
    assert type(rewrite) is Seq2SeqText2TextPipeline
    expected = []
    for text in TEXTS:
        ids = model.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), **GREEDY)
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert [rewrite(text, **GREEDY)[0]["generated_text"] for text in TEXTS] == expected
    assert [one[0]["generated_text"] for one in rewrite(TEXTS, batch_size=3, **GREEDY)] == expected
    assert [one[0]["generated_text"] for one in rewrite((text for text in TEXTS), batch_size=2, **GREEDY)] == expected
    beams = rewrite(TEXTS, batch_size=3, num_beams=3, num_return_sequences=2, **GREEDY)
    assert [len(several) for several in beams] == [2, 2, 2]
    assert rewrite("w4 w5 w6 w7", prefix="w3 ", **GREEDY) == rewrite(TEXTS[0], **GREEDY)


@parametrize(SEQ2SEQ)
def test_summaries_of_long_texts(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = case.model(), word_tokenizer(ends=True, model_max_length=32)
    summarize = pipeline("seq2seq-summarization", model=model, tokenizer=tokenizer, **GREEDY)
    assert type(summarize) is Seq2SeqSummarizationPipeline
    words = [f"w{3 + i % 30}" for i in range(90)]
    with pytest.raises(ValueError, match="has 91 tokens, but the limit is 32.*`truncation=True`"):
        summarize(" ".join(words))
    whole = summarize(" ".join(words), max_input_length=128)
    assert list(whole[0]) == ["summary_text"]
    with caplog.at_level(logging.WARNING, logger="hf_hybrid"):
        cut = summarize(" ".join(words), truncation=True)
    assert "the last 59 are cut off" in caplog.text
    assert cut == summarize(" ".join(words[:31]))
    caplog.clear()
    both = summarize([" ".join(words), TEXTS[0]], max_input_length=128, batch_size=2)
    assert both == [whole, summarize(TEXTS[0])] and not caplog.text


def long_context(length: int) -> str:
    return "  ".join(f"w{3 + (11 * i + i * i) % 30}" for i in range(length))


@parametrize(ANSWERING)
def test_answers_are_the_best_spans(case: Case) -> None:
    """Against a search over all spans of the single window, written out."""
    model, tokenizer = case.model(), word_tokenizer(ends=True)
    answer = pipeline("extractive-question-answering", model=model, tokenizer=tokenizer)
    assert type(answer) is ExtractiveQuestionAnsweringPipeline
    question, context = "w3 w4", long_context(20)
    inputs = tokenizer(question, context, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model(**inputs)
    start, end = output.start_logits[0, 3:-1], output.end_logits[0, 3:-1]  # question and </s> before, </s> behind
    spans = {(i, j): float(start[i] + end[j]) for i in range(20) for j in range(i, min(i + 4, 20))}
    total = torch.tensor(list(spans.values())).exp().sum()
    best = sorted(spans, key=lambda span: -spans[span])[:3]
    words = context.split("  ")
    found = answer(question=question, context=context, max_answer_length=4, top_k=3)
    assert [entry["answer"] for entry in found] == ["  ".join(words[i : j + 1]) for i, j in best]
    for entry, span in zip(found, best):
        assert context[entry["start"] : entry["end"]] == entry["answer"]
        assert entry["score"] == pytest.approx(float(torch.tensor(spans[span]).exp() / total), rel=1e-4)
    (everything,) = (answer(question=question, context=context, max_answer_length=4, top_k=len(spans)),)
    assert sum(entry["score"] for entry in everything) == pytest.approx(1.0, rel=1e-5)


@parametrize(ANSWERING)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_long_documents_and_batches(case: Case, padding_side: str) -> None:
    tokenizer = word_tokenizer(ends=True, padding_side=padding_side)
    answer = pipeline("extractive-question-answering", model=case.model(), tokenizer=tokenizer)
    inputs = [
        {"question": "w3 w4", "context": long_context(150)},
        {"question": "w7", "context": "w8"},
        {"question": "w5 w6 w7", "context": long_context(47)},
    ]
    options = {"max_seq_length": 24, "doc_stride": 8, "top_k": 4, "max_answer_length": 5}
    single = [answer(item, **options) for item in inputs]
    for one, several in zip(single, answer(inputs, batch_size=4, **options)):
        assert [entry["answer"] for entry in one] == [entry["answer"] for entry in several]
        for entry, other in zip(one, several):
            assert entry["score"] == pytest.approx(other["score"], rel=1e-3)
    assert [len(entries) for entries in single] == [4, 1, 4]
    many = answer(inputs[0], **{**options, "top_k": 10_000})
    spans = [(entry["start"], entry["end"]) for entry in many]
    assert len(set(spans)) == len(spans), "a span of two windows counts twice"
    assert len(spans) == 150 * 5 - 10, "a span that fits into a window was not looked at"
    assert sum(entry["score"] for entry in many) == pytest.approx(1.0, rel=1e-5)
    assert isinstance(answer(inputs[1]), dict)
    questions = [item["question"] for item in inputs[1:]]
    assert answer(question=questions, context="w8 w9", top_k=1) == [
        answer(question=question, context="w8 w9") for question in questions
    ]


def test_the_tasks_are_registered() -> None:
    assert set(PIPELINES) <= set(PIPELINE_REGISTRY.get_supported_tasks())
    for class_name, _ in PIPELINES.values():
        assert getattr(hf_hybrid, class_name) is getattr(sys.modules["hf_hybrid.pipelines"], class_name)


def test_registration_after_the_pipelines_were_imported(tmp_path: Path) -> None:
    """A fresh process, as in this one `hf_hybrid` came first; model and tokenizer load from a folder."""
    SEQ2SEQ[0].model().save_pretrained(tmp_path)
    word_tokenizer(ends=True).save_pretrained(tmp_path)
    code = f"""
from transformers import pipeline
import hf_hybrid
print(pipeline("seq2seq-summarization", model={str(tmp_path)!r})("w3 w4", max_new_tokens=3)[0]["summary_text"] is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr[-2000:]


def test_a_saved_pipeline_loads_again(tmp_path: Path) -> None:
    case = ANSWERING[0]
    answer = pipeline("extractive-question-answering", model=case.model(), tokenizer=word_tokenizer(ends=True))
    item = {"question": "w3", "context": long_context(9)}
    answer.save_pretrained(tmp_path)
    again = pipeline("extractive-question-answering", model=str(tmp_path))
    assert again(item)["answer"] == answer(item)["answer"]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"inputs": ""}, "The input is empty"),
        ({"inputs": "  \n"}, "The input is empty"),
        ({"inputs": []}, "no input to generate from"),
        ({"inputs": ["w3", ""]}, "Input 1 is empty"),
        ({"inputs": ["w3", 7]}, "Input 1 must be a string; got int"),
        ({"inputs": None}, "The input must be a string; got NoneType"),
        ({"inputs": "w3", "max_input_length": 0}, "`max_input_length` must be a positive"),
    ],
)
def test_bad_texts(call: dict, message: str) -> None:
    rewrite = Seq2SeqText2TextPipeline(SEQ2SEQ[0].model(), word_tokenizer(ends=True))
    with pytest.raises(ValueError, match=message):
        rewrite(**call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"question": "", "context": "w3"}, "The question is empty"),
        ({"question": "w3", "context": " "}, "The context is empty"),
        ({"question": "w3"}, "The context must be a string; got NoneType"),
        ({"inputs": []}, "no question to answer"),
        ({"inputs": "w3"}, "mapping with `question` and `context`; got str"),
        ({"inputs": [{"question": "w3", "context": "w4"}, {"question": "w3"}]}, "of input 1"),
        ({"question": ["w3", "w4"], "context": ["w5"]}, "2 questions but 1 contexts"),
        ({"question": "w3", "context": "w4", "top_k": 0}, "`top_k` must be positive"),
        ({"question": "w3", "context": "w4", "max_answer_len": 3}, "Unknown options"),
        ({"question": "w3", "context": "w4", "max_seq_length": 65}, "exceeds the limit of the model, 64"),
        ({"question": "w3 w4 w5", "context": "w4", "max_seq_length": 5}, "question has 3 tokens, but at most 2"),
        (
            {"question": "w3", "context": "w4", "max_seq_length": 8, "doc_stride": 5},
            "`doc_stride` must be below the 5",
        ),
    ],
)
def test_bad_questions(call: dict, message: str) -> None:
    answer = ExtractiveQuestionAnsweringPipeline(ANSWERING[0].model(), word_tokenizer(ends=True))
    with pytest.raises(ValueError, match=message):
        answer(**call)


def test_models_without_the_head_are_refused() -> None:
    encoder, lm = (
        Case("spade", "AutoModelForTextEncoding", "default"),
        Case("spade_lm", "AutoModelForCausalLM", "default"),
    )
    for model in (encoder.model(), lm.model()):
        with pytest.raises(ValueError, match="needs an encoder-decoder that generates"):
            pipeline("seq2seq-summarization", model=model, tokenizer=word_tokenizer())
        with pytest.raises(ValueError, match="needs a question-answering head"):
            pipeline("extractive-question-answering", model=model, tokenizer=word_tokenizer())

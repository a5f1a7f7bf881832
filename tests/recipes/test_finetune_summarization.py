"""Summarization, end to end on toy rows: learning, references, queries, lengths, predictions, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, EvalPrediction

from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes.finetune_summarization import SummarizationArguments, main, references_of, rouge_scores
from hf_hybrid.recipes.finetune_summarization import find_columns as columns_of
from hf_hybrid.recipes.support.finetuning_data import GenerationScorer

PAIRS = [("the list is sorted by the key function", "list"), ("a dictionary maps keys to values", "dictionary")]


def write_split(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def data(tmp_path):
    rows = [{"document": document, "summary": summary, "query": "what?"} for document, summary in PAIRS * 4]
    write_split(tmp_path / "data", "train", rows)
    write_split(tmp_path / "data", "validation", rows[:3])
    return tmp_path / "data"


@pytest.fixture
def finetuning(options, checkpoint, data) -> dict:
    return {
        **options,
        "model_name_or_path": str(checkpoint),
        "data": [str(data)],
        "max_source_length": 24,
        # More than a target has letters: how many tokens it has depends on the vocabulary (see `documents`).
        "max_target_length": 16,
        "save_strategy": "no",
    }


def test_pairs_are_learnt_and_generated(finetuning, tmp_path):
    changes = {"max_steps": 60, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "eval_strategy": "no"}
    metrics = main({**finetuning, **changes, "generation_num_beams": 2})
    assert metrics["eval_rouge1"] == pytest.approx(100.0) and metrics["eval_rougeLsum"] == pytest.approx(100.0)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert rows == [{"prediction": summary, "references": [summary]} for _, summary in (PAIRS * 2)[:3]]
    assert model_card_problems((run / "README.md").read_text()) == []
    tokenizer, model = AutoTokenizer.from_pretrained(run), AutoModelForSeq2SeqLM.from_pretrained(run)
    ids = model.generate(**tokenizer(PAIRS[0][0], return_tensors="pt"), max_new_tokens=8)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "list"


def test_evaluation_each_epoch_is_not_repeated_at_the_end(finetuning, tmp_path):
    main({**finetuning, "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "epoch"})
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "eval_rouge1" in entry]) == 2
    assert (tmp_path / "run" / "predictions.jsonl").is_file()


def test_several_references_and_a_query(finetuning, tmp_path, tokenizer):
    rows = [{"article": "a b c", "highlights": "x", "targets": ["x", "y z"], "question": "why?"}] * 4
    for split in ("train", "validation"):
        write_split(tmp_path / "many", split, rows)
    changes = {"data": [str(tmp_path / "many")], "query_column": "question", "source_prefix": "summarize: "}
    metrics = main(
        {
            **finetuning,
            **changes,
            "max_steps": 1,
            "generation_num_beams": 2,
            "length_penalty": 0.8,
            "no_repeat_ngram_size": 3,
        }
    )
    assert metrics["eval_samples"] == 4
    written = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert written["references"] == ["x", "y z"]


def test_rows_that_are_cut_are_counted_and_said(finetuning, data, caplog):
    write_split(data, "train", [{"document": "a list " * (40 * (i % 2) + 1), "summary": "a list"} for i in range(8)])
    write_split(data, "validation", [{"document": "a", "summary": "a list " * (20 * (i < 3) + 1)} for i in range(4)])
    with caplog.at_level("INFO", "hf_hybrid"):
        metrics = main({**finetuning, "max_source_length": 24, "max_target_length": 12, "max_steps": 1})
    assert metrics["truncated_rows"] == {
        "training data": {"max_source_length": 4}, "validation data": {"max_target_length": 3},
    }  # fmt: skip
    said = [record.getMessage() for record in caplog.records if "are cut" in record.getMessage()]
    assert said == [
        "Training data: 4 of 8 rows are cut to 24 tokens (`max_source_length`).",
        "Validation data: 3 of 4 rows are cut to 12 tokens (`max_target_length`).",
    ]


def test_the_best_reference_counts(tokenizer):
    scorer = GenerationScorer(tokenizer, [["list of keys", "dictionary"], ["the value"]], rouge_scores)
    ids = [tokenizer(text)["input_ids"] for text in ("dictionary", "the value")]
    padded = np.full((3, 30), -100)  # a repeated third row, as distributed evaluation gives
    for number, row in enumerate([*ids, ids[0]]):
        padded[number, : len(row)] = row
    scores = scorer(EvalPrediction(predictions=padded, label_ids=padded))
    assert scores["rouge1"] == pytest.approx(100.0)
    assert scorer.predictions == ["dictionary", "the value"]


def test_empty_reference_lists_fall_back_to_the_summary():
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["a", "b"], "summary": ["s", "t"], "targets": [["u", "v"], []]})
    columns = columns_of(rows, SummarizationArguments(data=["x"]))
    assert references_of(rows, columns) == [["u", "v"], ["t"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_target_length": 65}, "Targets have up to 65 tokens.*accepts 64.*`max_target_length`"),
        ({"generation_max_length": 66}, "Generated texts.*`generation_max_length`"),
        ({"length_penalty": 0.8}, "generation_num_beams"),
        (
            {"metric_for_best_model": "bleu"},
            "`metric_for_best_model` is 'bleu', .*eval_rougeL, .*eval_generated_tokens",
        ),
        ({"text_column": "body"}, "no column 'body'"),
        ({"query_column": "questions"}, "no column 'questions'"),
        ({"data": None}, "`data` is required"),
        ({"data": ["/nowhere"]}, "No such file"),
    ],
)
def test_bad_options_are_explained(finetuning, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main({**finetuning, **changes})
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_bad_rows_are_explained(finetuning, data):
    write_split(data, "train", [{"body": "a", "summary": "b"}])
    with pytest.raises(ValueError, match="None of the columns document"):
        main(finetuning)
    write_split(data, "train", [{"document": "a", "summary": None}, {"document": "a", "summary": "b"}])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1 has no text in the column 'summary'"):
        main(finetuning)

"""Sequence classification and regression, end to end on toy rows."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import ClassLabel, Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import finetune_glue
from hf_hybrid.recipes.finetune_glue import find_text_columns, main
from hf_hybrid.recipes.support.labels import Labels, find_labels

GOOD, BAD = "the list is good and sorted", "this dictionary is bad"


def sentiment_rows(count: int) -> list[dict]:
    return [{"sentence": f"{(BAD, GOOD)[i % 2]} {i}", "label": i % 2, "idx": i} for i in range(count)]


def write_split(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def data(tmp_path):
    write_split(tmp_path / "data", "train", sentiment_rows(32))
    write_split(tmp_path / "data", "validation", sentiment_rows(10))
    return tmp_path / "data"


@pytest.fixture
def finetuning(options, checkpoint, data) -> dict:
    return {
        **options,
        "model_name_or_path": str(checkpoint),
        "data": [str(data)],
        "max_length": 24,
        "save_strategy": "no",
    }


def test_a_separable_task_is_learnt(finetuning, tmp_path):
    changes = {"max_steps": 40, "learning_rate": 2e-2, "per_device_train_batch_size": 8}
    metrics = main({**finetuning, **changes})
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["majority_accuracy"] == 0.5
    assert metrics["eval_samples"] == {"validation": 10}
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    assert model_card_problems(card) == []
    assert "| accuracy | 1 |" in card and "pipeline_tag: text-classification" in card
    model = AutoModelForSequenceClassification.from_pretrained(run)
    assert model.config.num_labels == 2 and model.config.id2label == {0: "0", 1: "1"}


def test_pretrained_weights_are_used_unless_from_scratch(finetuning, tmp_path, checkpoint):
    frozen = {**finetuning, "learning_rate": 0.0, "ssm_learning_rate": 0.0}
    main({**frozen, "output_dir": str(tmp_path / "pretrained")})
    main({**frozen, "output_dir": str(tmp_path / "scratch"), "from_scratch": True})
    base, used, fresh = (
        load_file(p / "model.safetensors") for p in (checkpoint, tmp_path / "pretrained", tmp_path / "scratch")
    )
    name = next(key for key in base if "encoder" in key and key.endswith("q_proj.weight"))
    (key,) = [key for key in used if key.endswith(name.removeprefix("model."))]
    assert torch.equal(base[name], used[key]) and not torch.equal(base[name], fresh[key])


@pytest.mark.parametrize(
    ("columns", "task", "expected"),
    [
        (("question", "sentence"), "qnli", {"eval_accuracy"}),
        (("sentence1", "sentence2"), "mrpc", {"eval_accuracy", "eval_f1"}),
        (("question1", "question2"), "qqp", {"eval_accuracy", "eval_f1"}),
        (("premise", "hypothesis"), "rte", {"eval_accuracy"}),
        (("sentence",), "cola", {"eval_matthews_correlation"}),
    ],
)
def test_columns_and_metrics_of_the_tasks(finetuning, tmp_path, columns, task, expected):
    rows = [{**dict.fromkeys(columns, GOOD), "label": i % 2} for i in range(8)]
    for split in ("train", "validation"):
        write_split(tmp_path / "pairs", split, rows)
    metrics = main({**finetuning, "data": [str(tmp_path / "pairs")], "task": task, "max_steps": 1})
    assert expected <= metrics.keys()


def test_decimal_labels_mean_regression(finetuning, tmp_path):
    rows = [{"sentence1": GOOD, "sentence2": BAD, "label": i / 2} for i in range(8)]
    for split in ("train", "validation"):
        write_split(tmp_path / "stsb", split, rows)
    metrics = main({**finetuning, "data": [str(tmp_path / "stsb")], "max_steps": 2})
    assert {"eval_pearson", "eval_spearmanr"} <= metrics.keys() and "majority_accuracy" not in metrics
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config
    assert config.num_labels == 1 and config.problem_type == "regression"


def test_regression_accumulates_like_one_batch(finetuning, tmp_path):
    rows = [{"sentence": f"{GOOD} {i}", "label": i / 2} for i in range(8)]
    for split in ("train", "validation"):
        write_split(tmp_path / "numbers", split, rows)
    base = {
        **finetuning,
        "data": [str(tmp_path / "numbers")],
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "warmup_steps": 0,
        "optim": "sgd",
        "learning_rate": 1e-2,
    }
    main({**base, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8})
    main({**base, "output_dir": str(tmp_path / "four"), "gradient_accumulation_steps": 4})
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-5, atol=1e-6)


def test_names_are_classes(finetuning, tmp_path):
    rows = [{"text": GOOD, "label": ("spam", "ham", "eggs")[i % 3]} for i in range(9)]
    (tmp_path / "mail.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"data": [str(tmp_path / "mail.jsonl")], "validation_fraction": 0.34, "max_steps": 1}
    metrics = main({**finetuning, **changes, "metrics": ["accuracy", "f1"]})
    assert "eval_f1" in metrics
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config
    assert config.label2id == {"eggs": 0, "ham": 1, "spam": 2}


def test_mnli_has_two_validation_sets(finetuning, tmp_path):
    rows = [{"premise": GOOD, "hypothesis": BAD, "label": i % 3} for i in range(6)]
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_split(tmp_path / "mnli", split, rows)
    metrics = main({**finetuning, "data": [str(tmp_path / "mnli")], "task": "mnli", "max_steps": 1})
    assert {"eval_matched_accuracy", "eval_mismatched_accuracy"} <= metrics.keys()
    assert "matched" in metrics["eval_samples"]


def test_a_task_by_name_reads_the_hub_data(finetuning, monkeypatch, data):
    asked = []

    def fake(source, split="train", *, config_name=None, **options):
        asked.append((source, config_name))
        return load(str(data), split)

    from hf_hybrid.recipes.support import finetuning_data

    load = finetuning_data.load_table
    monkeypatch.setattr(finetuning_data, "load_table", fake)
    main({**finetuning, "data": None, "task": "sst2", "max_steps": 1})
    assert set(map(str, asked)) == {str((["nyu-mll/glue"], "sst2"))}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 7}, r"validation\.jsonl, line 1 has the label 7"),
        ({"label": None}, r"validation\.jsonl, line 1 has the label None"),
        ({"sentence": None}, r"validation\.jsonl, line 1 has no text"),
    ],
)
def test_bad_validation_rows_are_named(finetuning, data, row, message):
    write_split(data, "validation", [{"sentence": GOOD, "label": 0, **row}, *sentiment_rows(3)])
    with pytest.raises(ValueError, match=message):
        main(finetuning)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": GOOD, "label": 0}] * 4, "nothing to learn"),
        ([{"sentence": GOOD, "label": -1}] * 4, "unlabelled"),
        ([{"sentence": GOOD, "label": i * 100} for i in range(4)], "number the classes"),
        ([{"sentence": GOOD, "target": 1}] * 4, "no column 'label'"),
        ([{"body": GOOD, "label": i % 2} for i in range(4)], "No known text columns"),
        ([{"sentence": GOOD, "label": None}] * 4, "contains no label"),
    ],
)
def test_bad_training_data_is_explained(finetuning, data, rows, message):
    write_split(data, "train", rows)
    with pytest.raises(ValueError, match=message):
        main(finetuning)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "snli"}, "`task` must be one of cola"),
        ({"model_name_or_path": "/nowhere"}, "cannot be loaded"),
        ({"text_columns": ["body"]}, "no column 'body'"),
        ({"metrics": ["acc"]}, "Unknown metric"),
        (
            {"metric_for_best_model": "acc", "metrics": ["f1"]},
            "`metric_for_best_model` is 'acc', .* measure eval_loss, .*, eval_f1: choose",
        ),
        ({"data": None}, "`data` is required"),
    ],
)
def test_bad_options_are_explained(finetuning, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main({**finetuning, **changes})
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_validation_set_is_needed(finetuning, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, sentiment_rows(8))))
    with pytest.raises(ValueError, match="validation_fraction"):
        main({**finetuning, "data": [str(tmp_path / "rows.jsonl")]})


def test_kinds_of_labels():
    names = find_labels(
        Dataset.from_dict({"label": [0, 1]}).cast_column("label", ClassLabel(names=["no", "yes"])), "label"
    )
    assert names == Labels("label", ["no", "yes"], {0: 0, 1: 1}, kind="a number")
    booleans = Dataset.from_dict({"label": [True, False]})
    assert find_labels(booleans, "label").encode(booleans, "x") == [1, 0]
    numbers = find_labels(Dataset.from_dict({"label": [0.5, 1.0]}), "label")
    assert numbers.is_regression and numbers.encode(Dataset.from_dict({"label": [2, 0.5]}), "x") == [2.0, 0.5]
    with pytest.raises(ValueError, match="finite numbers"):
        numbers.encode(Dataset.from_dict({"label": [float("nan")]}), "x")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, 1, 0.5, 1],
            "Row 2 of the training data has the label 0.5 .*most labels are the whole numbers 0, 1: correct it",
        ),
        ([0.0, 1.0, 1.0], "are the whole numbers 0, 1, but written as decimal numbers"),
        ([0, 1, 2, 3, 0.1, float("nan")], "Row 4 .* 0.1 .*whole numbers 0, 1, 2 ...: correct it"),
    ],
)
def test_decimal_numbers_that_look_like_classes_need_a_problem_type(labels, message):
    """Not a regression in silence; both kinds can be asked for."""
    rows = Dataset.from_dict({"label": list(map(float, labels))})
    with pytest.raises(
        ValueError, match=f"{message}.*`problem_type='regression'` predicts .*'single_label_classification'"
    ):
        find_labels(rows, "label")
    assert find_labels(rows, "label", "regression").is_regression
    if all(number.is_integer() for number in rows["label"]):
        assert find_labels(rows, "label", "single_label_classification").encode(rows, "x") == [0, 1, 1]
    else:
        with pytest.raises(ValueError, match="Row . of the training data has the label 0..*classes are whole numbers"):
            find_labels(rows, "label", "single_label_classification")


def test_the_kind_of_labels_can_be_chosen(finetuning, tmp_path):
    """Whole numbers as numbers to predict."""
    metrics = main({**finetuning, "problem_type": "regression", "max_steps": 1})
    assert "eval_pearson" in metrics and "eval_accuracy" not in metrics
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.problem_type == "regression"
    with pytest.raises(
        ValueError, match="`problem_type` must be regression or single_label_classification; got 'ranking'"
    ):
        finetune_glue.GlueArguments(data=["x"], problem_type="ranking")
    assert finetune_glue.GlueArguments(task="stsb").problem_type == "regression"


def test_long_rows_are_counted(finetuning, data):
    rows = [{**row, "sentence": row["sentence"] * (1 + 9 * (i < 5))} for i, row in enumerate(sentiment_rows(10))]
    write_split(data, "validation", rows)
    metrics = main({**finetuning, "max_length": 40, "max_steps": 1})
    assert metrics["truncated_rows"] == {"validation data": {"max_length": 5}}


def test_pairs_are_preferred_to_single_columns():
    rows = Dataset.from_dict({"question": ["a"], "sentence": ["b"], "label": [0]})
    assert find_text_columns(rows, None) == ("question", "sentence")
    assert find_text_columns(rows, ["sentence"]) == ("sentence", None)
    assert finetune_glue.COLUMN_PAIRS[0] == ("sentence1", "sentence2")


class TestPairsReadSeparately:
    @pytest.fixture
    def pairs(self, finetuning, data):
        rows = [
            {"question": GOOD, "sentence": (BAD, GOOD)[i % 2] + f" {i}", "label": 1 - i % 2, "idx": i}
            for i in range(32)
        ]
        write_split(data, "train", rows)
        write_split(data, "validation", rows[:10])
        return {**finetuning, "dual_encoder": True}

    def test_learn_evaluate_and_stay_dual(self, pairs, tmp_path):
        changes = {"max_steps": 40, "learning_rate": 1e-3, "head_learning_rate": 5e-2}
        metrics = main({**pairs, **changes, "per_device_train_batch_size": 8})
        assert metrics["eval_accuracy"] == 1.0
        run = tmp_path / "run"
        assert AutoModelForSequenceClassification.from_pretrained(run).config.dual_encoder
        again = {**pairs, "model_name_or_path": str(run), "output_dir": str(tmp_path / "again"), "max_steps": 1}
        again |= {"dual_encoder": None, "learning_rate": 0.0, "head_learning_rate": 0.0}
        assert main(again)["eval_accuracy"] == 1.0

    def test_need_two_columns(self, pairs, data):
        write_split(data, "train", sentiment_rows(8))
        write_split(data, "validation", sentiment_rows(8))
        with pytest.raises(ValueError, match="classifies pairs, but the data has one column of texts, 'sentence'"):
            main(pairs)


def test_fields_of_the_configuration_are_changed(finetuning, tmp_path):
    main({**finetuning, "max_steps": 1, "config_overrides": "hidden_dropout=0.3,classifier_dropout=0.4"})
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config
    assert (config.hidden_dropout, config.classifier_dropout) == (0.3, 0.4)
    with pytest.raises(ValueError, match="`config_overrides` names \\['hiden_dropout'\\]"):
        main({**finetuning, "output_dir": str(tmp_path / "other"), "config_overrides": {"hiden_dropout": 0.3}})

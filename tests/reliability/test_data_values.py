"""What if texts, labels or references are not what a recipe needs: the line of the file is named before anything is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_hybrid.data.loading import load_table, load_text_source
from hf_hybrid.data.records import place_of
from hf_hybrid.recipes import finetune_glue, finetune_summarization, finetune_translation
from hf_hybrid.recipes.finetune_summarization import Columns, references_of
from hf_hybrid.recipes.support.finetuning_data import TableArguments, load_tables, require_text
from hf_hybrid.recipes.support.labels import find_labels
from hf_hybrid.recipes.support.options import fill_dataclasses
from hf_hybrid.recipes.train_tokenizer import TrainTokenizerArguments

COUNT = 40


def write(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.mark.parametrize("bad", [None, 7, ["a", "b"], {"a": 1}, True])
@pytest.mark.parametrize("line", [1, 2, 23, COUNT])
def test_texts_are_named_by_the_line_of_the_file(bad, line, tmp_path):
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(COUNT)]
    rows[line - 1]["text"] = bad
    path = write(tmp_path, rows)
    arguments = TableArguments(data=[str(path)], validation_fraction=0.3)
    train, validation = load_tables(arguments, seed=3)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line {line} has no text in the column 'text'"):
        for part in (train, validation[""]):
            require_text(part, ["text"], "data")


@pytest.mark.parametrize("fraction", [0.03, 0.3, 0.97])
@pytest.mark.parametrize("limit", [None, 1, 5])
def test_every_row_knows_its_line(fraction, limit, tmp_path):
    """Over two files, shuffled, with blank lines and line breaks inside cells."""
    first = tmp_path / "a.csv"
    first.write_text("text,line\n" + "x,2\n\n" + '"two\nlines",4\n' + "".join(f"x,{n}\n" for n in range(6, 30)))
    second = tmp_path / "b.csv"
    second.write_text("text,line\n" + "".join(f"x,{n}\n" for n in range(2, 20)))
    arguments = TableArguments(
        data=[str(first), str(second)], validation_fraction=fraction, max_train_samples=limit, max_eval_samples=limit
    )
    train, validation = load_tables(arguments, seed=1)
    for part in (train, validation[""]):
        for number, row in enumerate(part):
            name, line = place_of(part, number, "rows").rsplit("/", 1)[1].split(", line ")
            assert name in ("a.csv", "b.csv") and int(line) == row["line"]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_records_without_lines_are_counted(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps([{"text": "a"}, {"text": None}]))
    else:
        Dataset.from_dict({"text": ["a", None]}).to_parquet(path)
    with pytest.raises(ValueError, match=rf"rows\.{suffix}, (record|row) 2 has no text"):
        require_text(load_table(path), ["text"], "data")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1], "All training rows have the label 1"),
        ([0, 0], "All training rows have the label 0"),
        (["a", "a"], "All training rows have the label 'a'"),
        ([True, True], "All training rows have the label True"),
        ([False, False], "All training rows have the label False"),
        ([None, None], "contains no label"),
        ([0, "yes"], r"of several kinds.*line 1 has a number: 0; .*line 2 has text: 'yes'"),
        ([0, True], r"of several kinds.*line 1 has a number: 0; .*line 2 has true or false: True"),
        (["a", ["b"]], r"line 2 has a list in the column 'label': \['b'\]"),
        ([["a"], ["b"]], r"line 1 has a list in the column 'label'"),
        (["0.5", "nan"], r"of several kinds.*line 1 has a decimal number: '0.5'; .*line 2 has text: 'nan'"),
    ],
)
def test_labels_that_cannot_be_learnt(labels, message, tmp_path):
    path = write(tmp_path, [{"text": "a", "label": label} for label in labels])
    with pytest.raises(ValueError, match=message):
        find_labels(load_table(path), "label")


@pytest.mark.parametrize(
    ("suffix", "learnt", "held_out", "message"),
    [
        ("jsonl", [0, 1], [0, 1, 10**30], r"line 3 has the label 1e\+30 .*accepted are 0, 1"),
        ("jsonl", [0, 1, 10**30], [0], r"line 3 has the label 1e\+30 .*accepted are finite numbers below"),
        ("csv", [0.5, 1.5], ["0.5", "1e30"], r"line 3 has the label 1e\+30 .*accepted are finite numbers below"),
        ("jsonl", [0, 1], [1, True], "line 2 has the label True .*accepted are 0, 1"),
        ("jsonl", [True, False], [True, 1], "line 2 has the label 1 .*accepted are"),
        ("jsonl", [0, 1], [0, 1, "yes"], "line 3 has the label 'yes' .*accepted are 0, 1"),
        ("csv", [0, 1], [0, 1, "yes"], "line 4 has the label 'yes' .*accepted are 0, 1"),
        ("csv", ["a", "b"], ["b", "a", 1], "line 4 has the label '1' .*accepted are 'a', 'b'"),
        ("jsonl", [0, 1], [0, [1]], r"line 2 has the label \[1\] .*accepted are 0, 1"),
    ],
)
def test_labels_of_other_kinds_are_named(suffix, learnt, held_out, message, tmp_path):
    """Also where they are only among the rows to evaluate on."""
    tables = []
    for name, values in (("train", learnt), ("validation", held_out)):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            write(tmp_path, [{"text": "a", "label": label} for label in values], path.name)
        else:
            path.write_text("text,label\n" + "".join(f"a,{label}\n" for label in values))
        tables.append(load_table(path))
    labels = find_labels(tables[0], "label")
    with pytest.raises(ValueError, match=rf"\.{suffix}, {message}"):
        for table in tables:
            labels.encode(table, "data")


@pytest.mark.parametrize("only", [0, 1])
def test_one_named_class_is_refused_whichever_it_is(only):
    features = Features({"label": ClassLabel(names=["no", "yes"])})
    with pytest.raises(ValueError, match=f"the label {['no', 'yes'][only]!r}"):
        find_labels(Dataset.from_dict({"label": [only] * 3}, features=features), "label")
    assert find_labels(Dataset.from_dict({"label": [0, 1]}, features=features), "label").names == ["no", "yes"]


COLUMNS = Columns(text="document", summary="summary", targets="targets", query=None)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("one string", ["one string"]), (["a", "b"], ["a", "b"]), (None, ["the summary"]), ([], ["the summary"])],
)
def test_one_string_is_one_reference(targets, expected, tmp_path):
    path = write(tmp_path, [{"document": "d", "summary": "the summary", "targets": targets}])
    assert references_of(load_table(path), COLUMNS) == [expected]


@pytest.mark.parametrize("targets", [["a", None], [None], ["a", ["b"]], [3]])
def test_references_that_are_no_text(targets, tmp_path):
    rows = [{"document": "d", "summary": "s", "targets": ["x"]}, {"document": "d", "summary": "s", "targets": targets}]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 has a reference that is no text in 'targets'"):
        references_of(load_table(write(tmp_path, rows)), COLUMNS)


@pytest.mark.parametrize("bad", [3, ["a"], {"b": 1}])
def test_texts_to_pretrain_on_are_named(bad, tmp_path):
    path = write(tmp_path, [{"text": "a"}, {"text": "b"}, {"text": bad}])
    with pytest.raises(ValueError, match=r"does not contain strings.*rows\.jsonl, line 3"):
        load_text_source(path, text_column="text")


RECIPES = [finetune_glue.RECIPE, finetune_summarization.RECIPE, finetune_translation.RECIPE]
LENGTHS = [
    (recipe, name)
    for recipe in RECIPES
    for name in ("max_train_samples", "max_eval_samples", "max_length", "max_source_length", "max_target_length")
    if any(name in kind.__dataclass_fields__ for kind in recipe.arguments)
]


@pytest.mark.parametrize(("recipe", "name"), LENGTHS)
@pytest.mark.parametrize("value", [0, -1])
def test_lengths_and_numbers_of_rows_below_one(recipe, name, value, tmp_path):
    options = {"data": "a.jsonl", "model_name_or_path": "m", "output_dir": str(tmp_path / "run"), name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1.*got {value}"):
        recipe.train(options)


def test_lengths_of_other_options_too():
    with pytest.raises(ValueError, match="`max_documents` must be at least 1"):
        fill_dataclasses([TrainTokenizerArguments], {"data": ["a"], "output_dir": "b", "max_documents": 0})


def test_words_of_csv_are_text_and_labels(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nNone,NA\nNA,null\nnull,None\n")
    rows = load_table(path)
    assert rows.features["text"].dtype in (Value("string").dtype, "large_string")
    require_text(rows, ["text"], "data")
    assert find_labels(rows, "label").names == ["NA", "None", "null"]


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (1, 0.9), (3, 0.75)])
def test_too_few_rows_to_hold_some_out(count, fraction, tmp_path):
    path = write(tmp_path, [{"text": "a", "label": 1}] * count)
    with pytest.raises(
        ValueError, match=f"`validation_fraction` {fraction} of the training rows, which are {count}, leaves none"
    ):
        load_tables(TableArguments(data=[str(path)], validation_fraction=fraction), seed=1)


@pytest.mark.parametrize("option", ["data", "validation_data"])
@pytest.mark.parametrize("value", ["", [""], " , "])
def test_an_empty_name_is_no_folder(option, value, monkeypatch, tmp_path):
    """Not the current one."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [{"text": "a", "label": 1}])
    with pytest.raises(ValueError, match=f"`{option}` names no file"):
        TableArguments(**{option: value})


NUMBERS = [
    *((name, 0, "at least 1") for name in ("per_device_train_batch_size", "per_device_eval_batch_size")),
    ("gradient_accumulation_steps", 0, "at least 1"),
    ("gradient_accumulation_steps", -1, "at least 1"),
    ("max_steps", -5, "at least -1"),
    *(
        (name, math.nan, "a finite number")
        for name in ("num_train_epochs", "weight_decay", "max_grad_norm", "learning_rate")
    ),
    ("warmup_steps", math.inf, "a finite number"),
    ("ssm_learning_rate", -1.0, "at least 0"),
    ("max_grad_norm", -1.0, "at least 0"),
    ("seed", -1, "at least 0"),
    ("seed", 2**40, "below 4294967296"),
    ("dataloader_num_workers", -1, "at least 0"),
    ("adam_beta1", 1.5, "below 1"),
    ("label_smoothing_factor", 2.0, "below 1"),
    *((name, 0, "above 0") for name in ("save_steps", "eval_steps", "logging_steps")),
    ("save_steps", -3, "above 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), NUMBERS)
def test_numbers_that_no_training_can_follow(name, value, message, tmp_path):
    """Before data and model are loaded, and not in the evaluation after the last step."""
    options = {"data": "a.jsonl", "model_name_or_path": "m", "output_dir": str(tmp_path / "run"), name: value}
    options |= {"save_strategy": "steps", "eval_strategy": "steps"}
    with pytest.raises(ValueError, match=f"`{name}` must be .*{message}"):
        finetune_glue.main(options)

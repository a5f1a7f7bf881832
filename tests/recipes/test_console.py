"""What recipes print: one line per event, on every recipe; one bar on a terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from factories import TINY_OVERRIDES
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_hybrid.recipes import list_recipes
from hf_hybrid.training.progress import ProgressReport

LINE = re.compile(r"\d\d:\d\d:\d\d \S.*")


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def runs(tmp_path: Path, corpus: Path, tokenizer_folder: Path, checkpoint: Path) -> dict[str, dict]:
    """Options of a short run of every training recipe."""
    text = {"data": str(corpus), "tokenizer": str(tokenizer_folder), "validation_fraction": 0.2}
    tuned = {"model_name_or_path": str(checkpoint), "validation_fraction": 0.5}
    new = {"arch": "mega", "config_overrides": TINY_OVERRIDES["mega"]}
    words = ["the list is sorted", "a key of a dictionary"] * 4
    pixels = [{"pixels": [i] * 16, "label": i % 2} for i in range(8)]
    sounds = [{"samples": [i, 2, 3] * 8, "sampling_rate": 8000, "digit": i % 2} for i in range(8)]
    pairs = [{"document": word, "summary": word, "translation": {"en": word, "de": word}} for word in words]
    rows = [{"sentence": word, "label": number % 2} for number, word in enumerate(words)]
    paired = {"data": write_rows(tmp_path / "pairs.jsonl", pairs), "max_source_length": 16, "max_target_length": 8}
    return {
        "pretrain_span_corruption": text | {"config_overrides": TINY_OVERRIDES["spade"] + ",decoder_layers=1", "input_length": 32},
        "pretrain_clm": text | {"arch": "bst", "config_overrides": TINY_OVERRIDES["bst"], "block_length": 32},
        "pretrain_mlm": text | {"arch": "seqboat", "config_overrides": TINY_OVERRIDES["seqboat"], "block_length": 32},
        "finetune_glue": tuned | {"data": write_rows(tmp_path / "rows.jsonl", rows), "max_length": 16},
        "finetune_summarization": tuned | paired,
        "finetune_translation": tuned | paired | {"source_lang": "en", "target_lang": "de"},
        "train_lra": new
        | {"task": "listops", "num_train": 8, "num_validation": 4, "longer_than": 3, "shorter_than": 30, "num_processes": 1},
        "train_synthetic": {"arch": "longvq", "config_overrides": TINY_OVERRIDES["longvq"], "task": "copying", "num_tokens": 4}
        | {"num_train": 8, "num_validation": 4},
        "classify_image": new | {"data": write_rows(tmp_path / "images.jsonl", pixels), "validation_fraction": 0.5},
        "classify_audio": new | {"data": write_rows(tmp_path / "sounds.jsonl", sounds), "validation_fraction": 0.5},
    }  # fmt: skip


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_every_training_recipe_prints_lines(runs: dict[str, dict], options: dict, tmp_path: Path, few: bool) -> None:
    """No warning, no table, no dictionary, nothing twice; nothing at all with `quiet`."""
    assert runs.keys() == {item.name for item in list_recipes() if item.trains}
    if few:
        runs = {name: runs[name] for name in ("pretrain_span_corruption", "finetune_glue")}
    del options["disable_tqdm"]  # as a user begins
    for name, chosen in runs.items():
        chosen.update(options, output_dir=str(tmp_path / name), max_steps=2, eval_strategy="steps", eval_steps=1)
    quiet = runs["finetune_glue"] | {"quiet": True, "output_dir": str(tmp_path / "quiet")}
    code = """
import json, sys
from importlib import import_module
for name, options in json.load(open(sys.argv[1])):
    print("===", name, file=sys.stderr, flush=True)
    import_module(f"hf_hybrid.recipes.{name}").main(options)
"""
    (tmp_path / "runs.json").write_text(json.dumps([*runs.items(), ["finetune_glue", quiet]]))
    command = [sys.executable, "-c", code, str(tmp_path / "runs.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    printed = dict.fromkeys(runs, "")
    *parts, last = done.stderr.split("=== ")[1:]
    for part in parts:
        name, _, printed[name] = part.partition("\n")
    assert last == "finetune_glue\n", last
    for name, text in printed.items():
        lines = text.splitlines()
        assert all(LINE.fullmatch(line) for line in lines), text
        messages = [line[9:] for line in lines]
        assert len(set(messages)) == len(messages) and not re.search("{'|pin_memory|LOAD REPORT|\r", text), text
        for event in (
            r"step 2 of 2: loss [\d.]+, [\d,]+ tokens/s",
            "evaluation after step 1: loss",
            "checkpoint-2 is saved",
        ):
            assert len(re.findall(event, text)) == 1, (name, event, text)
        assert messages[-1] == f"All files of this run are in {tmp_path / name}"
    assert (
        "no weights for classifier.dense, classifier.out_proj: they start from random values"
        in printed["finetune_glue"]
    )


def test_the_bar(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Loss, tokens per second and time left in one bar that stays, also while it evaluates."""
    args, control = TrainingArguments(output_dir="run", use_cpu=True, report_to="none"), TrainerControl()
    state = TrainerState(max_steps=4, is_world_process_zero=True)
    report = ProgressReport(bar=True)
    caplog.set_level("INFO", "hf_hybrid")
    report.on_train_begin(args, state, control)
    for step in range(1, 5):
        state.global_step = step
        report.on_step_end(args, state, control)
        report.on_log(args, state, control, logs={"loss": 2.0 / step, "tokens_per_second": 12345.6, "epoch": 1.0})
    for _ in range(3):
        report.on_prediction_step(args, state, control, eval_dataloader=range(3))
    report.on_evaluate(args, state, control, metrics={"eval_loss": 0.51234, "eval_runtime": 3.0, "epoch": 1.0})
    report.on_save(args, state, control)
    report.on_log(args, state, control, logs={"train_loss": 1.0})
    report.on_step_end(args, state, control)
    report.on_train_end(args, state, control)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1, "one bar"
    assert "evaluating 3/3" in shown
    assert re.search(r"training 100%\|.*\| 4/4, loss=0.5, tokens/s=12,346, left=00:00\s*$", shown), shown
    assert [record.getMessage() for record in caplog.records] == [
        "evaluation after step 4: loss 0.5123",
        "checkpoint-4 is saved",
    ]


def test_the_time_left_keeps_to_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    args, control = TrainingArguments(output_dir="run", use_cpu=True, report_to="none"), TrainerControl()
    caplog.set_level("INFO", "hf_hybrid")
    report = ProgressReport(max_minutes=2, bar=False)
    state = TrainerState(max_steps=10**12, is_world_process_zero=True)
    report.on_train_begin(args, state, control)
    state.global_step = 5
    report.on_log(args, state, control, logs={"loss": 1.25})
    assert re.fullmatch(r"step 5: loss 1.25, 0[12]:\d\d left", caplog.messages[-1])


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    args, control = TrainingArguments(output_dir="run", use_cpu=True, report_to="none"), TrainerControl()
    report, state = ProgressReport(bar=True), TrainerState(max_steps=2, is_world_process_zero=False)
    caplog.set_level("INFO", "hf_hybrid")
    report.on_train_begin(args, state, control)
    report.on_step_end(args, state, control)
    report.on_log(args, state, control, logs={"loss": 1.0})
    report.on_prediction_step(args, state, control, eval_dataloader=range(3))
    report.on_evaluate(args, state, control, metrics={"eval_loss": 0.5})
    report.on_save(args, state, control)
    report.on_train_end(args, state, control)
    assert capsys.readouterr().err == "" and not caplog.records


def test_a_checkpoint_that_does_not_fit_is_explained(checkpoint: Path) -> None:
    """The table of Transformers is part of the error, where the error speaks of it."""
    load_model = import_module("hf_hybrid.recipes.support.models").load_model
    auto_class = import_module("transformers").AutoModelForSeq2SeqLM
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded as AutoModelForSeq2SeqLM.*MISMATCH"):
        load_model(auto_class, str(checkpoint), hidden_size=32)

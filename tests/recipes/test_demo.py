"""The demonstration end to end in small, from random weights and from a checkpoint, and what its parts promise."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import demo
from hf_hybrid.recipes.support import demo_plans
from hf_hybrid.recipes.support.demo_data import HIDDEN_LINE, DataPlan, read_rows, write_data, write_rows
from hf_hybrid.recipes.support.demo_report import write_report
from hf_hybrid.recipes.support.demo_samples import fill_in_html, split_at_sentinels

Finished = tuple[Path, dict, str]
REPOSITORY = Path(__file__).resolve().parents[2]


def run_demo(options: dict) -> tuple[dict, str]:
    """Metrics and printed text."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        metrics = demo.main(options)
    return metrics, printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Folder, metrics and printed text of one quick run from random weights."""
    folder = tmp_path_factory.mktemp("demo") / "output"
    metrics, printed = run_demo({"from_scratch": True, "quick": True, "output_dir": str(folder), "seed": 7})
    return folder, metrics, printed


@pytest.fixture(scope="module")
def continued(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same of a run from the checkpoint of the other, which reads other libraries."""
    plan = replace(
        demo_plans.QUICK_PLAN,
        data=replace(
            demo_plans.QUICK_PLAN_FROM_SCRATCH.data, new_families=("joblib", "networkx"), max_source_bytes=1_000_000
        ),
        pretraining={**demo_plans.QUICK_PLAN.pretraining, "input_length": 64, "max_steps": 3, "eval_steps": 2},
        classification={**demo_plans.QUICK_PLAN.classification, "max_steps": 2},
        summarization={**demo_plans.QUICK_PLAN.summarization, "max_steps": 2, "max_target_length": 12},
    )
    folder = tmp_path_factory.mktemp("continued") / "output"
    loaded = {"logits_equal": True, "generated_equal": True, "largest_difference": 0.0, "texts": [], "description": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "plan_of", lambda **options: plan)
        patch.setattr(demo, "reload_in_clean_process", lambda *args: loaded)  # the other run does it
        options = {"model_name_or_path": str(finished[0] / "pretrained"), "quick": True, "output_dir": str(folder)}
        metrics, printed = run_demo(options)
    return folder, metrics, printed


def test_quick_demo_leaves_everything(finished: Finished) -> None:
    folder, metrics, printed = finished
    for checkpoint in ("pretrained", "classifier", "summarizer"):
        for name in ("model.safetensors", "config.json", "tokenizer.json", "metrics.json", "loss_curve.png"):
            assert (folder / checkpoint / name).is_file(), f"{checkpoint}/{name}"
        assert model_card_problems((folder / checkpoint / "README.md").read_text()) == []
    assert json.loads((folder / "metrics.json").read_text())["seed"] == 7
    assert len(metrics["phases"]) == 8 and all(phase["seconds"] >= 0 for phase in metrics["phases"])
    assert metrics["peak_memory_mb"] > 0
    assert str((folder / "report.html").resolve()) in printed.splitlines()[-1]


def test_one_line_per_phase_and_nothing_else(finished: Finished, continued: Finished) -> None:
    for _, _, printed in (finished, continued):
        phases, rest = printed.split("\n\n", maxsplit=1)
        lines = phases.splitlines()
        assert [line[:4] for line in lines] == [f"{number}/8 " for number in range(1, 9)]
        assert all(re.search(r" \d+ s( |$)", line) for line in lines)
        assert rest.startswith("Done in ")
        assert not [line for line in printed.splitlines() if line.startswith("{")]  # the logs of the Trainer


def test_checkpoint_reads_documents_that_it_has_not_seen(continued: Finished, finished: Finished) -> None:
    folder, metrics, _ = continued
    assert metrics["checkpoint"] == "pretrained" and not metrics["from_scratch"]
    assert metrics["data"]["libraries"] == ["joblib", "networkx"]
    seen = {row["text"] for row in read_rows(finished[0] / "data" / "corpus" / "train.jsonl")}
    assert not seen & {row["text"] for row in read_rows(folder / "data" / "corpus" / "train.jsonl")}
    text = metrics["pretraining"]
    assert {"text_loss_before", "text_accuracy_before", "text_loss", "text_entropy"} <= text.keys()
    assert text["steps"] <= 3 and text["text_loss_before"] != text["text_loss"]
    claims = [check["claim"] for check in metrics["checks"]]
    assert len(claims) == 6 and "new documents" in claims[0]


def test_report_opens_with_a_picture_and_three_samples(continued: Finished, finished: Finished) -> None:
    for folder, metrics, _ in (continued, finished):
        page = (folder / "report.html").read_text(encoding="utf-8")
        opening, rest = page.split("<h2>", maxsplit=1)
        assert opening.count("data:image/png;base64,") == 1 and opening.count("<blockquote>") == 3
        assert "no, it did not" not in opening and rest.count("data:image/png;base64,") == 5
        assert f"training in {metrics['precision']}" in page
    samples = json.loads((continued[0] / "samples.json").read_text())
    assert len(samples["prompts"]) == 3 and all("<extra_id_0>" not in one["filled"] for one in samples["prompts"])
    assert len(samples["fill_ins"]) == len(samples["fill_ins_before"]) > 0
    assert [part.get("hidden") for part in samples["fill_ins"][0]] == [
        part.get("hidden") for part in samples["fill_ins_before"][0]
    ]


def test_summaries_are_asked_for_as_in_pretraining(finished: Finished) -> None:
    folder, _, _ = finished
    row = read_rows(folder / "data" / "summarization" / "train.jsonl")[0]
    assert row["summary"] == HIDDEN_LINE + row["targets"][0] and HIDDEN_LINE.strip() not in row["document"]
    predictions = read_rows(folder / "summarizer" / "predictions.jsonl")
    assert all("<extra_id" not in text for row in predictions for text in (row["prediction"], *row["references"]))


def test_quick_demo_reloads_bit_for_bit(finished: Finished) -> None:
    folder, metrics, _ = finished
    assert metrics["reload"]["logits_equal"] and metrics["reload"]["generated_equal"]
    assert metrics["reload"]["largest_difference"] == 0.0
    assert (folder / "reload" / "reload.py").is_file()


def test_quick_demo_reports_what_it_measured(finished: Finished) -> None:
    folder, metrics, _ = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "src=" not in re.sub(r'src="data:image/png;base64,[^"]+"', "", page), "the report needs other files"
    for phase in metrics["phases"]:
        assert phase["name"].split(":")[0] in page
    # An untrained model passes no check but that of loading, and the report must say so.
    passed = {check["claim"]: check["passed"] for check in metrics["checks"]}
    assert len(passed) == 5
    assert page.count("no, it did not") == list(passed.values()).count(False) >= 1
    accuracy = metrics["classification"]["eval_accuracy"]
    rows = read_rows(folder / "data" / "classification" / "validation.jsonl")
    assert math.isclose(accuracy * len(rows), round(accuracy * len(rows)))
    assert 0 <= metrics["classification"]["baselines"]["majority"] <= 1
    assert metrics["summarization"]["baselines"]["rouge1"] > 0
    assert metrics["pretraining"]["text_entropy"] > 0


def test_pretraining_text_and_validation_rows_come_from_different_files(tmp_path: Path) -> None:
    counts = write_data(
        tmp_path, DataPlan(families=("numpy", "sklearn"), max_source_bytes=1_000_000, max_per_class=75)
    )
    corpus = " ".join(row["text"] for row in read_rows(tmp_path / "corpus" / "train.jsonl"))
    corpus = " ".join(corpus.split())
    summaries = read_rows(tmp_path / "summarization" / "validation.jsonl")
    documents = [" ".join(row["document"].split()) for row in summaries]
    assert len(documents) == counts["summarization_pairs"]["validation"] > 5
    # Docstrings that are repeated in other files are allowed to occur, whole files are not.
    assert sum(document in corpus for document in documents) <= 0.1 * len(documents)


def test_classes_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few docstrings"):
        write_data(tmp_path, DataPlan(families=("numpy",), max_source_bytes=300_000))


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"not an empty folder.*DEMO_OUTPUT"):
        demo.main(["--output_dir", str(tmp_path), "--quick", "True"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_time_limit_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`max_minutes` must be positive"):
        demo.main({"output_dir": str(tmp_path / "new"), "max_minutes": 0.0})


def test_checkpoint_and_random_weights_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="`from_scratch` starts from random weights, but `model_name_or_path` names 'x'"
    ):
        demo.main({"output_dir": str(tmp_path / "new"), "from_scratch": True, "model_name_or_path": "x"})


def test_installed_package_without_checkpoint_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert Path(demo.find_checkpoint(None)) == REPOSITORY / "checkpoints" / "spade-small"
    monkeypatch.setattr(
        demo, "__file__", str(tmp_path / "lib" / "site-packages" / "hf_hybrid" / "recipes" / "demo.py")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo", "--output_dir", str(tmp_path / "new")])
    with pytest.raises(
        SystemExit, match="`checkpoints/spade-small` is not here.*--model_name_or_path.*--from_scratch"
    ):
        demo.command_line()
    assert not (tmp_path / "new").exists()


def test_clock_divides_the_time_that_is_left_and_never_gives_nothing() -> None:
    clock = demo.Clock(10.0, {"first": 1.0, "second": 2.0, "rest": 1.0})
    assert 2.4 < clock.limit("first") <= 2.5
    clock.start -= 60
    assert 5.9 < clock.limit("second") <= 6.0
    clock.start -= 3600
    assert clock.limit("second") > 0


def test_threads_leave_the_cores_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_plans.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(demo_plans.os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert demo_plans.free_threads() == 2  # as the user wants
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert demo_plans.free_threads() == 1
    monkeypatch.setattr(demo_plans.os, "getloadavg", lambda: (0.2, 0.0, 0.0))
    assert demo_plans.free_threads() == 2


def test_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for dtype, expected in (
        (torch.float32, ({}, "float32")),
        (torch.bfloat16, ({"bf16": True, "use_cpu": True}, "bfloat16")),
    ):
        monkeypatch.setattr(demo_plans, "product_dtype", lambda device, dtype=dtype: dtype)
        assert demo_plans.precision_options() == expected


def test_report_says_when_a_phase_was_cut_short(finished: Finished, tmp_path: Path) -> None:
    folder, metrics, _ = finished
    phases = [dict(phase) for phase in metrics["phases"]]
    phases[2].update(steps=2, cut_short=True)
    samples = json.loads((folder / "samples.json").read_text())
    page = write_report(tmp_path, {**metrics, "phases": phases}, samples).read_text(encoding="utf-8")
    assert "Ended by the time limit, with the learning rate at its end: " + phases[2]["name"] in page
    assert "Ended by the time limit" not in (folder / "report.html").read_text(encoding="utf-8")


def poisoned(value: object) -> object:
    """The same record with markup in every string, and in a name of every table of counts."""
    markup = "<script>alert('x')</script><img src=x onerror='y'>"
    if isinstance(value, str):
        return markup + value
    if isinstance(value, dict):
        changed = {key: poisoned(item) for key, item in value.items()}
        counts = value and all(type(item) in (int, float) for item in value.values())  # by the name of a class, say
        return {**changed, markup: 1} if counts else changed
    return [poisoned(item) for item in value] if isinstance(value, list) else value


def test_nothing_in_the_data_becomes_markup_of_the_report(finished: Finished, tmp_path: Path) -> None:
    folder, metrics, _ = finished
    samples = json.loads((folder / "samples.json").read_text())
    page = write_report(tmp_path, poisoned(metrics), poisoned(samples)).read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;") > 20
    assert "<script" not in page and "<img src=x" not in page and "onerror='y'" not in page
    assert page.count("<span class=") == len(metrics["checks"])  # its own markup stays


def test_split_at_sentinels() -> None:
    sentinels = [99, 98, 97]
    assert split_at_sentinels([5, 99, 6, 7, 98, 8, 1, 9], sentinels, eos=1) == ([5], {0: [6, 7], 1: [8]})
    assert split_at_sentinels([99, 6, 99, 7, 1], sentinels, eos=1) == ([], {0: [6]})
    assert split_at_sentinels([], sentinels, eos=1) == ([], {})


def test_fill_ins_are_escaped() -> None:
    text = fill_in_html([{"text": "a <b> & "}, {"hidden": "x<y", "filled": " x<y "}, {"hidden": "z", "filled": ""}])
    assert "<b>" not in text and "a &lt;b&gt; &amp; " in text
    assert text.count('class="right"') == 1 and text.count('class="wrong"') == 1


def test_fill_ins_show_both_attempts() -> None:
    before = [{"text": "a "}, {"hidden": "b", "filled": "<i>"}]
    after = [{"text": "a "}, {"hidden": "b", "filled": " b"}]
    page = fill_in_html(after, before)
    assert page.index('class="wrong">&lt;i&gt;') < page.index('class="right"> b') and page.count("<del>") == 1


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [{"text": "äöü\nline", "label": "b"}, {"text": "", "label": "a"}]
    write_rows(tmp_path / "deep" / "rows.jsonl", rows)
    assert read_rows(tmp_path / "deep" / "rows.jsonl") == rows


@pytest.mark.slow
def test_full_demo_keeps_what_it_claims(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The whole run from the checkpoint of the repository, on whatever machine this is; the time limit is its own."""
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as shown, caplog.at_level(logging.WARNING):
        metrics, _ = run_demo({"output_dir": str(tmp_path / "output")})
    assert time.monotonic() - started < 6 * 60
    assert not [record.getMessage() for record in caplog.records] and not [str(one.message) for one in shown]
    # That summaries beat the first words is measured and reported, and not reached with this checkpoint (docs/results/demonstration.md).
    claims = [check for check in metrics["checks"] if "ROUGE" not in check["claim"]]
    assert not [f"{check['claim']}: {check['measured']}" for check in claims if not check["passed"]]

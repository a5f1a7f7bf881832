"""The demonstration end to end in its quick form, and what its parts promise."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import demo
from hf_hybrid.recipes.support.demo_data import DataPlan, entropy, read_rows, write_data, write_rows
from hf_hybrid.recipes.support.demo_report import write_report
from hf_hybrid.recipes.support.demo_samples import fill_in_html, split_at_sentinels


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """Folder, metrics and printed text of one quick run."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo") / "output"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        metrics = demo.main({"quick": True, "output_dir": str(folder), "seed": 7})
    return folder, metrics, printed.getvalue()


def test_quick_demo_leaves_everything(finished: tuple[Path, dict, str]) -> None:
    folder, metrics, printed = finished
    for checkpoint in ("pretrained", "classifier", "summarizer"):
        for name in ("model.safetensors", "config.json", "tokenizer.json", "metrics.json", "loss_curve.png"):
            assert (folder / checkpoint / name).is_file(), f"{checkpoint}/{name}"
        assert model_card_problems((folder / checkpoint / "README.md").read_text()) == []
    assert json.loads((folder / "metrics.json").read_text())["seed"] == 7
    assert len(metrics["phases"]) == 8 and all(phase["seconds"] >= 0 for phase in metrics["phases"])
    assert metrics["peak_memory_mb"] > 0
    headings = re.findall(r"^=== (\d)/8  ", printed, re.MULTILINE)
    assert headings == [str(number) for number in range(1, 9)]
    assert str((folder / "report.html").resolve()) in printed.splitlines()[-1]


def test_quick_demo_reloads_bit_for_bit(finished: tuple[Path, dict, str]) -> None:
    folder, metrics, _ = finished
    assert metrics["reload"]["logits_equal"] and metrics["reload"]["generated_equal"]
    assert metrics["reload"]["largest_difference"] == 0.0
    assert (folder / "reload" / "reload.py").is_file()


def test_quick_demo_reports_what_it_measured(finished: tuple[Path, dict, str]) -> None:
    folder, metrics, _ = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
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
    assert metrics["pretraining"]["unigram_entropy"] > metrics["pretraining"]["text_entropy"] * 0.5


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


def test_clock_never_gives_nothing() -> None:
    clock = demo.Clock(minutes=10.0)
    assert 4.9 < clock.limit(0.5) <= 5.0
    clock.start -= 3600
    assert clock.limit(0.5) > 0


def test_report_says_when_a_phase_was_cut_short(finished: tuple[Path, dict, str], tmp_path: Path) -> None:
    folder, metrics, _ = finished
    phases = [dict(phase) for phase in metrics["phases"]]
    phases[2].update(steps=2, cut_short=True)
    samples = json.loads((folder / "samples.json").read_text())
    page = write_report(tmp_path, {**metrics, "phases": phases}, samples).read_text(encoding="utf-8")
    assert "Cut short by the time limit: " + phases[2]["name"] in page
    assert "Cut short" not in (folder / "report.html").read_text(encoding="utf-8")


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


def test_nothing_in_the_data_becomes_markup_of_the_report(finished: tuple[Path, dict, str], tmp_path: Path) -> None:
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


def test_entropy() -> None:
    assert entropy(np.array([3, 3, 3])) == 0.0
    assert math.isclose(entropy(np.arange(8)), math.log(8))


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [{"text": "äöü\nline", "label": "b"}, {"text": "", "label": "a"}]
    write_rows(tmp_path / "deep" / "rows.jsonl", rows)
    assert read_rows(tmp_path / "deep" / "rows.jsonl") == rows

"""Every recipe explains itself, and every script calls its recipe."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from hf_hybrid.recipes.support.models import parse_overrides
from hf_hybrid.recipes.support.options import split_names

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "scripts").glob("run_*.py"))
TRAINING = (
    "pretrain_span_corruption",
    "pretrain_clm",
    "pretrain_mlm",
    "finetune_glue",
    "finetune_summarization",
    "finetune_translation",
    "train_lra",
    "classify_image",
    "classify_audio",
)


@pytest.mark.parametrize(
    "name",
    [*TRAINING, "generate", "generate_lra", "evaluate", "push_to_hub", "export_model", "merge_adapter", "lm_eval"]
    + ["inspect_activations", "train_synthetic"],
)
def test_help_is_complete(name, capsys):
    main, doc = (getattr(import_module(f"hf_hybrid.recipes.{name}"), item) for item in ("main", "__doc__"))
    texts = {}
    for word in ("--help", *(["--help-all"] if name in TRAINING else [])):
        with pytest.raises(SystemExit) as stopped:
            main([word])
        assert stopped.value.code == 0
        texts[word] = capsys.readouterr().out
        assert all(line.strip() in texts[word] for line in re.split(r"\n| {4,}", doc)), (
            "the example commands are reflowed"
        )
    if name in TRAINING:
        assert 5 <= len(re.findall("^  --", texts["--help"], flags=re.MULTILINE)) <= 15
        assert "--output_dir" in texts["--help"] and "--resume_from_checkpoint" in texts["--help"]
        for option in ("--data", "--output_dir", "--seed", "--resume_from_checkpoint", "--max_minutes", "--max_steps"):
            assert f"  {option} " in texts["--help-all"]
        for title in ("Data:", "Model:", "Training:", "Options of the Trainer of Transformers:"):
            assert f"\n{title}\n" in texts["--help-all"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_only_call_their_recipe(script):
    name = script.stem.removeprefix("run_")
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    entry = "command_line" if name == "demo" else "main"
    assert lines == [f"from hf_hybrid.recipes.{name} import {entry}", 'if __name__ == "__main__":', f"    {entry}()"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("a=1,b=[0,1],c=word", {"a": 1, "b": [0, 1], "c": "word"}),
        ("a=True, b=None,c=1e-3", {"a": True, "b": None, "c": 1e-3}),
        ("a=x,y", {"a": "x,y"}),
    ],
)
def test_overrides(text, expected):
    assert parse_overrides(text) == expected


def test_names_are_split_at_commas_unless_they_exist(tmp_path):
    odd = tmp_path / "a,b.txt"
    odd.write_text("x")
    assert split_names([str(odd), "c, d"]) == [str(odd), "c", "d"]
    assert split_names("a,b") == ["a", "b"] and split_names(None) == []


@pytest.mark.parametrize("content", ["[1, 2]", "just text"])
def test_option_files_must_hold_a_mapping(tmp_path, content):
    (tmp_path / "options.yaml").write_text(content)
    main = import_module("hf_hybrid.recipes.pretrain_clm").main
    with pytest.raises(ValueError, match="name: value"):
        main([str(tmp_path / "options.yaml")])
    with pytest.raises(ValueError, match="cannot be read"):
        main([str(tmp_path / "missing.yaml")])

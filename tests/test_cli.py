"""The console command: every recipe has its place, help is quick, mistakes are explained."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers import AutoConfig

from hf_hybrid import cli
from hf_hybrid.recipes import list_recipes
from hf_hybrid.recipes.support.models import parse_overrides


def test_every_recipe_is_a_command() -> None:
    assert sorted(cli.COMMANDS.values()) == sorted(item.name for item in list_recipes())
    assert {command.split()[0] for command in cli.COMMANDS if " " in command} == set(cli._GROUPS)


def test_help_is_quick() -> None:
    """Below a second of processor time (0.1 on an idle core): neither torch nor Transformers is imported for it."""
    for words in (["--help"], ["pretrain", "--help"], ["pretrain", "clm", "--help"], ["evaluate", "glue", "--help"]):
        code = f"""
import sys
from hf_hybrid.cli import main
assert main({words!r}) == 0
assert not {{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules)
"""
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        assert done.returncode == 0, done.stderr
        used = after.children_user + after.children_system - before.children_user - before.children_system
        assert used < 1.0, words


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the command, not the module, and shows about ten options."""
    if cli.COMMANDS[command] == "lm_eval":
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        text = capsys.readouterr().out
        assert "--blimp_data" in text and "hf-hybrid lm-eval --model" in text and "python -m" not in text
        return
    assert cli.main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"hf-hybrid {command}" in text and "python -m" not in text
    assert len([line for line in text.splitlines() if line.startswith("  --")]) <= 15 or command == "data lra"
    assert max(map(len, text.split("Usage:")[-1].splitlines())) <= 110


def test_models_of_the_examples_can_be_built() -> None:
    """Every help shows models: their fields fit together."""
    built = 0
    for recipe in list_recipes():
        text = (import_module(f"hf_hybrid.recipes.{recipe.name}").__doc__ or "").replace("\\\n", " ")
        for line in text.splitlines():
            words = shlex.split(line) if "--config_overrides" in line else []
            if words:
                by_default = "spade_lm" if "pretrain_clm" in words[2] or "clm" in words else "spade"
                arch = words[words.index("--arch") + 1] if "--arch" in words else by_default
                overrides = parse_overrides(words[words.index("--config_overrides") + 1])
                AutoConfig.for_model(arch, **overrides)
                built += 1
    assert built >= 8


def test_overview_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {command} " in text for command in cli.COMMANDS)
        assert len(text.splitlines()) < 48 and max(map(len, text.splitlines())) < 108  # a screen: a line for each
    assert cli.main(["finetune"]) == 0
    text = capsys.readouterr().out
    assert "  finetune glue" in text and "pretrain" not in text.split("Usage")[1]
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("hf-hybrid 0.")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("pretrian clm", "pretrain clm"),
        ("pretrain cml", "pretrain clm"),
        ("summarization", "finetune summarization"),
        ("finetune sumarization", "finetune summarization"),
        ("genrate", "generate"),
        ("pretain", "pretrain"),
        ("xyzzy", "--help"),
    ],
)
def test_a_mistyped_command_is_recognised(words: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"`hf-hybrid {hint}`" in error


def test_a_recipe_runs_under_its_command_and_under_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-hybrid"])
    for words in (["data", "lra"], ["generate_lra"]):
        folder = tmp_path / words[0]
        options = ["--task", "listops", "--num_train", "2", "--num_validation", "1", "--num_processes", "1"]
        options += ["--longer_than", "5", "--shorter_than", "60", "--output_dir", str(folder)]
        assert cli.main([*words, *options]) == 0
        assert list(folder.glob("train*"))
    assert cli.main(["data", "lra", *options]) == 1  # the folder is not empty
    error = capsys.readouterr().err
    assert "hf-hybrid data lra: error:" in error and str(folder) in error and "Traceback" not in error
    with pytest.raises(FileExistsError):
        cli.main(["data", "lra", *options, "--traceback"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "lra", "--num_trian", "2"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("hf-hybrid data lra: error:") and "`--num_train`" in error


def test_a_mistake_in_an_evaluation_names_the_help_of_its_task(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-hybrid"])
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "clm", "--blok_length", "2"])
    assert "`hf-hybrid evaluate clm --help` lists the options" in capsys.readouterr().err


def test_completions() -> None:
    assert cli.completions(["pre"]) == ["pretrain"]
    assert cli.completions(["pretrain", ""]) == ["span-corruption", "clm", "mlm"]
    assert cli.completions(["pretrain", "clm", "--block"]) == ["--block_length"]
    assert "glue" in cli.completions(["evaluate", "g"])
    assert cli.completions(["evaluate", "glue", "--model_n"]) == ["--model_name_or_path"]
    assert cli.completions(["generate", "--help"]) == ["--help", "--help-all"]
    assert cli.completions(["no", "--x"]) == [] and cli.completions(["pretrain", "clm", "x"]) == []
    assert cli.main(["completion", "tcsh"]) == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "hf-hybrid"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hf_hybrid "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    script = 'eval "$(hf-hybrid completion bash)"; COMP_WORDS=(hf-hybrid finetune s); COMP_CWORD=2; _hf_hybrid; echo "${COMPREPLY[@]}"'
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "summarization\n", done.stderr

"""Every example runs at a small size, in one folder, from public names alone, and leaves its picture."""

from __future__ import annotations

import ast
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import hf_hybrid
from hf_hybrid.recipes import list_recipes

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def marks(script: Path) -> list[pytest.MarkDecorator]:
    """The one that trains five models is wide."""
    return [pytest.mark.wide] if script.stem.startswith("listops") else []


@pytest.mark.parametrize("script", [pytest.param(path, id=path.stem, marks=marks(path)) for path in SCRIPTS])
def test_example(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "lora" in script.stem:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXAMPLES_QUICK", "1")
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    picture = tmp_path / "examples-output" / f"{script.stem}.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out.count("\n") > 2
    shutil.rmtree(tmp_path / "examples-output")


def test_there_are_five_and_each_is_short_and_described() -> None:
    assert len(SCRIPTS) == 5
    described = (FOLDER / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 120, script.name
        assert f"({script.name})" in described, script.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_examples_use_public_names(script: Path) -> None:
    recipes = {item.name for item in list_recipes()}
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_hybrid"):
            known = recipes if node.module == "hf_hybrid.recipes" else set(hf_hybrid.__all__)
            assert {alias.name for alias in node.names} <= known and node.module in ("hf_hybrid", "hf_hybrid.recipes")

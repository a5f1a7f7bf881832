"""The workflows of the forge: readable, without rights that they do not need, and with targets that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def steps(jobs: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in jobs.values() for step in job["steps"]]


def test_there_is_one_for_each_purpose() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "tests", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job or "needs" in job for job in content["jobs"].values())
    called = {
        name
        for step in steps(content["jobs"])
        for line in re.findall(r"^make (.*)$", step.get("run", ""), flags=re.MULTILINE)
        for name in line.split()
        if not name.startswith(("$", "{", "}")) and "matrix" not in name
    }
    halves = {
        half for job in content["jobs"].values() for half in job.get("strategy", {}).get("matrix", {}).get("half", [])
    }
    assert called | halves <= TARGETS and called | halves

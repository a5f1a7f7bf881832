"""docs/guarantees.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", PAGE)


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    assert all("`tests/" in row for row in rows)


@pytest.mark.parametrize(("file", "path"), NAMED, ids=[file + path for file, path in NAMED])
def test_named_tests_exist(file: str, path: str) -> None:
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for name in path.split("::")[1:]:
        found = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name]
        assert found, f"{file} has no {name}"
        body = found[0].body

"""Every stored output of the Block-State Transformer is reproduced within its tolerance."""

from __future__ import annotations

from pathlib import Path

import pytest
from check import check_file

FILES = sorted((Path(__file__).parent / "vectors" / "bst").glob("*.safetensors"))


def test_vectors_are_present() -> None:
    assert len(FILES) == 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_vectors_are_reproduced(path: Path) -> None:
    report = check_file(path)
    assert not report.problem
    assert report.rows
    assert not [row for row in report.rows if not row.is_ok]

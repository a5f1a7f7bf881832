"""Texts cut over processes: `pieces_of_texts` in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_pieces_of_texts(processes: int, tmp_path: Path) -> None:
    """Outputs, loss and gradients of one process; the bytes exchanged do not grow with the text; the rest is refused."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.pieces_of_texts", str(processes), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "all alike" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]

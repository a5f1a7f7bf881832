"""Texts, matrices, layers and checkpoints cut over processes, each program in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(program: str, *arguments: object) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", f"tests.distributed.{program}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and "all alike" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def test_pieces_of_texts(tmp_path: Path) -> None:
    """Outputs, loss, gradients and training are those of one process; the bytes exchanged do not grow with the text; what
    cannot be cut is refused."""
    run("pieces_of_texts", 2, tmp_path, "spade_lm", "trainer")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_pieces_of_texts_of_all_models(processes: int, tmp_path: Path) -> None:
    run("pieces_of_texts", processes, tmp_path)


@pytest.mark.slow
def test_matrices_and_layers(tmp_path: Path) -> None:
    """`tp_plan="auto"` and pipeline stages: loss, gradients and generated text of the model in one piece."""
    run("cut_models", tmp_path)


@pytest.mark.slow
def test_sharded_checkpoints(tmp_path: Path) -> None:
    """A run sharded by FSDP2 is saved whole, loaded by one process, and resumed by two as if there had been no break."""
    run("sharded_checkpoints", tmp_path)

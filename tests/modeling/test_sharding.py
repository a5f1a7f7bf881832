"""Models sharded by FSDP2 in two processes: `sharded_models` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "mode", ["transformers", *(pytest.param(mode, marks=pytest.mark.wide) for mode in ("plain", "accelerate"))]
)
def test_sharded_models(mode: str, tmp_path: Path) -> None:
    """Float32: loss and gradients of the model in one piece. Bfloat16: kernels of the state spaces in full precision."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.modeling.sharded_models", mode, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and "all alike" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]

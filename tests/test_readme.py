"""The Python snippets of the README run, in their order, in one folder and a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")

README = Path(__file__).parents[1] / "README.md"


def test_snippets_run_in_order(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) >= 3, "the README promises three snippets: pretrain, fine-tune, generate"
    script = tmp_path / "snippets.py"
    script.write_text("\n\n".join(snippets), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy, generated = done.stdout.strip().splitlines()[-2:]
    assert 0 <= float(accuracy) <= 1
    assert generated
    for run in ("runs/pretrain", "runs/classifier"):
        for name in ("model.safetensors", "metrics.json", "arguments.json", "environment.json", "README.md"):
            assert (tmp_path / run / name).exists(), f"{run}/{name}"

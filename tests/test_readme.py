"""The snippets of the README and of the quick start run, in their order, in one folder and a process of their own."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path

import pytest
from factories import TINY_OVERRIDES

pytest.importorskip("datasets")
pytest.importorskip("sentencepiece")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FRONT, _, REFERENCE = README.partition("\n# Reference\n")


def python_snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(code: str, folder: Path) -> str:
    """Runs code as a script in a folder, with the checkpoints of the repository where it has any; returns what it prints."""
    if (ROOT / "checkpoints").is_dir() and not (folder / "checkpoints").exists():
        (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    (folder / "snippets.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "snippets.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_front_page_is_short() -> None:
    """Two screens; no line of a table that nobody reads."""
    assert len(FRONT.splitlines()) < 120 and REFERENCE
    for line in README.splitlines():
        assert len(re.sub(r"\]\([^)]*\)", "]", line)) < 210, line
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


OTHERS = [pytest.param(name, marks=pytest.mark.wide) for name in ("spade_lm", "longvq", "bst", "mega")]


@pytest.mark.parametrize("arch", ["seqboat", *OTHERS])
def test_snippets_of_the_readme(arch: str, tmp_path: Path) -> None:
    """Those of Python as they stand, and with the other architectures that one of them names."""
    snippets = python_snippets(FRONT)
    assert snippets and not python_snippets(REFERENCE)
    code = "\n\n".join(snippets)
    assert f'"{arch}"' in code
    causal = ", bidirectional=False" if arch == "mega" else ""
    printed = run(code.replace('for_model("seqboat"', f'for_model("{arch}"{causal}'), tmp_path).strip().splitlines()
    assert len(printed) >= len(snippets) and any(re.match(r"tensor\(\d+\.\d+.*tensor\(\[", line) for line in printed)


# What makes the commands of the README short enough for a test.
SHORTER = {
    "train-tokenizer": "--vocab_size 600",
    "pretrain": "--max_steps 2 --input_length 64 --per_device_train_batch_size 2 --validation_fraction 0.1 --use_cpu --config_overrides "
    + TINY_OVERRIDES["spade"]
    + ",decoder_layers=1",
    "finetune": "--max_steps 2 --max_source_length 64 --max_target_length 8 --per_device_train_batch_size 2 --use_cpu",
    "push": "",
}


def test_commands_of_the_readme(tmp_path: Path) -> None:
    """Pretrain, fine-tune, share: as they stand, but with fewer steps and a smaller model."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)][:12]
    (tmp_path / "corpus.txt").write_text("\n\n".join(topics))
    rows = [{"document": text[100:300], "summary": text[:30]} for text in topics]
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = re.findall(r"```bash\n(.*?)```", FRONT, flags=re.DOTALL)
    commands = [
        line.partition("  #")[0] for block in blocks for line in block.splitlines() if line.startswith("hf-hybrid")
    ]
    assert [command.split()[1] for command in commands] == list(SHORTER)
    words = [[*command.split()[1:], *SHORTER[command.split()[1]].split()] for command in commands]
    run(f"from hf_hybrid.cli import main\nfor words in {words!r}:\n    assert main(words) == 0, words\n", tmp_path)
    assert (tmp_path / "export" / "model.safetensors").is_file() and list((tmp_path / "export").glob("*.py"))


def test_snippets_of_the_quick_start(tmp_path: Path) -> None:
    snippets = python_snippets((ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"))
    accuracy, generated = run("\n\n".join(snippets), tmp_path).strip().splitlines()[-2:]
    assert 0 <= float(accuracy) <= 1
    assert generated
    for name in ("runs/pretrain", "runs/classifier"):
        for file in ("model.safetensors", "metrics.json", "arguments.json", "environment.json", "README.md"):
            assert (tmp_path / name / file).exists(), f"{name}/{file}"

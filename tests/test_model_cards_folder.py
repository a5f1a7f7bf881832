"""The reviewed cards: valid, complete, and one for every architecture and every trained checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard as HubCard

from hf_hybrid.auto import ARCHITECTURES
from hf_hybrid.hub import model_card_problems

ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
TYPES = {architecture.model_type: architecture for architecture in ARCHITECTURES}
SECTIONS = [
    *("How to use", "Architecture", "Training", "Evaluation"),
    *("Intended use", "Limits", "Citation"),
]


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_is_valid_and_complete(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert model_card_problems(text) == []
    data = HubCard(text).data
    assert data.library_name == "transformers" and "hf_hybrid" in data.tags
    (model_type,) = set(data.tags) & TYPES.keys()
    sections = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert [name for name in sections if name in SECTIONS] == SECTIONS
    assert "trust_remote_code=True" in text and f"| model type | {model_type} |" in text
    named = re.search(r"^\| class(?:es)? \| (.+) \|$", text, flags=re.MULTILINE)
    assert named and set(named[1].split(", ")) <= set(TYPES[model_type].heads.values())
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda found: found.model_type)
def test_every_architecture_has_a_card_that_names_all_heads(architecture) -> None:
    text = (ROOT / "model_cards" / f"{architecture.model_type}.md").read_text(encoding="utf-8")
    classes = re.search(r"^\| classes \| (.+) \|$", text, flags=re.MULTILINE)
    assert classes and set(classes[1].split(", ")) == set(architecture.heads.values())


def test_checkpoints_say_what_they_were_measured_on() -> None:
    """A card of a trained checkpoint has metrics, a split, hardware, versions and the commit."""
    checkpoints = [path for path in CARDS if path.stem not in TYPES]
    assert checkpoints
    for path in checkpoints:
        text = path.read_text(encoding="utf-8")
        results = HubCard(text).data.eval_results
        assert results and all(result.dataset_split for result in results), path.name
        for row in ("revision of hf_hybrid", "hardware", "torch", "transformers", "seed", "optimizer steps"):
            assert re.search(rf"^\| {row} \| .+ \|$", text, flags=re.MULTILINE), (path.name, row)
        assert "Lengths used: not measured" not in text

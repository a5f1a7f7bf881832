"""The published checkpoint `mnaylor/mega-base-wikitext`, against the slices of the integration tests of Transformers 4.x.

It also decides how its head is tied: its conversion assigned a separately trained head, while its configuration ties it to the
embedding (see `tied_weights_conflict`).
"""

from __future__ import annotations

import pytest
import torch

from hf_hybrid.modeling.mega.mega_heads import MegaForMaskedLM, MegaModel

NAME = "mnaylor/mega-base-wikitext"
IDS = torch.tensor([[0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2]])
LOGITS = torch.tensor([[67.8389, 10.1470, -32.7148], [-11.1655, 29.1152, 23.1304], [-3.8015, 66.0397, 29.6733]])
STATES = torch.tensor([[1.1767, -0.6349, 2.8494], [-0.5109, -0.7745, 1.9495], [-0.3287, -0.2111, 3.3367]])
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

pytestmark = pytest.mark.network


@torch.no_grad()
def test_states() -> None:
    states = MegaModel.from_pretrained(NAME).eval()(IDS).last_hidden_state
    assert states.shape == (1, 11, 128)
    torch.testing.assert_close(states[0, :3, :3], STATES, **TOLERANCE)


@torch.no_grad()
def test_logits() -> None:
    logits = MegaForMaskedLM.from_pretrained(NAME).eval()(IDS).logits
    assert logits.shape == (1, 11, 50265)
    torch.testing.assert_close(logits[0, :3, :3], LOGITS, **TOLERANCE)

"""docs/works_with.md says what the table says, and the table says something of every architecture."""

from __future__ import annotations

import pytest
from works_with import CLIENTS, MODEL_TYPES, PAGE, Client, cell, render

from hf_hybrid.auto import ARCHITECTURES


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `python tests/company/works_with.py`"


def test_every_architecture_has_a_column() -> None:
    assert set(MODEL_TYPES) == {architecture.model_type for architecture in ARCHITECTURES}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_every_cell_is_filled_once(client: Client) -> None:
    for model_type in MODEL_TYPES:
        assert cell(client, model_type)
        assert (model_type in client.impossible) != (model_type in client.works or model_type in client.refused)

"""Recipes whose processes read a stream together."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_context_parallel import run


@pytest.mark.parametrize(
    "recipes", [["clm"], pytest.param(["mlm", "span_corruption"], marks=pytest.mark.slow)], ids="-".join
)
def test_a_stream_of_two_processes_is_continued_by_one_and_by_four(recipes: list[str], tmp_path: Path) -> None:
    """No row twice, none lost, all in the order of one process, and the weights of a run without a break."""
    run("resumed_streams", tmp_path, *recipes)

"""Runs under FSDP2 that another number of processes resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_context_parallel import run


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["spade_lm", "spade"], ["mega", "seqboat"], ["bst", "longvq"]], ids="-".join)
def test_sharded_runs_are_resumed_by_other_numbers_of_processes(kinds: list[str], tmp_path: Path) -> None:
    """Two and four processes train, save shards, and resume one another; one, and two with copies, resume them whole. Weights are
    those of one process without a break; shards are loaded by other numbers, joined, and generate the same text."""
    run("resumed_shards", tmp_path, *kinds)

"""Settings of the whole suite: no network, one thread, fixed seeds, a small and deterministic hypothesis profile."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RUN_SLOW", "yes")  # the markers of pytest choose, not the library's own switch
# One thread here and in every process that a test starts, whatever the environment says: sums of several threads differ in the
# last bit from those of one, and many comparisons are bitwise.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # torch may have been imported before this file

settings.register_profile(
    "suite", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test whose cases are all wide would be missing from the default suite."""
    if any("::" in argument for argument in config.args):
        return
    kept: dict[tuple[Path, str], bool] = {}
    for item in items:
        name = item.path, getattr(item, "originalname", item.name)
        kept[name] = kept.get(name, False) or item.get_closest_marker("wide") is None
    missing = sorted(f"{path.name}::{name}" for (path, name), is_kept in kept.items() if not is_kept)
    if missing:
        raise pytest.UsageError(
            f"Every case of these tests is marked as wide; one of each has to stay: {', '.join(missing)}"
        )


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)

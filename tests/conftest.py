"""Settings of the whole suite: no network, one thread, fixed seeds, a small and deterministic hypothesis profile."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
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

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

from hf_hybrid.ops.branches import forced_branch

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with the marker `both_branches` run twice: as they are, and in the forms for accelerators; with `only="cpu"` once."""
    marker = metafunc.definition.get_closest_marker("both_branches")
    if marker is not None and marker.kwargs.get("only") != "cpu":
        metafunc.fixturenames.append("branch_name")
        marks = [pytest.mark.wide] if marker.kwargs.get("wide") else []
        metafunc.parametrize("branch_name", ["cpu", pytest.param("accelerator", marks=marks)])


@pytest.fixture(autouse=True)
def branch(request: pytest.FixtureRequest) -> Iterator[None]:
    """The forms of operations that a test marked with `both_branches` runs."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    name = parameters.get("branch_name")
    with forced_branch(name) if name == "accelerator" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def console() -> Iterator[None]:
    """What a recipe sets for its process, such as `--quiet` or the level of a logger, ends with its test."""
    import transformers  # here: some files name their Hub before anything of it is imported

    from hf_hybrid.recipes.support.console import is_quiet, set_quiet

    ours, theirs = logging.getLogger("hf_hybrid"), transformers.utils.logging
    level, verbosity, has_bars = ours.level, theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    quiet = is_quiet()
    yield
    set_quiet(quiet)
    ours.setLevel(level)
    theirs.set_verbosity(verbosity)
    (theirs.enable_progress_bar if has_bars else theirs.disable_progress_bar)()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of the random numbers of every test and fixture")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    """What is made once for many tests is the same whichever of them comes first."""
    if fixturedef.scope != "function":
        _seed_everything(request.config.getoption("--seed"))


@pytest.fixture(autouse=True)
def fixed_seed(request: pytest.FixtureRequest) -> None:
    """Every test starts from the same random state."""
    _seed_everything(request.config.getoption("--seed"))

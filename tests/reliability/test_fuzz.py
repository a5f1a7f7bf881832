"""What if a call, a configuration or a text to generate is nonsense, or merely unusual: random ones of every architecture.

Each ends with an error that names an argument, or with a finite result that is the same in float32 and float64 and does not depend
on the other rows of the batch; a text is the same with and without a cache. The examples are the same in every run; a failing one
is printed, and replays as `check_call(Call(...))`, `check_settings(Settings(...))` or `check_generation(Generation(...))`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fuzz_calls import calls, check_call
from fuzz_configurations import check_settings, settings_of
from fuzz_generation import check_generation, generations
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

from hf_hybrid.auto import ARCHITECTURES

TYPES = [architecture.model_type for architecture in ARCHITECTURES]


def run(strategy: SearchStrategy[Any], check: Callable[[Any], str], count: int) -> None:
    """Checks `count` examples, of which at least one in twelve must not be refused: else the generator tests nothing."""
    ends: Counter[str] = Counter()

    def one(example: Any) -> None:
        ends[check(example)] += 1

    for number in range(3):  # a few examples may all be refused; which are drawn depends on the version of hypothesis
        drawn = settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
        seed(number)(drawn(given(strategy)(one)))()
        if ends["computed"] >= ends.total() // 12:
            return
    raise AssertionError(ends)


@pytest.mark.parametrize("model_type", TYPES)
def test_some_calls(model_type: str) -> None:
    run(calls(model_type), check_call, 12)


@pytest.mark.parametrize("model_type", TYPES)
def test_some_configurations(model_type: str) -> None:
    run(settings_of(model_type), check_settings, 12)


@pytest.mark.parametrize("model_type", TYPES)
def test_some_generations(model_type: str) -> None:
    run(generations(model_type), check_generation, 8)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_calls(model_type: str) -> None:
    run(calls(model_type), check_call, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_configurations(model_type: str) -> None:
    run(settings_of(model_type), check_settings, 500)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_generations(model_type: str) -> None:
    run(generations(model_type), check_generation, 500)

"""Transformers' own checks of models and configurations, over every head of every architecture."""

from __future__ import annotations

import os

import pytest
from model_checks import all_test_classes
from source_distribution import SKIP_VARIABLE, SourceDistributionError

if os.environ.get(SKIP_VARIABLE):
    pytest.skip(f"{SKIP_VARIABLE} is set", allow_module_level=True)

try:
    globals().update(all_test_classes())
except SourceDistributionError as error:
    reason = str(error)

    def test_common_checks_are_available() -> None:
        pytest.fail(reason, pytrace=False)

"""Settings of the common checks of Transformers."""

from __future__ import annotations

import pytest

MARKERS_OF_TRANSFORMERS = (
    "accelerate_tests",
    "all_flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS_OF_TRANSFORMERS:
        config.addinivalue_line("markers", f"{marker}: of the common checks of Transformers")

"""Plugin of pytest that adds the architecture of this folder to the suites: the record, and small settings for `factories.py`."""

from __future__ import annotations

import pytest

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "ema_size": 3}


def pytest_configure(config: pytest.Config) -> None:
    import factories
    from gated_average.configuration_gated_average import GatedAverageConfig

    def build(**overrides: object) -> GatedAverageConfig:
        overrides.pop("dropout_rate", None)  # it has none inside the stack
        return GatedAverageConfig(**SMALL | overrides)

    factories.VARIANTS["gated_average"] = {"default": build}
    factories.TINY_OVERRIDES["gated_average"] = "hidden_size=16,num_hidden_layers=1"

"""Metrics that need no network: `evaluate.load` fetches code from the Hub, `load` does not.

Instances work with `evaluate.combine`:

    evaluate.combine([load("accuracy"), load("f1")]).compute(predictions=[0, 1], references=[0, 1])
"""

from __future__ import annotations

import math
import tempfile
from typing import TYPE_CHECKING

from .metric_names import GLUE_TASKS, ROUGE_TYPES, glue_metric_names

if TYPE_CHECKING:
    from .offline_metrics import OfflineMetric


def metric_names() -> list[str]:
    """Names that `load` accepts."""
    from .offline_metrics import CLASSES

    return list(CLASSES)


def load(name: str, config_name: str | None = None) -> OfflineMetric:
    """A metric by its name in `evaluate`, without a network or downloaded files.

    Args:
        name: one of `metric_names()`.
        config_name: the task, for `glue`.

    Raises:
        ValueError: unknown name or task.
        ImportError: `evaluate` is not installed.
    """
    from .offline_metrics import CLASSES

    if name not in CLASSES:
        raise ValueError(f"Unknown metric {name!r}; accepted are {', '.join(CLASSES)}.")
    return CLASSES[name](config_name=config_name, keep_in_memory=True, cache_dir=tempfile.gettempdir())


def perplexity(loss: float) -> float:
    """exp(loss) for a mean negative log-likelihood in nats; infinity where it overflows."""
    return math.exp(loss) if loss < 709.0 else math.inf


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Code length of a text in bits per byte.

    Args:
        loss: mean negative log-likelihood of a token, in nats.
        num_tokens, num_bytes: size of the text.
    """
    return loss / math.log(2) * num_tokens / num_bytes


__all__ = [
    "GLUE_TASKS",
    "ROUGE_TYPES",
    "bits_per_byte",
    "glue_metric_names",
    "load",
    "metric_names",
    "perplexity",
]

"""A `metric_for_best_model` that no evaluation measures is refused before training, not at the first evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import IntervalStrategy

_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second")


@dataclass(frozen=True)
class NamedMetrics:
    """`compute_metrics` of a `Trainer` that knows what it measures.

    Args:
        compute: the function.
        metric_names: returns the names of its results.
    """

    compute: Callable[[EvalPrediction], dict[str, float]]
    metric_names: Callable[[], Iterable[str]]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.compute(prediction)


def check_best_metric(trainer: Trainer, measured: Iterable[str] | None = None) -> None:
    """Compares `metric_for_best_model` with what the evaluations measure.

    Args:
        trainer: the trainer.
        measured: names of the metrics; default those of `Trainer`. A `compute_metrics` that does not name its results is trusted, and so
            is an `evaluate` or `evaluation_loop` of a class outside of this library.

    Raises:
        ValueError: no evaluation measures it; the message names what they do.
    """
    args, compute = trainer.args, trainer.compute_metrics
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == IntervalStrategy.NO:
        return
    if measured is None:
        if _evaluates_in_its_own_way(trainer):
            return
        measured = _ALWAYS
        if compute is not None and not args.prediction_loss_only:
            names: Any = getattr(compute, "metric_names", None)
            if names is None:
                return
            measured = [*_ALWAYS, *names()]
    data: Any = trainer.eval_dataset
    sets = [f"{name}_" for name in data] if isinstance(data, dict) else [""]
    known = [f"eval_{name}{metric}" for name in sets for metric in measured]
    if f"eval_{wanted.removeprefix('eval_')}" not in known:
        raise ValueError(
            f"`metric_for_best_model` is {wanted!r}, but the evaluations of this run measure {', '.join(known)}: choose one of these."
        )


def _evaluates_in_its_own_way(trainer: Trainer) -> bool:
    """Whether a class outside of this library and Transformers evaluates, and may measure what it likes."""
    packages = (__name__.split(".")[0], "transformers")
    methods = (getattr(type(trainer), name) for name in ("evaluate", "evaluation_loop"))
    return any(method.__module__.split(".")[0] not in packages for method in methods)

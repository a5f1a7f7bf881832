"""Pictures of what a run did. Needs matplotlib (`pip install "hf_hybrid[viz]"`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A colour-blind safe pair, dark enough on white.
TRAIN_COLOUR = "#0072B2"
EVALUATION_COLOUR = "#D55E00"


def new_figure(width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    """A matplotlib figure with one axes, on the file backend whatever the global one is.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "hf_hybrid[viz]".') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    return figure, axes


def plot_loss_curves(
    log_history: Sequence[Mapping[str, float]],
    path: str | os.PathLike,
    *,
    reference_lines: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path | None:
    """Draw training and evaluation loss over the steps.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG to write.
        reference_lines: label -> loss in nats drawn as a horizontal line, e.g. an entropy.
        title: above the picture.

    Returns:
        The path, or None when the history holds no loss at all (nothing is written).

    Raises:
        ImportError: matplotlib is not installed.
    """
    curves = {
        "training": [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry],
        "evaluation": [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry],
    }
    if not any(curves.values()):
        return None
    figure, axes = new_figure()
    for (label, points), colour in zip(curves.items(), (TRAIN_COLOUR, EVALUATION_COLOUR)):
        if points:
            marker = "o" if label == "evaluation" or len(points) == 1 else None
            axes.plot(*zip(*points), label=label, color=colour, linewidth=1.4, marker=marker, markersize=3.5)
    for label, value in (reference_lines or {}).items():
        axes.axhline(value, color="0.4", linestyle="--", linewidth=1.0)
        axes.annotate(label, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.3")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per target)")
    if title:
        axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path

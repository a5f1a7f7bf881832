"""Pictures of the demonstration: its results at a glance, the loss of hidden text, and confused classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...viz import EVALUATION_COLOUR, TRAIN_COLOUR, new_figure

_BASELINE_COLOUR = "0.65"


def plot_overview(metrics: Mapping[str, Any], path: Path) -> None:
    """Draws the result of each of the three tasks beside what it is compared with."""
    text, classes, summaries = (metrics[name] for name in ("pretraining", "classification", "summarization"))
    losses = {"entropy of\nthe words": text["text_entropy"], "SPADE": text["text_loss"]}
    if "text_loss_before" in text:
        losses = {
            "entropy of\nthe words": text["text_entropy"],
            "before": text["text_loss_before"],
            "after": text["text_loss"],
        }
    naive = classes["baselines"]
    panels: list[tuple[str, str, dict[str, float]]] = [
        ("Hidden text of held-out documents", "nats per token, lower is better", losses),
        (
            "Which library is it from?",
            "accuracy (%), higher is better",
            {
                "largest\nclass": 100 * naive["majority"],
                "Naive\nBayes": 100 * max(naive["naive_bayes"], naive["naive_bayes_default"]),
                "SPADE": 100 * classes["eval_accuracy"],
            },
        ),
        (
            "Summary line of a docstring",
            "ROUGE-L, higher is better",
            {"first\nwords": summaries["baselines"]["rougeL"], "SPADE": summaries["eval_rougeL"]},
        ),
    ]
    figure, first = new_figure(10.5, 3.4)
    first.remove()
    for place, (title, unit, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.spines[["top", "right"]].set_visible(False)
        own = ("SPADE", "before", "after")
        colours = [TRAIN_COLOUR if name in own else _BASELINE_COLOUR for name in values]
        bars = axes.bar(list(values), list(values.values()), color=colours, width=0.6)
        axes.bar_label(bars, fmt="%.2f" if place == 1 else "%.1f", padding=2)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel(unit, fontsize=9)
        axes.margins(y=0.12)
    _save(figure, path)


def plot_text_loss(log_history: Sequence[Mapping[str, Any]], path: Path, *, entropy: float) -> None:
    """Draws the loss of the hidden text of held-out documents over the steps, and the entropy of its tokens.

    Args:
        log_history: `trainer.state.log_history` with `eval_text_loss`.
        path: the PNG to write.
        entropy: unigram entropy of the hidden text, in nats.
    """
    points = [(entry["step"], entry["eval_text_loss"]) for entry in log_history if "eval_text_loss" in entry]
    figure, axes = new_figure()
    axes.plot(*zip(*points), color=EVALUATION_COLOUR, marker="o", markersize=4, linewidth=1.5, label="SPADE")
    axes.axhline(entropy, color="0.4", linestyle="--", linewidth=1.0)
    axes.annotate(
        "entropy of the words",
        (1.0, entropy),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="0.3",
    )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss of the hidden text (nats per token)")
    axes.set_title("Held-out documents, text tokens alone", loc="left")
    _save(figure, path)


def plot_confusions(right: np.ndarray, predicted: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draws which classes are taken for which: shares of each row.

    Args:
        right, predicted: (N,) numbers of classes.
        names: names of the classes.
        path: the PNG to write.
    """
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (right, predicted), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure(6.0, 5.2)
    axes.grid(False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            colour = "white" if share > 0.55 else "0.2"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("what the model says")
    axes.set_ylabel("where it is from")
    axes.set_title("Held-out docstrings (% of a row)", loc="left")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)

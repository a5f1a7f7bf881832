"""Table and picture of the results of a case."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_HEADER = (
    "| variant | parameters | steps | tokens | processor s | text loss | text accuracy | nats per byte | loss of all targets |",
    "|---|---|---|---|---|---|---|---|---|",
)


def by_variant(runs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each variant, one per seed, in the order in which they came."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return groups


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(report: dict[str, Any]) -> str:
    """Markdown: the end of every run, best text loss first, and what word counts reach."""
    lines = list(_HEADER)
    rows = []
    for name, runs in by_variant(report["runs"]).items():
        last = [run["curve"][-1] for run in runs if run["curve"] and not run["diverged"]]
        if len(last) < len(runs):
            rows.append((float("inf"), f"| {name} | {runs[0]['parameters']:,} | | | | diverged | | | |"))
            continue
        losses = [entry["text_loss"] for entry in last]
        cells = (
            name,
            f"{runs[0]['parameters']:,}",
            f"{statistics.mean(entry['step'] for entry in last):.0f}",
            f"{statistics.mean(entry['tokens'] for entry in last) / 1e6:.2f} M",
            f"{statistics.mean(entry['seconds'] for entry in last):.0f}",
            mean_and_spread(losses, 3),
            f"{100 * statistics.mean(entry['text_accuracy'] for entry in last):.1f} %",
            f"{statistics.mean(entry['nats_per_byte'] for entry in last):.3f}",
            mean_and_spread([entry["all_loss"] for entry in last], 3),
        )
        rows.append((statistics.mean(losses), f"| {' | '.join(cells)} |"))
    lines += [line for _, line in sorted(rows, key=lambda row: row[0])]
    lines += [""] + [_counts_line(name, counts) for name, counts in report["word_counts"].items()]
    return "\n".join(lines)


def _counts_line(name: str, counts: dict[str, float]) -> str:
    return (
        f"Held-out text ({name}): {counts['tokens']:,} tokens of {counts['bytes_per_token']:.2f} bytes, unigram entropy "
        f"{counts['unigram']:.3f}, bigram cross-entropy {counts['bigram']:.3f}, the most frequent token is "
        f"{100 * counts['most_frequent']:.1f} %."
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """Text loss against tokens and against processor seconds, with the word counts that are near as lines.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    found = [point["text_loss"] for run in report["runs"] for point in run["curve"]]
    for axes, key, scale, label in (
        (left, "tokens", 1e6, "input tokens, millions"),
        (right, "seconds", 1.0, "processor seconds of the training steps"),
    ):
        for name, runs in by_variant(report["runs"]).items():
            curves = [run["curve"] for run in runs if run["curve"]]
            shortest = min(map(len, curves), default=0)
            places = [statistics.mean(curve[i][key] for curve in curves) / scale for i in range(shortest)]
            losses = [statistics.mean(curve[i]["text_loss"] for curve in curves) for i in range(shortest)]
            axes.plot(places, losses, marker="o", markersize=3, linewidth=1.4, label=name)
        if found and len(report["word_counts"]) == 1:
            (counts,) = report["word_counts"].values()
            for value, text in ((counts["unigram"], "unigram"), (counts["bigram"], "bigram")):
                if value < 2 * min(found) - max(found):  # far below: it would flatten the curves
                    continue
                axes.axhline(value, color="0.4", linestyle="--", linewidth=1.0)
                axes.annotate(text, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set(xlabel=label, ylabel="nats per held-out text token" if axes is left else None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, alpha=0.25, linewidth=0.6)
    left.set_title(report["question"], loc="left")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)

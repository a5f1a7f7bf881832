"""Draws time and memory of peers against length, from benchmarks/stored/lengths.json, into docs/images.

python benchmarks/picture.py

`length.png` is the picture of the README; `length-time.png` and `length-memory.png` are those of docs/benchmarks.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "stored" / "lengths.json"
_IN_MIB = {"GB": 1e9 / 2**20, "GiB": 1024.0, "MiB": 1.0}

Points = list[tuple[int, float, float | None]]


def in_mib(amount: str) -> float:
    """An amount of memory with its unit, in MiB."""
    number, unit = amount.split()
    return float(number) * _IN_MIB[unit]


def measured() -> dict[tuple[str, str], Points]:
    """(our model, peer) -> length, time of the peer over ours, and peak memory of the peer over ours where it was measured."""
    points: dict[tuple[str, str], Points] = {}
    for result in json.loads(STORED.read_text(encoding="utf-8"))["results"]:
        memory = in_mib(result["peer_peak"]) / in_mib(result["peak"]) if "peak" in result else None
        points.setdefault((result["model"], result["peer"]), []).append(
            (result["length"], result["time_ratio"], memory)
        )
    return points


def short_table() -> str:
    """The same as a table of Markdown."""
    lengths = sorted({length for points in measured().values() for length, _, _ in points})
    lines = [f"| ours | peer | {' | '.join(f'{length:,}' for length in lengths)} |", "|" + "---|" * (len(lengths) + 2)]
    for (model, peer), points in measured().items():
        cells = dict.fromkeys(lengths, "")
        for length, time, memory in points:
            cells[length] = f"{time:.2f}" + ("" if memory is None else f", {memory:.2f}")
        lines.append(f"| {model} | {peer} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


def _plot(axes: Any, what: str) -> None:
    """Ratios of time or of memory, one line per pair."""
    for (model, peer), points in measured().items():
        kept = [(length, time if what == "time" else memory) for length, time, memory in points]
        kept = [(length, ratio) for length, ratio in kept if ratio is not None]
        axes.plot([length for length, _ in kept], [ratio for _, ratio in kept], "o-", label=f"{model} vs {peer}")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    title = {"time": "time of the peer / ours", "memory": "peak memory of the peer / ours"}[what]
    axes.set(xscale="log", title=f"Training step: {title}", xlabel="tokens", ylim=(0, None))
    axes.set_xticks([2048, 4096, 8192, 16384], ["2,048", "4,096", "8,192", "16,384"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def draw(folder: Path) -> None:
    """Writes the pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9.5, 3.4), sharex=True, layout="constrained")
    for axes, what in zip(both, ("time", "memory")):
        _plot(axes, what)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(folder / "length.png", dpi=120)
    for what in ("time", "memory"):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        _plot(axes, what)
        axes.legend(fontsize=8, frameon=False)
        figure.savefig(folder / f"length-{what}.png", dpi=110)


if __name__ == "__main__":
    draw(ROOT / "docs" / "images")

"""Draws the picture of the README, time and memory of peers against length, from the tables of docs/benchmarks.md.

python benchmarks/picture.py docs/images/length.png
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
GB = {"GB": 1.0, "GiB": 1.0, "MiB": 1 / 1024}

# Our model, the peer as the table names it -> case of the table.
PAIRS = {
    ("SPADE", "LongT5 local"): "spade-encoder-train",
    ("SPADE", "LongT5 transient-global"): "spade-encoder-train",
    ("SPADE", "LED, window 256"): "spade-encoder-train",
    ("Mega", "Transformers 4.57.6"): "mega-train",
    ("LongVQ", "the same model with dense attention"): "longvq-train",
    ("Block-State layer", "block-recurrent-transformer-pytorch 0.4.4"): "bst-layer-mf",
}
LABELS = {
    "LED, window 256": "LED",
    "Transformers 4.57.6": "Mega of Transformers 4.57",
    "the same model with dense attention": "dense attention",
    "block-recurrent-transformer-pytorch 0.4.4": "Block-Recurrent layer",
}


def rows() -> list[tuple[str, int, str, str]]:
    """Case, length, peer and result of every row of the table that has a length and a peer."""
    found, case, length, last = [], "", 0, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 5:
            continue
        name = re.match(r"`([\w-]+)`", cells[0])
        case = name[1] if name else case
        size = re.match(r"L ([\d,]+)$", cells[1])
        length = int(size[1].replace(",", "")) if size else length
        last = last if cells[2] == "the same" else cells[2]
        if size:
            found.append((case, length, last, cells[3]))
    return found


def measured() -> dict[tuple[str, str], list[tuple[int, float, float | None]]]:
    """Length, time of the peer over ours, and peak memory of the peer over ours, if it was measured."""
    points: dict[tuple[str, str], list[tuple[int, float, float | None]]] = {pair: [] for pair in PAIRS}
    ours: dict[tuple[str, int], float] = {}
    for case, length, peer, result in rows():
        pair = next((key for key, name in PAIRS.items() if name == case and key[1] == peer), None)
        ratio = re.match(r"\**([\d.]+)", result)
        if pair is None or ratio is None:
            continue
        peaks = [
            float(number.replace(",", "")) * GB[unit]
            for number, unit in re.findall(r"([\d.,]*\d) (GB|GiB|MiB)", result)
        ]
        if len(peaks) == 2:
            ours[case, length] = peaks[0]
        memory = peaks[-1] / ours[case, length] if peaks and (case, length) in ours else None
        points[pair].append((length, float(ratio[1]), memory))
    return points


def draw(path: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, memories) = plt.subplots(1, 2, figsize=(9.5, 3.4), sharex=True, layout="constrained")
    for (model, peer), found in measured().items():
        label = f"{model} vs {LABELS.get(peer, peer)}"
        lengths = [length for length, _, _ in found]
        (line,) = times.plot(lengths, [ratio for _, ratio, _ in found], "o-", label=label)
        kept = [(length, memory) for length, _, memory in found if memory is not None]
        memories.plot([length for length, _ in kept], [memory for _, memory in kept], "o-", color=line.get_color())
    for axes, title in ((times, "time of the peer / ours"), (memories, "peak memory of the peer / ours")):
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xscale="log", title=f"Training step: {title}", xlabel="tokens", ylim=(0, None))
        axes.set_xticks([2048, 4096, 8192, 16384], ["2,048", "4,096", "8,192", "16,384"])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))

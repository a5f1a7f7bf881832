"""Draws the figure of every architecture: a layer on the left, and on the right what a token sees. Writes docs/images/<name>.svg.

python docs/_site/figures.py
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"
FILL = {
    "plain": "#f1f3f5",
    "state": "#ffe3b8",
    "attention": "#b9d4f5",
    "codes": "#d8c7ee",
    "none": "#ffffff",
}
Point = tuple[float, float]
N = 16  # tokens of the matrix


class Figure:
    """An SVG picture, built from boxes and arrows; y grows downwards, layers are read from the bottom to the top."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#212529"><title>{escape(title)}</title>'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#495057"/></marker></defs>'
        )
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, anchor: str = "middle", size: int = 12, color: str = "#212529"
    ) -> None:
        for number, line in enumerate(words.split("\n")):
            self.parts.append(
                f'<text x="{x:g}" y="{y + 15 * number:g}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(line)}</text>'
            )

    def box(self, x: float, y: float, width: float, height: float, words: str, kind: str = "plain") -> None:
        """A box with its left upper corner at (x, y)."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{FILL[kind]}" stroke="#868e96"/>'
        )
        lines = words.count("\n")
        self.text(x + width / 2, y + height / 2 + 4.5 - 7.5 * lines, words)

    def line(self, *points: Point, arrow: bool = True) -> None:
        path = " ".join(f"{'M' if number == 0 else 'L'}{x:g} {y:g}" for number, (x, y) in enumerate(points))
        tip = ' marker-end="url(#tip)"' if arrow else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="#495057"{tip}/>')

    def plus(self, x: float, y: float) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="#ffffff" stroke="#495057"/>')
        self.text(x, y + 4.5, "+", size=14)

    def cell(self, x: float, y: float, size: float, kind: str) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" fill="{FILL[kind]}" stroke="#ced4da" stroke-width="0.7"/>'
        )

    def matrix(self, x: float, y: float, kind_of: Callable[[int, int], str], legend: dict[str, str]) -> None:
        """Which of N tokens (columns) a token (row) sees, and how."""
        size = 13
        self.text(x + N * size / 2, y - 10, "seen token →", size=11, color="#495057")
        for row in range(N):
            for column in range(N):
                self.cell(x + column * size, y + row * size, size, kind_of(row, column))
        for number, (kind, words) in enumerate(legend.items()):
            top = y + N * size + 14 + 19 * number
            self.cell(x, top, 12, kind)
            self.text(x + 19, top + 10.5, words, anchor="start", size=11)

    def svg(self) -> str:
        return "\n".join([self.head, *self.parts, "</svg>", ""])


def _block_ends(figure: Figure, middle: float) -> None:
    """The feed-forward layer with its residual, and the output, above (middle, 116)."""
    figure.plus(middle, 116)
    figure.line((middle, 108), (middle, 94))
    figure.box(middle - 75, 66, 150, 28, "norm, feed-forward")
    figure.line((middle, 66), (middle, 50))
    figure.plus(middle, 42)
    figure.line((middle, 101), (middle + 190, 101), (middle + 190, 42), (middle + 9, 42))
    figure.line((middle, 34), (middle, 20))
    figure.text(middle, 14, "output")


def spade() -> str:
    figure = Figure(740, 360, "A SPADE layer: a state space model of the whole text beside local attention")
    figure.text(235, 352, "input of the layer")
    figure.line((235, 338), (235, 318))
    figure.box(185, 290, 100, 28, "norm")
    figure.line((235, 290), (235, 276), (130, 276), (130, 260))
    figure.line((235, 276), (340, 276), (340, 260))
    figure.box(50, 204, 160, 56, "state space model\nthe whole text\n(bottom layer only)", "state")
    figure.box(260, 204, 160, 56, "local attention\na window", "attention")
    figure.line((130, 204), (130, 186), (200, 186), (200, 172))
    figure.line((340, 204), (340, 186), (270, 186), (270, 172))
    figure.text(112, 192, "norm g", anchor="end", size=11)
    figure.text(358, 192, "norm a", anchor="start", size=11)
    figure.box(155, 144, 160, 28, "combine: W [g; a] + b")
    figure.line((235, 144), (235, 125))
    figure.line((235, 328), (445, 328), (445, 116), (244, 116))
    _block_ends(figure, 235)
    seen = {
        "attention": "window: exact attention",
        "state": "state: all earlier tokens",
        "none": "not seen (causal form)",
    }
    figure.matrix(500, 40, lambda i, j: "none" if j > i else "attention" if i - j < 4 else "state", seen)
    return figure.svg()


def mega() -> str:
    figure = Figure(
        740, 360, "A Mega layer: a moving average makes queries, keys and gates of attention with one head"
    )
    figure.text(235, 352, "input x")
    figure.line((235, 338), (235, 324))
    figure.box(185, 296, 100, 28, "norm")
    figure.line((235, 296), (235, 284), (130, 284), (130, 272))
    figure.line((235, 284), (360, 284), (360, 226))
    figure.box(45, 226, 170, 46, "moving average of\nevery feature, N decays", "state")
    figure.line((130, 226), (130, 210))
    figure.box(45, 182, 170, 28, "e: z, and gates u, r, c")
    figure.box(300, 198, 120, 28, "values v = f(V n)")
    figure.line((130, 182), (130, 158), (170, 158))
    figure.text(128, 172, "q, k from z", anchor="end", size=11)
    figure.line((360, 198), (360, 158), (320, 158))
    figure.box(170, 140, 150, 36, "attention, one head\nfull or in chunks", "attention")
    figure.line((245, 140), (245, 120))
    figure.box(170, 92, 150, 28, "h = f(c + H (· r))")
    figure.line((60, 182), (60, 106), (170, 106))
    figure.text(66, 122, "r, c", anchor="start", size=11)
    figure.line((245, 92), (245, 72))
    figure.box(170, 44, 150, 28, "x + u (h − x)")
    figure.line((52, 182), (52, 58), (170, 58))
    figure.text(66, 74, "u", anchor="start", size=11)
    figure.line((235, 331), (450, 331), (450, 58), (320, 58))
    figure.text(444, 74, "x", anchor="end", size=11)
    figure.line((245, 44), (245, 22))
    figure.text(245, 14, "then norm, feed-forward")
    seen = {
        "attention": "chunk: exact attention",
        "state": "moving average: earlier tokens",
        "none": "not seen (causal form)",
    }
    figure.matrix(500, 40, lambda i, j: "none" if j > i else "attention" if i // 4 == j // 4 else "state", seen)
    return figure.svg()


ACTIVE = (0, 2, 3, 6, 7, 11, 12, 14)


def _strip(figure: Figure, x: float, y: float, kinds: list[str]) -> None:
    for number, kind in enumerate(kinds):
        figure.cell(x + 14 * number, y, 14, kind)


def seqboat() -> str:
    figure = Figure(740, 360, "A SeqBoat layer: a router lets only some tokens into the attention unit")
    figure.text(235, 352, "input x")
    figure.line((235, 338), (235, 324))
    figure.box(155, 294, 160, 30, "norm, moving average: h", "state")
    figure.line((235, 294), (235, 278))
    figure.box(155, 250, 160, 28, "router: active or not?")
    figure.line((315, 264), (395, 264), (395, 122))
    figure.text(402, 200, "gate g", anchor="start", size=11)
    figure.line((235, 250), (235, 234))
    _strip(figure, 123, 218, ["attention" if token in ACTIVE else "none" for token in range(N)])
    figure.text(116, 229, "tokens", anchor="end", size=11)
    figure.line((235, 217), (235, 202))
    _strip(figure, 179, 188, ["attention"] * len(ACTIVE))
    figure.text(172, 199, "packed", anchor="end", size=11)
    figure.line((235, 187), (235, 172))
    figure.box(155, 136, 160, 36, "attention unit over the\nlast w active tokens: o", "attention")
    figure.line((235, 136), (235, 122))
    figure.box(155, 86, 270, 36, "each to its place, times its gate: g · o")
    figure.line((235, 86), (235, 62))
    figure.box(135, 34, 200, 28, "f(x + S h + g · o)")
    figure.line((155, 309), (70, 309), (70, 48), (135, 48))
    figure.text(76, 66, "S h", anchor="start", size=11)
    figure.line((235, 331), (450, 331), (450, 48), (335, 48))
    figure.text(444, 66, "x", anchor="end", size=11)
    figure.line((235, 34), (235, 20))
    figure.text(235, 14, "output")

    def kind(i: int, j: int) -> str:
        if j > i:
            return "none"
        ranks = [token for token in ACTIVE if token <= i]
        return "attention" if i in ACTIVE and j in ranks[-4:] else "state"

    seen = {
        "attention": "active sees active: attention",
        "state": "moving average: earlier tokens",
        "none": "not seen (causal form)",
    }
    figure.matrix(500, 40, kind, seen)
    return figure.svg()


def longvq() -> str:
    figure = Figure(740, 360, "A LongVQ layer: softmax attention over keys that are replaced by codewords")
    figure.text(235, 352, "input x")
    figure.line((235, 338), (235, 324))
    figure.box(185, 296, 100, 28, "norm")
    figure.line((235, 296), (235, 284), (130, 284), (130, 272))
    figure.line((235, 284), (385, 284), (385, 246))
    figure.box(45, 236, 170, 36, "moving average or\nstate space", "state")
    figure.box(325, 218, 120, 28, "values v = f(V n)")
    figure.line((90, 236), (90, 150), (130, 150))
    figure.text(84, 192, "q", anchor="end", size=11)
    figure.line((170, 236), (170, 218))
    figure.text(178, 230, "k", anchor="start", size=11)
    figure.box(110, 186, 170, 32, "nearest of S codewords", "codes")
    figure.line((200, 186), (200, 168))
    figure.line((385, 218), (385, 150), (340, 150))
    figure.box(130, 132, 210, 36, "one softmax: near keys one by\none, far ones by code", "attention")
    figure.line((235, 132), (235, 112))
    figure.box(145, 84, 180, 28, "h = f(c + H (· silu(r)))")
    figure.line((235, 84), (235, 66))
    figure.box(145, 38, 180, 28, "x + sigmoid(u) (h − x)")
    figure.line((58, 236), (58, 98), (145, 98))
    figure.text(64, 114, "r, c", anchor="start", size=11)
    figure.line((50, 236), (50, 52), (145, 52))
    figure.text(64, 68, "u", anchor="start", size=11)
    figure.line((235, 331), (470, 331), (470, 52), (325, 52))
    figure.text(464, 68, "x", anchor="end", size=11)
    figure.line((235, 38), (235, 22))
    figure.text(235, 14, "then norm, feed-forward")

    def kind(i: int, j: int) -> str:
        return "none" if j > i else "attention" if i // 4 - j // 4 < 2 else "codes"

    seen = {
        "attention": "own and last chunk: every key",
        "codes": "earlier: number and mean by code",
        "none": "not seen (causal form)",
    }
    figure.matrix(500, 40, kind, seen)
    return figure.svg()


def bst() -> str:
    figure = Figure(
        740, 360, "A Block-State layer: filters of a state space make context states, to which a block attends"
    )
    figure.text(235, 352, "input x")
    figure.line((235, 338), (235, 320))
    figure.box(185, 292, 100, 28, "norm: u")
    figure.line((235, 292), (235, 280), (120, 280), (120, 268))
    figure.line((235, 280), (345, 280), (345, 210))
    figure.box(40, 232, 160, 36, "state space filters\nover the whole past", "state")
    figure.line((120, 232), (120, 210))
    figure.text(126, 225, "context states", anchor="start", size=11)
    figure.box(40, 176, 160, 34, "cross attention: c", "codes")
    figure.line((235, 280), (235, 193), (200, 193))
    figure.box(265, 176, 160, 34, "attention in the block: a", "attention")
    figure.line((120, 176), (120, 160), (190, 160))
    figure.line((345, 176), (345, 160), (280, 160))
    figure.box(190, 144, 90, 30, "W [a; c]")
    figure.line((235, 144), (235, 125))
    figure.line((235, 329), (445, 329), (445, 116), (244, 116))
    _block_ends(figure, 235)
    seen = {"attention": "block: exact attention", "codes": "earlier: by context states", "none": "not seen"}
    figure.matrix(500, 40, lambda i, j: "none" if j > i else "attention" if i // 4 == j // 4 else "codes", seen)
    return figure.svg()


FIGURES: dict[str, Callable[[], str]] = {
    "spade": spade,
    "mega": mega,
    "seqboat": seqboat,
    "longvq": longvq,
    "bst": bst,
}


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")

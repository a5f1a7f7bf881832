"""The page: tabs, buttons, and what they call. Needs Gradio (`pip install "hf_hybrid[app]"`).

Whatever a visitor types and a model writes reaches the browser as text, never as HTML: through text boxes, highlighted words
and pictures. Messages are the one place where Gradio renders HTML, so they are escaped here.
"""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr
from fastapi import FastAPI

from ..recipes.support.options import require
from .measuring import active_tokens, draw_lengths, measure_lengths, reach_of_states
from .opening import OpenCheckpoint, Shelf
from .writing import Decoding, Pieces, write

logger = logging.getLogger(__name__)

TITLE = "hf_hybrid"
MAX_CHARACTERS = 400_000
MAX_WAITING = 32  # calls in the queue; the next visitor is told to come back
MAX_MEASURING_SECONDS = 60
WRITTEN, ACTIVE = "written by the model", "active"
ALL_LAYERS = "mean of all layers"
_SYSTEM_FONTS = ["system-ui", "sans-serif"]
_HINTS = {
    "rewrite": "Write ___ (three underscores) where words are missing, and the model fills in up to eight tokens each; any other text is rewritten as the "
    "model was trained to: a summary, a translation.",
    "continue": "The model continues the text.",
    "guess": "Write ___ (three underscores) for each word to guess.",
    "read": "This head writes no text; the other tabs work.",
}
_EXPECTED = (ValueError, OSError, ImportError)  # what the visitor can mend; anything else is a mistake of this library


def build_page(shelf: Shelf, checkpoint: str | None = None, *, fixed: bool = False) -> gr.Blocks:
    """The page.

    Args:
        shelf: open checkpoints, shared by all visitors.
        checkpoint: folder or Hub name that is open at first; None: none.
        fixed: visitors cannot open other checkpoints.

    Raises:
        ValueError: `fixed` without a checkpoint.
        ImportError: matplotlib is not installed.
    """
    require("Pictures", "matplotlib", extra="viz")
    if fixed and not checkpoint:
        raise ValueError("`fixed` needs a checkpoint: pass `model_name_or_path`.")
    opened = shelf.get(checkpoint) if checkpoint else None
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\nState space models joined with attention: open a checkpoint and try it.")
        current = gr.State(checkpoint or "")
        name, button, about = _opening(opened, fixed)
        with gr.Tabs():
            with gr.Tab("Write"):
                hint = _writing(shelf, current, opened)
            with gr.Tab("Where it attends"):
                layer = _attending(shelf, current, opened)
            with gr.Tab("How far it remembers"):
                _remembering(shelf, current)
            with gr.Tab("Time and memory"):
                _measuring(shelf, current)
        if not fixed:
            choose = _shown(_opener(shelf))
            for event in (button.click, name.submit):
                event(choose, [name], [current, about, hint, layer], concurrency_id="model", api_visibility="private")
    page.queue(default_concurrency_limit=1, max_size=MAX_WAITING)
    return page


def application(page: gr.Blocks) -> FastAPI:
    """A web application that shows the page: no fonts or scripts of other hosts, nothing that reports elsewhere."""
    theme = gr.themes.Default(primary_hue="blue", font=_SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        theme=theme,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )


# --------------------------------------------------------------------------------------------------------- messages


def _shown(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the page whose errors are shown as a message, with their text escaped."""

    def guarded(*args: Any) -> Iterator[Any]:
        try:
            result = call(*args)
            if isinstance(result, Iterator):
                yield from result
            else:
                yield result
        except _EXPECTED as error:
            raise gr.Error(html.escape(str(error)), title="This does not work", print_exception=False) from error
        except Exception as error:
            logger.exception("A function of the page failed.")
            raise gr.Error("Something failed that should not; the log of the program says where.") from error

    return guarded


def _require_open(shelf: Shelf, name: str) -> OpenCheckpoint:
    if not name:
        raise ValueError("No checkpoint is open: type the name of one above, and press Open.")
    return shelf.get(name)


# ------------------------------------------------------------------------------------------------------------ parts


def _opening(opened: OpenCheckpoint | None, fixed: bool) -> tuple[Any, Any, Any]:
    with gr.Row(equal_height=True):
        name = gr.Textbox(
            opened.name if opened else "",
            label="Checkpoint",
            placeholder="a folder, or a model on the Hub",
            max_length=500,
            scale=4,
            visible=not fixed,
            elem_id="checkpoint",
        )
        button = gr.Button("Open", scale=1, visible=not fixed, elem_id="open")
    about = gr.Textbox(
        opened.describe() if opened else "none", label="Open now", interactive=False, elem_id="about", lines=1
    )
    return name, button, about


def _opener(shelf: Shelf) -> Callable[..., Any]:
    def choose(name: str) -> tuple[Any, ...]:
        opened = shelf.get(name.strip())
        return opened.name, opened.describe(), _HINTS[opened.task], gr.Dropdown(choices=_layers(opened))

    return choose


def _layers(opened: OpenCheckpoint | None) -> list[str]:
    return [ALL_LAYERS, *(str(number) for number in range(opened.depth if opened else 0))]


def _writing(shelf: Shelf, current: Any, opened: OpenCheckpoint | None) -> Any:
    """Fill in, rewrite, continue."""

    def run(name: str, text: str, length: float, temperature: float, no_repeats: bool) -> Iterator[Any]:
        decoding = Decoding(int(length), temperature, no_repeats)
        yield "", []
        for pieces in write(_require_open(shelf, name), text, decoding):
            yield " / ".join(piece for piece, is_new in pieces if is_new), _highlighted(pieces)

    hint = gr.Textbox(_HINTS[opened.task if opened else "rewrite"], show_label=False, interactive=False, lines=1)
    text = gr.Textbox(label="Text", lines=8, max_length=MAX_CHARACTERS, elem_id="text")
    with gr.Row():
        length = gr.Slider(1, 512, 64, step=1, label="At most this many tokens")
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: the likeliest token)")
        no_repeats = gr.Checkbox(True, label="Never the same three tokens twice")
    with gr.Row():
        button = gr.Button("Write", variant="primary", elem_id="write")
        stop = gr.Button("Stop", elem_id="stop")
    written = gr.Textbox(label="Written", lines=3, interactive=False, elem_id="written", buttons=["copy"])
    whole = gr.HighlightedText(
        label="In its place", color_map={WRITTEN: "#F0B27A"}, show_inline_category=False, elem_id="whole"
    )
    event = button.click(
        _shown(run),
        [current, text, length, temperature, no_repeats],
        [written, whole],
        concurrency_id="model",
        api_visibility="private",
    )
    stop.click(None, cancels=[event], queue=False, api_visibility="private")
    return hint


def _highlighted(pieces: Pieces) -> list[tuple[str, str | None]]:
    return [(piece, WRITTEN if is_new else None) for piece, is_new in pieces if piece]


def _attending(shelf: Shelf, current: Any, opened: OpenCheckpoint | None) -> Any:
    """SeqBoat: which tokens are active."""

    def run(name: str, text: str, layer: str) -> tuple[Any, Any]:
        chosen = None if layer == ALL_LAYERS else int(layer)
        words, figure = active_tokens(_require_open(shelf, name), text, chosen)
        return [(word, round(gate, 3)) for word, gate in words], figure

    gr.Markdown("Each layer of a SeqBoat model decides which tokens use attention. Darker: the gate is further open.")
    text = gr.Textbox(label="Text, up to 256 tokens", lines=3, max_length=MAX_CHARACTERS, elem_id="attended")
    with gr.Row(equal_height=True):
        layer = gr.Dropdown(_layers(opened), value=ALL_LAYERS, label="Layer", elem_id="layer")
        button = gr.Button("Show", variant="primary", elem_id="attend")
    words = gr.HighlightedText(label="Gate of each token", elem_id="gates")
    picture = gr.Plot(show_label=False, elem_id="gates-picture")
    button.click(
        _shown(run), [current, text, layer], [words, picture], concurrency_id="model", api_visibility="private"
    )
    return layer


def _remembering(shelf: Shelf, current: Any) -> None:
    """State spaces: how fast they forget, and how far they reach."""

    def run(name: str) -> Any:
        return reach_of_states(_require_open(shelf, name))

    gr.Markdown("How fast the states of the layers decay, and how many tokens back each channel reaches.")
    button = gr.Button("Show", variant="primary", elem_id="reach")
    picture = gr.Plot(show_label=False, elem_id="reach-picture")
    button.click(_shown(run), [current], [picture], concurrency_id="model", api_visibility="private")


def _measuring(shelf: Shelf, current: Any) -> None:
    """Time and memory against length, measured now and here."""

    def run(name: str, seconds: float) -> Iterator[Any]:
        opened = _require_open(shelf, name)
        for rows in measure_lengths(opened, max_seconds=min(seconds, MAX_MEASURING_SECONDS)):
            table = [[row.length, round(row.seconds, 4), round(row.bytes / 1e6, 1)] for row in rows]
            yield draw_lengths(rows), table

    gr.Markdown(
        "One pass over texts of twice the length each time, until the time is over: without training, one text at a time."
    )
    seconds = gr.Slider(2, MAX_MEASURING_SECONDS, 15, step=1, label="Seconds to measure")
    button = gr.Button("Measure", variant="primary", elem_id="measure")
    picture = gr.Plot(show_label=False, elem_id="measure-picture")
    table = gr.Dataframe(headers=["tokens", "seconds", "megabytes"], interactive=False, elem_id="measured")
    button.click(_shown(run), [current, seconds], [picture, table], concurrency_id="model", api_visibility="private")

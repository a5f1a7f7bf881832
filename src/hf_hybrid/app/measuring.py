"""What a model shows about itself: active tokens, the reach of its states, time and memory against length."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..memory import LiveBytes
from ..training.activations import sample_gates
from ..viz import (
    EVALUATION_COLOUR,
    TRAIN_COLOUR,
    draw_activation_map,
    draw_state_space_channels,
    new_figure,
    state_space_layers,
    token_labels,
)
from .opening import OpenCheckpoint

MAX_DRAWN_TOKENS = 256
MAX_LENGTH = 65_536


class ActiveTokens(NamedTuple):
    """Where the layers of a model attend.

    Attributes:
        words: each token as text, with its gate: 0 where inactive, else up to 1.
        figure: layers by tokens.
    """

    words: list[tuple[str, float]]
    figure: Any


def active_tokens(opened: OpenCheckpoint, text: str, layer: int | None = None) -> ActiveTokens:
    """Which tokens of a text activate the attention of a SeqBoat model.

    Args:
        opened: checkpoint with routers.
        text: a short text.
        layer: layer of `words`; None for the mean over all layers.

    Raises:
        ValueError: the model has no routers or no such layer, or there is no text, or too much.
        ImportError: matplotlib is not installed.
    """
    if not opened.has_routers:
        raise ValueError(
            f"{type(opened.model).__name__} attends to every token: only SeqBoat models (without `always_active`) "
            "choose the tokens to attend to."
        )
    encoded = opened.encode(text, max_tokens=MAX_DRAWN_TOKENS)
    with opened.lock:
        gates = sample_gates(opened.model, {"input_ids": encoded["input_ids"]})
    if layer is not None and not 0 <= layer < len(gates):
        raise ValueError(f"`layer` must lie between 0 and {len(gates) - 1}; got {layer}.")
    ids = encoded["input_ids"][0].tolist()
    values = (gates.mean(0) if layer is None else gates[layer]).tolist()
    words = [(opened.tokenizer.decode([token]), value) for token, value in zip(ids, values)]
    return ActiveTokens(words, draw_activation_map(gates.numpy(), token_labels(opened.tokenizer, ids)))


def reach_of_states(opened: OpenCheckpoint, length: int = 4096) -> Any:
    """Decay spectrum and effective memory of at most four layers with states, from the first to the last.

    Raises:
        ValueError: the model has none.
        ImportError: matplotlib is not installed.
    """
    with opened.lock:
        found = list(state_space_layers(opened.model).items())
        if not found:
            raise ValueError(f"{type(opened.model).__name__} has no state space layers.")
        chosen = sorted({round(place * (len(found) - 1) / 3) for place in range(4)})
        return draw_state_space_channels({found[index][0]: found[index][1] for index in chosen}, length=length)


class Measured(NamedTuple):
    """One pass over a text of random tokens.

    Attributes:
        length: number of tokens.
        seconds: time of a forward pass.
        bytes: largest total of the tensors that it held at once, without the weights.
    """

    length: int
    seconds: float
    bytes: int


def measure_lengths(
    opened: OpenCheckpoint, *, max_seconds: float = 15.0, first: int = 256, longest: int = MAX_LENGTH
) -> Iterator[list[Measured]]:
    """Time and memory of reading a text, for lengths that double until the next would not fit into the time.

    Args:
        opened: checkpoint.
        max_seconds: time for everything.
        first, longest: lengths, in tokens.

    Yields:
        All measurements up to now.
    """
    limit = getattr(opened.model.config, "max_source_length", lambda: None)()
    longest = longest if limit is None else min(longest, limit)
    start, rows, length = time.monotonic(), [], min(first, longest)
    while True:
        before = time.monotonic()
        with opened.lock:
            rows.append(measure(opened, length))
        yield list(rows)
        took, length = time.monotonic() - before, 2 * length
        # The next length takes about twice as long, more where something is quadratic.
        if length > longest or time.monotonic() - start + 2.5 * took > max_seconds:
            return


@torch.inference_mode()
def measure(opened: OpenCheckpoint, length: int) -> Measured:
    """Measures one length: the better time of two passes, and the memory of a third."""
    model: Any = opened.model
    stack = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, "base_model", model)
    inputs = _random_inputs(model, length)
    seconds = []
    for _ in range(2):
        _wait_for_accelerator()
        before = time.perf_counter()
        stack(**inputs)
        _wait_for_accelerator()
        seconds.append(time.perf_counter() - before)
    with LiveBytes() as memory:
        stack(**inputs)
    return Measured(length, min(seconds), memory.peak)


def _random_inputs(model: Any, length: int) -> dict[str, torch.Tensor]:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    if getattr(config, "input_type", "tokens") == "values":
        return {"input_values": torch.randn(1, length, generator=generator).to(model.device, model.dtype)}
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    return {"input_ids": ids.masked_fill(ids == (-1 if pad is None else pad), config.vocab_size - 1).to(model.device)}


def _wait_for_accelerator() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def draw_lengths(rows: list[Measured]) -> Any:
    """Time and memory against length.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, seconds = new_figure(10.0, 3.8)
    seconds.set_subplotspec(figure.add_gridspec(1, 2)[0])
    memory = figure.add_subplot(1, 2, 2)
    memory.spines[["top", "right"]].set_visible(False)
    memory.grid(True, alpha=0.25, linewidth=0.6)
    lengths = [row.length for row in rows]
    for axes, values, colour, title in (
        (seconds, [row.seconds for row in rows], TRAIN_COLOUR, "Time of one pass (s)"),
        (memory, [row.bytes / 1e6 for row in rows], EVALUATION_COLOUR, "Memory beside the weights (MB)"),
    ):
        axes.plot(lengths, values, color=colour, marker="o", markersize=4, linewidth=1.6, label="this model")
        last = max(values[-1], 1e-9)
        axes.plot(
            lengths,
            [last * size / lengths[-1] for size in lengths],
            color="0.5",
            linestyle="--",
            linewidth=1.0,
            label="in proportion to the length",
        )
        axes.set(xscale="log", yscale="log", xlabel="tokens")
        axes.set_xticks(lengths, [f"{size:,}" for size in lengths], rotation=45, fontsize=8)
        axes.minorticks_off()
        axes.set_title(title, loc="left")
        axes.legend(frameon=False, fontsize=8)
    return figure

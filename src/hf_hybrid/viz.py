"""Plots of training runs and of what models do. Needs matplotlib (`pip install "hf_hybrid[viz]"`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A pair that is safe for colour-blind readers and dark enough on white.
TRAIN_COLOUR = "#0072B2"
EVALUATION_COLOUR = "#D55E00"


def new_figure(width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    """A matplotlib figure with a single axes, on the file backend whatever the global backend is.

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
    path: str | os.PathLike[str],
    *,
    reference_lines: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path | None:
    """Draw training and evaluation loss over the steps.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG to write.
        reference_lines: label -> loss in nats drawn as a horizontal line, e.g. an entropy.
        title: title of the plot.

    Returns:
        The path, or None when the history holds no loss (nothing is written).

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
    axes.set_ylabel("loss")
    if title:
        axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


def effective_memory(kernel: Any, share: float = 0.95) -> Any:
    """Smallest number of lags that holds a given share of the energy of each kernel.

    Args:
        kernel: (..., K) tensor, lag along the last axis.
        share: fraction of the summed squares, between 0 and 1.

    Returns:
        (...,) int64 tensor: lags 0 to m - 1 hold at least this share; 0 for a kernel of zeros.

    Raises:
        ValueError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` must lie in (0, 1]; got {share}.")
    energy = kernel.detach().double().square().cumsum(-1)
    total = energy[..., -1:]
    return ((energy < share * total).sum(-1) + 1) * (total.squeeze(-1) > 0)


def time_constants(layer: Any) -> Any:
    """Tokens after which each state of a layer has decayed to 1/e: -1 / log|eigenvalue of A-bar|.

    Args:
        layer: a `StateSpaceLayer`, the filters of a Block-State Transformer, or a layer whose `system()` is diagonal
            (moving averages).

    Returns:
        (H, M) tensor for diagonal systems (one per state or conjugate pair), (H, N) for "s4".

    Raises:
        ValueError: the layer has explicit filters, which have no states.
    """
    constants = _time_constants(layer)
    if constants is None:
        raise ValueError(
            f"{type(layer).__name__} has no states that decay; `effective_memory(layer.kernel(length))` gives its "
            "reach."
        )
    return constants


def _time_constants(layer: Any) -> Any:
    """`time_constants`, or None for a layer without states."""
    import torch

    with torch.no_grad():
        if getattr(layer, "ssm_type", None) == "s4":
            from .ops.s4 import dplr_dense

            transition = dplr_dense(layer.dplr_system(torch.float64)).transition
            log_decay = torch.linalg.eigvals(transition).abs().log()
        elif hasattr(layer, "diagonal_system"):
            log_decay = layer.diagonal_system().log_decay_real
        elif hasattr(layer, "system"):
            log_decay = layer.system().log_decay_real
        else:
            return None
        return -1.0 / log_decay.clamp(max=-1e-12)


def state_space_layers(model: Any) -> dict[str, Any]:
    """The layers of a model with a convolution kernel: state spaces, moving averages and context filters, by name.

    Args:
        model: any model of this library.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if callable(getattr(module, "kernel", None)) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def plot_state_space_channels(
    layers: Mapping[str, Any], path: str | os.PathLike[str], *, length: int = 4096, share: float = 0.95
) -> Path:
    """Draw the decay spectrum and the effective memory of state space layers into a file.

    Args:
        layers, length, share: as in `draw_state_space_channels`.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer, or more than four.
    """
    _saved(draw_state_space_channels(layers, length=length, share=share), path)
    return Path(path)


def draw_state_space_channels(layers: Mapping[str, Any], *, length: int = 4096, share: float = 0.95) -> Any:
    """Draw the decay spectrum and the effective memory of state space layers.

    Left: the distribution of the time constants of all states, that is, how fast single states forget. Right: how far
    the convolution kernel of each channel reaches (95 % of its energy, both directions taken separately), channels
    sorted.

    Args:
        layers: label -> layer as in `time_constants`; at most four, drawn in one plot. Explicit filters appear on the
            right only.
        length: number of lags of the kernel to compute, in tokens.
        share: fraction of the energy that defines the reach.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer, or more than four.
    """
    import numpy as np
    import torch

    colours = (TRAIN_COLOUR, EVALUATION_COLOUR, "#009E73", "#555555")
    if not 1 <= len(layers) <= len(colours):
        raise ValueError(f"`layers` must name 1 to {len(colours)} layers; got {len(layers)}.")
    figure, spectrum = new_figure(10.0, 3.8)
    spectrum.set_subplotspec(figure.add_gridspec(1, 2)[0])
    reach = figure.add_subplot(1, 2, 2)
    reach.spines[["top", "right"]].set_visible(False)
    reach.grid(True, alpha=0.25, linewidth=0.6)
    bins = np.logspace(-1, 5, 49)
    for (label, layer), colour in zip(layers.items(), colours):
        constants = _time_constants(layer)
        if constants is not None:
            constants = constants.flatten().clamp(bins[0], bins[-1]).cpu().numpy()
            weights = np.full(constants.shape, 100.0 / constants.size)
            spectrum.hist(
                constants, bins=bins, weights=weights, histtype="step", color=colour, linewidth=1.4, label=label
            )
        with torch.no_grad():
            tokens = effective_memory(layer.kernel(length), share).flatten().sort().values.cpu().numpy()
        channels = np.linspace(0, 100, len(tokens))
        reach.plot(channels, tokens.clip(min=1), color=colour, linewidth=1.4, label=label)
    spectrum.set(xscale="log", xlabel="time constant (tokens)", ylabel="states (%)")
    spectrum.set_title("Decay spectrum", loc="left")
    reach.set(yscale="log", xlabel="channels, sorted (%)", ylabel=f"tokens with {share:.0%} of the energy")
    reach.set_title("Effective memory", loc="left")
    reach.legend(frameon=False)
    return figure


def activation_map(
    model: Any,
    tokenizer: Any,
    text: str,
    path: str | os.PathLike[str] | None = None,
    *,
    tokens_per_line: int = 64,
    max_tokens: int = 256,
) -> Any:
    """Draw which tokens of a text activate the attention unit of each layer: layers by tokens, shaded by the gate.

    Args:
        model: a SeqBoat model of any head that reads tokens.
        tokenizer: its tokenizer.
        text: text to show.
        path: a PNG to write; None writes nothing.
        tokens_per_line: number of tokens after which the map continues on the next line.
        max_tokens: number of tokens after which the text is truncated.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the text is empty, or the model has no routers.
    """
    from .training.activations import sample_gates

    encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens, return_token_type_ids=False)
    if encoded["input_ids"].numel() == 0:
        raise ValueError("`text` is empty: there are no tokens to show.")
    gates = sample_gates(model, encoded).numpy()
    labels = token_labels(tokenizer, encoded["input_ids"][0].tolist())
    return draw_activation_map(gates, labels, path, tokens_per_line=tokens_per_line)


def token_labels(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with spaces and line ends made visible."""
    return [_printable(tokenizer.decode([token])) for token in ids]


def _printable(token: str) -> str:
    """A token as a label on an axis; the dollar sign would start a formula."""
    visible = token.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5").replace("$", "\\$")
    return "".join(symbol if symbol.isprintable() else "\u00b7" for symbol in visible) or "\u00b7"


def draw_activation_map(
    gates: Any, labels: Sequence[str], path: str | os.PathLike[str] | None = None, *, tokens_per_line: int = 64
) -> Any:
    """The picture of `activation_map`.

    Args:
        gates: array (layers, tokens): 0 where inactive, else in (0.5, 1].
        labels: one per token.
        path: a PNG to write; None writes nothing.
        tokens_per_line: number of tokens after which the map continues on the next line.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the numbers of labels and tokens differ.
    """
    depth, length = gates.shape
    if len(labels) != length or length == 0:
        raise ValueError(f"`labels` must name each of the {length} tokens of `gates`; got {len(labels)}.")
    lines = -(-length // tokens_per_line)
    width = min(length, tokens_per_line)
    figure, first = new_figure(max(4.0, 0.17 * width + 1.4), lines * (0.16 * depth + 0.9) + 0.5)
    figure.delaxes(first)
    for line in range(lines):
        axes = figure.add_subplot(lines, 1, line + 1)
        part = slice(line * tokens_per_line, min((line + 1) * tokens_per_line, length))
        image = axes.imshow(gates[:, part], cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_xticks(range(part.stop - part.start), labels[part], rotation=90, fontsize=7)
        axes.set_yticks(range(depth), [str(layer) for layer in range(depth)], fontsize=7)
        axes.set_ylabel("layer", fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.suptitle(_rates_of(gates), fontsize=9, x=0.01, ha="left")
    figure.colorbar(image, ax=figure.axes, label="gate (0 = inactive)", shrink=0.8)
    return _saved(figure, path)


def draw_image_activations(images: Any, gates: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw where the layers of a pixel classifier are active: a row per image, followed by one map per layer.

    Args:
        images: array (N, H, W) of grey values.
        gates: array (N, layers, H, W): 0 where inactive, else in (0.5, 1].
        path: a PNG to write; None writes nothing.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no image, or the shapes do not match.
    """
    number, depth = gates.shape[:2]
    if number == 0 or images.shape != (number, *gates.shape[2:]):
        raise ValueError(
            f"`images` must be (N, H, W) and `gates` (N, layers, H, W), N >= 1; got {images.shape} and {gates.shape}."
        )
    figure, first = new_figure(1.5 * (depth + 1) + 0.9, 1.5 * number + 0.5)
    figure.delaxes(first)
    shades: Any = None
    for row in range(number):
        for column in range(depth + 1):
            axes = figure.add_subplot(number, depth + 1, row * (depth + 1) + column + 1)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.imshow(images[row], cmap="gray", interpolation="nearest")
                continue
            layer = gates[row, column - 1]
            shades = axes.imshow(layer, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set_title(f"layer {column - 1}: {100 * float((layer > 0).mean()):.0f} %", fontsize=8)
    figure.colorbar(shades, ax=figure.axes, label="gate (0 = inactive)", shrink=0.8)
    return _saved(figure, path)


def draw_waveform_activations(
    samples: Any, gates: Any, path: str | os.PathLike[str] | None = None, *, sampling_rate: int | None = None
) -> Any:
    """Draw where the layers of a waveform classifier are active: the waveform, and below it layers by time.

    Args:
        samples: array (L,).
        gates: array (layers, L): 0 where inactive, else in (0.5, 1].
        path: a PNG to write; None writes nothing.
        sampling_rate: samples per second, for an axis in seconds; None counts samples.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the numbers of samples and gates differ.
    """
    depth, length = gates.shape
    if length == 0 or samples.shape != (length,):
        raise ValueError(f"`samples` must be ({length},), as many as `gates`, and not empty; got {samples.shape}.")
    end = length if sampling_rate is None else length / sampling_rate
    figure, wave = new_figure(9.0, 1.6 + 0.3 * depth)
    grid = figure.add_gridspec(2, 1, height_ratios=[1.1, 0.3 * depth])
    wave.set_subplotspec(grid[0])
    wave.plot([place * end / length for place in range(length)], samples, color="0.3", linewidth=0.5)
    wave.set(xlim=(0, end), xticks=[], yticks=[])
    layers = figure.add_subplot(grid[1])
    extent = (0, end, depth - 0.5, -0.5)
    shades = layers.imshow(
        gates, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="antialiased", extent=extent
    )
    layers.set_yticks(range(depth))
    layers.set(xlabel="samples" if sampling_rate is None else "seconds", ylabel="layer")
    figure.suptitle(_rates_of(gates), fontsize=9, x=0.01, ha="left")
    figure.colorbar(shades, ax=figure.axes, label="gate (0 = inactive)", shrink=0.8)
    return _saved(figure, path)


def _rates_of(gates: Any) -> str:
    rates = ", ".join(f"{100 * float((layer > 0).mean()):.0f}" for layer in gates)
    return f"Active tokens per layer (%): {rates}"


def _saved(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    """Writes the figure to `path` unless that is None, and returns it."""
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
    return figure


def plot_activations(statistics: Mapping[str, Sequence[Any]], path: str | os.PathLike[str]) -> Path:
    """Draw how much and how far each layer attends: share of active tokens with its deviation, and their span.

    Args:
        statistics: label (a task, a model) -> one `LayerActivation` per layer.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not statistics or not all(statistics.values()):
        raise ValueError("`statistics` must hold at least one layer for each label.")
    figure, rates = new_figure(10.0, 3.8)
    from matplotlib.ticker import LogLocator, NullLocator

    rates.set_subplotspec(figure.add_gridspec(1, 2)[0])
    spans = figure.add_subplot(1, 2, 2)
    spans.spines[["top", "right"]].set_visible(False)
    spans.grid(True, alpha=0.25, linewidth=0.6)
    colours = (TRAIN_COLOUR, EVALUATION_COLOUR, "#009E73", "#555555")
    for number, (label, layers) in enumerate(statistics.items()):
        colour, depth = colours[number % len(colours)], [layer.layer for layer in layers]
        values = [100 * layer.rate for layer in layers]
        errors = [100 * layer.rate_std for layer in layers]
        options = {"color": colour, "linewidth": 1.4, "marker": "o", "markersize": 3.5, "label": label}
        rates.errorbar(depth, values, yerr=errors, capsize=2, **options)
        spans.plot(depth, [max(layer.span, 0.5) for layer in layers], **options)
    deepest = max(layer.layer for layers in statistics.values() for layer in layers)
    for axes in (rates, spans):
        axes.set_xticks(range(0, deepest + 1, 1 + deepest // 16))
    rates.set(xlabel="layer", ylabel="active tokens (%)", ylim=(-3, 103))
    rates.set_title("Activation", loc="left")
    spans.set(xlabel="layer", ylabel="mean distance (tokens)", yscale="log")
    low, high = spans.get_ylim()
    spans.set_ylim(low / 1.6, high * 1.6)
    spans.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    spans.yaxis.set_major_formatter("{x:g}")
    spans.yaxis.set_minor_locator(NullLocator())
    spans.set_title("Span of attention", loc="left")
    spans.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


def codebook_usage(
    model: Any, path: str | os.PathLike[str] | None = None, *, history: Sequence[Mapping[str, Any]] | None = None
) -> Any:
    """Draw how evenly the codewords of each layer are used, and their perplexity during training.

    Args:
        model: a LongVQ model of any head.
        path: a PNG to write; None writes nothing.
        history: records of `training.codebooks.CodebookCallback`; adds a second plot, the perplexity over the steps.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the model has no codebooks.
    """
    from .training.codebooks import quantized_model

    quantized = quantized_model(model)
    if quantized is None:
        raise ValueError(f"{type(model).__name__} has no codebooks: only LongVQ models quantise their keys.")
    counts = [layer.mixer.quantizer.ema_count.detach().double().cpu() for layer in quantized.base_model.layers]
    figure, usage = new_figure(10.0 if history else 6.0, 3.8)
    if history:
        usage.set_subplotspec(figure.add_gridspec(1, 2)[0])
        perplexities = figure.add_subplot(1, 2, 2)
        perplexities.spines[["top", "right"]].set_visible(False)
        perplexities.grid(True, alpha=0.25, linewidth=0.6)
    depth, size = len(counts), counts[0].shape[-1]
    for layer, count in enumerate(counts):
        shade = 0.25 + 0.7 * layer / max(depth - 1, 1)
        options = {"color": (0.0, 0.45 * (1.4 - shade), 0.7, shade), "linewidth": 1.3}
        shares = (count / count.sum(-1, keepdim=True).clamp(min=1e-12)).sort(-1, descending=True).values
        for head in shares:
            usage.plot(range(1, size + 1), (size * head).tolist(), **options)
        if history:
            steps, values = [entry["step"] for entry in history], [entry["perplexity"][layer] for entry in history]
            perplexities.plot(steps, values, label=f"layer {layer}", **options)
    usage.axhline(1.0, color=EVALUATION_COLOUR, linewidth=0.9, linestyle="--")
    usage.set(xlabel="codeword, sorted by use", ylabel="use (1 = uniform)", yscale="symlog")
    usage.set_title("Use of the codewords", loc="left")
    if history:
        perplexities.set(xlabel="step", ylabel="perplexity of the codes", ylim=(0, size))
        perplexities.set_title("Perplexity", loc="left")
        if depth <= 8:
            perplexities.legend(frameon=False, fontsize=8)
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
    return figure

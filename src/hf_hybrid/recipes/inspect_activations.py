"""Show which tokens a SeqBoat model attends to.

Also how much of an input its layers activate, and how far they look.

    python -m hf_hybrid.recipes.inspect_activations --model_name_or_path runs/lm --prompts "To be, or not to be" \
        --output_dir runs/lm-activations
    python -m hf_hybrid.recipes.inspect_activations --model_name_or_path runs/lm --data books/ --max_length 512 \
        --split_long True --output_dir …
    python -m hf_hybrid.recipes.inspect_activations --model_name_or_path runs/digits --data digits/ --output_dir …

Language models and text classifiers read `--prompts`, an `--input_file` or a column of `--data`; classifiers of pairs,
of images and of waveforms read `--data` as the recipes that train them do. The recipe writes `activations.json` and
`activations.csv` (one row per layer, padding excluded), `activations.png`, and pictures of the first samples:
`text_0.png` ..., `images.png` or `sound_0.png` ....
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedConfig, PreTrainedTokenizerBase

from ..data.loading import load_table
from ..data.lra import PixelSequences, load_lra_table, lra_task, pixel_array
from ..data.waveforms import read_waveforms
from ..training.activations import activation_statistics, has_routers, sample_gates, write_activation_statistics
from ..training.progress import shows_bars
from ..viz import (
    draw_activation_map,
    draw_image_activations,
    draw_waveform_activations,
    plot_activations,
    token_labels,
)
from .classify_audio import AUDIO_COLUMNS
from .finetune_summarization import TEXT_COLUMNS
from .generate import GenerateArguments, read_inputs
from .support.finetuning_data import check_vocabulary, choose_column, require_columns, require_text
from .support.main_options import MAIN_OPTIONS
from .support.models import load_config, load_model, load_tokenizer
from .support.options import (
    BAD_RECORD_HELP,
    ENCODING_HELP,
    parse_arguments,
    reading_options,
    require,
    source_names,
    split_names,
)
from .support.runs import set_up_logging
from .support.sequence_classification import saved_image_processor

logger = logging.getLogger(__name__)

KINDS = ("text", "pairs", "image", "audio")
PAIR_COLUMNS = (("text1", "text2"), ("sentence1", "sentence2"), ("document1", "document2"), ("question", "sentence"))
_MORE_TEXT_COLUMNS = ("sentence", "Source", "review")


@dataclass
class InspectArguments:
    """Model, inputs and output."""

    model_name_or_path: str = field(metadata={"help": "SeqBoat checkpoint (folder or Hub name)."})
    output_dir: str = field(metadata={"help": "Folder to write; it must be new or empty."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer. Default: that of the checkpoint."})
    prompts: list[str] | None = field(default=None, metadata={"help": "Texts given on the command line."})
    input_file: str | None = field(
        default=None, metadata={"help": "Texts: .txt with one per line, or a table (jsonl, csv, parquet ...)."}
    )
    data: list[str] | None = field(default=None, metadata={"help": "Files, a folder, or a Hub data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set."})
    split: str = field(default="validation", metadata={"help": "Split of `data`."})
    kind: str | None = field(
        default=None, metadata={"help": f"What the model reads: {', '.join(KINDS)}. Default: determined by its head."}
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column of the texts in a table; for pairs, both columns separated by a comma."},
    )
    audio_column: str | None = field(
        default=None, metadata={"help": f"Column of the waveforms. Default: the first of {', '.join(AUDIO_COLUMNS)}."}
    )
    encoding: str | None = field(default=None, metadata={"help": ENCODING_HELP})
    on_bad_record: str = field(default="error", metadata={"help": BAD_RECORD_HELP})
    batch_size: int = field(default=4, metadata={"help": "Samples read together."})
    max_length: int = field(
        default=4096, metadata={"help": "Tokens of a text or samples of a waveform to read; the rest is dropped."}
    )
    split_long: bool = field(default=False, metadata={"help": "Split longer texts into several pieces instead."})
    max_texts: int = field(default=100, metadata={"help": "Compute the statistics on this many first samples."})
    pictures: int = field(default=3, metadata={"help": "Draw this many first samples."})
    max_drawn_tokens: int = field(default=256, metadata={"help": "Draw this many tokens of a text."})
    device: str | None = field(default=None, metadata={"help": "Default: an accelerator where there is one."})

    def __post_init__(self) -> None:
        self.data = source_names(self.data, "data")
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        for name in ("batch_size", "max_length", "max_texts", "max_drawn_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive; got {getattr(self, name)}.")
        if self.pictures < 0:
            raise ValueError(f"`pictures` must not be negative; got {self.pictures}.")
        if sum(source is not None for source in (self.prompts, self.input_file, self.data)) != 1:
            raise ValueError("Pass the inputs either as `prompts`, as `input_file`, or as `data`.")


@dataclass(frozen=True)
class Samples:
    """The samples to inspect.

    Attributes:
        batch: function from a range of samples to the arguments of the stack.
        number: number of samples.
        draw: draws the first samples, given the gates (layers, L) of each, into a folder.
    """

    batch: Callable[[slice], dict[str, torch.Tensor]]
    number: int
    draw: Callable[[list[np.ndarray], Path], list[Path]]


def kind_of(config: PreTrainedConfig, options: InspectArguments) -> str:
    """Which of `KINDS` the model reads.

    Raises:
        ValueError: its head does not determine it, or it needs `data`.
    """
    head = (config.architectures or [""])[0]
    reads_values = getattr(config, "input_type", "tokens") == "values"
    kind = options.kind
    if kind is None and "ForImageClassification" in head:
        kind = "image"
    elif kind is None and "ForAudioClassification" in head:
        kind = "audio"
    elif kind is None and reads_values:
        raise ValueError(f"{head or 'This model'} reads real numbers of an unknown kind: pass `kind`, image or audio.")
    kind = kind or ("pairs" if getattr(config, "dual_encoder", False) else "text")
    if kind != "text" and options.data is None:
        raise ValueError(f"A model of kind {kind} needs `data`: `prompts` and `input_file` hold single texts.")
    if reads_values and kind not in ("image", "audio"):
        raise ValueError(f"The model reads real numbers, but `kind` is {kind!r}: pass image or audio.")
    if kind == "audio" and not reads_values:
        raise ValueError("`kind` is audio, but the model reads tokens (`input_type='tokens'`).")
    return kind


# ------------------------------------------------------------------------------------------------------------- samples


def _texts(options: InspectArguments, kind: str) -> list[str]:
    """The texts; of pairs, one after the other, each of which a layer reads alone."""
    if options.data is None:
        names = (
            "model_name_or_path",
            "prompts",
            "input_file",
            "text_column",
            "batch_size",
            "encoding",
            "on_bad_record",
        )
        return read_inputs(GenerateArguments(**{name: getattr(options, name) for name in names}))[: options.max_texts]
    rows: Any = load_table(options.data, options.split, config_name=options.dataset_config, **reading_options(options))
    columns = split_names(options.text_column)
    if not columns and kind == "pairs":
        columns = list(next((pair for pair in PAIR_COLUMNS if set(pair) <= set(rows.column_names)), ()))
    if not columns:
        columns = [choose_column(rows, None, (*TEXT_COLUMNS, *_MORE_TEXT_COLUMNS), "text_column")]
    require_columns(rows, columns, "data")
    rows = rows.select(range(min(options.max_texts, len(rows))))
    require_text(rows, columns, "data")
    return [row[column] for row in rows for column in columns]


def text_samples(options: InspectArguments, kind: str, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """Samples of token ids.

    Raises:
        ValueError: there is no text.
    """
    limit = options.max_length
    pieces: list[list[int]] = []
    for text in _texts(options, kind):
        ids = tokenizer(text, truncation=not options.split_long, max_length=limit)["input_ids"]
        pieces += [ids[start : start + limit] for start in range(0, len(ids), limit)]
    pieces = pieces[: options.max_texts]
    if not pieces:
        raise ValueError("There is no text to inspect: every text is empty.")

    def batch(part: slice) -> dict[str, torch.Tensor]:
        padded = tokenizer.pad({"input_ids": pieces[part]}, return_tensors="pt", return_attention_mask=True)
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    def draw(gates: list[np.ndarray], folder: Path) -> list[Path]:
        paths = []
        for number, (ids, layers) in enumerate(zip(pieces, gates)):
            length = min(len(ids), options.max_drawn_tokens)
            paths.append(folder / f"text_{number}.png")
            draw_activation_map(layers[:, :length], token_labels(tokenizer, ids[:length]), paths[-1])
        return paths

    return Samples(batch, len(pieces), draw)


def image_samples(options: InspectArguments, config: PreTrainedConfig) -> Samples:
    """Samples of pixels, scaled as in training, or as tokens.

    Raises:
        ValueError: the images differ in size from each other or from the model.
    """
    source = {"config_name": options.dataset_config, **reading_options(options)}
    rows = load_lra_table(lra_task("image"), options.data or [], options.split, **source)
    pixels = pixel_array(rows.select(range(min(options.max_texts, len(rows)))), "data")
    as_values = getattr(config, "input_type", "tokens") == "values"
    side = getattr(config, "image_size", None)
    if as_values and side is not None and pixels.shape[1] != side * side:
        raise ValueError(f"The images have {pixels.shape[1]} pixels, but the model reads {side} by {side}.")
    scale: dict[str, float] = {}
    processor = saved_image_processor(options.model_name_or_path)
    if processor is not None:
        scale = {"mean": processor.image_mean, "std": processor.image_std}
    sequences = PixelSequences(pixels, [0] * len(pixels), as_values=as_values, **scale)
    name = "pixel_values" if as_values else "input_ids"

    def batch(part: slice) -> dict[str, torch.Tensor]:
        found = sequences.__getitems__(range(len(pixels))[part])
        return {"input_values" if as_values else "input_ids": torch.stack([row[name] for row in found])}

    def draw(gates: list[np.ndarray], folder: Path) -> list[Path]:
        length = pixels.shape[1]
        height = int(length**0.5) if int(length**0.5) ** 2 == length else 1
        shape = (height, length // height)
        layers = np.stack(gates).reshape(len(gates), -1, *shape)
        draw_image_activations(pixels[: len(gates)].reshape(-1, *shape), layers, folder / "images.png")
        return [folder / "images.png"]

    return Samples(batch, len(pixels), draw)


def audio_samples(options: InspectArguments) -> Samples:
    """Samples of waveforms, scaled as in training.

    Raises:
        ValueError: the checkpoint has no feature extractor, or the data has no waveforms with its sampling rate.
    """
    try:
        extractor = AutoFeatureExtractor.from_pretrained(options.model_name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"The checkpoint {options.model_name_or_path} has no feature extractor: {error}") from error
    rows: Any = load_table(
        options.data or [], options.split, config_name=options.dataset_config, **reading_options(options)
    )
    column = choose_column(rows, options.audio_column, AUDIO_COLUMNS, "audio_column")
    rows = rows.select(range(min(options.max_texts, len(rows))))
    rate = extractor.sampling_rate
    waveforms, _ = read_waveforms(rows, column, sampling_rate=rate, max_samples=options.max_length)

    def batch(part: slice) -> dict[str, torch.Tensor]:
        return dict(extractor(waveforms[part], sampling_rate=rate, padding=True, return_tensors="pt"))

    def draw(gates: list[np.ndarray], folder: Path) -> list[Path]:
        paths = [folder / f"sound_{number}.png" for number in range(len(gates))]
        for path, samples, layers in zip(paths, waveforms, gates):
            draw_waveform_activations(samples, layers, path, sampling_rate=rate)
        return paths

    return Samples(batch, len(waveforms), draw)


def load_samples(options: InspectArguments, config: PreTrainedConfig, model: Any) -> Samples:
    """The inputs of a model.

    Raises:
        ValueError: there are none, or they do not fit the model.
    """
    kind = kind_of(config, options)
    if kind == "image":
        return image_samples(options, config)
    if kind == "audio":
        return audio_samples(options)
    tokenizer = load_tokenizer(options.tokenizer or options.model_name_or_path)
    check_vocabulary(model, tokenizer)
    return text_samples(options, kind, tokenizer)


# ---------------------------------------------------------------------------------------------------------------- main


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `--help` for the options.

    Args:
        args: command-line arguments, a mapping of options, or None for `sys.argv`.

    Returns:
        `layers`: the statistics of each layer; `mean_rate`; `pictures`: the files drawn.

    Raises:
        ValueError: an option, the inputs or the checkpoint cannot be used, or the model has no routers.
        FileExistsError: the output folder is not empty.
    """
    (options,) = parse_arguments((InspectArguments,), args, __doc__, MAIN_OPTIONS["inspect_activations"])
    require("Pictures", "matplotlib", extra="viz")  # fail now rather than after the measurements
    set_up_logging()
    output = Path(options.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"`output_dir` {output} exists and is not an empty folder. Choose a new one, or empty it."
        )
    config = load_config(options.model_name_or_path, {})
    model: Any = load_model(AutoModel, options.model_name_or_path)
    model = model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    if not has_routers(model):
        raise ValueError(
            f"{options.model_name_or_path} is a {model.config.model_type} model: only SeqBoat models (without "
            "`always_active`) have layers that activate some tokens and not others."
        )
    samples = load_samples(options, config, model)
    starts = range(0, samples.number, options.batch_size)
    bar = tqdm(starts, desc="activations", unit="batch", disable=len(starts) < 2 or not shows_bars())
    batches = (samples.batch(slice(start, start + options.batch_size)) for start in bar)
    layers = activation_statistics(model, batches, max_sequences=samples.number + 1)  # all; the bar completes
    output.mkdir(parents=True, exist_ok=True)
    for suffix in ("json", "csv"):
        write_activation_statistics(layers, output / f"activations.{suffix}")
    pictures = [plot_activations({Path(options.model_name_or_path).name: layers}, output / "activations.png")]
    drawn = range(min(options.pictures, samples.number))
    gates = [sample_gates(model, samples.batch(slice(number, number + 1))).numpy() for number in drawn]
    pictures += samples.draw(gates, output) if gates else []
    for layer in layers:
        state = " (dead)" if layer.is_dead else " (always on)" if layer.is_always_on else ""
        logger.info("layer %d: %.1f %% active, span %.1f tokens%s", layer.layer, 100 * layer.rate, layer.span, state)
    mean_rate = sum(layer.rate for layer in layers) / len(layers)
    return {"layers": [asdict(layer) for layer in layers], "mean_rate": mean_rate, "pictures": pictures}


if __name__ == "__main__":
    main()

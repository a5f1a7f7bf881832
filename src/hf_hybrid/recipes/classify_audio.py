"""Train a classifier of raw waveforms.

    python -m hf_hybrid.recipes.classify_audio --data digits/ --arch mega \
        --config_overrides "hidden_size=60,num_hidden_layers=6,use_chunking=true,chunk_size=1000" --output_dir runs/digits

Rows have a column of samples (numbers, one channel) or of mappings with `array` and `sampling_rate`, and a column of labels. All
recordings must have the same sampling rate; lengths may differ. The feature extractor is saved with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from ..data.waveforms import WaveformCollator, WaveformDataset, read_waveforms, standardization
from ..processing.audio_processing import WaveformFeatureExtractor
from ..training.arguments import FinetuningArguments
from .support.finetuning_data import TableArguments, choose_column, load_tables, require_columns, single_validation_set
from .support.labels import labels_of_model
from .support.models import with_adapter
from .support.recipe import Recipe
from .support.reports import display_names
from .support.runs import Job
from .support.sequence_classification import (
    ClassifierArguments,
    build_classifier,
    classification_report,
    classification_trainer,
    classifier_config,
    find_classes,
)

if TYPE_CHECKING:
    from datasets import Dataset

AUDIO_COLUMNS = ("audio", "samples", "waveform", "input_values")
LABEL_COLUMNS = ("label", "digit", "labels", "class")


@dataclass
class AudioArguments(TableArguments):
    """Recordings and their labels."""

    audio_column: str | None = field(
        default=None, metadata={"help": f"Column of the waveforms. Default: the first of {', '.join(AUDIO_COLUMNS)}."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": f"Column of the labels. Default: the first of {', '.join(LABEL_COLUMNS)}."}
    )
    sampling_rate: int | None = field(
        default=None,
        metadata={"help": "Sampling rate in Hz that all recordings must have. Default: that of the data."},
    )
    max_seconds: float | None = field(default=None, metadata={"help": "Cut longer recordings."})
    standardize: str = field(
        default="recording",
        metadata={
            "help": "Scale to mean 0 and variance 1: each `recording` by its own statistics, or all by those of the "
            "training `data`."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.standardize not in ("recording", "data"):
            raise ValueError(f"`standardize` must be 'recording' or 'data'; got {self.standardize!r}.")


def build(
    data_args: AudioArguments,
    model_args: ClassifierArguments,
    training_args: FinetuningArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Classifier, waveforms and trainer.

    Raises:
        ValueError: an option, the data, the labels or the checkpoint cannot be used.
    """
    auto_class = AutoModelForAudioClassification
    config = classifier_config(auto_class, model_args, {}, {"input_type": "values"})
    train, validation = load_tables(data_args, seed=training_args.seed, evaluate_only=evaluate_only)
    rows = single_validation_set(validation)
    some = rows if train is None else train
    audio_column = choose_column(some, data_args.audio_column, AUDIO_COLUMNS, "audio_column")
    label_column = choose_column(some, data_args.label_column, LABEL_COLUMNS, "label_column")
    new_labels = None if train is None else find_classes(train, label_column)
    labels = new_labels or labels_of_model(config, label_column)
    extractor = None
    if model_args.model_name_or_path is not None:
        extractor = AutoFeatureExtractor.from_pretrained(model_args.model_name_or_path)
    rate = data_args.sampling_rate if extractor is None else extractor.sampling_rate

    def read(part: Dataset, what: str) -> WaveformDataset:
        nonlocal rate
        require_columns(part, [audio_column, label_column], what)
        limit = None if data_args.max_seconds is None or rate is None else round(data_args.max_seconds * rate)
        waveforms, rate = read_waveforms(part, audio_column, sampling_rate=rate, max_samples=limit, what=what)
        return WaveformDataset(waveforms, labels.encode(part, what))  # type: ignore[arg-type]

    if rate is None and data_args.max_seconds is not None:
        rate = read_waveforms(some.select([0]), audio_column)[1]
    train_set = None if train is None else read(train, "training data")
    validation_set = read(rows, "validation data")
    if rate is None:
        raise ValueError("The data does not state its sampling rate; pass `sampling_rate` in Hz.")
    if extractor is None:
        scale: dict[str, Any] = {}
        if train_set is not None and data_args.standardize == "data":
            scale = standardization(train_set.waveforms)
        extractor = WaveformFeatureExtractor(sampling_rate=rate, **scale)
    longest = max(len(waveform) for part in (train_set, validation_set) if part for waveform in part.waveforms)
    model = build_classifier(auto_class, config, model_args, new_labels, longest)
    options: dict[str, Any] = {"collator": WaveformCollator(extractor), "processor": extractor}
    trained = with_adapter(model, model_args.model_name_or_path, training_args)
    trainer = classification_trainer(trained, training_args, train_set, validation_set, labels, **options)
    sources = data_args.data or data_args.validation_data or []
    report = classification_report(
        f"A {model.config.model_type} classifier of raw waveforms at {rate} Hz: {display_names(sources)}.",
        auto_class,
        sources,
        train,
        rows,
        label_column=label_column,
        lengths=f"waveforms of up to {longest} samples",
        task_type="audio-classification",
        metrics={"sampling_rate": rate, "longest_sequence": longest},
    )
    return Job(trainer, report)


RECIPE = Recipe("classify_audio", __doc__ or "", (AudioArguments, ClassifierArguments, FinetuningArguments), build)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

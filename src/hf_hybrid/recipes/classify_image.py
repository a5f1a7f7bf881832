"""Train a classifier of images, read pixel by pixel.

Images are sequences of grey values, row by row.

    python -m hf_hybrid.recipes.classify_image --data digits/ --arch mega \
        --config_overrides "hidden_size=96,num_hidden_layers=4,normalization_type=batchnorm" --output_dir runs/images

Rows have a column `pixels` (integers from 0 to 255) or a column of images, which are converted to grey, and a column
of labels. All images must have the same size. The model sees (pixel / 255 - `pixel_mean`) / `pixel_std`; for square
images, the image processor that does this is saved with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForImageClassification, default_data_collator

from ..data.lra import PixelSequences, load_lra_table, lra_task, pixel_array
from ..training.arguments import FinetuningArguments
from .support.finetuning_data import TableArguments, load_tables, single_validation_set
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
    new_image_processor,
    saved_image_processor,
)

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class ImageArguments(TableArguments):
    """Images and their labels."""

    pixel_mean: float = field(default=0.5, metadata={"help": "Subtracted from the grey values (0 to 1)."})
    pixel_std: float = field(default=0.5, metadata={"help": "Divides the grey values."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pixel_std > 0:
            raise ValueError(f"`pixel_std` must be positive; got {self.pixel_std}.")


def build(
    data_args: ImageArguments,
    model_args: ClassifierArguments,
    training_args: FinetuningArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Classifier, pixels and trainer.

    Raises:
        ValueError: an option, the data, the labels or the checkpoint cannot be used.
    """
    auto_class, checkpoint = AutoModelForImageClassification, model_args.model_name_or_path
    config = classifier_config(auto_class, model_args, {}, {"input_type": "values"})
    load = partial(load_lra_table, lra_task("image"))
    train, validation = load_tables(data_args, seed=training_args.seed, evaluate_only=evaluate_only, load=load)
    rows = single_validation_set(validation)
    new_labels = None if train is None else find_classes(train, "label")
    labels = new_labels or labels_of_model(config, "label")
    scale: dict[str, float] = {"mean": data_args.pixel_mean, "std": data_args.pixel_std}
    processor = saved_image_processor(checkpoint)
    if processor is not None:
        scale = {"mean": processor.image_mean, "std": processor.image_std}

    def encode(part: Dataset, what: str) -> PixelSequences:
        targets: Any = labels.encode(part, what)
        return PixelSequences(pixel_array(part, what), targets, as_values=True, **scale)

    train_set = None if train is None else encode(train, "training data")
    validation_set = encode(rows, "validation data")
    length = validation_set.pixels.shape[1]
    if train_set is not None and train_set.pixels.shape[1] != length:
        raise ValueError(
            f"Training images have {train_set.pixels.shape[1]} pixels, validation images {length}: all must have the "
            "same size."
        )
    if checkpoint is None:
        processor = new_image_processor(config, length, **scale)
    model = build_classifier(auto_class, config, model_args, new_labels, length)
    options: dict[str, Any] = {"collator": default_data_collator, "processor": processor, "equal_lengths": True}
    trained = with_adapter(model, model_args.model_name_or_path, training_args)
    trainer = classification_trainer(trained, training_args, train_set, validation_set, labels, **options)
    sources = data_args.data or data_args.validation_data or []
    report = classification_report(
        f"A {model.config.model_type} classifier of images as sequences of grey values: {display_names(sources)}. Inputs are "
        f"(pixel / 255 - {scale['mean']}) / {scale['std']}, row by row.",
        auto_class,
        sources,
        train,
        rows,
        label_column="label",
        lengths=f"{length} pixels",
        task_type="image-classification",
        metrics={"pixels": length, "pixel_mean": scale["mean"], "pixel_std": scale["std"]},
    )
    return Job(trainer, report)


RECIPE = Recipe("classify_image", __doc__ or "", (ImageArguments, ClassifierArguments, FinetuningArguments), build)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

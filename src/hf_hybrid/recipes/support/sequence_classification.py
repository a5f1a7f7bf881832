"""Shared by the recipes that train classifiers of long sequences, of tokens or of numbers, from scratch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedConfig, PreTrainedModel

from ...auto import find_architecture, image_processor_class
from ...processing.image_processing import PixelSequenceImageProcessor
from ...training.arguments import FinetuningArguments
from ...training.trainer import HybridTrainer
from .labels import (
    Labels,
    classification_head,
    find_labels,
    majority_accuracy,
    make_classification_metrics,
    only_logits,
)
from .models import NewModelArguments, load_config, load_model, make_room, parse_overrides, require_head
from .reports import RunReport, display_names, hub_names

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass
class ClassifierArguments(NewModelArguments):
    """A new model by its architecture, or a checkpoint: there is no default."""

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.arch is None):
            raise ValueError("Pass either `arch`, for a new model, or `model_name_or_path`, for a checkpoint.")
        super().__post_init__()


def find_classes(rows: Dataset, column: str) -> Labels:
    """The classes of training rows.

    Raises:
        ValueError: a label is a decimal number, or see `find_labels`.
    """
    return find_labels(rows, column, "single_label_classification")


def _published_fields(known: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration fields that the published code sets for classifiers and that differ from the defaults."""
    architecture = find_architecture(known.model_type)
    if architecture is None:
        return {}
    fields = {**{name: getattr(known, name) for name in type(known).__dataclass_fields__}, **overrides}
    published = architecture.published_classifier.items()
    return {name: value(fields) if callable(value) else value for name, value in published}


def classifier_config(
    auto_class: Any, model_args: ClassifierArguments, defaults: Mapping[str, Any], wishes: Mapping[str, Any]
) -> PreTrainedConfig:
    """Configuration of the checkpoint, or of a new model.

    Args:
        auto_class: Auto class of the head.
        model_args: choice of the model; its overrides take precedence.
        defaults: fields of a new model, which its configuration must have.
        wishes: fields of a new model that are set only if its configuration has them.

    Raises:
        ValueError: it cannot be loaded, or the model type has no such head.
    """
    trust = {"trust_remote_code": model_args.trust_remote_code}
    if model_args.model_name_or_path is not None:
        config = load_config(model_args.model_name_or_path, {}, **trust)
    else:
        name = str(model_args.arch)
        known = load_config(name, {}, **trust)
        overrides = parse_overrides(model_args.config_overrides)
        wanted = {**_published_fields(known, overrides), **wishes}
        chosen = {option: value for option, value in wanted.items() if hasattr(known, option)}
        config = load_config(name, {**defaults, **chosen, **overrides}, **trust)
    require_head(auto_class, config)
    return config


def build_classifier(
    auto_class: Any, config: PreTrainedConfig, model_args: ClassifierArguments, labels: Labels | None, longest: int
) -> PreTrainedModel:
    """The checkpoint, or a new model that accepts the longest sequence.

    Args:
        auto_class: Auto class of the head.
        config: configuration from `classifier_config`.
        model_args: choice of the model.
        labels: classes to learn; None keeps those of the checkpoint.
        longest: length of the longest sequence.

    Raises:
        ValueError: the checkpoint cannot be loaded.
    """
    head = {} if labels is None else classification_head(labels)
    trust = {"trust_remote_code": model_args.trust_remote_code}
    if model_args.model_name_or_path is not None:
        return load_model(auto_class, model_args.model_name_or_path, **trust, **head)
    make_room(config, longest, parse_overrides(model_args.config_overrides), "max_length")
    for name, value in head.items():
        setattr(config, name, value)
    return auto_class.from_config(config, **trust)


def classification_trainer(
    model: PreTrainedModel,
    training_args: FinetuningArguments,
    train: TorchDataset | Dataset | None,
    validation: TorchDataset | Dataset,
    labels: Labels,
    *,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    processor: Any = None,
    equal_lengths: bool = False,
) -> HybridTrainer:
    """A trainer that evaluates accuracy.

    Args:
        model, training_args, train, validation, labels: model, arguments, data sets and labels of the run.
        collator: data collator.
        processor: tokenizer, image processor or feature extractor, saved with the model.
        equal_lengths: whether all sequences have the same length, so that batches need no padding and no sorting by
            length.
    """
    if equal_lengths:
        training_args.train_sampling_strategy = "random"
        training_args.include_num_input_tokens_seen = "all"
    return HybridTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=processor,
        compute_metrics=make_classification_metrics(["accuracy"], labels),
        preprocess_logits_for_metrics=only_logits,
    )


def saved_image_processor(checkpoint: str | None) -> Any:
    """The image processor of a checkpoint; None where it has none."""
    if checkpoint is None:
        return None
    try:
        return image_processor_class().from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        logger.debug("no image processor: %s", error)
        return None


def new_image_processor(
    config: PreTrainedConfig, length: int, mean: float, std: float
) -> PixelSequenceImageProcessor | None:
    """The image processor of a new classifier if its images are square, whose side is set in `config`; else None.

    Args:
        config: configuration of the new model.
        length: number of pixels of an image.
        mean, std: values that the processor subtracts and divides by.
    """
    side = math.isqrt(length)
    if side * side != length:
        return None
    if hasattr(config, "image_size"):
        config.image_size = side  # type: ignore[attr-defined]
    return PixelSequenceImageProcessor(image_size=side, image_mean=mean, image_std=std)


def classification_report(
    description: str,
    auto_class: Any,
    sources: Sequence[str],
    train: Dataset | None,
    validation: Dataset,
    *,
    label_column: str,
    lengths: str,
    name: str | None = None,
    task_type: str = "text-classification",
    metrics: Mapping[str, Any] | None = None,
) -> RunReport:
    """The report of a classification recipe.

    Args:
        description: sentence for the model card.
        auto_class: Auto class that loads the checkpoint.
        sources: sources of the data.
        train, validation: rows with their labels in `label_column`.
        label_column: column of the labels, for the accuracy of the most frequent class.
        lengths: lengths of the inputs, in words.
        name: name of the data; None for that of the sources.
        task_type: Hub task, also used as the pipeline.
        metrics: additional numbers.
    """
    name = name or display_names(sources)
    numbers: dict[str, Any] = {
        **(metrics or {}),
        "train_samples": 0 if train is None else len(train),
        "eval_samples": len(validation),
    }
    if train is not None:
        numbers["majority_accuracy"] = majority_accuracy(train, {"": validation}, label_column)
    return RunReport(
        description=description,
        task_type=task_type,
        pipeline_tag=task_type,
        data_name=name,
        auto_class=auto_class.__name__,
        training_data=f"{name}, {numbers['train_samples']:,} rows",
        datasets=hub_names(sources),
        lengths=lengths,
        metrics=numbers,
        result_names={"eval_accuracy": "accuracy"},
    )

"""Train a classifier on a task of the Long Range Arena.

The tasks are those of arXiv 2011.04006.

    python -m hf_hybrid.recipes.train_lra --task listops --arch mega --config_overrides "hidden_size=80,num_hidden_layers=6" \
        --num_train 96000 --num_validation 2000 --per_device_train_batch_size 64 --learning_rate 1e-3 --output_dir runs/listops
    python -m hf_hybrid.recipes.train_lra --task image --arch spade --data cifar-10-batches-bin --output_dir runs/image

Tasks: listops, text (bytes), retrieval (pairs of documents, bytes), image and pathfinder (pixels). Without `--data`, ListOps and
Pathfinder are generated. `--data` takes the files in which the tasks are distributed, a folder written by
`hf-hybrid data lra`, or any table with the usual columns. `--arch` is any model type with a sequence-classification head, of
this library or of Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from ..data.lra import (
    GREY_VALUES,
    TASKS,
    LraTask,
    PairCollator,
    PixelSequences,
    encode_rows,
    load_lra_table,
    lra_task,
    lra_tokenizer,
    pixel_array,
)
from ..training.arguments import FinetuningArguments
from .generate_lra import GENERATED, GeneratorArguments, generate_splits
from .support.finetuning_data import TableArguments, check_vocabulary, load_tables, single_validation_set
from .support.labels import Labels, labels_of_model
from .support.models import load_tokenizer, with_adapter
from .support.recipe import Recipe
from .support.reports import RunReport, display_names
from .support.runs import Job
from .support.sequence_classification import (
    ClassifierArguments,
    build_classifier,
    classification_report,
    classification_trainer,
    classifier_config,
    find_classes,
    new_image_processor,
)

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class LraArguments(GeneratorArguments, TableArguments):
    """The task and its data: read from `data`, or generated."""

    task: str = field(default="listops", metadata={"help": f"{', '.join(TASKS)}."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a text; longer ones are truncated. Default: 2000 (ListOps), 4000 (bytes)."},
    )
    pixel_values: bool = field(
        default=False,
        metadata={"help": "Feed grey values as numbers to an image-classification head, instead of as tokens."},
    )
    pixel_mean: float = field(default=0.5, metadata={"help": "Subtracted from `pixel_values` (0 to 1)."})
    pixel_std: float = field(default=0.5, metadata={"help": "Divides `pixel_values`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        task = lra_task(self.task)
        if self.pixel_values and not task.is_pixels:
            raise ValueError(f"`pixel_values` is for the tasks image and pathfinder; got {self.task!r}.")
        if self.data is None and self.validation_data is None and self.task not in GENERATED:
            raise ValueError(
                f"`data` is required for the task {self.task!r}; only {' and '.join(GENERATED)} are generated."
            )


# ---------------------------------------------------------------------------------------------------------------- data


def load_rows(
    task: LraTask, arguments: LraArguments, seed: int, evaluate_only: bool
) -> tuple[Dataset | None, Dataset]:
    """Training rows (None when only evaluating) and validation rows."""
    if arguments.data is None and arguments.validation_data is None:
        splits = generate_splits(task, arguments, with_train=not evaluate_only)
        if "validation" not in splits or not (evaluate_only or "train" in splits):
            raise ValueError("`num_train` and `num_validation` must be positive.")
        return splits.get("train"), splits["validation"]
    load = partial(load_lra_table, task)
    train, validation = load_tables(arguments, seed=seed, evaluate_only=evaluate_only, load=load)
    return train, single_validation_set(validation)


def encode(
    rows: Dataset,
    task: LraTask,
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase | None,
    arguments: LraArguments,
    two_inputs: bool,
    what: str,
) -> Dataset | PixelSequences:
    """Model inputs and labels of all rows."""
    targets = labels.encode(rows, what)
    if tokenizer is None:
        return PixelSequences(
            pixel_array(rows, what),
            targets,  # type: ignore[arg-type]
            as_values=arguments.pixel_values,
            mean=arguments.pixel_mean,
            std=arguments.pixel_std,
        )
    encoded = encode_rows(rows, task, tokenizer, max_length=arguments.max_length, two_inputs=two_inputs, what=what)
    return encoded.add_column("labels", targets)


def longest_sequence(data: Sequence[PixelSequences | Dataset | None]) -> int:
    """Length in tokens of the longest sequence of the data sets."""
    longest = 0
    for dataset in data:
        if isinstance(dataset, PixelSequences):
            longest = max(longest, dataset.pixels.shape[1])
        elif dataset is not None:
            longest = max(longest, max(dataset["length"]))
            if "pair_input_ids" in dataset.column_names:
                longest = max(longest, max(map(len, dataset["pair_input_ids"])))
    return longest


def build(
    data_args: LraArguments,
    model_args: ClassifierArguments,
    training_args: FinetuningArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Classifier, encoded rows and trainer.

    Raises:
        ValueError: an option, the data, the labels or the checkpoint cannot be used.
    """
    task = lra_task(data_args.task)
    tokenizer = lra_tokenizer(task)
    if tokenizer is not None and (model_args.tokenizer or model_args.model_name_or_path):
        tokenizer = load_tokenizer(
            model_args.tokenizer or model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
        )
    auto_class = AutoModelForImageClassification if data_args.pixel_values else AutoModelForSequenceClassification
    defaults, wishes = _new_fields(task, tokenizer, data_args.pixel_values)
    config = classifier_config(auto_class, model_args, defaults, wishes)
    train, validation = load_rows(task, data_args, training_args.seed, evaluate_only)
    new_labels = None if train is None else find_classes(train, "label")
    labels = new_labels or labels_of_model(config, "label")
    two_inputs = bool(getattr(config, "dual_encoder", False))
    with training_args.main_process_first(desc="tokenize"):
        encoded_rows = encode(validation, task, labels, tokenizer, data_args, two_inputs, "validation data")
        encoded_train = None
        if train is not None:
            encoded_train = encode(train, task, labels, tokenizer, data_args, two_inputs, "training data")
    longest = longest_sequence([encoded_train, encoded_rows])
    model = build_classifier(auto_class, config, model_args, new_labels, longest)
    collator: Any = default_data_collator
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
        collator = PairCollator(tokenizer) if two_inputs else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    processor: Any = tokenizer
    if data_args.pixel_values:
        processor = new_image_processor(model.config, longest, data_args.pixel_mean, data_args.pixel_std)
    options = {"collator": collator, "processor": processor, "equal_lengths": task.is_pixels}
    trained = with_adapter(model, model_args.model_name_or_path, training_args)
    trainer = classification_trainer(trained, training_args, encoded_train, encoded_rows, labels, **options)
    return Job(trainer, _report(task, data_args, model, auto_class, train, validation, longest))


def _new_fields(
    task: LraTask, tokenizer: PreTrainedTokenizerBase | None, pixel_values: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a new model: those that every configuration has, and those that are set only where they exist."""
    if pixel_values:
        return {}, {"input_type": "values"}
    size = GREY_VALUES + 1 if tokenizer is None else len(tokenizer)
    eos = None if tokenizer is None else tokenizer.eos_token_id
    wishes = {"dual_encoder": True} if len(task.columns) == 2 else {}
    return {"vocab_size": size, "pad_token_id": 0, "eos_token_id": eos}, wishes


def _report(
    task: LraTask,
    data_args: LraArguments,
    model: PreTrainedModel,
    auto_class: Any,
    train: Dataset | None,
    validation: Dataset,
    longest: int,
) -> RunReport:
    sources = data_args.data or data_args.validation_data or []
    origin = display_names(sources) if sources else f"generated with seed {data_args.generator_seed}"
    inputs = (
        " (grey values as numbers)" if data_args.pixel_values else " (grey values as tokens)" if task.is_pixels else ""
    )
    return classification_report(
        f"A {model.config.model_type} classifier for the task {task.name} of the Long Range Arena{inputs}.",
        auto_class,
        sources,
        train,
        validation,
        label_column="label",
        lengths=f"sequences of up to {longest} tokens",
        name=f"Long Range Arena {task.name} ({origin})",
        task_type="image-classification" if data_args.pixel_values else "text-classification",
        metrics={"task": task.name, "longest_sequence": longest},
    )


RECIPE = Recipe("train_lra", __doc__ or "", (LraArguments, ClassifierArguments, FinetuningArguments), build)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

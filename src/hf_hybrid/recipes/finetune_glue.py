"""Fine-tune a sequence classifier (or regressor) on a GLUE task or on own data with the same columns.

    python -m hf_hybrid.recipes.finetune_glue --model_name_or_path runs/pretrain --task sst2 --output_dir runs/sst2
    python -m hf_hybrid.recipes.finetune_glue --model_name_or_path runs/pretrain --data reviews.csv \
        --validation_fraction 0.1 --output_dir runs/reviews

Own data has one text column or two and a column `label`: integers, names or booleans for classes, decimal numbers for
regression. The GLUE benchmark is described in arXiv 1804.07461.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .. import metrics as offline_metrics
from ..training.arguments import FinetuningArguments
from ..training.trainer import HybridTrainer
from .common import Job, RunReport, display_names, hub_names, load_config, load_tokenizer, run_recipe
from .finetuning_data import (
    CheckpointArguments,
    TableArguments,
    check_vocabulary,
    load_or_initialize,
    load_tables,
    require_columns,
    require_text,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

GLUE_DATASET = "nyu-mll/glue"

# Column names of the nine tasks, pairs before single sentences.
COLUMN_PAIRS = (
    ("sentence1", "sentence2"),  # mrpc, rte, stsb, wnli
    ("premise", "hypothesis"),  # mnli
    ("question1", "question2"),  # qqp
    ("question", "sentence"),  # qnli
    ("sentence", None),  # cola, sst2
    ("text", "text_pair"),
    ("text", None),
)


@dataclass
class GlueArguments(TableArguments):
    """The task, its data and its columns."""

    task: str | None = field(
        default=None,
        metadata={"help": f"GLUE task ({', '.join(offline_metrics.GLUE_TASKS)}): decides data and metrics."},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns of text. Default: found by their GLUE names."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    metrics: list[str] | None = field(
        default=None,
        metadata={"help": "Metrics by name. Default: those of the task, else accuracy, or correlations."},
    )
    max_length: int = field(default=256, metadata={"help": "Tokens of an input; longer ones are cut."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is not None and self.task not in offline_metrics.GLUE_TASKS:
            raise ValueError(f"`task` must be one of {', '.join(offline_metrics.GLUE_TASKS)}; got {self.task!r}.")
        if self.task is not None and self.data is None and self.validation_data is None:
            self.data, self.dataset_config = [GLUE_DATASET], self.task


@dataclass
class Labels:
    """What the labels are: names of classes, or numbers (`names` is None)."""

    column: str
    names: list[str] | None
    ids: dict[Any, int] | None = None  # raw value -> class

    @property
    def is_regression(self) -> bool:
        """True when the labels are numbers to predict."""
        return self.names is None

    def encode(self, values: Sequence[Any], what: str) -> list[int] | list[float]:
        """Labels of the model.

        Raises:
            ValueError: a label is missing or unknown; names the row.
        """
        encoded: list[Any] = []
        for number, value in enumerate(values):
            try:
                if value is None:
                    raise ValueError
                encoded.append(_finite(value) if self.ids is None else self.ids[value])
            except (KeyError, ValueError, TypeError):
                accepted = "finite numbers" if self.ids is None else ", ".join(map(repr, self.ids))
                raise ValueError(
                    f"Row {number} of the {what} has the label {value!r} in the column {self.column!r}; accepted are "
                    f"{accepted}."
                ) from None
        return encoded


def _finite(value: Any) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise ValueError
    return number


def find_text_columns(rows: Dataset, wanted: Sequence[str] | None) -> tuple[str, str | None]:
    """The one or two columns of text.

    Raises:
        ValueError: no known combination of columns.
    """
    if wanted is not None:
        if not 1 <= len(wanted) <= 2:
            raise ValueError(f"`text_columns` takes one or two names; got {list(wanted)}.")
        require_columns(rows, wanted, "training data")
        return wanted[0], wanted[1] if len(wanted) == 2 else None
    for first, second in COLUMN_PAIRS:
        if first in rows.column_names and (second is None or second in rows.column_names):
            return first, second
    known = "; ".join(", ".join(filter(None, pair)) for pair in COLUMN_PAIRS)
    raise ValueError(
        f"No known text columns among {', '.join(rows.column_names)}. Known are: {known}. Name them with `text_columns`."
    )


def find_labels(rows: Dataset, column: str) -> Labels:
    """Read the kind of the labels and the classes off the training rows.

    Raises:
        ValueError: the column is missing, mixes types, or holds a single class.
    """
    from datasets import ClassLabel

    require_columns(rows, [column], "training data")
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return Labels(column, list(feature.names), {number: number for number in range(feature.num_classes)})
    values = rows[column]
    present = [value for value in values if value is not None]
    if not present:
        raise ValueError(f"The column {column!r} of the training data holds no label.")
    if any(isinstance(value, float) for value in present):
        return Labels(column, None)
    classes = sorted(set(present))
    if isinstance(classes[0], int):  # booleans too
        smallest, largest = int(classes[0]), int(classes[-1])
        if smallest < 0:
            raise ValueError(
                f"The column {column!r} of the training data holds the label {smallest}; classes are 0, 1, 2 ... Rows "
                "marked -1 are unlabelled: choose another split or drop them."
            )
        if largest >= max(2 * len(classes), 2):
            raise ValueError(
                f"The labels in {column!r} go up to {largest} but only {len(classes)} different ones occur; number the "
                "classes 0, 1, 2 ..., use names, or decimal numbers for regression."
            )
        classes = list(range(largest + 1))
    if len(classes) < 2:
        raise ValueError(f"All training rows have the label {classes[0]!r} in {column!r}: there is nothing to learn.")
    return Labels(column, [str(name) for name in classes], {name: number for number, name in enumerate(classes)})


def labels_of_model(config: PreTrainedConfig, column: str) -> Labels:
    """The labels a fine-tuned checkpoint predicts."""
    if config.num_labels == 1:
        return Labels(column, None)
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    ids: dict[Any, int] = {number: number for number in range(len(names))}
    return Labels(column, names, {**ids, **{name: number for number, name in enumerate(names)}})


def make_metrics(arguments: GlueArguments, labels: Labels) -> Any:
    """`compute_metrics` for the Trainer."""
    if arguments.metrics is not None:
        names = arguments.metrics
    elif arguments.task is not None:
        names = list(offline_metrics.glue_metric_names(arguments.task))
    else:
        names = ["pearson", "spearmanr"] if labels.is_regression else ["accuracy"]
    modules = [offline_metrics.load(name) for name in names]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = logits.reshape(len(logits)) if labels.is_regression else logits.argmax(-1)
        results: dict[str, float] = {}
        for name, module in zip(names, modules):
            options = {"average": "macro"} if name == "f1" and len(labels.names or []) > 2 else {}
            results.update(module.compute(predictions=predicted, references=prediction.label_ids, **options))
        return results

    return compute


def encode(
    rows: Dataset,
    columns: tuple[str, str | None],
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    what: str,
) -> Dataset:
    """Token ids and labels of all rows."""
    require_columns(rows, [*columns, labels.column], what)
    require_text(rows, columns, what)
    targets = labels.encode(rows[labels.column], what)
    first, second = columns

    def tokenize(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        pair = None if second is None else batch[second]
        encoded = tokenizer(batch[first], pair, truncation=True, max_length=max_length, return_token_type_ids=False)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    encoded = rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc=f"tokenize {what}")
    return encoded.add_column("labels", targets)


def build(
    data_args: GlueArguments,
    model_args: CheckpointArguments,
    training_args: FinetuningArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Classifier, encoded rows and trainer.

    Raises:
        ValueError: an option, the data, the labels or the checkpoint cannot be used.
    """
    tokenizer = load_tokenizer(model_args.tokenizer or model_args.model_name_or_path)
    train, validation = load_tables(data_args, seed=training_args.seed, evaluate_only=evaluate_only)
    changes: dict[str, Any] = {}
    if train is not None:
        labels = find_labels(train, data_args.label_column)
        changes = _head(labels)
    else:
        labels = labels_of_model(load_config(model_args.model_name_or_path, {}), data_args.label_column)
    model = load_or_initialize(AutoModelForSequenceClassification, model_args, **changes)
    check_vocabulary(model, tokenizer)
    columns = find_text_columns(next(iter(validation.values())) if train is None else train, data_args.text_columns)
    with training_args.main_process_first(desc="tokenize"):
        encoded = {
            name: encode(rows, columns, labels, tokenizer, data_args.max_length, "validation data")
            for name, rows in validation.items()
        }
        encoded_train = None
        if train is not None:
            encoded_train = encode(train, columns, labels, tokenizer, data_args.max_length, "training data")
    trainer = HybridTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded_train,
        eval_dataset=encoded[""] if "" in encoded else encoded,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        processing_class=tokenizer,
        compute_metrics=make_metrics(data_args, labels),
        preprocess_logits_for_metrics=lambda logits, _: logits[0] if isinstance(logits, tuple) else logits,
    )
    return Job(trainer, _report(data_args, model_args, labels, train, validation))


def _head(labels: Labels) -> dict[str, Any]:
    if labels.names is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: number for number, name in enumerate(labels.names)},
    }


def _report(
    data_args: GlueArguments,
    model_args: CheckpointArguments,
    labels: Labels,
    train: Dataset | None,
    validation: Mapping[str, Dataset],
) -> RunReport:
    sources = data_args.data or data_args.validation_data or []
    name = display_names(sources) + (f" ({data_args.task})" if data_args.task else "")
    kind = "regression" if labels.is_regression else f"classification into {len(labels.names or [])} classes"
    start = "random weights" if model_args.from_scratch else "a pretrained checkpoint"
    metrics: dict[str, Any] = {
        "train_samples": 0 if train is None else len(train),
        "eval_samples": {key or "validation": len(rows) for key, rows in validation.items()},
        "from_scratch": model_args.from_scratch,
    }
    if train is not None and not labels.is_regression:
        majority = Counter(train[labels.column]).most_common(1)[0][0]
        held_out = [value for rows in validation.values() for value in rows[labels.column]]
        metrics["majority_accuracy"] = held_out.count(majority) / len(held_out)
    shown = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr")
    names = {f"eval_{key}_{metric}" if key else f"eval_{metric}": metric for key in validation for metric in shown}
    return RunReport(
        description=f"Fine-tuned from {start} for {kind}: {name}.",
        task_type="text-classification",
        pipeline_tag="text-classification",
        data_name=name,
        auto_class="AutoModelForSequenceClassification",
        training_data=f"{name}, {metrics['train_samples']:,} rows",
        datasets=hub_names(sources),
        base_model=next(iter(hub_names([model_args.model_name_or_path])), None),
        lengths=f"inputs of up to {data_args.max_length} tokens",
        metrics=metrics,
        result_names=names,
    )


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `run_recipe` for arguments and errors, `--help` for the options."""
    return run_recipe((GlueArguments, CheckpointArguments, FinetuningArguments), build, args, __doc__)


if __name__ == "__main__":
    main()

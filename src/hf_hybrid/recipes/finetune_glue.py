"""Fine-tune a classifier or regressor of texts or pairs of texts.

Reads a GLUE task, or your own data with the same columns.

    python -m hf_hybrid.recipes.finetune_glue --model_name_or_path runs/pretrain --task sst2 --output_dir runs/sst2
    python -m hf_hybrid.recipes.finetune_glue --model_name_or_path runs/pretrain --data reviews.csv \
        --validation_fraction 0.1 --output_dir runs/reviews

Your data needs one or two text columns and a column `label`: integers, names or booleans for classes, decimal numbers
for regression, or as `--problem_type` says. The GLUE benchmark is described in arXiv 1804.07461.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from ..data.lra import PairCollator
from ..data.truncation import TruncatingTokenizer
from ..metrics import GLUE_TASKS, glue_metric_names
from ..training.arguments import FinetuningArguments
from ..training.trainer import HybridTrainer
from .support.finetuning_data import (
    CheckpointArguments,
    TableArguments,
    check_vocabulary,
    load_or_initialize,
    load_tables,
    require_columns,
    require_text,
)
from .support.labels import (
    LABEL_PROBLEMS,
    Labels,
    classification_head,
    find_labels,
    labels_of_model,
    majority_accuracy,
    make_classification_metrics,
    only_logits,
)
from .support.models import check_positions, load_config, load_tokenizer, with_adapter
from .support.recipe import Recipe
from .support.reports import RunReport, display_names, hub_names
from .support.runs import Job

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
        metadata={"help": f"GLUE task ({', '.join(GLUE_TASKS)}): determines data and metrics."},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns of text. Default: the usual GLUE column names."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": f"What the labels are: {' or '.join(LABEL_PROBLEMS)}. Default: decimal numbers are predicted (regression), whole numbers, "
            "names and booleans are classes."
        },
    )
    metrics: list[str] | None = field(
        default=None,
        metadata={"help": "Metrics by name. Default: those of the task, else accuracy, or correlations."},
    )
    max_length: int = field(
        default=256,
        metadata={"help": "Tokens of an input (of each text with `dual_encoder`); longer ones are truncated."},
    )
    dual_encoder: bool | None = field(
        default=None,
        metadata={
            "help": "Encode the two texts of a pair separately and compare them, instead of reading them as one text. Default: as the "
            "checkpoint says."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is not None and self.task not in GLUE_TASKS:
            raise ValueError(f"`task` must be one of {', '.join(GLUE_TASKS)}; got {self.task!r}.")
        if self.task is not None and self.data is None and self.validation_data is None:
            self.data, self.dataset_config = [GLUE_DATASET], self.task
        if self.problem_type is None and self.task == "stsb":
            self.problem_type = "regression"
        if self.problem_type not in (None, *LABEL_PROBLEMS):
            raise ValueError(f"`problem_type` must be {' or '.join(LABEL_PROBLEMS)}; got {self.problem_type!r}.")


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


def metric_names(arguments: GlueArguments, labels: Labels) -> list[str]:
    """The requested metrics, else those of the task, else the usual ones for the kind of labels."""
    if arguments.metrics is not None:
        return arguments.metrics
    if arguments.task is not None:
        return list(glue_metric_names(arguments.task))
    return ["pearson", "spearmanr"] if labels.is_regression else ["accuracy"]


def encode(
    rows: Dataset,
    columns: tuple[str, str | None],
    labels: Labels,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    what: str,
    *,
    two_inputs: bool = False,
) -> Dataset:
    """Token ids and labels of all rows; with `two_inputs` the second text is `pair_input_ids`, otherwise a pair is one text. Rows that
    are cut are counted."""
    require_columns(rows, [*columns, labels.column], what)
    require_text(rows, columns, what)
    targets = labels.encode(rows, what)
    first, second = columns

    tokenize = TruncatingTokenizer(tokenizer, {"max_length": max_length})

    def tokenize_batch(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        others = None if second is None else batch[second]
        return tokenize.rows_of("max_length", batch[first], others, two_inputs=two_inputs)

    return tokenize.map_rows(rows, tokenize_batch, what).add_column("labels", targets)


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
    tokenizer = load_tokenizer(
        model_args.tokenizer or model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
    )
    train, validation = load_tables(data_args, seed=training_args.seed, evaluate_only=evaluate_only)
    changes: dict[str, Any] = {}
    if train is not None:
        labels = find_labels(train, data_args.label_column, data_args.problem_type)
        changes = classification_head(labels)
    else:
        labels = labels_of_model(load_config(model_args.model_name_or_path, {}), data_args.label_column)
    if data_args.dual_encoder is not None:
        changes |= _dual_encoder(model_args, data_args.dual_encoder)
    model = load_or_initialize(AutoModelForSequenceClassification, model_args, **changes)
    check_vocabulary(model, tokenizer)
    check_positions(model.config, data_args.max_length, "max_length")
    columns = find_text_columns(next(iter(validation.values())) if train is None else train, data_args.text_columns)
    two_inputs = bool(getattr(model.config, "dual_encoder", False))
    if two_inputs and columns[1] is None:
        raise ValueError(
            f"A model with `dual_encoder` classifies pairs, but the data has one column of texts, {columns[0]!r}: name two with "
            "`text_columns`, or leave `dual_encoder` out."
        )
    make_rows = partial(encode, two_inputs=two_inputs)
    with training_args.main_process_first(desc="tokenize"):
        encoded = {
            name: make_rows(rows, columns, labels, tokenizer, data_args.max_length, "validation data")
            for name, rows in validation.items()
        }
        encoded_train = None
        if train is not None:
            encoded_train = make_rows(train, columns, labels, tokenizer, data_args.max_length, "training data")
    start = None if model_args.from_scratch else model_args.model_name_or_path
    trainer = HybridTrainer(
        model=with_adapter(model, start, training_args),
        args=training_args,
        train_dataset=encoded_train,
        eval_dataset=encoded[""] if "" in encoded else encoded,
        data_collator=PairCollator(tokenizer)
        if two_inputs
        else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        processing_class=tokenizer,
        compute_metrics=make_classification_metrics(metric_names(data_args, labels), labels),
        preprocess_logits_for_metrics=only_logits,
    )
    return Job(trainer, _report(data_args, model_args, labels, train, validation))


def _dual_encoder(arguments: CheckpointArguments, value: bool) -> dict[str, bool]:
    """The field of the configuration.

    Raises:
        ValueError: the architecture reads pairs as one text only.
    """
    config = load_config(arguments.model_name_or_path, {}, trust_remote_code=arguments.trust_remote_code)
    if not hasattr(config, "dual_encoder"):
        raise ValueError(
            f"`dual_encoder`: the model type {config.model_type!r} cannot encode the two texts of a pair separately; leave it out."
        )
    return {"dual_encoder": value}


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
        metrics["majority_accuracy"] = majority_accuracy(train, validation, labels.column)
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


RECIPE = Recipe("finetune_glue", __doc__ or "", (GlueArguments, CheckpointArguments, FinetuningArguments), build)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

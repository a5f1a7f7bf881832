"""What the fine-tuning recipes share: reading tables with a training and a validation part, and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.loading import load_table
from .common import load_model, split_names

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass
class CheckpointArguments:
    """The model to start from."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint (folder or Hub name)."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer. Default: that of the checkpoint."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Use the configuration alone and start from random weights (a baseline)."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a checkpoint."})


@dataclass
class TableArguments:
    """Rows to train and evaluate on."""

    data: list[str] | None = field(
        default=None, metadata={"help": "Training data: files, a folder, or a Hub data set."}
    )
    validation_data: list[str] | None = field(
        default=None, metadata={"help": "Validation data. Default: the `validation` split of `data`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split of `data` to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Hold out this share of the training rows where there is no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many rows."})

    def __post_init__(self) -> None:
        self.data = split_names(self.data) or None
        self.validation_data = split_names(self.validation_data) or None
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must lie between 0 and 1; got {self.validation_fraction}.")


def load_tables(
    arguments: TableArguments, *, seed: int, evaluate_only: bool = False
) -> tuple[Dataset | None, dict[str, Dataset]]:
    """The training rows (None when only evaluating) and the validation sets by name (one, called "", or two of MNLI).

    Raises:
        ValueError: no data, no validation rows, or no rows at all.
    """
    if arguments.data is None and not (evaluate_only and arguments.validation_data):
        raise ValueError("`data` is required: files, a folder, or the name of a Hub data set.")
    train = None
    if arguments.data is not None and not (evaluate_only and arguments.validation_data):
        needed = not evaluate_only or arguments.validation_fraction is not None
        train = _load(arguments.data, arguments.train_split, arguments) if needed else None
    validation = _load_validation(arguments)
    if not validation:
        if arguments.validation_fraction is None or train is None:
            raise ValueError(
                f"There is no split {arguments.validation_split!r} to evaluate on. Pass `validation_data`, or "
                "`validation_fraction` to hold out a share of the training rows."
            )
        parts = train.train_test_split(test_size=arguments.validation_fraction, seed=seed)
        train, validation = parts["train"], {"": parts["test"]}
    if train is not None:
        train = None if evaluate_only else _first(train, arguments.max_train_samples, "training data")
    limit = arguments.max_eval_samples
    return train, {name: _first(rows, limit, "validation data") for name, rows in validation.items()}


def _load(sources: Sequence[str], split: str, arguments: TableArguments) -> Dataset:
    return load_table(sources, split, config_name=arguments.dataset_config)  # type: ignore[return-value]


def _load_validation(arguments: TableArguments) -> dict[str, Dataset]:
    split = arguments.validation_split
    if arguments.validation_data is not None:
        return {"": _load(arguments.validation_data, split, arguments)}
    sources = arguments.data or []
    if all(Path(source).is_file() for source in sources):  # a file has no splits
        return {}
    single = {"": split}
    mnli = {name: f"{split}_{name}" for name in ("matched", "mismatched")}  # two validation sets
    # In a folder, files called validation_matched belong to the split `validation` as well: look for the two first.
    is_local = all(Path(source).exists() for source in sources)
    for splits in (mnli, single) if is_local else (single, mnli):
        try:
            return {name: _load(sources, of_name, arguments) for name, of_name in splits.items()}
        except ValueError as error:
            logger.debug("no splits %s: %s", ", ".join(splits.values()), error)
    return {}


def _first(rows: Dataset, limit: int | None, what: str) -> Dataset:
    if len(rows) == 0:
        raise ValueError(f"The {what} is empty.")
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


def require_columns(rows: Dataset, names: Sequence[str | None], what: str) -> None:
    """Refuse data without the named columns.

    Raises:
        ValueError: names a missing column and those that exist.
    """
    missing = [name for name in names if name is not None and name not in rows.column_names]
    if missing:
        raise ValueError(f"The {what} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}.")


def require_text(rows: Dataset, columns: Sequence[str | None], what: str) -> None:
    """Refuse rows whose text is missing.

    Raises:
        ValueError: names the first such row.
    """
    for column in filter(None, columns):
        for number, value in enumerate(rows[column]):
            if not isinstance(value, str):
                raise ValueError(f"Row {number} of the {what} has no text in the column {column!r}: {value!r}.")


def load_or_initialize(auto_class: Any, arguments: CheckpointArguments, **config_changes: Any) -> PreTrainedModel:
    """The checkpoint with a fresh head where it has none, or its configuration with random weights.

    Raises:
        ValueError: nothing can be loaded from there.
    """
    options = {"trust_remote_code": arguments.trust_remote_code}
    name = arguments.model_name_or_path
    if not arguments.from_scratch:
        return load_model(auto_class, name, **options, **config_changes)
    try:
        config = AutoConfig.from_pretrained(name, **options, **config_changes)
    except (OSError, ValueError) as error:
        raise ValueError(f"The configuration of {name!r} cannot be loaded: {error}") from error
    return auto_class.from_config(config, **options)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        ValueError: the vocabulary of the model is smaller.
    """
    size = int(model.config.vocab_size)
    if len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} ids but the model only {size}: use the tokenizer of the checkpoint."
        )

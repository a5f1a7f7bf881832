"""Shared by the fine-tuning recipes: tables with training and validation rows, checkpoints, labels, generated text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...data.loading import MissingSplitError, is_single_file, load_table
from ...data.records import origin_of, place_of, remember_origin, shortened
from ...data.truncation import TruncatingTokenizer
from ...remote_code import check_export
from ...training.arguments import Seq2SeqFinetuningArguments
from ...training.trainer import HybridSeq2SeqTrainer
from .models import check_decoder_table, check_positions, load_config, load_model, parse_overrides
from .options import BAD_RECORD_HELP, ENCODING_HELP, reading_options, source_names
from .reports import RunReport
from .runs import Job

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass
class CheckpointArguments:
    """The model to start from."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint (folder or Hub name)."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer. Default: that of the checkpoint."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Use only the configuration and start from random weights (a baseline)."}
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Fields of the configuration to change, e.g. "hidden_dropout=0.2,classifier_dropout=0.3"; a mapping in option files.'
        },
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
        default=None, metadata={"help": "Share of the training rows to hold out if there is no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many rows."})

    encoding: str | None = field(default=None, metadata={"help": ENCODING_HELP})
    on_bad_record: str = field(default="error", metadata={"help": BAD_RECORD_HELP})

    def __post_init__(self) -> None:
        self.data = source_names(self.data, "data")
        self.validation_data = source_names(self.validation_data, "validation_data")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must lie between 0 and 1; got {self.validation_fraction}.")
        reading_options(self)


def load_tables(
    arguments: TableArguments, *, seed: int, evaluate_only: bool = False, load: Callable[..., Any] | None = None
) -> tuple[Dataset | None, dict[str, Dataset]]:
    """The training rows (None when only evaluating) and the validation sets by name (one, called "", or two for MNLI).

    Args:
        arguments: sources, splits and limits.
        seed: seed that selects held-out rows.
        evaluate_only: whether to leave the training rows out.
        load: function that reads one split, with the signature of `load_table`, which is the default.

    Raises:
        ValueError: there is no data, there are no validation rows, or a split is empty.
    """
    if arguments.data is None and not (evaluate_only and arguments.validation_data):
        raise ValueError("`data` is required: files, a folder, or the name of a Hub data set.")
    train = None
    if arguments.data is not None and not (evaluate_only and arguments.validation_data):
        needed = not evaluate_only or arguments.validation_fraction is not None
        train = _load(arguments.data, arguments.train_split, arguments, load) if needed else None
    validation = _load_validation(arguments, load)
    if not validation:
        if arguments.validation_fraction is None or train is None:
            raise ValueError(
                f"There is no split {arguments.validation_split!r} to evaluate on. Pass `validation_data`, or "
                "`validation_fraction` to hold out a share of the training rows."
            )
        train, held_out = _split(train, arguments.validation_fraction, seed)
        validation = {"": held_out}
    if train is not None:
        train = None if evaluate_only else _first(train, arguments.max_train_samples, "training data")
    limit = arguments.max_eval_samples
    return train, {name: _first(rows, limit, "validation data") for name, rows in validation.items()}


def _load(sources: Sequence[str], split: str, arguments: TableArguments, load: Callable[..., Any] | None) -> Dataset:
    return (load or load_table)(sources, split, config_name=arguments.dataset_config, **reading_options(arguments))


def _split(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and a held-out share; both know their rows in the files."""
    from datasets import Dataset

    if math.ceil(fraction * len(rows)) >= len(rows):
        raise ValueError(
            f"`validation_fraction` {fraction} of the training rows, which are {len(rows)}, leaves none to train on: lower it, add rows, or "
            "pass `validation_data`."
        )
    numbers = Dataset.from_dict({"number": range(len(rows))})
    parts = numbers.train_test_split(test_size=fraction, seed=seed)
    kept, held_out = (parts[name]["number"][:] for name in ("train", "test"))
    origin = origin_of(rows)
    return (
        remember_origin(rows.select(kept), origin, kept),
        remember_origin(rows.select(held_out), origin, held_out),
    )


def _load_validation(arguments: TableArguments, load: Callable[..., Any] | None) -> dict[str, Dataset]:
    split = arguments.validation_split
    if arguments.validation_data is not None:
        return {"": _load(arguments.validation_data, split, arguments, load)}
    sources = arguments.data or []
    if all(is_single_file(source) for source in sources):  # a file has no splits
        return {}
    single = {"": split}
    mnli = {name: f"{split}_{name}" for name in ("matched", "mismatched")}  # two validation sets
    # In a folder, files called validation_matched also belong to the split `validation`: look for the two first.
    is_local = all(Path(source).exists() for source in sources)
    for splits in (mnli, single) if is_local else (single, mnli):
        try:
            return {name: _load(sources, of_name, arguments, load) for name, of_name in splits.items()}
        except MissingSplitError as error:
            logger.debug("no splits %s: %s", ", ".join(splits.values()), error)
        except ValueError as error:
            if is_local:  # a damaged file is no missing one
                raise
            logger.debug("no splits %s: %s", ", ".join(splits.values()), error)
    return {}


def _first(rows: Dataset, limit: int | None, what: str) -> Dataset:
    if len(rows) == 0:
        raise ValueError(f"The {what} is empty.")
    if limit is None or limit >= len(rows):
        return rows
    origin = origin_of(rows)
    chosen = None if origin is None or origin.chosen is None else origin.chosen[:limit]
    return remember_origin(rows.select(range(limit)), origin, chosen)


def require_columns(rows: Dataset, names: Sequence[str | None], what: str) -> None:
    """Rejects data without the named columns.

    Raises:
        ValueError: a column is missing; the message names it and the existing columns.
    """
    missing = [name for name in names if name is not None and name not in rows.column_names]
    if missing:
        raise ValueError(f"The {what} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}.")


def choose_column(rows: Dataset, given: str | None, usual: Sequence[str], option: str) -> str:
    """The named column, or the first of the usual columns that exists.

    Raises:
        ValueError: there is none; the message names the `option` that chooses it.
    """
    require_columns(rows, [given], "data")
    found = given or next((name for name in usual if name in rows.column_names), None)
    if found is None:
        raise ValueError(
            f"None of the columns {', '.join(usual)} exists; there are {', '.join(rows.column_names)}. Name one with "
            f"`{option}`."
        )
    return found


def require_text(rows: Dataset, columns: Sequence[str | None], what: str) -> None:
    """Rejects rows whose text is missing.

    Raises:
        ValueError: a text is missing; the message names the first such row.
    """
    for column in filter(None, columns):
        for number, value in enumerate(rows[column]):
            if not isinstance(value, str):
                place = place_of(rows, number, what)
                raise ValueError(f"{place} has no text in the column {column!r}: {shortened(value)}.")


def load_or_initialize(auto_class: Any, arguments: CheckpointArguments, **config_changes: Any) -> PreTrainedModel:
    """The checkpoint, with a new head if it has none, or a model with its configuration and random weights.

    Args:
        auto_class: Auto class of the head.
        arguments: checkpoint, and fields of its configuration to change.
        config_changes: fields that the task sets; they precede those of `arguments`.

    Raises:
        ValueError: the checkpoint cannot be loaded, or its configuration has no such field.
    """
    options = {"trust_remote_code": arguments.trust_remote_code}
    name = arguments.model_name_or_path
    overrides = parse_overrides(arguments.config_overrides)
    if overrides:
        load_config(name, overrides, **options)  # names unknown fields, which `from_pretrained` would pass over
        config_changes = {**overrides, **config_changes}
    if not arguments.from_scratch:
        return load_model(auto_class, name, **options, **config_changes)
    check_export(name)
    try:
        config = AutoConfig.from_pretrained(name, **options, **config_changes)
    except (OSError, ValueError) as error:
        raise ValueError(f"The configuration of {name!r} cannot be loaded: {error}") from error
    return auto_class.from_config(config, **options)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rejects a tokenizer with ids that the model has no embedding for.

    Raises:
        ValueError: the vocabulary of the model is smaller.
    """
    size = int(model.config.vocab_size)
    if len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} ids but the model only {size}: use the tokenizer of the checkpoint."
        )


# ------------------------------------------------------------------------------------------------ generation

PREDICTIONS_FILE = "predictions.jsonl"


@dataclass
class GenerationArguments(TableArguments):
    """Lengths and generation of a sequence-to-sequence task."""

    source_prefix: str = field(default="", metadata={"help": 'Text before every input, e.g. "summarize: ".'})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of an input; longer ones are truncated."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a target; longer ones are truncated."})
    length_penalty: float | None = field(default=None, metadata={"help": "Length penalty of beam search."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "Never generate an n-gram twice."})
    min_new_tokens: int | None = field(default=None, metadata={"help": "Generate at least this many tokens."})


def encode_pairs(
    rows: Dataset,
    texts_of: Callable[[Mapping[str, list[Any]]], tuple[list[str], list[str]]],
    tokenizer: PreTrainedTokenizerBase,
    arguments: GenerationArguments,
    what: str,
) -> Dataset:
    """Token ids of inputs and targets; those that are cut are counted.

    Args:
        rows: data set with any columns.
        texts_of: function from a batch of rows to its inputs and targets.
        tokenizer: tokenizer of the model.
        arguments: prefix and lengths.
        what: name of the rows in the progress bar, the log and the records.
    """

    limits = {name: getattr(arguments, name) for name in ("max_source_length", "max_target_length")}
    tokenize = TruncatingTokenizer(tokenizer, limits)

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        sources, targets = texts_of(batch)
        sources = [arguments.source_prefix + text for text in sources]
        encoded, long_sources = tokenize("max_source_length", sources)
        labels, long_targets = tokenize("max_target_length", text_target=targets)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**encoded, "labels": labels["input_ids"], "length": lengths, **long_sources, **long_targets}

    return tokenize.map_rows(rows, encode, what, batch_size=200)


def set_generation(
    model: PreTrainedModel, data_args: GenerationArguments, training_args: Seq2SeqFinetuningArguments
) -> None:
    """Stores the decoding options in the generation configuration, which is saved with the model.

    Raises:
        ValueError: options contradict each other, or exceed the number of decoder positions.
    """
    if training_args.generation_max_length is None:
        training_args.generation_max_length = data_args.max_target_length + 1  # the start token counts
    longest = training_args.generation_max_length - 1
    check_positions(model.config, data_args.max_source_length, "max_source_length")
    check_decoder_table(model.config, data_args.max_target_length, "Targets", "max_target_length")
    check_decoder_table(model.config, longest, "Generated texts", "generation_max_length")
    beams = training_args.generation_num_beams or 1
    if data_args.length_penalty is not None and beams == 1:
        raise ValueError(
            "`length_penalty` only affects beam search: set `generation_num_beams` above 1 or leave it out."
        )
    model.generation_config.max_length = training_args.generation_max_length  # the default of 20 would truncate texts
    options = {
        "num_beams": beams if beams > 1 else None,
        "length_penalty": data_args.length_penalty,
        "no_repeat_ngram_size": data_args.no_repeat_ngram_size,
        "min_new_tokens": data_args.min_new_tokens,
    }
    for name, value in options.items():
        if value is not None:
            setattr(model.generation_config, name, value)


class GenerationScorer:
    """Scores generated ids against all references; keeps the decoded texts of the last evaluation.

    Args:
        tokenizer: tokenizer that decodes the ids.
        references: references of every evaluated row, in order.
        score: function from predictions and references to metrics by name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        references: list[list[str]],
        score: Callable[[list[str], list[list[str]]], Mapping[str, float]],
    ) -> None:
        self.tokenizer = tokenizer
        self.references = references
        self.score = score
        self.predictions: list[str] = []

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        ids = ids[: len(self.references)]  # distributed evaluation repeats rows to fill the last batch
        ids = np.where(ids < 0, self.tokenizer.pad_token_id, ids)
        self.predictions = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        lengths = (ids != self.tokenizer.pad_token_id).sum(axis=1)
        return {**self.score(self.predictions, self.references), "generated_tokens": float(lengths.mean())}

    def metric_names(self) -> Iterable[str]:
        """What an evaluation measures."""
        return [*self.score(["a"], [["a"]]), "generated_tokens"]

    def write(self, folder: Path) -> None:
        """Writes the predictions of the last evaluation with their references."""
        if self.predictions:
            with (folder / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
                for text, references in zip(self.predictions, self.references):
                    file.write(json.dumps({"prediction": text, "references": references}, ensure_ascii=False) + "\n")


def sequence_to_sequence_job(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_args: Seq2SeqFinetuningArguments,
    report: RunReport,
    scorer: GenerationScorer,
    train: Dataset | None,
    validation: Dataset,
) -> Job:
    """A trainer on encoded pairs that evaluates generated text with the scorer."""
    trainer = HybridSeq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8),
        processing_class=tokenizer,
        compute_metrics=scorer if training_args.predict_with_generate else None,
    )
    return Job(trainer, report, write_results=scorer.write)


def single_validation_set(validation: Mapping[str, Dataset]) -> Dataset:
    """The only validation set.

    Raises:
        ValueError: there are several.
    """
    if "" not in validation:
        raise ValueError("The data has several validation sets; name one with `validation_split`.")
    return validation[""]

"""Raw text for pretraining: sources to one array of tokens per split, or to a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.loading import load_text_source
from ..data.token_corpus import tokenize_corpus
from ..training.run_folder import is_main_process
from .common import split_names

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

HELD_OUT_CHARACTERS = 2_000_000  # at most, of a single long document


@dataclass
class PretrainingDataArguments:
    """Text to train on."""

    data: list[str] = field(
        metadata={"help": "Files, folders or Hub data sets, separated by spaces or commas, read one after another."}
    )
    validation_data: list[str] | None = field(
        default=None,
        metadata={"help": "Text for evaluation. Default: the `validation` split of the data, else a held-out part."},
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the text. Default: `text`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set."})
    validation_fraction: float = field(
        default=0.02, metadata={"help": "Share of the documents held out where a source has no validation split."}
    )
    max_validation_segments: int = field(default=512, metadata={"help": "Evaluate on at most this many segments."})
    streaming: bool = field(
        default=False, metadata={"help": "Read and tokenize while training; needs `max_steps` or `max_minutes`."}
    )

    def __post_init__(self) -> None:
        self.data = split_names(self.data)
        self.validation_data = split_names(self.validation_data) or None
        if not self.data:
            raise ValueError("`data` names no file, folder or data set.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must lie between 0 and 1; got {self.validation_fraction}.")


@dataclass
class TokenSplit:
    """Documents of one split as one array of ids, each document followed by the end-of-sequence id."""

    tokens: np.ndarray
    num_bytes: int
    num_documents: int

    def __str__(self) -> str:
        return f"{self.num_documents:,} documents, {self.num_bytes:,} bytes, {self.tokens.size:,} tokens"


def load_token_splits(
    arguments: PretrainingDataArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenSplit, TokenSplit]:
    """Read and tokenize the training and the validation text.

    Raises:
        ValueError: a source cannot be read, or holds no text.
    """
    train, validation = load_documents(arguments)
    return tokenize(train, tokenizer, "training text"), tokenize(validation, tokenizer, "validation text")


def load_documents(arguments: PretrainingDataArguments) -> tuple[list[Dataset], list[Dataset]]:
    """The training and validation documents of every source, as data sets with the one column `text`."""
    options = {"text_column": arguments.text_column, "config_name": arguments.dataset_config}
    train = [load_text_source(name, "train", **options) for name in arguments.data]
    if arguments.validation_data is not None:
        return train, [
            _validation_split(name, options) or load_text_source(name, **options) for name in arguments.validation_data
        ]
    validation = []
    for index, name in enumerate(arguments.data):
        own = _validation_split(name, options)
        if own is None:
            train[index], own = hold_out(train[index], arguments.validation_fraction)
            logger.info("%s has no validation split: %d documents are held out of training.", name, len(own))
        validation.append(own)
    return train, validation


def _validation_split(name: str, options: dict) -> Dataset | None:
    """The `validation` split of a folder or Hub data set; None where there is none."""
    if Path(name).is_file():
        return None
    try:
        return load_text_source(name, "validation", **options)
    except ValueError as error:
        logger.debug("no validation split: %s", error)
        return None


def hold_out(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Split documents into a training and a validation part, evenly over the data; a single document at its end.

    Raises:
        ValueError: there is too little text to hold something out.
    """
    from datasets import Dataset

    count = len(documents)
    if count > 1:
        step = max(2, round(1 / fraction))
        held = list(range(step - 1, count, step)) or [count - 1]
        kept = sorted(set(range(count)) - set(held))
        return documents.select(kept), documents.select(held)
    text = documents[0]["text"]
    size = min(max(1, round(len(text) * fraction)), HELD_OUT_CHARACTERS)
    cut = text.rfind("\n", 0, len(text) - size)
    cut = cut if cut > len(text) // 2 else len(text) - size
    if not text[:cut].strip() or not text[cut:].strip():
        raise ValueError("There is too little text to hold out a validation part; pass `validation_data`.")
    return Dataset.from_dict({"text": [text[:cut]]}), Dataset.from_dict({"text": [text[cut:]]})


def tokenize(documents: Sequence[Dataset], tokenizer: PreTrainedTokenizerBase, name: str) -> TokenSplit:
    """Tokenize documents into one array.

    Raises:
        ValueError: there is no text at all.
    """
    num_bytes = num_documents = 0

    def counted() -> Iterator[str]:
        nonlocal num_bytes, num_documents
        for dataset in documents:
            for row in dataset:
                if row["text"] and row["text"].strip():
                    num_documents += 1
                    num_bytes += len(row["text"].encode())
                    yield row["text"]

    try:
        tokens = tokenize_corpus(counted(), tokenizer, progress=is_main_process())
    except ValueError as error:
        raise ValueError(f"The {name} cannot be used: {error}") from error
    split = TokenSplit(tokens, num_bytes, num_documents)
    logger.info("%s: %s", name, split)
    return split


def stream_texts(arguments: PretrainingDataArguments) -> IterableDataset:
    """The training documents as a stream with the one column `text`."""
    return load_text_source(
        arguments.data,
        "train",
        text_column=arguments.text_column,
        config_name=arguments.dataset_config,
        streaming=True,
    )


def first_texts(documents: Iterable[dict], limit: int) -> Dataset:
    """The first documents of a stream, in memory."""
    from datasets import Dataset

    texts = []
    for row in documents:
        texts.append(row["text"])
        if len(texts) >= limit:
            break
    if not texts:
        raise ValueError("The validation text is empty.")
    return Dataset.from_dict({"text": texts})


def spread(available: int, wanted: int) -> list[int]:
    """Indices of `wanted` samples spread evenly over `available` ones."""
    return [index * available // wanted for index in range(wanted)]

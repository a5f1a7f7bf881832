"""Raw text for pretraining: turns sources into one array of tokens per split, or into a stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase

from ...data.loading import MissingSplitError, is_single_file, load_text_source
from ...data.sharded_stream import ShardedStream
from ...data.streaming import PackedStream
from ...data.token_corpus import tokenize_corpus
from ...data.token_shards import TokenFolder, TokenShards, is_token_folder
from ...training.arguments import HybridTrainingArguments
from ...training.progress import UNLIMITED_STEPS
from ...training.run_folder import is_main_process
from .console import is_quiet
from .options import BAD_RECORD_HELP, ENCODING_HELP, reading_options, source_names

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

DocumentsOf = Callable[[list[dict[str, str]]], list[str]]

SHUFFLE_WINDOW = 512  # segments of a stream that are shuffled together
_DATA_IS_REQUIRED = "`data` is required: files, folders, or names of Hub data sets."
HELD_OUT_CHARACTERS = 2_000_000  # maximum held out of a single long document


@dataclass
class TextArguments:
    """Text, and a part of it to evaluate on."""

    data: list[str] = field(
        metadata={
            "help": "Files, folders or Hub data sets, separated by spaces or commas, read one after another. Training also takes folders "
            "written by `hf-hybrid tokenize`."
        }
    )
    validation_data: list[str] | None = field(
        default=None,
        metadata={"help": "Evaluation text. Default: the `validation` split of the data, else a held-out part."},
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the text. Default: `text`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set."})
    validation_fraction: float = field(
        default=0.02, metadata={"help": "Share of the documents to hold out if a source has no validation split."}
    )
    encoding: str | None = field(default=None, metadata={"help": ENCODING_HELP})
    on_bad_record: str = field(default="error", metadata={"help": BAD_RECORD_HELP})

    def __post_init__(self) -> None:
        self.data = source_names(self.data, "data") or []
        self.validation_data = source_names(self.validation_data, "validation_data")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must lie between 0 and 1; got {self.validation_fraction}.")
        reading_options(self)


@dataclass
class PretrainingDataArguments(TextArguments):
    """Text to train on."""

    data: list[str] = field(
        default=None,  # type: ignore[arg-type]  # replaced by an empty list
        metadata={
            "help": "Files, folders or Hub data sets, separated by spaces or commas, read one after another. Training also takes folders "
            "written by `hf-hybrid tokenize`. Required, except to evaluate `validation_data`."
        },
    )
    max_validation_segments: int = field(default=512, metadata={"help": "Evaluate on at most this many segments."})
    held_out_documents: int = field(
        default=200,
        metadata={"help": "Streaming: number of validation documents, taken from the beginning if there is no split."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read and tokenize while training; needs `max_steps` or `max_minutes`."}
    )
    stream_shards: int | None = field(
        default=None,
        metadata={
            "help": "Streaming: divide the documents into this many shards, a multiple of processes x workers of this run and of those "
            "that will resume it (48, say); every process and worker reads its own. Default: the first process reads for all."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream_shards is not None and (self.stream_shards < 1 or not self.streaming):
            raise ValueError(
                f"`stream_shards` must be a positive number of shards of a stream (`streaming=True`); got {self.stream_shards}."
            )


CONVERSATIONS_HELP = (
    "Rows are conversations: the column `messages` (or `text_column`) lists messages with `role` and `content`. Every "
    "answer ends a document; the tokenizer is saved with the chat template, a plain one if it has none."
)


@dataclass
class TokenSplit:
    """Documents of one split as one array of ids, each document followed by the end-of-sequence id."""

    tokens: np.ndarray | TokenShards
    num_bytes: int
    num_documents: int

    def __str__(self) -> str:
        return f"{self.num_documents:,} documents, {self.num_bytes:,} bytes, {self.tokens.size:,} tokens"


@dataclass
class PretrainingText:
    """Training text, as tokens or (streaming) as documents, and tokenized validation text."""

    train: TokenSplit | IterableDataset | None
    validation: TokenSplit

    def __str__(self) -> str:
        if self.train is None:
            return f"evaluated on {self.validation}"
        return str(self.train) if isinstance(self.train, TokenSplit) else "streamed"


def load_text(
    arguments: PretrainingDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    evaluate_only: bool = False,
    documents_of: DocumentsOf | None = None,
) -> PretrainingText:
    """Reads the training and the validation text; tokenizes all of it, or (streaming) only the validation text.

    With `documents_of` the sources are conversations, which it turns into texts.

    With `evaluate_only` there is no training text. Folders of tokens are opened, not read.

    Raises:
        ValueError: a source cannot be read, or contains no text; or tokens are those of another tokenizer, or stand beside text; or there
            is no source.
    """
    given = arguments.validation_data or []
    if not arguments.data and not (evaluate_only and given):
        raise ValueError(_DATA_IS_REQUIRED)
    if are_tokens(arguments.data, "data") or (not arguments.data and are_tokens(given, "validation_data")):
        return _open_tokens(arguments, tokenizer, evaluate_only, documents_of)
    if are_tokens(given, "validation_data"):
        raise ValueError("`validation_data` is a folder of tokens, but `data` is text; tokenize both, or neither.")
    if arguments.streaming and arguments.data:
        stream, first = _load_stream(arguments, documents_of)
        return PretrainingText(None if evaluate_only else stream, tokenize([first], tokenizer, "validation text"))
    train, held_out = load_documents(arguments, documents_of)
    validation = tokenize(held_out, tokenizer, "validation text")
    return PretrainingText(None if evaluate_only else tokenize(train, tokenizer, "training text"), validation)


def check_run(arguments: PretrainingDataArguments, training_args: HybridTrainingArguments) -> None:
    """Checks that a run has something to train on, and, on a stream, which has no known length, an end.

    Raises:
        ValueError: no `data`, or streaming with neither `max_steps` nor `max_minutes`.
    """
    if not arguments.data:
        raise ValueError(_DATA_IS_REQUIRED)
    if arguments.streaming and arguments.stream_shards is None and training_args.dataloader_num_workers > 1:
        logger.info("One worker reads the stream; with `stream_shards` every worker reads shards of its own.")
    if not arguments.streaming or training_args.max_steps > 0:
        return
    if training_args.max_minutes is None:
        raise ValueError("`streaming` needs `max_steps` or `max_minutes`: a stream has no known length.")
    training_args.max_steps = UNLIMITED_STEPS


def sharded(
    make: Callable[..., PackedStream], num_shards: int | None, training_args: HybridTrainingArguments
) -> TorchIterableDataset:
    """The training stream of this process.

    Args:
        make: makes a shard of the stream from its index, `rank`, and the number of shards, `world_size`.
        num_shards: number of shards that processes and workers read themselves; None: one stream, which the first process reads.
        training_args: says which process this is, of how many, and of their workers.

    Raises:
        ValueError: the shards cannot be divided among the processes and their workers.
    """
    if num_shards is None:
        return make(rank=0, world_size=1)
    processes, workers = training_args.world_size, training_args.dataloader_num_workers
    if num_shards % (processes * max(1, workers)):
        raise ValueError(
            f"`stream_shards` must be a multiple of the number of processes times `dataloader_num_workers`; got {num_shards} for "
            f"{processes} processes with {workers} workers."
        )
    return ShardedStream(
        lambda index, shards: make(rank=index, world_size=shards),
        num_shards,
        rank=training_args.process_index,
        world_size=processes,
    )


def _loader(arguments: TextArguments, documents_of: DocumentsOf | None) -> Callable[..., Any]:
    return partial(
        load_text_source,
        text_column=arguments.text_column,
        config_name=arguments.dataset_config,
        documents_of=documents_of,
        **reading_options(arguments),
    )


def load_documents(
    arguments: TextArguments, documents_of: DocumentsOf | None = None
) -> tuple[list[Dataset], list[Dataset]]:
    """The training and validation documents of every source, as data sets with a single column `text`."""
    load = _loader(arguments, documents_of)
    train = [load(name, "train") for name in arguments.data]
    if arguments.validation_data is not None:
        return train, _validation_documents(arguments.validation_data, load)
    validation = []
    for index, name in enumerate(arguments.data):
        own = _validation_split(name, load)
        if own is None:
            train[index], own = hold_out(train[index], arguments.validation_fraction)
            logger.info("%s has no validation split: %d documents are held out of training.", name, len(own))
        validation.append(own)
    return train, validation


def _validation_documents(names: Sequence[str], load: Callable[..., Any]) -> list[Any]:
    return [_validation_split(name, load) or load(name) for name in names]


def _validation_split(name: str, load: Callable[..., Any], **options: Any) -> Any | None:
    """The `validation` split of a folder or Hub data set; None where there is none."""
    if is_single_file(name):
        return None
    try:
        return load(name, "validation", **options)
    except MissingSplitError as error:
        logger.debug("no validation split: %s", error)
    except ValueError as error:
        if Path(name).exists():  # a damaged file is no missing one
            raise
        logger.debug("no validation split: %s", error)
    return None


def _load_stream(
    arguments: PretrainingDataArguments, documents_of: DocumentsOf | None
) -> tuple[IterableDataset, Dataset]:
    """The training documents as a stream, and the first documents of the validation text in memory."""
    from datasets import concatenate_datasets

    load = partial(_loader(arguments, documents_of), streaming=True)
    stream = load(arguments.data, "train")
    if arguments.stream_shards is not None and stream.num_shards % arguments.stream_shards and is_main_process():
        logger.warning(
            "`stream_shards` divides rows, as the number of files, %d, is no multiple of it: every shard reads all files, and only the "
            "work of tokenizing is divided.",
            stream.num_shards,
        )
    if arguments.validation_data is not None:
        held_out = _validation_documents(arguments.validation_data, load)
    else:
        held_out = [split for name in arguments.data if (split := _validation_split(name, load)) is not None]
    count = arguments.held_out_documents
    if held_out:
        return stream, concatenate_datasets([first_texts(split, count) for split in held_out])
    shards = arguments.stream_shards
    if (
        shards is not None and shards > 1 and stream.num_shards % shards == 0
    ):  # every shard would skip documents of its own files
        raise ValueError(
            f"`stream_shards={shards}` divides the {stream.num_shards} files of the data among the shards, so that no documents can be "
            "held out from the beginning of the stream: pass `validation_data`."
        )
    logger.info("No validation split: the first %d documents are held out of training.", count)
    rest = stream.skip(count)
    if next(iter(rest), None) is None:
        raise ValueError(
            f"The stream ends within the {count} documents held out for validation. Lower `held_out_documents`, pass "
            "`validation_data`, or read the data without `streaming`."
        )
    return rest, first_texts(stream, count)


def are_tokens(sources: Sequence[str], option: str) -> bool:
    """Whether the sources are folders of tokens.

    Raises:
        ValueError: some of them are, others are not.
    """
    kinds = [is_token_folder(source) for source in sources]
    if any(kinds) and not all(kinds):
        raise ValueError(
            f"`{option}` mixes tokens and text: {sources[kinds.index(True)]} is a folder of tokens, {sources[kinds.index(False)]} is "
            "not. Tokenize the text with `hf-hybrid tokenize`, or name the text that the tokens were made of."
        )
    return any(kinds)


def _open_tokens(
    arguments: PretrainingDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    evaluate_only: bool,
    documents_of: DocumentsOf | None,
) -> PretrainingText:
    """Training tokens, and validation tokens or text."""
    if arguments.streaming:
        raise ValueError("`streaming` is for text: a folder of tokens stays on disk anyway. Leave the option out.")
    given, has_text = arguments.validation_data, False
    if given is not None:
        has_text = not are_tokens(given, "validation_data")
    for name in () if has_text else ("text_column", "dataset_config", "encoding"):
        if getattr(arguments, name) is not None:
            raise ValueError(
                f"`{name}` is about text, but `data` is a folder of tokens; give it to `hf-hybrid tokenize`."
            )
    folders = [TokenFolder(name) for name in arguments.data]
    other = next((folder for folder in folders if not folder.manifest["sources"].get("conversations")), None)
    if documents_of is not None and other is not None:
        raise ValueError(
            f"`conversations` is set, but {other.path} was tokenized as plain text; write it with `hf-hybrid tokenize --conversations`."
        )
    train = None if evaluate_only else _token_split(folders, "train", tokenizer)
    if given is None:
        validation = _token_split(folders, "validation", tokenizer)
    elif has_text:
        documents = _validation_documents(given, _loader(arguments, documents_of))
        validation = tokenize(documents, tokenizer, "validation text")
    else:
        validation = _token_split([TokenFolder(name) for name in given], "validation", tokenizer)
    return PretrainingText(train, validation)


def _token_split(folders: Sequence[TokenFolder], split: str, tokenizer: PreTrainedTokenizerBase) -> TokenSplit:
    for folder in folders:
        folder.check_tokenizer(tokenizer)
    tokens = TokenShards([path for folder in folders for path in folder.open(split).files])
    totals = {name: sum(folder.splits[split][name] for folder in folders) for name in ("bytes", "documents")}
    found = TokenSplit(tokens, totals["bytes"], totals["documents"])
    logger.info("%s of %s: %s", split, ", ".join(str(folder.path) for folder in folders), found)
    return found


def first_texts(documents: Iterable[dict], limit: int) -> Dataset:
    """The first documents of a stream, in memory."""
    from datasets import Dataset

    return Dataset.from_dict({"text": [row["text"] for row in islice(documents, limit)]})


def hold_out(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Splits documents into a training and a validation part, evenly over the data; a single document near its end.

    Raises:
        ValueError: there is too little text to hold some out.
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
    """Tokenizes documents into one array.

    Raises:
        ValueError: there is no text.
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
        tokens = tokenize_corpus(counted(), tokenizer, progress=is_main_process() and not is_quiet())
    except ValueError as error:
        raise ValueError(f"The {name} cannot be used: {error}") from error
    split = TokenSplit(tokens, num_bytes, num_documents)
    logger.info("%s: %s", name, split)
    return split


def limited(dataset: TorchDataset, limit: int) -> TorchDataset:
    """The data set, or `limit` of its rows, evenly spaced."""
    available = len(dataset)  # type: ignore[arg-type]
    if available <= limit:
        return dataset
    return Subset(dataset, [index * available // limit for index in range(limit)])

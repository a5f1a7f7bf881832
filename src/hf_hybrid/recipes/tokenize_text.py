"""Tokenize text once, into a folder of Arrow shards.

Every run and every process that trains on the text reads the same shards.

    hf-hybrid tokenize --data corpus/ --tokenizer tokenizer/ --num_proc 8 --output_dir tokens
    hf-hybrid pretrain clm --data tokens --tokenizer tokenizer/ ...

A run that was stopped continues with the shards that are missing; the folder appears when all of them are there. It holds training and
validation tokens, digests of data and tokenizer (`tokens.json`), and opens with `datasets.load_from_disk`, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..data.conversations import documents_of, prepare_chat_template
from ..data.parallel import available_processes
from ..data.records import counting_left_out
from ..data.token_writing import partial_folder, write_token_folder
from ..training.fingerprints import fingerprints
from ..training.folder_lock import FolderLock
from ..training.progress import shows_bars
from .support.main_options import MAIN_OPTIONS
from .support.models import load_tokenizer
from .support.options import parse_arguments, require
from .support.pretraining_data import CONVERSATIONS_HELP, TextArguments, are_tokens, load_documents
from .support.runs import set_up_logging

# Options that decide which texts are read.
_TEXT_OPTIONS = (
    "data", "validation_data", "text_column", "dataset_config", "validation_fraction", "encoding", "on_bad_record", "conversations",
)  # fmt: skip


@dataclass
class TokenizeArguments(TextArguments):
    """Arguments of the recipe."""

    tokenizer: str = field(kw_only=True, metadata={"help": "Folder or Hub name of the tokenizer."})
    output_dir: str = field(kw_only=True, metadata={"help": "Folder to write; it must be new or empty."})
    conversations: bool = field(default=False, metadata={"help": CONVERSATIONS_HELP})
    num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize. Default: one per processor."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow code that a tokenizer on the Hub brings with it to run."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"`num_proc` must be a positive number of processes; got {self.num_proc}.")


def main(args: TokenizeArguments | Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes the folder and returns documents, bytes and tokens of each split.

    Args:
        args: the arguments, a command line (flags, or a YAML or JSON file), a mapping, or None for `sys.argv`.

    Raises:
        FileExistsError: the output folder exists and is not empty.
        ValueError: the data or the tokenizer cannot be used, or an unfinished folder belongs to other data.
        BlockingIOError: another process writes the same folder.
    """
    if isinstance(args, TokenizeArguments):
        options = args
    else:
        (options,) = parse_arguments([TokenizeArguments], args, __doc__, MAIN_OPTIONS["tokenize_text"])
    require("Tokenizing text", "datasets", extra="train")
    set_up_logging()
    for name in ("data", "validation_data"):
        if are_tokens(getattr(options, name) or [], name):
            raise ValueError(f"`{name}` is a folder of tokens already.")
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    if options.conversations:
        prepare_chat_template(tokenizer)
    read = partial(documents_of, tokenizer=tokenizer) if options.conversations else None
    with counting_left_out() as left_out:
        train, validation = load_documents(options, read)
    unfinished = partial_folder(options.output_dir)
    is_new = not unfinished.exists()
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(unfinished)
    try:
        manifest = write_token_folder(
            options.output_dir,
            {"train": train, "validation": validation},
            tokenizer,
            sources=_sources(options),
            num_processes=options.num_proc or available_processes(),
            progress=shows_bars(),
        )
    finally:
        lock.release()
        if is_new and unfinished.exists() and not any(unfinished.iterdir()):
            unfinished.rmdir()
    splits = {
        f"{split}_{what}": of_split[what]
        for split, of_split in manifest["splits"].items()
        for what in ("documents", "bytes", "tokens")
    }
    return {**splits, **({"skipped_records": len(left_out)} if options.on_bad_record == "skip" else {})}


def _sources(options: TokenizeArguments) -> dict[str, Any]:
    """The options that decide which texts are read, and size and digest of every local file behind them."""
    chosen = {name: getattr(options, name) for name in _TEXT_OPTIONS}
    files = {
        option: [
            {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in source.items()}
            for source in found
        ]
        for option, found in fingerprints({name: chosen[name] for name in ("data", "validation_data")}).items()
    }
    return {**chosen, "files": files}


if __name__ == "__main__":
    main()

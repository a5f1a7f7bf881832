"""Train a SentencePiece tokenizer with sentinels.

A unigram model with byte fallback, from text files, local data-set folders or Hub data sets.

    python -m hf_hybrid.recipes.train_tokenizer --data books/ notes.txt --vocab_size 8000 --output_dir my_tokenizer

The folder then loads with `AutoTokenizer.from_pretrained("my_tokenizer")`. It also holds the model in sentencepiece's own format.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.loading import load_text_source
from ..data.records import counting_left_out
from ..tokenization.sentencepiece_tokenizer import (
    padded_vocab_size,
    tokenizer_from_sentencepiece,
    train_sentencepiece_model,
)
from ..training.progress import shows_bars
from .support.main_options import MAIN_OPTIONS
from .support.options import BAD_RECORD_HELP, ENCODING_HELP, parse_arguments, reading_options, source_names
from .support.runs import set_up_logging

logger = logging.getLogger(__name__)


@dataclass
class TrainTokenizerArguments:
    """Arguments of the recipe."""

    data: list[str] = field(
        metadata={
            "help": "Text files, .json/.jsonl/.csv/.tsv/.parquet files, folders of them, or names of Hub data sets, "
            "separated by spaces or commas."
        }
    )
    output_dir: str = field(metadata={"help": "Folder to write; it must be new or empty."})
    vocab_size: int = field(default=32000, metadata={"help": "Number of pieces, without the sentinels."})
    num_sentinels: int = field(
        default=1024, metadata={"help": "Number of sentinel tokens; an input of 16,384 tokens needs 910."}
    )
    split: str = field(default="train", metadata={"help": "Split read from folders and Hub data sets."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, when it is not `text`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set as a stream, without storing it first."}
    )
    normalization: str = field(default="nfkc", metadata={"help": "nfkc, nfkc_cf (lower-cased) or identity."})
    character_coverage: float = field(
        default=0.9995,
        metadata={"help": "Share of the characters that get pieces; the others are encoded as bytes."},
    )
    max_sentences: int = field(
        default=400_000,
        metadata={"help": "Train on a random sample of this many lines if there are more; 0 = all lines."},
    )
    encoding: str | None = field(default=None, metadata={"help": ENCODING_HELP})
    on_bad_record: str = field(default="error", metadata={"help": BAD_RECORD_HELP})
    max_documents: int | None = field(default=None, metadata={"help": "Read only this many documents."})
    split_digits: bool = field(default=False, metadata={"help": "Make every digit a separate token."})
    model_max_length: int | None = field(default=None, metadata={"help": "Length for `truncation=True`."})
    num_threads: int = field(default=2, metadata={"help": "Threads of the trainer."})


def _documents(args: TrainTokenizerArguments, counts: dict[str, int]) -> Iterator[str]:
    data = load_text_source(
        source_names(args.data, "data") or [],
        args.split,
        text_column=args.text_column,
        config_name=args.dataset_config,
        streaming=args.streaming,
        **reading_options(args),
    )
    total = getattr(data, "num_rows", None)
    for row in tqdm(
        data, total=total, desc="Reading documents", unit=" documents", mininterval=1.0, disable=not shows_bars()
    ):
        if args.max_documents is not None and counts["documents"] >= args.max_documents:
            return
        text = row["text"] or ""
        counts["documents"] += 1
        counts["characters"] += len(text)
        yield text


def main(args: TrainTokenizerArguments | Sequence[str] | Mapping[str, Any] | None = None) -> dict:
    """Trains the tokenizer, writes the folder and returns a few figures about it.

    Args:
        args: the arguments, a command line (flags, or a YAML or JSON file), a mapping, or None for `sys.argv`.

    Raises:
        ValueError: the output folder is not empty, or the data cannot be used; nothing is written then.
    """
    if isinstance(args, TrainTokenizerArguments):
        options = args
    else:
        (options,) = parse_arguments([TrainTokenizerArguments], args, __doc__, MAIN_OPTIONS["train_tokenizer"])
    set_up_logging()
    output = Path(options.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"`output_dir` {output} exists and is not an empty folder; choose another one or empty it first."
        )

    started = time.perf_counter()
    counts = {"documents": 0, "characters": 0}
    with counting_left_out() as left_out:
        model = train_sentencepiece_model(
            _documents(options, counts),
            vocab_size=options.vocab_size,
            normalization=options.normalization,
            character_coverage=options.character_coverage,
            max_sentences=options.max_sentences,
            split_digits=options.split_digits,
            num_threads=options.num_threads,
        )
    tokenizer = tokenizer_from_sentencepiece(
        model, num_sentinels=options.num_sentinels, model_max_length=options.model_max_length
    )
    metrics = {
        **counts,
        **({"skipped_records": len(left_out)} if options.on_bad_record == "skip" else {}),
        "pieces": options.vocab_size,
        "vocab_size": len(tokenizer),
        "padded_vocab_size": padded_vocab_size(tokenizer),
        "seconds": round(time.perf_counter() - started, 2),
    }
    _write(output, model, tokenizer, metrics, options)
    logger.info("Tokenizer with %d ids written to %s", len(tokenizer), output)
    return metrics


def _write(output: Path, model: bytes, tokenizer, metrics: dict, args: TrainTokenizerArguments) -> None:
    """Writes to a temporary folder first, so that a failure leaves no half-written tokenizer."""
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        tokenizer.save_pretrained(scratch)
        (scratch / "sentencepiece.model").write_bytes(model)
        (scratch / "training_arguments.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        (scratch / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        scratch.chmod(0o755)
        if output.exists():
            output.rmdir()
        scratch.replace(output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


if __name__ == "__main__":
    main()

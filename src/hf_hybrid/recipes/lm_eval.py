"""Run the lm-evaluation-harness on checkpoints of this library.

Its own command line applies.

    hf-hybrid lm-eval --model hf --model_args pretrained=runs/lm --blimp_data data/blimp --blimp_rows 50 \\
        --batch_size 16 --device cpu --output_path runs/lm-blimp

All options except `--blimp_...` are passed on to the harness (`lm_eval run --help` lists them); it needs
`pip install "hf_hybrid[eval]"`. For encoder-decoders `backend=seq2seq` is added to `--model_args`, because the harness
recognises only those of Transformers. Minimal pairs in the format of BLiMP become the local task group `blimp_local`,
which is the default of `--tasks`. For other tasks, whose questions precede the answers, pass `add_bos_token=False` in
`--model_args`: the tokenizers of this library end a text with </s>, which must not appear between question and answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import hf_hybrid  # noqa: F401  registers the architectures with the Auto classes

from ..data.blimp import GROUP, read_minimal_pairs, write_blimp_tasks
from ..data.records import ON_BAD_RECORD
from ..remote_code import check_export
from .support.options import BAD_RECORD_HELP, ENCODING_HELP, HelpFormatter

# The harness needs a maximum number of tokens; no text is longer than this.
_UNLIMITED = 1 << 30


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Write the local tasks and run the harness.

    Args:
        args: command-line arguments, or None for `sys.argv`.

    Returns:
        `results` of the harness by task; empty without `--output_path`.

    Raises:
        ValueError: the minimal pairs cannot be used.
        ImportError: the harness is not installed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--blimp_data", nargs="+", help="Minimal pairs: files, a folder, or a Hub data set.")
    parser.add_argument("--blimp_rows", type=int, help="Use only this many first pairs of every paradigm.")
    parser.add_argument("--blimp_encoding", help=ENCODING_HELP)
    parser.add_argument("--blimp_on_bad_record", default="error", choices=ON_BAD_RECORD, help=BAD_RECORD_HELP)
    parser.add_argument("--blimp_context", default="", help="Text that the sentences continue, e.g. <extra_id_0>.")
    options, words = parser.parse_known_args(sys.argv[1:] if args is None else list(args))
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('The lm-evaluation-harness is not installed: pip install "hf_hybrid[eval]".')
    with tempfile.TemporaryDirectory() as scratch:
        if options.blimp_data is not None:
            tasks = Path(scratch) / "tasks"
            pairs = read_minimal_pairs(
                options.blimp_data, encoding=options.blimp_encoding, on_bad_record=options.blimp_on_bad_record
            )
            write_blimp_tasks(pairs, tasks, rows=options.blimp_rows, context=options.blimp_context)
            words += ["--include_path", str(tasks)]
            words += [] if "--tasks" in words else ["--tasks", GROUP]
        _run_harness(with_backend(words))
    return _results(words)


def with_backend(words: Sequence[str]) -> list[str]:
    """Adds to `--model_args` what the harness cannot find out about the checkpoint, unless it is given there.

    This is `backend=seq2seq` for an encoder-decoder, and `max_length` for every model of this library: the harness
    truncates texts to 2,048 tokens if a configuration has no length field that it knows.

    Raises:
        ValueError: `--batch_size auto` for a model without a maximum length, which it would try.
    """
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--model_args=") else [word])]
    if "--model_args" not in words:
        return words
    place = words.index("--model_args") + 1
    end = next((i for i in range(place, len(words)) if words[i].startswith("--")), len(words))
    given = " ".join(words[place:end])
    for source in re.findall(r"(?:pretrained|tokenizer|peft)=([^,\s]+)", given):
        check_export(source)
    found = re.search(r"pretrained=([^,\s]+)", given)
    if found is None:
        return words
    trust = re.search(r"trust_remote_code=(True|true|1)", given) is not None
    config = AutoConfig.from_pretrained(found.group(1), trust_remote_code=trust)
    if config.is_encoder_decoder and "backend=" not in given:
        words[end - 1] += ",backend=seq2seq"
    if hasattr(config, "max_source_length") and "max_length=" not in given:
        limit = config.max_source_length()
        if limit is None and _batch_size(words).startswith("auto"):
            raise ValueError(
                "`--batch_size auto` tries batches of the longest input, and this model accepts any length: pass a number, or "
                "the length to truncate texts to, `max_length=...` in `--model_args`."
            )
        words[end - 1] += f",max_length={_UNLIMITED if limit is None else limit}"
    return words


def _batch_size(words: Sequence[str]) -> str:
    for option in ("--batch_size", "-b"):
        for place, word in enumerate(words):
            if word == option and place + 1 < len(words):
                return words[place + 1]
            if word.startswith(f"{option}="):
                return word.partition("=")[2]
    return ""


def _run_harness(words: Sequence[str]) -> None:
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _results(words: Sequence[str]) -> dict[str, Any]:
    if "--output_path" not in words:
        return {}
    folder = Path(words[list(words).index("--output_path") + 1])
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(files[-1].read_text(encoding="utf-8"))["results"] if files else {}


if __name__ == "__main__":
    main()

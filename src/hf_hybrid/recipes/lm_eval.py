"""Run the lm-evaluation-harness on a checkpoint: its own command line, with the architectures of this library known.

    python -m hf_hybrid.recipes.lm_eval --model hf --model_args pretrained=runs/lm --blimp_data data/blimp --blimp_rows 50 \
        --batch_size 16 --device cpu --output_path runs/lm-blimp

Everything but the options `--blimp_...` goes to the harness as it is (`lm_eval run --help` lists its options); it needs
`pip install "hf_hybrid[eval]"`. For encoder-decoders `backend=seq2seq` is added to `--model_args`, as the harness knows those of
Transformers alone. Minimal pairs in the format of BLiMP are made into the local task group `blimp_local`, which is chosen when
`--tasks` is left out. With other tasks, whose questions precede the answers, pass `add_bos_token=False` in `--model_args`: the
tokenizers of this library end a text with </s>, which must not stand between the two.
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
from .support.options import HelpFormatter


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Write the local tasks and run the harness.

    Args:
        args: words of the command line; None = those of this process.

    Returns:
        `results` of the harness by task; empty without `--output_path`.

    Raises:
        ValueError: the minimal pairs cannot be used.
        ImportError: the harness is not installed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--blimp_data", nargs="+", help="Minimal pairs: files, a folder, or a Hub data set.")
    parser.add_argument("--blimp_rows", type=int, help="Use the first so many pairs of every paradigm.")
    parser.add_argument("--blimp_context", default="", help="Text that the sentences continue, e.g. <extra_id_0>.")
    options, words = parser.parse_known_args(sys.argv[1:] if args is None else list(args))
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('The lm-evaluation-harness is not installed: pip install "hf_hybrid[eval]".')
    with tempfile.TemporaryDirectory() as scratch:
        if options.blimp_data is not None:
            tasks = Path(scratch) / "tasks"
            pairs = read_minimal_pairs(options.blimp_data)
            write_blimp_tasks(pairs, tasks, rows=options.blimp_rows, context=options.blimp_context)
            words += ["--include_path", str(tasks)]
            words += [] if "--tasks" in words else ["--tasks", GROUP]
        _run_harness(with_backend(words))
    return _results(words)


def with_backend(words: Sequence[str]) -> list[str]:
    """The same words, with `backend=seq2seq` in `--model_args` where the checkpoint is an encoder-decoder and no backend is named."""
    words = list(words)
    if "--model_args" not in words:
        return words
    place = words.index("--model_args") + 1
    end = next((i for i in range(place, len(words)) if words[i].startswith("--")), len(words))
    given = " ".join(words[place:end])
    found = re.search(r"pretrained=([^,\s]+)", given)
    if found is None or "backend=" in given:
        return words
    trust = re.search(r"trust_remote_code=(True|true|1)", given) is not None
    if AutoConfig.from_pretrained(found.group(1), trust_remote_code=trust).is_encoder_decoder:
        words[end - 1] += ",backend=seq2seq"
    return words


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

"""Measure a checkpoint on a data set, with the metrics of its task.

    python -m hf_hybrid.recipes.evaluate glue --model_name_or_path runs/sst2 --task sst2 --output_dir runs/sst2-eval
    python -m hf_hybrid.recipes.evaluate summarization --model_name_or_path runs/summaries --data articles/ \
        --generation_num_beams 4 --output_dir runs/summaries-eval

The first word is the task: span_corruption, clm, mlm, glue, summarization, translation, lra, synthetic, image or audio. The other
options are those of the recipe that trains it; `<task> --help` lists them. `metrics.json`, `arguments.json` and
`environment.json` are written.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import training_recipe


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Args:
        args: command-line arguments, the task first; a mapping of options with the key `kind` for the task; or None.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: unknown task, or an option, the data or the checkpoint cannot be used.
        FileExistsError: the output folder is not empty.
    """
    options: Sequence[str] | Mapping[str, Any]
    if isinstance(args, Mapping):
        kind = args.get("kind")
        options = {key: value for key, value in args.items() if key != "kind"}
    else:
        words = list(sys.argv[1:] if args is None else args)
        if words[:1] in (["-h"], ["--help"]):
            sys.stdout.write(__doc__ or "")
            raise SystemExit(0)
        kind, options = (words[0] if words else None), words[1:]
        if args is None and words:
            sys.argv = [f"{sys.argv[0]} {kind}", *options]  # messages of the parser name the help of the task
    return training_recipe(kind).evaluate(options, __doc__)


if __name__ == "__main__":
    main()

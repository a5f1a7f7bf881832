"""Run an experiment of a paper, whole or at a smaller scale.

    python -m hf_hybrid.recipes.reproduce mega/listops --scale 0.01 --output_dir runs/listops
    python -m hf_hybrid.recipes.reproduce seqboat/enwik8 --scale 0.1 --data enwik8/ --output_dir runs/enwik8
    python -m hf_hybrid.recipes.reproduce --list

`--scale` multiplies optimizer steps, warm-up and generated rows; the model stays that of the paper. All other options are those of
the recipe that the experiment belongs to, and take precedence (`config_overrides` field by field). ListOps and Pathfinder are
generated; where other data is not given with `--data`, a small stand-in of the same form takes its place, which shows only that
the experiment runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .support.console import set_quiet
from .support.experiment_files import experiment_names
from .support.help_text import help_page
from .support.main_options import MAIN_OPTIONS
from .support.models import parse_overrides
from .support.options import HelpFormatter, describe_options, given_flags
from .support.published import Experiment, load_experiment, scaled, training_recipe_of
from .support.stand_ins import write_byte_tokenizer, write_stand_in

logger = logging.getLogger(__name__)

REPRODUCTION_FILE = "reproduction.json"


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run an experiment.

    Args:
        args: command-line arguments, the experiment first; a mapping of options with the keys `experiment` and `scale`; or None.

    Returns:
        The metrics of the run, with what was published as `published`.

    Raises:
        ValueError: unknown experiment, or an option or the data cannot be used.
        FileExistsError: the output folder is not empty.
    """
    if isinstance(args, Mapping):
        changes = dict(args)
        experiment, scale = load_experiment(changes.pop("experiment", "")), float(changes.pop("scale", 1.0))
    else:
        experiment, scale, changes = _read_words(list(sys.argv[1:] if args is None else args))
    options = (
        scaled({name: value for name, value in experiment.options.items() if name not in changes}, scale) | changes
    )
    options["config_overrides"] = experiment.overrides | parse_overrides(changes.get("config_overrides"))
    options.setdefault("output_dir", f"runs/{experiment.name.replace('/', '-')}")
    stand_in = _complete_data(experiment, options)
    recipe = training_recipe_of(experiment)
    metrics = recipe.train(options)
    summary = {
        "experiment": experiment.name,
        "scale": scale,
        "stand_in_data": stand_in,
        "metric": experiment.metric,
        "published": experiment.figure,
        "parameters": metrics["num_parameters"],
        "published_parameters": experiment.parameters,
    }
    folder = Path(options["output_dir"])
    if folder.is_dir():
        (folder / REPRODUCTION_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    reported = "a figure that is not known to us" if experiment.figure is None else f"{experiment.figure:g}"
    logger.info(
        "%s at scale %g%s; the paper reports %s (%s, on %s).",
        experiment.title,
        scale,
        " on stand-in data" if stand_in else "",
        reported,
        experiment.metric,
        experiment.data,
    )
    return {**metrics, "published": summary}


def _complete_data(experiment: Experiment, options: dict[str, Any]) -> bool:
    """Adds data and tokenizer where none are given. Returns whether the data is a stand-in."""
    beside = Path(f"{options['output_dir']}-data")
    stand_in = experiment.data_format is not None and not options.get("data")
    if stand_in:
        logger.warning("No `data` is given: a stand-in of the same form shows that the experiment runs, nothing more.")
        length = int(experiment.build.get("longest", 1024))
        options["data"] = [str(write_stand_in(str(experiment.data_format), beside, length=length))]
        if "validation_split" in options:
            options["validation_split"] = "validation"
    needs_tokenizer = experiment.recipe in ("pretrain_clm", "finetune_translation") and not options.get("tokenizer")
    if needs_tokenizer and (stand_in or experiment.tokenizer == "bytes"):
        options["tokenizer"] = str(write_byte_tokenizer(Path(f"{options['output_dir']}-tokenizer")))
    return stand_in


def _read_words(words: list[str]) -> tuple[Experiment, float, dict[str, Any]]:
    """Experiment, scale and the options of its recipe, from a command line."""
    name = words[0] if words and not words[0].startswith("-") else None
    if name is None:
        _answer(words)
    experiment = load_experiment(str(name))
    recipe = training_recipe_of(experiment)
    if {"-h", "--help", "--help-all"} & set(words):
        options = describe_options(recipe.arguments)
        usage = f"{Path(sys.argv[0]).name} {name} [--scale X]"
        sys.stdout.write(
            help_page(usage, __doc__ or "", options, MAIN_OPTIONS[recipe.name], show_all="--help-all" in words)
        )
        raise SystemExit(0)
    set_quiet("--quiet" in words)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--scale", type=float, default=1.0)
    own, rest = parser.parse_known_args([word for word in words[1:] if word != "--quiet"])
    changes = given_flags(recipe.arguments, rest, __doc__, complete=False)
    return experiment, own.scale, changes | ({"quiet": True} if "--quiet" in words else {})


def _answer(words: Sequence[str]) -> None:
    """Answers a command line without an experiment, and ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("experiment", help="<paper>/<experiment>, as --list shows them.")
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the steps and of the generated rows.")
    parser.add_argument("--list", action="store_true", help="List all experiments.")
    if "--list" in words:
        for name in experiment_names():
            found = load_experiment(name)
            figure = "" if found.figure is None else f" {found.figure:g}"
            sys.stdout.write(f"{name:32} {found.title}: {found.metric}{figure}\n")
        raise SystemExit(0)
    parser.parse_args(words)


if __name__ == "__main__":
    main()

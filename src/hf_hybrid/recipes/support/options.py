"""The options of a recipe: from the command line, an option file or a mapping to dataclasses."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, so that example commands can be copied, and shows the defaults of the options."""


def parse_arguments(
    dataclass_types: Sequence[type], args: Sequence[str] | Mapping[str, Any] | None, description: str | None
) -> tuple[Any, ...]:
    """Fill dataclasses from flags, from a YAML or JSON file followed by flags that override it, or from a mapping.

    Args:
        dataclass_types: one instance of each is returned, in this order.
        args: list of command line words; a mapping of option names to values; None = the words of this process.
        description: shown by `--help`.

    Raises:
        ValueError: the file cannot be read or is no mapping.
    """
    parser = HfArgumentParser(
        list(dataclass_types),  # type: ignore[arg-type]
        description=description,
        formatter_class=HelpFormatter,
    )
    if isinstance(args, Mapping):
        words = _to_flags(args)
    else:
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0].endswith((".yaml", ".yml", ".json")):
            words = _to_flags(_read_options(Path(words[0]))) + words[1:]
    return parser.parse_args_into_dataclasses(args=words)


def _read_options(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The option file {path} cannot be read: {error}.") from error
    if path.suffix == ".json":
        options = json.loads(text)
    else:
        import yaml

        options = yaml.safe_load(text)
    if not isinstance(options, Mapping):
        raise ValueError(f"The option file {path} must hold `name: value` pairs at its top level.")
    return options


def _to_flags(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif isinstance(value, (list, tuple)):
            words += [str(item) for item in value]
        else:
            words.append(str(value))
    return words


def resolved_arguments(*dataclasses_: Any) -> dict[str, Any]:
    """All options of a run in one flat dictionary, for `arguments.json`."""
    resolved: dict[str, Any] = {}
    for group in dataclasses_:
        is_training = isinstance(group, TrainingArguments)
        resolved.update(group.to_dict() if is_training else {f.name: getattr(group, f.name) for f in fields(group)})
    return resolved


def split_names(names: Sequence[str] | str | None) -> list[str]:
    """Several names given as separate words, separated by commas, or both; an existing path is never split."""
    names = [names] if isinstance(names, str) else list(names or [])
    split: list[str] = []
    for name in names:
        split += [name] if Path(name).exists() else [part.strip() for part in name.split(",") if part.strip()]
    return split

"""What `--help` and `--help-all` print; imports nothing heavy, so that the console command answers at once."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

INDEX = Path(__file__).with_name("options.json")  # written from the recipes by `make tables`

TRAINER_GROUP = "Options of the Trainer of Transformers"
_COLUMN = 34


@dataclass(frozen=True)
class Option:
    """One option of a recipe, in words.

    Attributes:
        name: name of the field, without dashes.
        value: kind of its value, as shown after the flag.
        default: its default in words; None if it has none worth showing.
        help: what it does.
        group: heading under which `--help-all` lists it.
        is_required: whether it has to be given.
    """

    name: str
    value: str
    default: str | None
    help: str
    group: str
    is_required: bool = False


def help_page(
    usage: str, description: str, options: Sequence[Option], main: Iterable[str] = (), *, show_all: bool = False
) -> str:
    """The text of `--help`, or of `--help-all`.

    Args:
        usage: how the command is called, without options.
        description: what it does, with examples.
        options: all options that are known.
        main: names of the options that `--help` shows, in this order; none for all.
        show_all: whether to show the others too, under their headings.
    """
    by_name = {option.name: option for option in options}
    chosen = [by_name[name] for name in main if name in by_name]
    parts = [_with_broken_examples(description.strip()), f"Usage: {usage} [OPTIONS.yaml] [--option value ...]"]
    if show_all or not chosen:
        for group in dict.fromkeys(option.group for option in options):
            parts.append(_section(group, [option for option in options if option.group == group]))
    else:
        parts.append(_section("Options", chosen))
    last = [("--quiet", "Warnings and errors only.")]
    if chosen and not show_all:
        last.append(("--help-all", "All options: data, model, training, and those of the Trainer of Transformers."))
    parts.append("\n".join(_entry(flag, text) for flag, text in last))
    return "\n\n".join(parts) + "\n"


def _with_broken_examples(description: str) -> str:
    """The description with a line break wherever an example, which is indented, was continued on another line."""
    return re.sub(r"(?<=\S) {4,}(?=\S)", r" \\\n        ", description)


def _section(title: str, options: Iterable[Option]) -> str:
    lines = [f"{title}:"]
    for option in options:
        notes = " Required." if option.is_required else "" if option.default is None else f" [{option.default}]"
        lines.append(_entry(f"--{option.name} {option.value}".rstrip(), option.help + notes))
    return "\n".join(lines)


def _entry(flag: str, text: str) -> str:
    """A flag and what it does, in two columns."""
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    lines = textwrap.wrap(" ".join(text.split()), width - _COLUMN, break_long_words=False, break_on_hyphens=False) or [
        ""
    ]
    first = f"  {flag} ".ljust(_COLUMN)
    lines = [first + lines[0], *lines[1:]] if len(first) == _COLUMN else [first.rstrip(), *lines]
    return "\n".join([lines[0], *(" " * _COLUMN + line for line in lines[1:])])


@cache
def stored_options(recipe: str) -> tuple[Option, ...]:
    """The options of a recipe that the index holds: its own, and those of the Trainer that `--help` shows.

    Empty for a recipe that reads its command line itself.
    """
    index = json.loads(INDEX.read_text(encoding="utf-8"))
    return tuple(Option(**entry) for entry in index.get(recipe, ()))


def write_index(options: dict[str, Sequence[Option]], path: Path = INDEX) -> None:
    """Writes the index, one option per line."""
    recipes = []
    for name, found in options.items():
        lines = ",\n".join(f"    {json.dumps(asdict(option), ensure_ascii=False)}" for option in found)
        recipes.append(f'  "{name}": [\n{lines}\n  ]')
    path.write_text("{\n" + ",\n".join(recipes) + "\n}\n", encoding="utf-8")

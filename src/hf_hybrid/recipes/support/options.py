"""The options of a recipe: from the command line, an option file or a mapping to dataclasses; and what its `--help` says."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ...data.records import check_reading_options
from .console import set_quiet
from .experiment_files import option_file
from .help_text import TRAINER_GROUP, Option, help_page
from .main_options import HELP
from .option_values import option_value

logger = logging.getLogger(__name__)

# Former names of options, each with what replaced it in one recipe or another.
_FORMER_NAMES = {
    "config_name": ("arch", "dataset_config"),
    "source": ("model_name_or_path",),
    "adapter": ("model_name_or_path",),
}

# Options of recipes that are a length in tokens or a number of rows.
_COUNT = re.compile(r".*_length|max_(\w+_)?(samples|documents|segments)|held_out_documents")

ENCODING_HELP = "Encoding of local text files. Default: UTF-8, with or without a byte order mark."
BAD_RECORD_HELP = "What to do with corrupt records of local files: `error`, or `skip` to leave them out and list them."


def reading_options(arguments: Any) -> dict[str, Any]:
    """What the readers of texts take from the options of a recipe: `encoding` and `on_bad_record`.

    Raises:
        ValueError: one of them is unknown.
    """
    check_reading_options(arguments.encoding, arguments.on_bad_record)
    return {"encoding": arguments.encoding, "on_bad_record": arguments.on_bad_record}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description, so that example commands can be copied, and shows default values."""


def parse_arguments(
    dataclass_types: Sequence[type],
    args: Sequence[str] | Mapping[str, Any] | None,
    description: str | None,
    main_options: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Fills dataclasses from flags, from a YAML or JSON file followed by flags that override it, or from a mapping.

    Mappings and files set the fields directly: None stays None, an empty list stays empty.

    Args:
        dataclass_types: dataclasses; one instance of each is returned, in this order.
        args: list of command-line arguments, mapping of option names to values, or None for `sys.argv`.
        description: text shown by `--help`.
        main_options: names of the options that `--help` shows; none for all. `--help-all` shows all.

    `quiet` is an option of every recipe: nothing is printed but warnings, errors and results.

    Raises:
        ValueError: a mapping or a file contains an unknown option or a value of the wrong type, or lacks a required
            option; or the file cannot be read or is not a mapping.
        ImportError: a package that training needs is missing.
        SystemExit: the command line is invalid, or asks for help.
    """
    if isinstance(args, Mapping):
        return fill_dataclasses(dataclass_types, _noting_quiet(args))
    words = list(sys.argv[1:] if args is None else args)
    _answer_help(words, dataclass_types, description or "", main_options)
    from_file: dict[str, Any] = {}
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        from_file, words = dict(read_options(option_file(words[0]))), words[1:]
        from_file.pop("published", None)  # what the file is about
    if "--quiet" in words:
        from_file = {**from_file, "quiet": True}
    from_file = _noting_quiet(from_file)
    words = [word for word in words if word != "--quiet"]
    given = given_flags(dataclass_types, words, description, complete=not from_file)
    return fill_dataclasses(dataclass_types, {**from_file, **given})


def _noting_quiet(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without `quiet`, which is none of the dataclasses."""
    set_quiet(bool(options.get("quiet", False)))
    return {name: value for name, value in options.items() if name != "quiet"}


def _answer_help(words: Sequence[str], kinds: Sequence[type], description: str, main_options: Sequence[str]) -> None:
    """Prints the help that the command line asks for, and ends."""
    if "--help-json" in words:  # for the index of the console command
        known = [asdict(option) for option in describe_options(kinds)]
        sys.stdout.write(json.dumps(known))
    elif {"-h", "--help", "--help-all"} & set(words):
        options, usage = describe_options(kinds), Path(sys.argv[0]).name
        show_all = "--help-all" in words
        sys.stdout.write(help_page(usage, description, options, main_options, show_all=show_all))
    else:
        return
    raise SystemExit(0)


def describe_options(kinds: Sequence[type]) -> list[Option]:
    """The options of dataclasses, in words."""
    described = []
    for place, kind in enumerate(kinds):
        hints = get_type_hints(kind)
        trains = issubclass(kind, TrainingArguments)
        titles = (
            ("Data", "Model") if issubclass(kinds[-1], TrainingArguments) else ("Options",) if len(kinds) == 1 else ()
        )
        title = titles[place] if place < len(titles) else (kind.__doc__ or "Options").partition("\n")[0].rstrip(".")
        own = {
            name
            for base in kind.__mro__
            if base.__module__.startswith(__package__.split(".")[0])
            for name in vars(base).get("__annotations__", {})
        }
        for item in fields(kind):
            if not item.init:
                continue
            group = title if not trains else "Training" if item.name in own else TRAINER_GROUP
            described.append(_described(item, hints[item.name], group, trains))
    return described


def _described(item: Field, hint: Any, group: str, trains: bool) -> Option:
    is_required = item.default is MISSING and item.default_factory is MISSING
    default = None if is_required or item.default in (MISSING, None, "", -1) else item.default
    text = (HELP.get(item.name) if trains else None) or item.metadata.get("help", "")
    return Option(
        name=item.name,
        value=_kind_of_value(hint, item.metadata.get("choices")),
        default=None if default is None else str(default.value if isinstance(default, Enum) else default),
        help=" ".join(str(text).split()),
        group=group,
        is_required=is_required,
    )


def _kind_of_value(hint: Any, choices: Sequence[Any] | None) -> str:
    """What stands for the value of an option in a help text."""
    accepted = (
        [kind for kind in get_args(hint) if kind is not type(None)]
        if get_origin(hint) not in (list, dict, Literal)
        else []
    )
    hint = accepted[0] if accepted else hint
    if choices is None and get_origin(hint) is Literal:
        choices = get_args(hint)
    if choices is not None:
        return "{" + ",".join(map(str, choices)) + "}"
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
    if get_origin(hint) is list:
        return f"{names.get((get_args(hint) or (str,))[0], 'TEXT')} ..."
    return names.get(hint, "TEXT")


def fill_dataclasses(dataclass_types: Sequence[type], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """One instance of each dataclass, with its fields from the options and defaults for the others.

    Raises:
        ValueError: an unknown option, a value of the wrong type, or a required option that is missing.
        ImportError: a package that training needs is missing.
    """
    known = _option_names(dataclass_types)
    options = _with_current_names(options, known)
    for name in options:
        if name not in known:
            raise ValueError(f"Unknown option `{name}`{_did_you_mean(str(name), known)} `--help` lists all options.")
    filled = []
    for kind in dataclass_types:
        hints = get_type_hints(kind)
        values: dict[str, Any] = {}
        for item in fields(kind):
            if item.name in options:
                values[item.name] = option_value(item, hints[item.name], options[item.name])
            elif item.init and item.default is MISSING and item.default_factory is MISSING:
                raise ValueError(f"`{item.name}` is required: {item.metadata.get('help', 'it has no default.')}")
        if issubclass(kind, TrainingArguments):
            require("Training", "accelerate", extra="train")
        instance = kind(**values)
        if not issubclass(kind, TrainingArguments):
            check_counts(instance)
        filled.append(instance)
    return tuple(filled)


def check_counts(options: Any) -> None:
    """Rejects lengths and numbers of rows below 1, whatever dataclass they are in.

    Raises:
        ValueError: the message names the option.
    """
    for item in fields(options):
        value = getattr(options, item.name)
        if _COUNT.fullmatch(item.name) and isinstance(value, int) and value < 1:
            nothing = " (leave it out for no limit)" if item.default is None else ""
            raise ValueError(f"`{item.name}` must be at least 1{nothing}; got {value}.")


def _option_names(dataclass_types: Sequence[type]) -> set[str]:
    return {item.name for kind in dataclass_types for item in fields(kind) if item.init}


def _with_current_names(options: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The options by their current names.

    Raises:
        ValueError: an option is given twice, by both of its names.
    """
    current: dict[str, Any] = {}
    for name, value in options.items():
        successor = _current_name(str(name), known)
        if successor in current or (successor != name and successor in options):
            raise ValueError(
                f"`{name}` is the former name of `{successor}`, which is given too: pass `{successor}` alone."
            )
        current[successor] = value
    return current


def _current_name(name: str, known: set[str]) -> str:
    """The name of an option that may be given by its former one; says so once."""
    if name in known:
        return name
    current = next((successor for successor in _FORMER_NAMES.get(name, ()) if successor in known), None)
    if current is None:
        return name
    logger.warning("The option `%s` is now called `%s`.", name, current)
    return current


def require(what: str, *modules: str, extra: str) -> None:
    """Checks that the packages of an extra are installed.

    Raises:
        ImportError: a package is missing; the message names it and the extra to install.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{what} needs {" and ".join(missing)}: pip install "hf_hybrid[{extra}]".')


class _Parser(HfArgumentParser):
    """Flags of dataclasses; for an unknown flag it suggests a similar one."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists the options.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        flags = [option for action in self._actions for option in action.option_strings]
        for word in args or ():  # before argparse asks for what is required
            name = word.partition("=")[0]
            if re.fullmatch(r"--[A-Za-z][\w-]*", name) and not any(flag.startswith(name) for flag in flags):
                self.error(f"unknown argument {name}{_did_you_mean(name, flags)}")
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unknown argument {rest[0]}{_did_you_mean(rest[0], flags)}")
        return found


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """ ": did you mean ...?", or a full stop if no name is similar."""
    close = difflib.get_close_matches(name.replace("-", "_") if not name.startswith("-") else name, known, n=1)
    return f": did you mean `{close[0]}`?" if close else "."


def given_flags(
    dataclass_types: Sequence[type], words: Sequence[str], description: str | None, *, complete: bool
) -> dict[str, Any]:
    """The options given on a command line, without any defaults.

    Args:
        dataclass_types: dataclasses whose fields are options.
        words: command-line arguments.
        description: text shown by `--help`.
        complete: whether options without a default are required.
    """
    parser = _Parser(list(dataclass_types), description=description, formatter_class=HelpFormatter)  # type: ignore[arg-type]
    known = _option_names(dataclass_types)
    words = [_current_flag(word, known) for word in words]
    unset = object()
    for action in parser._actions:
        action.required = action.required and complete
    found = vars(parser.parse_args(words, argparse.Namespace(**{action.dest: unset for action in parser._actions})))
    return {name: value for name, value in found.items() if value is not unset}


def _current_flag(word: str, known: set[str]) -> str:
    """`--name` or `--name=value` with the current name of the option; other words as they are."""
    match = re.fullmatch(r"--([\w-]+)(=.*)?", word, flags=re.DOTALL)
    former = match[1].replace("-", "_") if match else ""
    current = _current_name(former, known)
    return word if match is None or current == former else f"--{current}{match[2] or ''}"


class _YamlLoader(yaml.SafeLoader):
    """Reads `5e-4` as a number, as in YAML 1.2; in YAML 1.1, which the library implements, it is text."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_options(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        options = json.loads(text) if path.suffix == ".json" else yaml.load(text, _YamlLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The option file {path} cannot be read: {error}.") from error
    if not isinstance(options, Mapping):
        raise ValueError(f"The option file {path} must hold `name: value` pairs at its top level.")
    return options


def resolved_arguments(*dataclasses_: Any) -> dict[str, Any]:
    """All options of a run in one flat dictionary, for `arguments.json`."""
    resolved: dict[str, Any] = {}
    for group in dataclasses_:
        is_training = isinstance(group, TrainingArguments)
        resolved.update(group.to_dict() if is_training else {f.name: getattr(group, f.name) for f in fields(group)})
    return resolved


def source_names(names: Sequence[str] | str | None, option: str) -> list[str] | None:
    """The sources that an option names, split by `split_names`; None if the option was left out.

    Raises:
        ValueError: the option is given but empty.
    """
    found = split_names(names)
    if names is not None and not found:
        raise ValueError(f"`{option}` names no file, folder or data set; got {names!r}.")
    return found or None


def split_names(names: Sequence[str] | str | None) -> list[str]:
    """Names given as separate words, separated by commas, or both; an existing path is never split."""
    names = [names] if isinstance(names, str) else list(names or [])
    split: list[str] = []
    for name in names:
        split += [name] if name and Path(name).exists() else [part.strip() for part in name.split(",") if part.strip()]
    return split

"""What a published folder holds: the model, how to load it and what was measured, and nothing that speaks of this machine.

Everything that leaves this machine goes through here: exports, pushes of folders, and whatever a trainer pushes. Two rules:

- A file leaves only if its name is known to belong to a model (`MODEL_FILES`), or lies in a checkpoint that a run was told to push.
  Records of the run (`arguments.json`, `environment.json`), its logs, whose names hold the host, and `training_args.bin` stay.
- In texts and JSON that leave, paths of this machine are replaced by their last part.
"""

from __future__ import annotations

import json
import ntpath
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

# Beside these: the files that a tokenizer names (`tokenizer_files`).
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",  # of the model, of generation, of tokenizer, processor and adapter
    "*.py",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "README.md",
    "LICENSE*",
    "SHA256SUMS",
    "metrics.json",
    "loss_curve.png",
    "codebooks.png",
)
# A Space: its program, this package as source, and the model if it is not loaded from the Hub.
SPACE_FILES = ("app.py", "requirements.txt", "README.md")
SPACE_PACKAGE, SPACE_MODEL = "hf_hybrid", "model"
_SOURCES = (".py", ".pyi", ".json", ".typed")
# Of the options of an official checkpoint, paths of the machine that trained it cannot be told from names.
_NEVER = ("training_args.bin", "official_config.json", "carried_state_*", ".*")
_LOGS = ("runs", "logs", "wandb", "mlruns", ".*")  # folders below a checkpoint or a run that are logs

_PATH_FIELD = re.compile(r"(path|_file|_dir|directory|folder|checkpoint)$")
_PATH_IN_TEXT = re.compile(r"(?<![\w/.~-])~?(?:/[\w.+@%=-]+)+/?")
_SHARED_ROOTS = ("/usr", "/bin", "/sbin", "/lib", "/etc", "/dev", "/proc", "/sys")  # the same on every machine
_TEXTS = {".md", ".txt", ".jinja", ".yaml", ".yml"}


# ----------------------------------------------------------------------------------------------------- which files


def is_model_file(name: str, further: Iterable[str] = ()) -> bool:
    """Whether a file of a folder belongs to a shared model.

    Args:
        name: its path in the folder, with `/`.
        further: names of further files, e.g. `tokenizer_files(tokenizer)`.
    """
    patterns = (*MODEL_FILES, *further)
    return (
        name.count("/") <= 1
        and any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in _NEVER)
    )


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of a checkpoint is needed to continue the run elsewhere."""
    *folders, last = name.split("/")
    return last != "training_args.bin" and not any(
        fnmatchcase(folder, pattern) for folder in folders for pattern in _LOGS
    )


def is_space_file(name: str) -> bool:
    """Whether a file of a folder belongs to a Space.

    Args:
        name: its path in the folder, with `/`.
    """
    first, _, rest = name.partition("/")
    if first == SPACE_MODEL and rest:
        return is_model_file(rest)
    if first == SPACE_PACKAGE and rest:
        return name.endswith(_SOURCES) and not any(part.startswith((".", "__pycache__")) for part in name.split("/"))
    return name in SPACE_FILES


def tokenizer_files(tokenizer: Any) -> list[str]:
    """Names of the files that a tokenizer or processor reads."""
    return sorted({*getattr(tokenizer, "vocab_files_names", {}).values()})


class Written(NamedTuple):
    """What `write_published` did."""

    left: list[str]
    """Names of the files that stay behind."""
    changed: list[str]
    """Names of the files that were cleaned."""


def write_published(
    source: Path, target: Path, *, checkpoint: bool = False, space: bool = False, further: Iterable[str] = ()
) -> Written:
    """Writes the part of a folder that may leave this machine, cleaned. Large files are linked where that is possible.

    Args:
        source: folder of a run, a checkpoint or an export.
        target: folder to write into; it is created.
        checkpoint: take all that is needed to continue the run, rather than the model alone.
        space: take what belongs to a Space.
        further: names of further files of the model.

    Returns:
        The names of the files that stay behind, and of those that were changed.
    """
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    left = []
    for name in names:
        belongs = (
            is_space_file(name) if space else is_checkpoint_file(name) if checkpoint else is_model_file(name, further)
        )
        if not belongs:
            left.append(name)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if _is_cleaned(name):
            shutil.copy(source / name, target / name)
        else:
            _link(source / name, target / name)
    target.mkdir(parents=True, exist_ok=True)
    return Written(left, clean_folder(target, source))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copy(source, target)


# ------------------------------------------------------------------------------------------------ what stands in them


def clean_folder(folder: Path, *known: Path) -> list[str]:
    """Removes paths of this machine from the texts and JSON files of a folder.

    Args:
        folder: folder to clean in place; its files must not be links to files elsewhere.
        known: folders of this machine, beside those of the user, of temporary files and of Python.

    Returns:
        The names of the files that were changed.
    """
    changed = []
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        name = path.relative_to(folder).as_posix()
        if not _is_cleaned(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        cleaned = _cleaned_file(name, text, _folders(folder, *known))
        if cleaned != text:
            path.write_text(cleaned, encoding="utf-8")
            changed.append(name)
    return changed


def _is_cleaned(name: str) -> bool:
    # The vocabulary of a tokenizer may well contain paths, which are its tokens.
    suffix = Path(name).suffix
    if name.startswith(f"{SPACE_PACKAGE}/"):
        return False  # this package, as it is installed everywhere
    return suffix in _TEXTS or (suffix == ".json" and Path(name).name not in ("tokenizer.json", "vocab.json"))


def _cleaned_file(name: str, text: str, folders: list[str]) -> str:
    if not name.endswith(".json"):
        return clean_text(text, folders)
    try:
        value = json.loads(text)
    except ValueError:
        return clean_text(text, folders)
    cleaned = clean_json(value, folders)
    if cleaned == value:
        return text
    return json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"


def clean_json(value: Any, folders: Iterable[str] = (), field: str = "") -> Any:
    """A JSON value without paths of this machine.

    Args:
        value: value of a JSON file.
        folders: folders of this machine, see `clean_text`.
        field: name of the field that holds the value. Where it names a file or a folder, paths that lead nowhere are shortened too.
    """
    if isinstance(value, dict):
        return {key: clean_json(item, folders, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [clean_json(item, folders, field) for item in value]
    if not isinstance(value, str):
        return value
    if _PATH_FIELD.search(field) and value:
        is_path = os.path.isabs(value) or ntpath.isabs(value) or value.startswith("~")
        if is_path or os.path.exists(value):
            return _last_part(value)
    return clean_text(value, folders)


def clean_text(text: str, folders: Iterable[str] = ()) -> str:
    """A text in which absolute paths of this machine are replaced by their last part.

    Args:
        text: any text, e.g. a model card.
        folders: folders of this machine: what lies below them is replaced even if it is not there any more. Elsewhere, only paths
            that exist.
    """
    if "/" not in text and "\\" not in text:
        return text
    for folder in sorted(folders, key=len, reverse=True):  # also with spaces, and in the form of other systems
        rest = r"((?:[/\\][^/\\\s\"'`<>|()\[\]]+)*)[/\\]?"
        text = re.sub(rf"(?:file://|(?<![\w/.-])){re.escape(folder)}(?![\w.-]){rest}", _base_of_match, text)

    def replaced(match: re.Match[str]) -> str:
        path = match[0].rstrip("/.")
        is_shared = any(path == root or path.startswith(f"{root}/") for root in _SHARED_ROOTS)
        is_here = path.startswith("~/") or (path.count("/") > 1 and not is_shared and os.path.lexists(path))
        return _last_part(path) + match[0][len(path) :].replace("/", "") if is_here else match[0]

    return _PATH_IN_TEXT.sub(replaced, text)


def _base_of_match(match: re.Match[str]) -> str:
    return _last_part(match[0])


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _folders(*known: Path) -> list[str]:
    """Folders of this machine, as they may stand in texts: as given and with links resolved."""
    given = [Path.home(), Path(tempfile.gettempdir()), *known]
    working: Iterator[Path] = (Path(path) for path in (os.getcwd(), sys.prefix, str(Path(__file__).parent)))
    given += [path for path in working if len(path.parts) > 2]  # `/usr` is the same everywhere
    both = {str(found) for path in given for found in (path.absolute(), path.resolve())}
    return sorted(folder for folder in both if folder not in ("/", ".") and not folder.endswith((":\\", ":/")))

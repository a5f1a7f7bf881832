"""Fingerprints of what a run reads: sizes and SHA-256 of its data, tokenizer and initial model.

A resumed run goes on at the same row, of what should be the same rows. Names on the Hub are not read: pin their revision.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.token_shards import MANIFEST_FILE, is_token_folder

# Options that name files or folders, with what of a folder belongs to them.
DATA_OPTIONS = ("data", "validation_data")
MODEL_OPTIONS = ("model_name_or_path", "arch", "tokenizer")
_WEIGHTS = (".safetensors", ".bin", ".pt")
_MODEL_FILES = (*_WEIGHTS, ".json", ".model", ".txt", ".jinja", ".py")
# What a run writes beside the model.
_RECORDS = frozenset(
    "arguments.json environment.json fingerprints.json metrics.json trainer_state.json run_totals.json checkpoint_manifest.json "
    "training_args.bin optimizer.pt scheduler.pt scaler.pt".split()
)
_DOCUMENTS = frozenset(("readme.md", "license", "license.md", "license.txt"))

_READ_WHOLE = 16 * 2**30  # bytes of a source up to which all are read
_BLOCK, _BLOCKS = 2**20, 16  # of each file of a larger source, this many blocks, evenly spaced

Files = dict[str, dict[str, Any]]


def fingerprints(
    options: Mapping[str, Any], *, known: Mapping[str, Any] | None = None, without: Path | None = None
) -> dict[str, list[Files]]:
    """The files behind the options of a run: option -> one entry per source that is a local path, file -> size and digest.

    Args:
        options: options of the run; those that name no local path are left out.
        known: earlier fingerprints. A file that has kept size and time of its last change is not read again.
        without: folder to leave out, because the run writes into it.
    """
    found: dict[str, list[Files]] = {}
    for option in (*DATA_OPTIONS, *MODEL_OPTIONS):
        value = options.get(option)
        names = [value] if isinstance(value, (str, os.PathLike)) else list(value or [])
        if names and all(Path(name).expanduser().exists() for name in names):
            earlier = (known or {}).get(option) or []
            found[option] = [
                _fingerprint(Path(name).expanduser(), option, earlier[index] if index < len(earlier) else {}, without)
                for index, name in enumerate(names)
            ]
    return found


def changed_files(before: Sequence[Files], after: Sequence[Files]) -> list[str]:
    """What differs between two fingerprints of an option: one phrase for each file; empty if the contents are the same."""
    if len(before) != len(after):
        return [f"{len(after)} sources instead of {len(before)}"]
    found = []
    for old, new in zip(before, after):
        if len(old) == len(new) == 1:  # a file may have another name
            old, new = {next(iter(new)): next(iter(old.values()))}, new
        found += [f"{name} is gone" for name in old if name not in new]
        found += [f"{name} was added" for name in new if name not in old]
        for name in old:
            if name in new and (old[name]["size"], old[name]["sha256"]) != (new[name]["size"], new[name]["sha256"]):
                sizes = f"{new[name]['size']:,} bytes, was {old[name]['size']:,}"
                found.append(f"{name} has other contents ({sizes})")
    return found


def _fingerprint(path: Path, option: str, known: Files, without: Path | None) -> Files:
    if path.is_file():
        files = {path.name: path}
    elif option in DATA_OPTIONS and is_token_folder(path):
        files = {MANIFEST_FILE: path / MANIFEST_FILE}  # it holds size and digest of every shard
    else:
        files = {file.relative_to(path).as_posix(): file for file in _files(path, option, without)}
    is_large = sum(file.stat().st_size for file in files.values()) > _READ_WHOLE
    return {name: _entry(file, known.get(name, {}), is_large) for name, file in sorted(files.items())}


def _files(folder: Path, option: str, without: Path | None) -> Iterable[Path]:
    """The files of a folder that an option stands for."""
    if option in MODEL_OPTIONS:
        kinds = _MODEL_FILES if option == "model_name_or_path" else _MODEL_FILES[len(_WEIGHTS) :]
        for path in folder.iterdir():
            if path.is_file() and path.suffix in kinds and path.name not in _RECORDS and path.name[0] not in "._":
                yield path
        return
    excluded = None if without is None else without.resolve()
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(
            name
            for name in folders
            if name[0] not in "._" and (excluded is None or (here / name).resolve() != excluded)
        )
        for name in names:
            path = here / name
            if name[0] not in "._" and name.lower() not in _DOCUMENTS and path.is_file():
                yield path


def _entry(path: Path, known: Mapping[str, Any], is_large: bool) -> dict[str, Any]:
    status = path.stat()
    entry = {"size": status.st_size, "modified": status.st_mtime_ns}
    if {name: known.get(name) for name in entry} == entry:
        return dict(known)
    with path.open("rb") as stream:
        if not is_large or status.st_size <= _BLOCK * _BLOCKS:
            return {**entry, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        digest = hashlib.sha256()
        for index in range(_BLOCKS):
            stream.seek(index * (status.st_size - _BLOCK) // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
        return {**entry, "sha256": digest.hexdigest(), "blocks": _BLOCKS}

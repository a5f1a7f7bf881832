"""Models that load without this package: a flat folder with the checkpoint and a copy of every source file it needs.

Transformers runs code from a model folder (`trust_remote_code=True`), but only files that lie side by side and import each
other as `from .name import ...`. An export is generated from the sources of this package and never edited; its
manifest holds the SHA-256 of every file.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .auto import ARCHITECTURES, Architecture
from .configuration.name_tables import enter_names
from .model_card import CARD_FILE, ModelCard, card_of_model, check_model_card
from .new_folder import new_folder
from .published import clean_folder

logger = logging.getLogger(__name__)

PACKAGE = __package__ or "hf_hybrid"
MANIFEST_FILE = "SHA256SUMS"  # in the format of the command `sha256sum`

_FROM = re.compile(r"^(\s*from\s+)([.\w]+)(\s+import\b)")
_MANIFEST_LINE = re.compile(r"^([0-9a-f]{64}) [ *](\S.*)$")
_NOT_LISTED = {MANIFEST_FILE, ".gitattributes"}
_BOOKKEEPING = {".git", ".cache"}  # folders that git and huggingface_hub keep in a copy of a repository
_LOADABLE = set(".py .pyc .pyd .so .safetensors .bin .pt .pth .ckpt .pkl .pickle .gguf .jinja".split())


# -------------------------------------------------------------------------------------------------------- flattening


@dataclass(frozen=True)
class _Source:
    """One module of a package: its text, and the modules of known packages that it imports, by line number."""

    text: str
    imports: Mapping[int, str]


def _package_of(module: str) -> str:
    return module.partition(".")[0]


def _read_source(module: str, packages: Collection[str] = (PACKAGE,)) -> _Source:
    specification = importlib.util.find_spec(module)
    loader: Any = specification.loader if specification is not None else None
    text = loader.get_source(module) if hasattr(loader, "get_source") else None
    if specification is None or text is None:
        raise RuntimeError(f"The source of `{module}` cannot be read: is it installed without its .py files?")
    imports: dict[int, str] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            if any(_package_of(alias.name) in packages for alias in node.names):
                raise _not_flat(module, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                target = ".".join([*package, target]) if target else ""
            elif _package_of(target) not in packages:
                continue
            found = importlib.util.find_spec(target) if target else None
            if found is None or found.submodule_search_locations is not None:  # a package: names of leaf modules only
                raise _not_flat(module, node.lineno)
            imports[node.lineno] = target
    return _Source(text, imports)


def _not_flat(module: str, line: int) -> RuntimeError:
    return RuntimeError(
        f"Line {line} of `{module}` cannot be flattened: files that models need import each other as "
        "`from .module import name`."
    )


def _closure(modules: Iterable[str]) -> dict[str, _Source]:
    """The modules and all that they import from their packages and from this one, directly or indirectly."""
    sources: dict[str, _Source] = {}
    waiting = list(dict.fromkeys(modules))
    packages = {PACKAGE, *map(_package_of, waiting)}
    while waiting:
        module = waiting.pop(0)
        if module not in sources:
            sources[module] = _read_source(module, packages)
            waiting += sources[module].imports.values()
    return sources


def _flat_names(modules: Iterable[str]) -> dict[str, str]:
    """A name without dots for each module: its last part, or all parts where two modules share it."""
    modules = list(modules)
    ends = Counter(module.rpartition(".")[2] for module in modules)

    def flat(module: str) -> str:
        end = module.rpartition(".")[2]
        return end if ends[end] == 1 else module.removeprefix(f"{PACKAGE}.").replace(".", "_")

    names = {module: flat(module) for module in modules}
    assert len(set(names.values())) == len(names), names
    return names


def _flatten(module: str, source: _Source, flat_names: Mapping[str, str], version: str) -> str:
    """The text of a module with its imports redirected to the neighbouring files."""
    lines = source.text.splitlines(keepends=True)
    for number, target in source.imports.items():
        changed, count = _FROM.subn(rf"\g<1>.{flat_names[target]}\g<3>", lines[number - 1])
        if count != 1:
            raise _not_flat(module, number)
        lines[number - 1] = changed
    path = module.replace(".", "/") + ".py"
    origin = f"# Generated by {PACKAGE} {version} from {path}. Do not edit: change the package and export again.\n"
    if _package_of(module) == PACKAGE:  # the code of other packages has their own licence
        origin += "# SPDX-License-Identifier: Apache-2.0\n"
    return origin + "".join(lines)


def _adopted(names: Iterable[str]) -> str:
    """Last lines of a file that re-exports classes of other files.

    Transformers saves the file that `__module__` of a class names, and what that file imports. Setting `__module__` to
    the file that imports every head keeps all heads when a model loaded from an export is saved again.
    """
    return "\n\n" + "".join(f"{name}.__module__ = __name__\n" for name in names)


def _entered(architecture: Architecture, name_tables: str) -> str:
    """Last lines of the configuration file, which is loaded first: enters the heads in Transformers' name tables."""
    heads = "".join(f'    "{auto_name}": "{name}",\n' for auto_name, name in architecture.heads.items())
    return f'\n\nfrom .{name_tables} import enter_names\n\nenter_names("{architecture.model_type}", {{\n{heads}}})\n'


@dataclass(frozen=True)
class RemoteCode:
    """Source files of an export, and how Transformers finds the classes in them.

    Attributes:
        files: file name -> text.
        auto_map: Auto class -> "module.class" of the configuration and of every head.
        processor_map: Auto class -> "module.class" of the tokenizer and the processors.
    """

    files: dict[str, str]
    auto_map: dict[str, str]
    processor_map: dict[str, str]


def remote_code(architecture: Architecture, processors: Mapping[str, type] | None = None) -> RemoteCode:
    """Generates the flat source files of an architecture.

    Args:
        architecture: entry of `auto.ARCHITECTURES`.
        processors: Auto class -> class of this package or of the package of the architecture, e.g.
            {"AutoImageProcessor": PixelSequenceImageProcessor}.

    Returns:
        The files that the configuration, all heads and the processors need, and no others.
    """
    from . import __version__

    config_module, config_name = architecture.config.split(":")
    config_module, modeling = (f"{architecture.package}.{name}" for name in (config_module, architecture.modeling))
    processors = processors or {}
    name_tables = enter_names.__module__
    sources = _closure([config_module, modeling, name_tables, *(kind.__module__ for kind in processors.values())])
    flat_names = _flat_names(sources)
    files = {
        f"{flat_names[module]}.py": _flatten(module, source, flat_names, __version__)
        for module, source in sources.items()
    }
    files[f"{flat_names[config_module]}.py"] += _entered(architecture, flat_names[name_tables])
    own = {node.name for node in ast.parse(sources[modeling].text).body if isinstance(node, ast.ClassDef)}
    adopted = [name for name in dict.fromkeys(architecture.heads.values()) if name not in own]
    if adopted:
        files[f"{flat_names[modeling]}.py"] += _adopted(adopted)
    return RemoteCode(
        files,
        {"AutoConfig": f"{flat_names[config_module]}.{config_name}"}
        | {auto_name: f"{flat_names[modeling]}.{name}" for auto_name, name in architecture.heads.items()},
        {auto_name: f"{flat_names[kind.__module__]}.{kind.__name__}" for auto_name, kind in processors.items()},
    )


# ---------------------------------------------------------------------------------------------------------- exporting


def architecture_of(model: Any) -> Architecture:
    """The entry of `auto.ARCHITECTURES` that a model belongs to.

    Raises:
        ValueError: the model is not one of this package.
    """
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"`model` is a {name} with adapters: merge them first (`merge_and_unload()` of PEFT, or the recipe merge_adapter), "
            "or share the adapters alone with `model.push_to_hub`."
        )
    for architecture in ARCHITECTURES:
        if name in architecture.heads.values() and type(model).__module__.startswith(f"{architecture.package}."):
            return architecture
    accepted = ", ".join(architecture.model_type for architecture in ARCHITECTURES)
    raise ValueError(
        f"`model` must be a model of {PACKAGE} ({accepted}); got {type(model).__module__}.{name}. A model that was "
        f"loaded by its remote code belongs to that code: `import {PACKAGE}` before loading it, or use `save_pretrained`."
    )


def export_remote_code(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    processor: Any | None = None,
    card: ModelCard | str | None = None,
    max_shard_size: int | str = "50GB",
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a folder that Transformers can load without this package, with `trust_remote_code=True`.

    The folder appears complete or not at all: it is written under a temporary name and renamed at the end.

    Args:
        model: any model of this package.
        folder: folder to create; it must not exist, or be empty.
        tokenizer: tokenizer saved with the model.
        processor: image processor or feature extractor saved with the model.
        card: text of the README.md, or a `ModelCard`; None drafts one from the model.
        max_shard_size: largest size of a weight file.
        dtype: see `save_checkpoint`.

    Returns:
        The folder, with weights, configurations, source files, card and the manifest `SHA256SUMS`.

    Raises:
        ValueError: the model is not one of this package, or the card is not valid.
        FileExistsError: the folder is not empty.
    """
    architecture = architecture_of(model)
    processors: dict[str, Any] = {}
    if tokenizer is not None:
        processors["AutoTokenizer"] = tokenizer
    if processor is not None:
        processors[_processor_kind(processor)] = processor
    packages = {PACKAGE, _package_of(architecture.package)}
    own = {name: type(one) for name, one in processors.items() if _package_of(type(one).__module__) in packages}
    code = remote_code(architecture, own)
    with new_folder(folder) as scratch:
        parts: dict[str, Any] = {
            "processor": processor,
            "card": card,
            "max_shard_size": max_shard_size,
            "dtype": dtype,
        }
        save_checkpoint(model, scratch, tokenizer, **parts)
        for name, text in code.files.items():
            (scratch / name).write_text(text, encoding="utf-8")
        _set_auto_map(scratch / "config.json", code.auto_map)
        for auto_name, reference in code.processor_map.items():
            if auto_name == "AutoTokenizer":
                _set_auto_map(scratch / "tokenizer_config.json", {auto_name: [None, reference]})
            else:
                _set_auto_map(scratch / "preprocessor_config.json", {auto_name: reference})
        write_manifest(scratch)
    return Path(folder)


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    processor: Any | None = None,
    card: ModelCard | str | None = None,
    max_shard_size: int | str = "50GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes weights, configurations, tokenizer, processor and card, without code.

    With `dtype`, e.g. `torch.bfloat16`, the weights are stored rounded to it, but loaded in the precision of the model: a file
    of half the size that is still trained in float32.

    Raises:
        ValueError: the card is not valid.
    """
    text = card if isinstance(card, str) else (card or card_of_model(model)).render()
    check_model_card(text)
    if dtype is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        rounded: Any = copy.deepcopy(model)
        rounded.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        _set_field(folder / "config.json", "dtype", str(model.dtype).removeprefix("torch."))
    for part in (tokenizer, processor):
        if part is not None:
            part.save_pretrained(folder)
    _set_auto_map(folder / "config.json", None)  # left behind by a checkpoint that came with code
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    clean_folder(folder)


def _processor_kind(processor: Any) -> str:
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin

    for base, auto_name in (
        (ImageProcessingMixin, "AutoImageProcessor"),
        (FeatureExtractionMixin, "AutoFeatureExtractor"),
    ):
        if isinstance(processor, base):
            return auto_name
    raise ValueError(
        f"`processor` must be an image processor or a feature extractor; got {type(processor).__name__}. Pass a "
        "tokenizer as `tokenizer`."
    )


def _set_auto_map(path: Path, auto_map: Mapping[str, Any] | None) -> None:
    _set_field(path, "auto_map", None if auto_map is None else dict(auto_map))


def _set_field(path: Path, name: str, value: Any) -> None:
    """Sets a field of a JSON file; None removes it."""
    contents = json.loads(path.read_text(encoding="utf-8"))
    contents.pop(name, None)
    if value is not None:
        contents[name] = value
    path.write_text(json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- manifest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_of(folder: Path) -> list[str]:
    """Names of all files of an export, relative to its folder, without those that a manifest never lists.

    A link to a folder counts as a file: loaders follow it. What git and huggingface_hub keep in a copy of a repository is left out,
    unless it could be loaded.
    """
    names = []
    for parent, folders, files in os.walk(folder):
        place = Path(parent).relative_to(folder)
        kept_by_tools = bool(place.parts) and place.parts[0] in _BOOKKEEPING
        links = [name for name in folders if (folder / place / name).is_symlink()]
        folders[:] = sorted(set(folders) - set(links))
        names += [
            (place / name).as_posix()
            for name in (*files, *links)
            if not kept_by_tools or name in links or Path(name).suffix in _LOADABLE
        ]
    return sorted(set(names) - _NOT_LISTED)


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Lists every file of a folder with its SHA-256 in `SHA256SUMS`, which `sha256sum --check` reads."""
    folder = Path(folder)
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in files_of(folder)]
    (folder / MANIFEST_FILE).write_text("".join(lines), encoding="utf-8")


def verify_export(folder: str | os.PathLike[str], digest: str | None = None) -> str:
    """Checks that an export is as it was written: no file changed, missing or added.

    The model card may differ, because it is edited on the Hub; that is only logged.

    Args:
        folder: an export, or a downloaded copy of it.
        digest: the value that this function returned when the export was made. Without it, a change of a file together
            with its line in the manifest goes unnoticed.

    Returns:
        The SHA-256 of the manifest, which identifies the whole export.

    Raises:
        ValueError: there is no manifest, or the folder differs from it; the message names every file.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        raise ValueError(f"{folder} has no manifest ({MANIFEST_FILE}): it was not written by `export_remote_code`.")
    expected = {}
    for number, line in enumerate(manifest.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _MANIFEST_LINE.match(line)
        if match is None:
            raise ValueError(
                f"Line {number} of {manifest} is not of the form `sha256  name`: the manifest was changed."
            )
        expected[match[2]] = match[1]
    present = set(files_of(folder))
    problems = [f"{name} was added" for name in sorted(present - expected.keys())]
    for name, sha256 in sorted(expected.items()):
        if name in present and not (folder / name).is_file():
            problems.append(f"{name} is a link to a folder, or to nothing")
        elif name not in present:
            problems.append(f"{name} is missing")
        elif file_digest(folder / name) != sha256:
            if name == CARD_FILE:
                logger.warning("The model card of %s was changed after the export.", folder)
            else:
                problems.append(f"{name} was changed")
    found = file_digest(manifest)
    if digest is not None and found != digest:
        problems.append(f"the manifest has the digest {found}, not {digest}")
    if problems:
        raise ValueError(
            f"The export {folder} has been changed: {'; '.join(problems)}. Download it again from its source. If you "
            f"changed it yourself, delete {MANIFEST_FILE} or export the model again."
        )
    return found


def check_export(name_or_path: str | os.PathLike[str]) -> None:
    """Refuses an export that was changed, before any of its files is read and any of its code runs.

    To be called before every load that may run code from a folder. It does not protect from whoever can write the manifest too: that
    needs the digest (`verify_export`). Names on the Hub are not checked.

    Args:
        name_or_path: a folder; anything else, and a folder without a manifest, passes.

    Raises:
        ValueError: the folder has a manifest and differs from it.
    """
    folder = Path(name_or_path)
    if os.path.lexists(folder / MANIFEST_FILE):
        _verify_once(folder, tuple(_stamps(folder)))


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    """What changes with every change of a file or link. Times of modification can be set back, those of the change cannot."""
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = os.path.join(parent, name)
            for status in (os.lstat(path), os.stat(path) if os.path.exists(path) else None):
                if status is not None:
                    yield path, status.st_ctime_ns, status.st_size


@lru_cache(maxsize=16)
def _verify_once(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> None:
    verify_export(folder)

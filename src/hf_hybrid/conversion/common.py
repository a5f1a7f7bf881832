"""Shared by all converters: renaming tensors both ways, reading files without executing code, comparing bits."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

StateDict = dict[str, torch.Tensor]

_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Official leaf names of a damped moving average -> our names, and the tensors of a norm by its kind.
MOVING_AVERAGE_NAMES = {
    "delta": "damping_factor",
    "alpha": "decay_factor",
    "beta": "ema_expansion_matrix",
    "gamma": "kernel_projection_matrix",
    "omega": "residual_weight",
}
NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NORM_LEAVES = {
    "layernorm": ("weight", "bias"),
    "scalenorm": ("scalar",),
    "rmsnorm": ("weight",),
    "batchnorm": ("weight", "bias"),
    "syncbatchnorm": ("weight", "bias"),
}


class Converter(Protocol):
    """Interface of the module that the record of an architecture names as `converter`. Nothing is lost either way."""

    def recognises(self, official: Mapping[str, Any]) -> bool:
        """Whether official options belong to this architecture, and to no other."""

    def is_fairseq(self, config: Any) -> bool:
        """Whether the official format is a fairseq checkpoint, rather than a Transformers folder."""

    def vocabulary_size(self, state: Mapping[str, torch.Tensor]) -> int | None:
        """Vocabulary size, if the official options do not contain it."""

    def config_from_official(self, official: Mapping[str, Any], *, vocab_size: int | None = None) -> Any:
        """Our configuration."""

    def config_to_official(self, config: Any, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The official options, starting from those of `base`."""

    def model_class(self, config: Any) -> type:
        """The model class that has all tensors."""

    def state_dict_from_official(self, state: Mapping[str, torch.Tensor], config: Any) -> StateDict:
        """Our tensors."""

    def state_dict_to_official(self, state: Mapping[str, torch.Tensor], config: Any) -> StateDict:
        """The official tensors."""


@dataclass(frozen=True)
class TensorNames:
    """Names of the tensors of one model in the official format and in ours.

    Attributes:
        ours: official name -> our name, one to one.
        aliases: official name of a second copy of a tied tensor -> official name of the original.
        constants: tensors without information in the official format (version marks); written on export.
        our_aliases: our name of a second copy -> our name of the original.
    """

    ours: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)
    constants: StateDict = field(default_factory=dict)
    our_aliases: dict[str, str] = field(default_factory=dict)


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (NaN equals itself)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    left, right = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(left, right)


def _listing(names: Iterable[str], limit: int = 12) -> str:
    names = sorted(names)
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def resolve_aliases(state: Mapping[str, torch.Tensor], aliases: Mapping[str, str], what: str) -> StateDict:
    """Drops the second copies of tied tensors; a missing original is taken from its copy.

    Raises:
        ValueError: a copy differs from its original.
    """
    resolved = dict(state)
    for alias, original in aliases.items():
        copy = resolved.pop(alias, None)
        if copy is None:
            continue
        if original not in resolved:
            resolved[original] = copy
        elif not same_bytes(copy, resolved[original]):
            raise ValueError(
                f"In {what}, `{alias}` and `{original}` are tied by the configuration but their values differ. Correct the "
                "configuration (untied embeddings or projections), or the checkpoint."
            )
    return resolved


def rename_tensors(
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    what: str,
    shapes: Mapping[str, torch.Size] | None = None,
) -> StateDict:
    """Renames every tensor, and checks that none is missing, superfluous or of another shape.

    Args:
        state: source tensors.
        names: source name -> target name.
        what: description of the source, for error messages.
        shapes: target name -> expected shape.

    Raises:
        ValueError: the names or shapes do not match; the message lists them.
    """
    problems = []
    missing, unexpected = names.keys() - state.keys(), state.keys() - names.keys()
    if missing:
        problems.append(f"missing: {_listing(missing)}")
    if unexpected:
        problems.append(f"unexpected: {_listing(unexpected)}")
    for source, target in names.items():
        if shapes is not None and source in state and state[source].shape != shapes[target]:
            problems.append(f"`{source}` has shape {tuple(state[source].shape)}, expected {tuple(shapes[target])}")
    if problems:
        raise ValueError(
            f"The tensors of {what} do not match its configuration; {'; '.join(problems)}. Check that weights and "
            "configuration belong together."
        )
    return {target: state[source] for source, target in names.items()}


def tensors_from_official(
    state: Mapping[str, torch.Tensor], names: TensorNames, what: str, shapes: Mapping[str, torch.Size] | None = None
) -> StateDict:
    """Our state dict from the official state dict; tensors are shared, not copied."""
    kept = {name: tensor for name, tensor in state.items() if name not in names.constants}
    return rename_tensors(resolve_aliases(kept, names.aliases, what), names.ours, what, shapes)


def tensors_to_official(
    state: Mapping[str, torch.Tensor],
    names: TensorNames,
    what: str,
    shapes: Mapping[str, torch.Size] | None = None,
    *,
    with_copies: bool = True,
) -> StateDict:
    """The official state dict from ours, with the copies and constants of the official format if `with_copies`."""
    ours = resolve_aliases(state, names.our_aliases, what)
    official_names = {ours_name: official_name for official_name, ours_name in names.ours.items()}
    official_shapes = None if shapes is None else {name: shapes[target] for name, target in names.ours.items()}
    official = rename_tensors(ours, official_names, what, official_shapes)
    if with_copies:
        official |= {alias: official[original] for alias, original in names.aliases.items()}
        official |= {name: tensor.clone() for name, tensor in names.constants.items()}
    return official


# ---------------------------------------------------------------------------------------------------- configurations


def reason_of(error: BaseException) -> str:
    """The innermost message; that of a strict dataclass only says that a check failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def options_of(
    config: Any,
    base: Mapping[str, Any] | None,
    *,
    write: Callable[[Any], dict[str, Any]],
    read: Callable[[Mapping[str, Any]], Any],
    comparable: Callable[[Any], dict[str, Any]],
    name: str,
) -> dict[str, Any]:
    """Official options of a configuration, from which `read` restores it.

    Args:
        config: our configuration.
        base: official options to start from, so that options that only concern training are kept. If they already
            describe `config`, they are returned unchanged.
        write: function from a configuration to official options.
        read: function from official options to a configuration.
        comparable: function that selects the fields of a configuration that change the model.
        name: name of the architecture, for error messages.

    Raises:
        ValueError: a field has no counterpart in the official code; the message names it.
    """
    wanted = comparable(config)
    if base is not None and comparable(read(base)) == wanted:
        return dict(base)
    official = write(config)
    try:
        restored = comparable(read(official))
    except ValueError as error:
        raise ValueError(f"This configuration has no official form: {error}") from error
    for field_name, value in wanted.items():
        if field_name in restored and restored[field_name] != value:
            raise ValueError(
                f"`{field_name}={value!r}` has no counterpart in the official {name}, which has {restored[field_name]!r} there."
            )
    return dict(base or {}) | official


# ------------------------------------------------------------------------------------------------------------ files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The configuration file {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"The configuration file {path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"The configuration file {path} must contain a JSON object; got {type(value).__name__}.")
    return value


def _reason(error: Exception) -> str:
    """What `torch.load` stumbled over, without its advice to load the file as code."""
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"it refers to {found[1]}" if found else "it is no pickle of tensors"
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return first if first and "weights_only" not in first else type(error).__name__


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    """Contents of a .safetensors file, or of a pickle of tensors and plain values, which is read without executing code.

    Raises:
        ValueError: the file is missing, damaged, of an unknown kind, or contains other objects than tensors and plain
            values.
    """
    if not path.is_file():
        raise ValueError(f"The checkpoint file {path} does not exist.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The checkpoint file {path} is damaged or not a safetensors file: {error}.") from error
    if path.suffix not in _PICKLE_SUFFIXES:
        raise ValueError(
            f"The checkpoint file {path} has an unknown suffix; accepted are .safetensors, {', '.join(_PICKLE_SUFFIXES)}."
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on damaged input
        # Not chained: the text of torch advises to execute the file.
        raise ValueError(
            f"The checkpoint file {path} cannot be read as tensors and plain values (it is damaged, or contains other "
            f"objects, which are never executed): {_reason(error)}."
        ) from None
    if not isinstance(contents, Mapping):
        raise ValueError(f"The checkpoint file {path} must contain a dictionary; got {type(contents).__name__}.")
    return dict(contents)


def read_folder_tensors(folder: Path) -> StateDict:
    """Tensors of a Transformers-style folder, in one file or in shards with an index.

    Raises:
        ValueError: there is no weight file, a shard is missing, or a file is damaged.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return read_checkpoint_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            state: StateDict = {}
            for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
                state |= read_checkpoint_file(folder / shard)
            return state
    raise ValueError(f"The folder {folder} contains no weights: expected one of {', '.join(_WEIGHT_FILES)}.")

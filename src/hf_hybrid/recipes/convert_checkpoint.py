"""Convert official SPADE, Mega and SeqBoat checkpoints, and back.

The official code is that of arXiv 2212.08136, 2209.10655 and 2306.11197.

    python -m hf_hybrid.recipes.convert_checkpoint --model_name_or_path official/ --output_dir converted/
    python -m hf_hybrid.recipes.convert_checkpoint --model_name_or_path checkpoint_best.pt --output_dir converted/
    python -m hf_hybrid.recipes.convert_checkpoint --model_name_or_path converted/ --output_dir official/ --direction to_official

SPADE encoder-decoders are folders with `config.json` and `pytorch_model.bin` (or safetensors); SPADE language models
and all Mega and SeqBoat models are fairseq checkpoints. Both directions are lossless.
No code in official files is executed. The result is read again, converted back and compared bit by bit with the
source.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig

from ..auto import ARCHITECTURES, Architecture, find_architecture, load_config_class, load_converter
from ..conversion.common import StateDict, read_checkpoint_file, read_folder_tensors, read_json, same_bytes
from ..new_folder import new_folder
from .support.options import parse_arguments
from .support.runs import set_up_logging

logger = logging.getLogger(__name__)

OFFICIAL_CONFIG_FILE = "official_config.json"  # the official options, kept next to our configuration
FAIRSEQ_FILE = "checkpoint.pt"

_DIRECTIONS = ("from_official", "to_official")


@dataclass
class ConvertCheckpointArguments:
    """Arguments of the recipe."""

    model_name_or_path: str = field(
        metadata={"help": "Folder of a checkpoint, or a single .pt, .bin or .safetensors file."}
    )
    output_dir: str = field(metadata={"help": "Folder to write; it must be new or empty."})
    direction: str = field(default="from_official", metadata={"help": "from_official or to_official."})
    config_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with the official options, when the checkpoint does not contain them (from_official), or to start "
            "from (to_official). Default: the options found in the source."
        },
    )


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `--help` for the options.

    Args:
        args: command-line arguments, a mapping of options, or None for `sys.argv`.

    Returns:
        `model_type`, and the number of `tensors` and `parameters` written to `output_dir`.

    Raises:
        ValueError: the source cannot be read, is damaged, or has no counterpart in the other format.
        FileExistsError: the output folder is not empty.
    """
    (options,) = parse_arguments((ConvertCheckpointArguments,), args, __doc__)
    set_up_logging()
    if options.direction not in _DIRECTIONS:
        raise ValueError(f"`direction` must be one of {', '.join(_DIRECTIONS)}; got {options.direction!r}.")
    source, output = Path(options.model_name_or_path), Path(options.output_dir)
    if not source.exists():
        raise ValueError(f"`model_name_or_path` {source} does not exist.")
    convert = _from_official if options.direction == "from_official" else _to_official
    with new_folder(output, "output_dir") as scratch:
        config, state = convert(source, options.config_file and Path(options.config_file), scratch)
    result = {
        "model_type": config.model_type,
        "output_dir": str(output),
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
    }
    logger.info("Converted %d tensors (%s) to %s", result["tensors"], config.model_type, output)
    return result


# ---------------------------------------------------------------------------------------------------- from official


def _jsonable(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that JSON can hold."""
    kept = {}
    for name, value in options.items():
        try:
            kept[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            logger.info("The official option `%s` (%s) is not recorded.", name, type(value).__name__)
    return kept


def _fairseq_options(contents: Mapping[str, Any], what: Path) -> dict[str, Any] | None:
    """Options of a fairseq checkpoint: `args`, or the `model` group of `cfg`."""
    for options in (contents.get("args"), contents.get("cfg")):
        if isinstance(options, Mapping) and "model" in options:
            options = options["model"]
        if isinstance(options, argparse.Namespace):
            options = vars(options)
        if isinstance(options, Mapping):
            return dict(options)
        if options is not None:
            raise ValueError(
                f"The options of the fairseq checkpoint {what} are a {type(options).__name__}, not a dictionary."
            )
    return None


def _read_official(source: Path, config_file: Path | None) -> tuple[dict[str, Any], StateDict]:
    """Official options and tensors."""
    options: dict[str, Any] | None = None
    if source.is_dir():
        if config_file is None:
            options = read_json(source / "config.json")
        state: Mapping[str, Any] = read_folder_tensors(source)
    else:
        state = read_checkpoint_file(source)
        if isinstance(state.get("model"), Mapping):
            options, state = _fairseq_options(state, source), state["model"]
    if config_file is not None:
        options = read_json(config_file)
    if options is None:
        raise ValueError(f"{source} contains no configuration: pass the official options as `config_file`.")
    wrong = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if wrong or not state:
        raise ValueError(
            f"{source} contains no state dict: " + (f"`{wrong[0]}` is not a tensor." if wrong else "it is empty.")
        )
    return options, dict(state)


def _from_official(source: Path, config_file: Path | None, folder: Path) -> tuple[PreTrainedConfig, StateDict]:
    options, official = _read_official(source, config_file)
    converter = _converter_of(options)
    config = converter.config_from_official(options, vocab_size=converter.vocabulary_size(official))
    state = {
        name: tensor.contiguous() for name, tensor in converter.state_dict_from_official(official, config).items()
    }
    config.architectures = [converter.model_class(config).__name__]
    config.dtype = state[next(name for name in state if "embed" in name)].dtype
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_file(_unshared(state), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / OFFICIAL_CONFIG_FILE).write_text(json.dumps(_jsonable(options), indent=2, sort_keys=True) + "\n")

    written_config, written = _read_ours(folder)
    _compare(written, state)
    _compare_common(converter.state_dict_to_official(written, written_config), official)
    if converter.config_to_official(written_config, options) != options:
        raise ValueError("The configuration did not survive the conversion; this is a defect of the converter.")
    return config, state


def _converted() -> list[Architecture]:
    """The architectures with official checkpoints."""
    return [architecture for architecture in ARCHITECTURES if architecture.converter is not None]


def _converter_of(options: Mapping[str, Any]) -> Any:
    """The `conversion.common.Converter` of the architecture that official options belong to.

    Raises:
        ValueError: they match none.
    """
    for architecture in _converted():
        converter = load_converter(architecture)
        if converter.recognises(options):
            return converter
    raise ValueError(
        f"The official options match none of {', '.join(found.title for found in _converted())}; found "
        f"{sorted(options)[:20]}. Pass those of the checkpoint as `config_file`."
    )


def _unshared(state: StateDict) -> StateDict:
    """safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return separate


# ------------------------------------------------------------------------------------------------------ to official


def _read_ours(source: Path) -> tuple[PreTrainedConfig, StateDict]:
    """Configuration and tensors of a folder of this library."""
    if not source.is_dir():
        raise ValueError(f"`model_name_or_path` {source} must be a folder with `config.json` and weights.")
    fields = read_json(source / "config.json")
    architecture = find_architecture(fields.get("model_type"))
    if architecture is None or architecture.converter is None:
        accepted = ", ".join(repr(found.model_type) for found in _converted())
        raise ValueError(f"{source} holds a model of type {fields.get('model_type')!r}; accepted are {accepted}.")
    config_class: Any = load_config_class(architecture)
    try:
        config = config_class.from_dict(fields)
    except StrictDataclassError as error:
        raise ValueError(f"The configuration in {source} is invalid: {error.__cause__ or error}") from error
    return config, read_folder_tensors(source)


def _to_official(source: Path, config_file: Path | None, folder: Path) -> tuple[PreTrainedConfig, StateDict]:
    config, state = _read_ours(source)
    architecture: Any = find_architecture(config.model_type)
    converter = load_converter(architecture)
    base_file = config_file or source / OFFICIAL_CONFIG_FILE
    base = read_json(base_file) if config_file or base_file.is_file() else None
    options = converter.config_to_official(config, base)
    official = converter.state_dict_to_official(state, config)
    if converter.is_fairseq(config):
        contents = {
            "args": argparse.Namespace(**options),
            "model": official,
            "optimizer_history": [],
            "extra_state": {},
        }
        torch.save(contents, folder / FAIRSEQ_FILE)
        written_options, written = _read_official(folder / FAIRSEQ_FILE, None)
    else:
        (folder / "config.json").write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")
        torch.save(official, folder / "pytorch_model.bin")
        written_options, written = _read_official(folder, None)
    _compare(written, official)
    _compare_common(converter.state_dict_from_official(written, config), state)
    if written_options != options:
        raise ValueError("The configuration did not survive the conversion; this is a defect of the converter.")
    return config, official


# ----------------------------------------------------------------------------------------------------- verification


def _compare(written: StateDict, expected: StateDict) -> None:
    """Raises OSError when the written files, read again, differ from the converted tensors."""
    differing = written.keys() ^ expected.keys()
    differing |= {name for name in written.keys() & expected.keys() if not same_bytes(written[name], expected[name])}
    if differing:
        raise OSError(
            f"The written files differ from the converted tensors at `{min(differing)}` (and {len(differing) - 1} more): the "
            "disk is full or faulty."
        )


def _compare_common(converted_back: StateDict, source: StateDict) -> None:
    """Raises ValueError when a tensor of the source is not restored exactly (version marks aside)."""
    for name, tensor in source.items():
        is_mark = name.endswith(("version", "_float_tensor"))
        if name in converted_back and not is_mark and not same_bytes(converted_back[name], tensor):
            raise ValueError(f"`{name}` did not survive the conversion; this is a defect of the converter.")


if __name__ == "__main__":
    main()

"""Export a checkpoint to torch.export, ONNX or 8-bit weights.

The formats run without model code: a program of torch.export, a decoding step, ONNX; or hold 8-bit weights.

    python -m hf_hybrid.recipes.export_model --model_name_or_path runs/classifier --format onnx --output_dir exported/
    python -m hf_hybrid.recipes.export_model --model_name_or_path runs/lm --format decoding_step --output_dir exported/

The new folder holds the model, its configuration and its tokenizer. The exported model is first compared with the
checkpoint, at other batch sizes and lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..auto import ARCHITECTURES
from ..export import Export, export_decoding_step, export_int8, export_onnx, export_program
from .support.options import parse_arguments
from .support.runs import set_up_logging

logger = logging.getLogger(__name__)

FORMATS: dict[str, Callable[..., Export]] = {
    "program": export_program,
    "decoding_step": export_decoding_step,
    "onnx": export_onnx,
    "int8": export_int8,
}


@dataclass
class ExportModelArguments:
    """Arguments of the recipe."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint to export."})
    output_dir: str = field(metadata={"help": "Folder to write; it must be new or empty."})
    format: str = field(default="program", metadata={"help": f"One of {', '.join(FORMATS)}."})
    head: str | None = field(
        default=None,
        metadata={
            "help": "Auto class of the head, for example AutoModelForSequenceClassification. Default: the head it was "
            "saved with."
        },
    )


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `--help` for the options.

    Args:
        args: command-line arguments, a mapping of options, or None for `sys.argv`.

    Returns:
        `path` of the exported model and `max_error`, its largest difference from the checkpoint.

    Raises:
        ValueError: an unknown format or head, or one that the checkpoint cannot be exported in.
        FileExistsError: the output folder is not empty.
        ImportError: a package that the format needs is missing.
        RuntimeError: the exported model differs from the checkpoint.
    """
    (options,) = parse_arguments((ExportModelArguments,), args, __doc__)
    set_up_logging()
    if options.format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}; got {options.format!r}.")
    model = _load(options.model_name_or_path, options.head)
    tokenizer = _tokenizer(options.model_name_or_path)
    written = FORMATS[options.format](model, options.output_dir, tokenizer=tokenizer)
    logger.info("Wrote %s, which differs from the checkpoint by %.1e at most", written.path, written.max_error)
    return {"path": str(written.path), "max_error": written.max_error}


def _load(name: str, head: str | None) -> PreTrainedModel:
    """The checkpoint in evaluation mode, with the head it was saved with unless another is requested."""
    known = {auto: cls for architecture in ARCHITECTURES for auto, cls in architecture.heads.items()}
    if head is not None and head not in known:
        raise ValueError(f"`head` must be one of {', '.join(known)}; got {head!r}.")
    if head is None:
        config = AutoConfig.from_pretrained(name)
        saved = (config.architectures or [None])[0]
        found = [
            auto
            for architecture in ARCHITECTURES
            if architecture.model_type == config.model_type
            for auto, cls in architecture.heads.items()
            if cls == saved
        ]
        if not found:
            raise ValueError(
                f"{name} does not say which head it was saved with: pass `head`, one of {', '.join(known)}."
            )
        head = found[0]
    return getattr(transformers, head).from_pretrained(name).eval()


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, if it has one."""
    if Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").exists():
        return None
    return AutoTokenizer.from_pretrained(name)


if __name__ == "__main__":
    main()

"""Merge a LoRA adapter into its base checkpoint.

The result is an ordinary checkpoint.

    python -m hf_hybrid.recipes.merge_adapter --model_name_or_path runs/sst2-lora --output_dir runs/sst2-merged

The tokenizer, image processor and feature extractor in the adapter's folder are copied. The weights of the merged
checkpoint are W + (alpha / r) B A, rounded to the data type of the checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.adapters import ADAPTED_CONFIG_FILE, adapted_config, adapter_folder, architecture_auto_class, base_name
from ..training.run_folder import RunFolder
from .support.models import load_model
from .support.options import parse_arguments, resolved_arguments
from .support.runs import set_up_logging

logger = logging.getLogger(__name__)

_PROCESSING_FILES = ("token*.json", "*.model", "special_tokens_map.json", "chat_template*", "*processor*.json")


@dataclass
class MergeArguments:
    """The adapter and the output folder."""

    model_name_or_path: str = field(metadata={"help": "Folder of the adapter, or its Hub name."})
    output_dir: str = field(metadata={"help": "Folder to write; it must be new or empty."})


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Merge and save.

    Args:
        args: see `parse_arguments`.

    Returns:
        `architecture`, `base_model` and `num_parameters` of the merged checkpoint.

    Raises:
        ValueError: this is not an adapter, or its base checkpoint is missing or a different model.
        FileExistsError: the output folder is not empty.
    """
    (arguments,) = parse_arguments((MergeArguments,), args, __doc__)
    set_up_logging()
    folder = RunFolder(arguments.output_dir)
    source = adapter_folder(arguments.model_name_or_path)
    if source is None:
        raise ValueError(
            f"`model_name_or_path` {arguments.model_name_or_path!r} has no adapter_config.json: pass the folder of a "
            "run with LoRA."
        )
    if not (source / ADAPTED_CONFIG_FILE).is_file():
        raise ValueError(
            f"{source} has no {ADAPTED_CONFIG_FILE}, which names the class of its model: merge it in Python, with "
            "`PeftModel.from_pretrained(model, folder).merge_and_unload()`."
        )
    model = load_model(architecture_auto_class(adapted_config(source)), arguments.model_name_or_path)
    with folder.recording(resolved_arguments(arguments)):
        model.save_pretrained(folder.path)
        for pattern in _PROCESSING_FILES:
            for path in sorted(Path(source).glob(pattern)):
                shutil.copy(path, folder.path / path.name)
    logger.info("The merged model is in %s", folder.path)
    return {
        "architecture": type(model).__name__,
        "base_model": base_name(source),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


if __name__ == "__main__":
    main()

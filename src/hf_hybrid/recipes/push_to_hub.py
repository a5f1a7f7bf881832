"""Push a checkpoint with its code to the Hub, or write it to a folder.

    python -m hf_hybrid.recipes.push_to_hub --model_name_or_path runs/summaries --repo_id me/summaries --license apache-2.0
    python -m hf_hybrid.recipes.push_to_hub --model_name_or_path runs/summaries --output_dir export
    python -m hf_hybrid.recipes.push_to_hub --model_name_or_path runs/summaries --repo_id me/summaries --remote_code False --private True

With its code a checkpoint loads without this package, with `trust_remote_code=True`. Pushing needs an access token of
the Hub: run `hf auth login` once, or set HF_TOKEN. Writing a folder needs no network.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedModel

from ..app.space import write_space
from ..auto import ARCHITECTURES, image_processor_class, load_heads
from ..hub import (
    CARD_FILE,
    MANIFEST_FILE,
    card_of_model,
    export_remote_code,
    log_in,
    push_folder,
    push_space,
    save_checkpoint,
    verify_export,
    with_metadata,
)
from ..new_folder import new_folder
from .support.models import load_model
from .support.options import parse_arguments, split_names
from .support.runs import set_up_logging

logger = logging.getLogger(__name__)


@dataclass
class PushToHubArguments:
    """Arguments of the recipe."""

    model_name_or_path: str = field(metadata={"help": "Folder of a checkpoint, with its tokenizer or processor."})
    repo_id: str | None = field(
        default=None, metadata={"help": "Repository to push to, name or owner/name; it is created if needed."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Write the files to this folder; it must be new or empty."}
    )
    remote_code: bool = field(default=True, metadata={"help": "Include the code, so that no package is needed."})
    card: str | None = field(
        default=None, metadata={"help": "File of the model card. Default: README.md of the source, or a draft."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, e.g. apache-2.0."})
    language: list[str] | None = field(default=None, metadata={"help": "Languages of the training text, e.g. en."})
    space: bool = field(
        default=False,
        metadata={
            "help": "Also share a page to try the model, a Space: `repo_id`-space on the Hub, `output_dir`-space as a folder."
        },
    )
    private: bool | None = field(default=None, metadata={"help": "Create a private repository."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the files in the repository."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest size of one weight file."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the stored weights, e.g. bfloat16 for half the size. They are loaded in the precision of the "
            "checkpoint. Default: the same.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `--help` for the options.

    Args:
        args: command-line arguments, a mapping of options, or None for `sys.argv`.

    Returns:
        `model_type`, `architecture`, the number of `files`, and, where they apply, the `url`, the `output_dir` and the
        `digest` that identifies all files of an export; `space_dir` and `space_url` of its page.

    Raises:
        ValueError: the source is not a checkpoint of this library, the card is not valid, or there is no token.
        FileExistsError: the output folder is not empty, or the repository holds other files.
        PermissionError: the Hub rejects the token.
    """
    (options,) = parse_arguments((PushToHubArguments,), args, __doc__)
    set_up_logging()
    if options.repo_id is None and options.output_dir is None:
        raise ValueError("Pass `repo_id` to push the checkpoint, `output_dir` to write a folder, or both.")
    if options.repo_id is not None:
        _, options.repo_id = log_in(options.repo_id)  # fail before the work
    page = Path(f"{options.output_dir}-space")
    if options.space and options.output_dir is not None and page.exists():
        raise FileExistsError(f"The folder of the Space, {page}, exists. Remove it, or choose another `output_dir`.")
    with tempfile.TemporaryDirectory(prefix="hf_hybrid-push-") as temporary:
        folder = Path(options.output_dir or Path(temporary) / "model")
        model = _write(options, folder)
        result: dict[str, Any] = {
            "model_type": model.config.model_type,
            "architecture": type(model).__name__,
            "files": sum(path.is_file() for path in folder.iterdir()),
        }
        if (folder / MANIFEST_FILE).is_file():
            result["digest"] = verify_export(folder)
        if options.output_dir is not None:
            result["output_dir"] = str(folder)
        if options.repo_id is not None:
            result["url"] = push_folder(
                folder,
                options.repo_id,
                private=options.private,
                overwrite=options.overwrite,
                commit_message=options.commit_message,
            )
        if options.space:
            result |= _share_space(options, folder, Path(temporary))
    for name, value in result.items():
        logger.info("%s = %s", name, value)
    return result


def _share_space(options: PushToHubArguments, model_folder: Path, temporary: Path) -> dict[str, str]:
    """Writes or pushes a page for the model, or both. It loads the model from the Hub where that has it, else it holds a copy."""
    title = (options.repo_id or Path(str(options.output_dir)).name).rpartition("/")[2]
    source: dict[str, Any] = {"repo_id": options.repo_id} if options.repo_id else {"model_folder": model_folder}
    target = Path(f"{options.output_dir}-space") if options.output_dir else temporary / "space"
    write_space(target, title=title, license=options.license, **source)
    found = {"space_dir": str(target)} if options.output_dir else {}
    if options.repo_id is not None:
        found["space_url"] = push_space(
            target,
            f"{options.repo_id}-space",
            private=options.private,
            overwrite=options.overwrite,
            commit_message=options.commit_message,
        )
    return found


def _write(options: PushToHubArguments, folder: Path) -> PreTrainedModel:
    """Writes everything that is shared."""
    source = Path(options.model_name_or_path)
    model = load_own_model(source)
    tokenizer, processor = _load_inputs(source)
    card = _card(options, source, model)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    parts: dict[str, Any] = {
        "processor": processor,
        "card": card,
        "max_shard_size": options.max_shard_size,
        "dtype": dtype,
    }
    if options.remote_code:
        export_remote_code(model, folder, tokenizer, **parts)
    else:
        with new_folder(folder, "output_dir") as scratch:
            save_checkpoint(model, scratch, tokenizer, **parts)
    return model


def load_own_model(source: Path) -> PreTrainedModel:
    """Loads a checkpoint as the class that its configuration names.

    Raises:
        ValueError: the folder has no checkpoint, or its model is not one of this library.
    """
    if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
        raise ValueError(
            f"`model_name_or_path` {source} holds an adapter without its base checkpoint: merge it into a checkpoint "
            "first (python -m hf_hybrid.recipes.merge_adapter)."
        )
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`model_name_or_path` {source} is not a checkpoint folder: config.json: {error}.") from error
    model_type, named = config.get("model_type"), (config.get("architectures") or [None])[0]
    architecture = next((found for found in ARCHITECTURES if found.model_type == model_type), None)
    if architecture is None:
        accepted = ", ".join(found.model_type for found in ARCHITECTURES)
        raise ValueError(
            f"`model_name_or_path` {source} holds a model of the type {model_type!r}; accepted are {accepted}."
        )
    classes = {model_class.__name__: model_class for _, model_class in load_heads(architecture)}
    if named not in classes:
        raise ValueError(
            f"config.json of `model_name_or_path` {source} names the class {named!r}; accepted are {', '.join(classes)}."
        )
    return load_model(classes[named], str(source))


def _load_inputs(source: Path) -> tuple[Any, Any]:
    """Tokenizer and processor of a checkpoint, where it has them."""
    tokenizer = AutoTokenizer.from_pretrained(source) if (source / "tokenizer_config.json").is_file() else None
    settings = source / "preprocessor_config.json"
    if not settings.is_file():
        return tokenizer, None
    is_image = "image_processor_type" in json.loads(settings.read_text(encoding="utf-8"))
    return tokenizer, (image_processor_class() if is_image else AutoFeatureExtractor).from_pretrained(source)


def _card(options: PushToHubArguments, source: Path, model: PreTrainedModel) -> str:
    path = Path(options.card) if options.card else source / CARD_FILE
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif options.card:
        raise ValueError(f"`card` {path} is not a file.")
    else:
        text = card_of_model(model).render()
    changes = {"license": options.license, "language": split_names(options.language) or None}
    return with_metadata(text, {name: value for name, value in changes.items() if value is not None})


if __name__ == "__main__":
    main()

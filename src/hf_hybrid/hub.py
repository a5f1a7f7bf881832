"""Sharing models: write them with their code, push them to the Hub, describe them.

What users need is here; the flat source files are made in `remote_code`, the cards in `model_card`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .model_card import (
    CARD_FILE,
    UNKNOWN,
    EvaluationResult,
    ModelCard,
    card_of_model,
    check_model_card,
    model_card_problems,
    with_metadata,
    write_model_card,
)
from .remote_code import (
    MANIFEST_FILE,
    architecture_of,
    export_remote_code,
    file_digest,
    save_checkpoint,
    verify_export,
)

logger = logging.getLogger(__name__)

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")  # states of training, and files that run code when they are read

__all__ = [
    "CARD_FILE",
    "MANIFEST_FILE",
    "UNKNOWN",
    "EvaluationResult",
    "ModelCard",
    "architecture_of",
    "card_of_model",
    "check_model_card",
    "export_remote_code",
    "log_in",
    "model_card_problems",
    "push",
    "push_folder",
    "save_checkpoint",
    "verify_export",
    "with_metadata",
    "write_model_card",
]


def push(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    processor: Any | None = None,
    card: ModelCard | str | None = None,
    remote_code: bool = True,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    max_shard_size: int | str = "5GB",
) -> str:
    """Pushes a model to the Hub: weights, configurations, tokenizer, processor, card, and the code to load it.

    All files arrive in one commit, so that nobody ever sees a part of them.

    Args:
        model: any model of this package.
        repo_id: "name" or "owner/name"; it is created when it does not exist.
        tokenizer, processor: saved with the model.
        card: the README.md, or what it says; None drafts one from the model.
        remote_code: include the source files, so that the model loads without this package.
        private: visibility of a repository that is created; None leaves it to the Hub.
        overwrite: replace what the repository holds, in the same commit.
        token: access token of the Hub; None takes the one of `hf auth login` or `HF_TOKEN`.
        commit_message: None says what is uploaded.
        max_shard_size: largest size of a weight file.

    Returns:
        The address of the repository.

    Raises:
        ValueError: no token, no valid name, no valid card, or no model of this package.
        PermissionError: the Hub refuses the token.
        FileExistsError: the repository holds other files and `overwrite` is False.
    """
    architecture_of(model)
    api, repo_id = log_in(repo_id, token)
    with tempfile.TemporaryDirectory(prefix="hf_hybrid-push-") as temporary:
        folder = Path(temporary) / "model"
        parts: dict[str, Any] = {"processor": processor, "card": card, "max_shard_size": max_shard_size}
        if remote_code:
            export_remote_code(model, folder, tokenizer, **parts)
        else:
            save_checkpoint(model, folder, tokenizer, **parts)
        message = commit_message or f"Upload {type(model).__name__}"
        return _upload(api, folder, repo_id, private=private, overwrite=overwrite, message=message)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Pushes a folder that `export_remote_code` or `save_checkpoint` wrote; options and errors as in `push`.

    Raises:
        ValueError: also when the folder differs from its manifest, or is none that these functions wrote.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: config.json is missing.")
    entries = [path for path in folder.iterdir() if path.name not in (".cache", ".git")]
    foreign = sorted(path.name for path in entries if path.is_dir() or path.suffix in _PICKLES)
    if foreign:
        raise ValueError(
            f"{folder} holds {', '.join(foreign)}, which do not belong to a shared model. The recipe push_to_hub takes the "
            "model out of the folder of a run."
        )
    if (folder / MANIFEST_FILE).is_file():
        verify_export(folder)
    api, repo_id = log_in(repo_id, token)
    message = commit_message or "Upload model"
    return _upload(api, folder, repo_id, private=private, overwrite=overwrite, message=message)


def log_in(repo_id: str, token: str | None = None) -> tuple[HfApi, str]:
    """A client with a token, and the full name of the repository.

    Raises:
        ValueError: there is no token, or no valid name.
        PermissionError: the Hub refuses the token (asked only for a name without owner).
    """
    token = token or get_token()
    if not token:
        raise ValueError(
            "Pushing needs a token of the Hub and there is none: run `hf auth login`, set the environment variable "
            "HF_TOKEN, or pass `token`."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` {repo_id!r} is not a valid repository name: {error}") from error
    api = HfApi(token=token, library_name="hf_hybrid")
    if "/" not in repo_id:
        repo_id = f"{_checked(api.whoami, 'log in')['name']}/{repo_id}"
    return api, repo_id


def _checked(call: Any, doing: str, *args: Any, **kwargs: Any) -> Any:
    """Calls the Hub; a refused token becomes a PermissionError that says what to do."""
    try:
        return call(*args, **kwargs)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub refused to {doing}: the token is not valid or may not write there. Log in again with "
                f"`hf auth login`, or set HF_TOKEN to a token with write access. ({error})"
            ) from error
        raise


def _upload(api: HfApi, folder: Path, repo_id: str, *, private: bool | None, overwrite: bool, message: str) -> str:
    url = str(_checked(api.create_repo, f"create {repo_id}", repo_id, private=private, exist_ok=True))
    # What was looked at is named as the parent of the commit: a change in between is refused by the Hub.
    parent = api.model_info(repo_id).sha
    tree = api.list_repo_tree(repo_id, recursive=True, revision=parent)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile) and entry.path != ".gitattributes"}
    differing = _differing(folder, there)
    if not differing:
        logger.info("%s already holds these files.", url)
        return url
    if there and not overwrite:
        raise FileExistsError(
            f"The repository {repo_id} exists and holds other files ({', '.join(differing[:5])}"
            f"{' …' if len(differing) > 5 else ''}). Choose another name, or replace them with `overwrite=True`."
        )
    _checked(
        api.upload_folder,
        f"write to {repo_id}",
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        delete_patterns="*" if there else None,
        parent_commit=parent,
    )
    logger.info("Pushed %s", url)
    return url


def _differing(folder: Path, there: Mapping[str, RepoFile]) -> list[str]:
    """Names of files that a folder and a repository do not have alike, by the hashes that the Hub tells."""
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    differing = set(here) ^ set(there)
    for name in here.keys() & there.keys():
        path, entry = here[name], there[name]
        same = (
            file_digest(path) == entry.lfs.sha256
            if entry.lfs is not None
            else git_hash(path.read_bytes()) == entry.blob_id
        )
        if not same:
            differing.add(name)
    return sorted(differing)

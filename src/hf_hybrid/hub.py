"""Sharing models: writes them with their code and pushes them to the Hub.

The public functions are here; `remote_code` generates the flat source files, `model_card` the cards.
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
from .published import write_published
from .remote_code import (
    MANIFEST_FILE,
    architecture_of,
    export_remote_code,
    file_digest,
    files_of,
    save_checkpoint,
    verify_export,
    write_manifest,
)

logger = logging.getLogger(__name__)

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")  # training states, and files that can run code when loaded

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
    "push_space",
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

    All files are uploaded in one commit, so that nobody ever sees a partial upload.

    Args:
        model: any model of this package.
        repo_id: "name" or "owner/name"; the repository is created when it does not exist.
        tokenizer, processor: tokenizer and processor saved with the model.
        card: text of the README.md, or a `ModelCard`; None drafts one from the model.
        remote_code: include the source files, so that the model loads without this package.
        private: visibility of a repository that is created; None leaves it to the Hub.
        overwrite: replace the files in the repository, in the same commit.
        token: access token of the Hub; None uses the one stored by `hf auth login` or in `HF_TOKEN`.
        commit_message: message of the commit; None generates one.
        max_shard_size: largest size of a weight file.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: there is no token, the name or the card is not valid, or the model is not one of this package.
        PermissionError: the Hub rejects the token.
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
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Pushes a folder that `export_remote_code` or `save_checkpoint` wrote; options and errors as in `push`.

    Raises:
        ValueError: also when the folder differs from its manifest, or was not written by these functions.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: config.json is missing.")
    entries = [path for path in folder.iterdir() if path.name not in (".cache", ".git")]
    foreign = sorted(path.name for path in entries if path.is_dir() or path.suffix in _PICKLES)
    if foreign:
        raise ValueError(
            f"{folder} holds {', '.join(foreign)}, which do not belong to a shared model. The recipe push_to_hub "
            "shares only the model of a run folder."
        )
    listed: list[str] = []
    if (folder / MANIFEST_FILE).is_file():
        verify_export(folder)
        listed = files_of(folder)
    api, repo_id = log_in(repo_id, token)
    message = commit_message or "Upload model"
    beside = folder.resolve().parent
    with tempfile.TemporaryDirectory(prefix=".push-", dir=beside if os.access(beside, os.W_OK) else None) as copy:
        written = write_published(folder, Path(copy), further=listed)
        if written.left:
            logger.warning("%s stay here: they do not belong to a shared model.", ", ".join(written.left))
        if listed and set(written.changed) - {CARD_FILE}:
            write_manifest(copy)
        return _upload(api, Path(copy), repo_id, private=private, overwrite=overwrite, message=message)


def push_space(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Pushes the folder of a Space, in one commit; options, result and errors as in `push`.

    Raises:
        ValueError: also when the folder has no `app.py`.
    """
    folder = Path(folder)
    if not (folder / "app.py").is_file():
        raise ValueError(f"{folder} is not a Space: app.py is missing.")
    api, repo_id = log_in(repo_id, token)
    with tempfile.TemporaryDirectory(prefix="hf_hybrid-push-") as temporary:
        copy = Path(temporary) / "space"
        written = write_published(folder, copy, space=True)
        if written.left:
            logger.warning("%s stay here: they do not belong to a Space.", ", ".join(written.left))
        message = commit_message or "Upload page"
        return _upload(api, copy, repo_id, private=private, overwrite=overwrite, message=message, repo_type="space")


def log_in(repo_id: str, token: str | None = None) -> tuple[HfApi, str]:
    """A client with a token, and the full name of the repository.

    Raises:
        ValueError: there is no token, or the name is not valid.
        PermissionError: the Hub rejects the token (checked only for a name without an owner).
    """
    token = token or get_token()
    if not token:
        raise ValueError(
            "Pushing needs an access token of the Hub, and none was found: run `hf auth login`, set the environment "
            "variable HF_TOKEN, or pass `token`."
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
    """Calls the Hub; turns a rejected token into a PermissionError that says what to do."""
    try:
        return call(*args, **kwargs)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub refused to {doing}: the token is not valid or may not write there. Log in again with "
                f"`hf auth login`, or set HF_TOKEN to a token with write access. ({error})"
            ) from error
        raise


def _upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    overwrite: bool,
    message: str,
    repo_type: str = "model",
) -> str:
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    where: dict[str, Any] = {"repo_type": repo_type}
    url = str(_checked(api.create_repo, f"create {repo_id}", repo_id, private=private, exist_ok=True, **where, **sdk))
    # The revision just inspected is the parent of the commit, so the Hub rejects the commit if anything changed since.
    parent = api.repo_info(repo_id, **where).sha
    tree = api.list_repo_tree(repo_id, recursive=True, revision=parent, **where)
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
        **where,
    )
    logger.info("Pushed %s", url)
    return url


def _differing(folder: Path, there: Mapping[str, RepoFile]) -> list[str]:
    """Names of files that differ between a folder and a repository, by the hashes that the Hub reports."""
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

"""Folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_new_folder(path: str | os.PathLike[str], argument: str = "folder") -> None:
    """Checks that a folder can be created.

    Raises:
        FileExistsError: `path` is a file or a link, or a folder that is not empty; the message calls it `argument`.
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FileExistsError(
            f"`{argument}` {target} exists and is not an empty folder. Choose a new one, or empty it."
        )


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], argument: str = "folder") -> Iterator[Path]:
    """A temporary folder that is renamed to `path` if everything succeeds, and removed otherwise.

    It has the same parent as `path`, so that a single rename suffices.

    Args:
        path: folder to create; it must not exist, or be empty.
        argument: name of the option that gave `path`, for the error message.

    Raises:
        FileExistsError: see `check_new_folder`.
    """
    check_new_folder(path, argument)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if target.exists():
            target.rmdir()
        scratch.replace(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise

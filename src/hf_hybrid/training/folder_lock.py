"""A lock on a folder that its process cannot leave behind: the operating system gives it up when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "_lock"  # Trainer never pushes what begins with `_`
_held: set[int] = set()


def _close_in_child() -> None:
    # A forked worker of a data loader would keep the lock of its killed parent.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class FolderLock:
    """Exclusive use of a folder by one process, until `release` or the end of the process.

    Args:
        folder: an existing folder.

    Raises:
        BlockingIOError: another run uses it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._descriptor: int | None = None
        if fcntl is None:
            return
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file may have been removed by its former holder in between.
                current = os.path.exists(self._path) and os.path.samestat(os.stat(self._path), os.fstat(descriptor))
            except BlockingIOError as error:
                owner = os.pread(descriptor, 64, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise BlockingIOError(
                    error.errno,
                    f"`output_dir` {folder} is in use by another run ({owner or 'unknown process'}). Wait for it or stop it, or "
                    "choose another folder.",
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            if current:
                break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        _held.add(descriptor)

    def release(self) -> None:
        """Give the folder free and remove the file of the lock."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

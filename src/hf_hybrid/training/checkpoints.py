"""Checkpoints that are either whole or not there: written beside, read back, and then renamed.

A checkpoint is written into `_saving/` of its run. Once every process has written its part, the sizes and SHA-256 of all files go
into `checkpoint_manifest.json`, and the folder gets its name. Whatever interrupts this leaves the older checkpoints as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

CHECKPOINT_MANIFEST_FILE = "checkpoint_manifest.json"
STAGING_FOLDER = "_saving"
OPTIMIZER_FOLDER = "optimizer"  # of a sharded run: the shards of its optimizer
PUBLISHING_FOLDER = "_publishing"  # clean copies on their way to the Hub, hard links where possible


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; older ones are as they were."""


def list_checkpoints(run: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, the newest step first."""
    steps = [(int(path.name[11:]), path) for path in run.glob("checkpoint-*") if path.name[11:].isdigit()]
    return [path for _, path in sorted(steps, reverse=True)]


def publish_checkpoint(staged: Path, final: Path) -> None:
    """Gives a written checkpoint its manifest and its name.

    Args:
        staged: folder with all files of the checkpoint, on the same file system as `final`.
        final: its place; a checkpoint that stands there is replaced.

    Raises:
        ValueError: a file of weights cannot be read back.
        OSError: the manifest or the name cannot be written.
    """
    for path in sorted(staged.rglob("*.safetensors")):
        check_safetensors(path)
    files = {}
    for path in sorted(item for item in staged.rglob("*") if item.is_file()):
        files[path.relative_to(staged).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path, sync=True)}
    manifest = staged / CHECKPOINT_MANIFEST_FILE
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    _digest(manifest, sync=True)
    _sync_folder(staged)
    if final.exists():  # a damaged one that was passed over, or that of an abandoned continuation
        remove_checkpoint(final)
    os.rename(staged, final)
    _sync_folder(final.parent)


def amend_manifest(folder: Path, changed: Iterable[str]) -> None:
    """Adapts the manifest of a copy of a checkpoint, if it has one, to files that were left out or changed on purpose.

    Args:
        folder: the copy.
        changed: names of the changed files.
    """
    manifest = folder / CHECKPOINT_MANIFEST_FILE
    if not manifest.is_file():
        return
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    files = {name: entry for name, entry in files.items() if (folder / name).is_file()}
    for name in set(changed) & files.keys():
        files[name] = {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def damages(folder: Path) -> list[str] | None:
    """What differs from the manifest of a checkpoint: one phrase for each file; None if there is no manifest."""
    try:
        files = json.loads((folder / CHECKPOINT_MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{CHECKPOINT_MANIFEST_FILE} is corrupt: {error}"]
    found = []
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} is corrupt: {path.stat().st_size} bytes, {size} were written")
        elif _digest(path) != digest:
            found.append(f"{name} is corrupt: its bytes are not those that were written")
    return found


def rotate_checkpoints(run: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Removes the oldest checkpoints beyond a number.

    Args:
        run: folder of the run.
        limit: number to keep; None or 0 for all.
        newest: checkpoint just written, which stays.
        best: path of the best checkpoint, which stays.
    """
    if not limit or limit < 0:
        return
    kept = {newest.resolve()} | ({Path(best).resolve()} if best is not None else set())
    present = list_checkpoints(run)
    # Later steps than the newest were passed over, or belong to a continuation that was abandoned: they go first.
    step = int(newest.name[11:])
    removable = sorted(
        (path for path in present if path.resolve() not in kept),
        key=lambda path: (int(path.name[11:]) < step, int(path.name[11:])),
    )
    surplus = len(present) - max(limit, len(kept))
    for path in removable[: max(surplus, 0)]:
        with contextlib.suppress(OSError):
            remove_checkpoint(path)


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; one that is half removed is never seen."""
    trash = folder.parent / STAGING_FOLDER / f"removed-{folder.name}"
    trash.parent.mkdir(exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(OSError):
        trash.parent.rmdir()


def last_good_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that is as it was written; None if there is none."""
    return next((path for path in list_checkpoints(run) if damages(path) == []), None)


@contextlib.contextmanager
def reporting_write_errors(run: Path, what: str) -> Iterator[None]:
    """Says where a failed write leaves the run.

    Args:
        run: folder of the run.
        what: could not be written, e.g. "The checkpoint of step 8".

    Raises:
        CheckpointWriteError: names the folder, the cause and the last good checkpoint.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        shutil.rmtree(run / STAGING_FOLDER, ignore_errors=True)  # a full disk needs the room
        good = last_good_checkpoint(run)
        if good is None:
            rest = "There is no earlier checkpoint of this run."
        else:
            rest = f"The last good checkpoint is {good}. Continue with `--resume_from_checkpoint last` once the cause is removed."
        cause = "the folder is gone" if not run.is_dir() else f"{type(error).__name__}: {error}"
        raise CheckpointWriteError(f"{what} could not be written to {run} ({cause}). {rest}") from error


def check_safetensors(path: Path) -> None:
    """Refuses a file of weights that is missing, or whose header and size do not fit together.

    Raises:
        ValueError: names the file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path.parent} is not a complete checkpoint: {path.name} is missing.")
    try:
        with safe_open(str(path), framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The checkpoint file {path} is corrupt or truncated ({error}). Copy it again, or use another checkpoint."
        ) from error


def _digest(path: Path, *, sync: bool = False) -> str:
    """SHA-256 of a file; with `sync` it is on the disk afterwards."""
    if sync:
        with path.open("r+b") as stream:
            os.fsync(stream.fileno())
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

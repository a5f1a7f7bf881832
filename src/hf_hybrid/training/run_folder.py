"""The output folder of a run: when it may be written, and the records that every run writes to it.

A run writes the checkpoint and its tokenizer, `arguments.json` (every resolved option), `environment.json` (versions,
hardware, git revision, command), `metrics.json`, `loss_curve.png` and a model card `README.md`. A folder that is not
empty is rejected unless the run resumes, so that no result is ever overwritten. Only the main process of a distributed
run writes.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .checkpoints import (
    CHECKPOINT_MANIFEST_FILE,
    STAGING_FOLDER,
    check_safetensors,
    damages,
    list_checkpoints,
)
from .folder_lock import LOCK_FILE, FolderLock

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "arguments.json"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.json"
LOSS_CURVE_FILE = "loss_curve.png"
CODEBOOK_FILE = "codebooks.png"
ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

RECORDED_PACKAGES = (
    "hf_hybrid",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "peft",
    "numpy",
)

# Options that may differ between a run and its continuation without changing what is trained.
_FREE_ON_RESUME = frozenset(
    "resume_from_checkpoint max_steps num_train_epochs max_minutes logging_steps save_steps save_total_limit eval_steps "
    "eval_strategy save_strategy disable_tqdm report_to run_name local_rank dataloader_num_workers log_level "
    "per_device_eval_batch_size output_dir".split()
)


def is_main_process() -> bool:
    """True in the only process of a distributed run that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


class RunFolder:
    """The output folder of one run, its rules and records.

    Args:
        path: the output folder; it is created when the first record is written.
        resume: None (a new run), `"last"` or `"true"` (the newest complete checkpoint of the folder), `"auto"` (the same if there are
            checkpoints, else a new run), or the path of a checkpoint folder.

    Raises:
        FileExistsError: the folder is not empty and the run does not resume.
        ValueError: the path is a file, or the checkpoint to resume from is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike, resume: str | bool | None = None) -> None:
        self.path = Path(path)
        self._is_auto = str(resume).lower() == "auto"
        self._present = list_checkpoints(self.path)
        self.resume_checkpoint = self._find_checkpoint(resume)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`output_dir` must be a folder; {self.path} is a file. Choose another path.")
        self._refuse_content()

    def _refuse_content(self) -> None:
        # The main process decides: when the other processes check, it may already have started to write.
        if not is_main_process() or self.resume_checkpoint is not None or not self.path.is_dir():
            return
        content = {path.name for path in self.path.iterdir()} - {LOCK_FILE}
        if self._is_auto:  # what a run that was killed before its first checkpoint leaves
            content -= {ARGUMENTS_FILE, ENVIRONMENT_FILE, STAGING_FOLDER, "runs"}
            content = {name for name in content if not (name.startswith(".") and name.endswith(".tmp"))}
        if content and self._is_auto:
            raise FileExistsError(
                f"`output_dir` {self.path} holds no checkpoint to resume from, but other files ({', '.join(sorted(content)[:5])}): a "
                "finished run, or something else. Choose a new folder, or empty this one."
            )
        if content:
            raise FileExistsError(
                f"`output_dir` {self.path} is not empty. Choose a new folder, empty this one, or continue its run "
                "with `--resume_from_checkpoint last`."
            )

    def _find_checkpoint(self, resume: str | bool | None) -> Path | None:
        if resume is None or resume is False or str(resume).lower() in ("", "none", "false"):
            return None
        if resume is True or str(resume).lower() in ("last", "true"):
            return self._last_whole_checkpoint()
        if self._is_auto:
            return self._last_whole_checkpoint() if self._present else None
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise ValueError(
                f"`resume_from_checkpoint` must be `last`, `auto` or a checkpoint folder; {checkpoint} is not a folder."
            )
        check_checkpoint(checkpoint, resumable=True)
        return checkpoint

    def _last_whole_checkpoint(self) -> Path:
        """The newest readable checkpoint; a run killed while saving leaves an unreadable one."""
        problems = []
        for checkpoint in list_checkpoints(self.path):
            try:
                check_checkpoint(checkpoint, resumable=True)
            except ValueError as error:
                problems.append(error)
                continue
            for problem in problems:
                logger.warning("Resuming from %s instead: %s", checkpoint, problem)
            return checkpoint
        if problems:
            raise problems[0]
        raise ValueError(
            f"`resume_from_checkpoint` is set but {self.path} has no checkpoint-<step> folder. Leave it out to start "
            "a new run."
        )

    @contextlib.contextmanager
    def recording(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Locks the folder and writes the initial records, which it removes if the run fails before it writes anything else.

        Raises:
            BlockingIOError: another run uses the folder.
            FileExistsError: another run wrote into it since this object was made.
        """
        if not is_main_process():
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.path)
        try:
            self._refuse_content()  # again: another run may have come first
            if list_checkpoints(self.path) != self._present:
                raise FileExistsError(
                    f"Another run wrote checkpoints into `output_dir` {self.path} while this one was prepared. Start this one again."
                )
            self._warn_about_changes(arguments)
            write_json(self.path / ARGUMENTS_FILE, arguments)
            write_json(self.path / ENVIRONMENT_FILE, describe_environment())
            try:
                yield
            except BaseException:
                self._withdraw_records()
                raise
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                self.path.rmdir()  # where nothing was left

    def _withdraw_records(self) -> None:
        records = {ARGUMENTS_FILE, ENVIRONMENT_FILE}
        with contextlib.suppress(OSError):  # the folder may be gone; the first error is the one to show
            if self.resume_checkpoint is None and {path.name for path in self.path.iterdir()} <= {*records, LOCK_FILE}:
                for name in records:
                    (self.path / name).unlink(missing_ok=True)

    def _warn_about_changes(self, arguments: Mapping[str, Any]) -> None:
        previous_file = self.path / ARGUMENTS_FILE
        if self.resume_checkpoint is None or not previous_file.is_file():
            return
        with contextlib.suppress(json.JSONDecodeError):
            previous, current = json.loads(previous_file.read_text()), to_json(arguments)
            changed = sorted(
                key
                for key in previous.keys() & current.keys()
                if previous[key] != current[key] and key not in _FREE_ON_RESUME
            )
            for key in changed:
                logger.warning("Resuming with `%s` = %r, it was %r.", key, current[key], previous[key])

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Writes `metrics.json` (main process only)."""
        if is_main_process():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / METRICS_FILE, metrics)


def check_checkpoint(folder: str | os.PathLike, *, resumable: bool = False) -> None:
    """Rejects a checkpoint that cannot be read, before anything expensive starts.

    Args:
        folder: local checkpoint folder of a whole model or of an adapter.
        resumable: also require the state that a training run needs to continue.

    Raises:
        ValueError: a file is missing, truncated or of the wrong kind; the message names it.
    """
    folder = Path(folder)
    is_adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
    names = [ADAPTER_CONFIG_FILE if is_adapter else "config.json"] + (["trainer_state.json"] if resumable else [])
    index = folder / "model.safetensors.index.json"
    names += [index.name] if index.is_file() else []
    parsed = {}
    for name in names:
        try:
            parsed[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} is not a complete checkpoint: {name} is missing.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"The checkpoint file {folder / name} is corrupt: {error}. Copy it again.") from error
    if index.name in parsed:
        weights = sorted({*parsed[index.name].get("weight_map", {}).values()})
    else:
        weights = [ADAPTER_WEIGHTS_FILE if is_adapter else "model.safetensors"]
    if resumable:
        _check_bytes(folder)
        for name in ("optimizer.pt", "scheduler.pt"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} cannot be resumed: {name} is missing (was it saved with save_only_model?)."
                )
    for name in weights:
        check_safetensors(folder / name)


def _check_bytes(folder: Path) -> None:
    problems = damages(folder)
    if problems is None:
        logger.warning(
            "%s holds no %s, so that changed bytes cannot be found: it was not written by this library.",
            folder,
            CHECKPOINT_MANIFEST_FILE,
        )
    elif problems:
        raise ValueError(
            f"The checkpoint {folder} is not as it was written: {'; '.join(problems)}. Copy it again, or use another."
        )


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, git revision and command of this process."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": accelerators,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "git_revision": git_revision(),
        "versions": versions,
    }


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far, in bytes: resident, and on the accelerator if there is one."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["peak_accelerator_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def git_revision() -> str | None:
    """Commit of the source tree of this package (`-dirty` if tracked files differ); None outside a repository."""
    package = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):  # inside another repository, e.g. in a virtual environment
            return None
        revision = git("rev-parse", "HEAD")
        return revision + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def to_json(value: Any) -> Any:
    """The value in JSON types; non-finite numbers become None, unknown types their `str`."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # NumPy scalar
        return to_json(value.item())
    return str(value)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON atomically: a reader sees either the old file or the complete new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)

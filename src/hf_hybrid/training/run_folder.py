"""The output folder of a run: when it may be written, and the records that every run writes to it.

A run writes the checkpoint and its tokenizer, `arguments.json` (every resolved option), `environment.json` (versions,
hardware, git revision, command), `fingerprints.json` (digests of what it reads), `metrics.json`, `loss_curve.png` and a model card `README.md`. A folder that is not
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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .checkpoints import (
    CHECKPOINT_MANIFEST_FILE,
    OPTIMIZER_FOLDER,
    PUBLISHING_FOLDER,
    STAGING_FOLDER,
    check_safetensors,
    damages,
    list_checkpoints,
)
from .fingerprints import Files, changed_files, fingerprints
from .folder_lock import LOCK_FILE, FolderLock
from .resuming import changed_options

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "arguments.json"
ENVIRONMENT_FILE = "environment.json"
FINGERPRINTS_FILE = "fingerprints.json"
METRICS_FILE = "metrics.json"
LOSS_CURVE_FILE = "loss_curve.png"
CODEBOOK_FILE = "codebooks.png"
# What FSDP (by accelerate), in one piece or in shards, and DeepSpeed write instead of `optimizer.pt`.
SHARDED_STATES = ("optimizer.bin", "optimizer_0", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0", "zero_to_fp32.py")
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

    def __init__(self, path: str | os.PathLike[str], resume: str | bool | None = None) -> None:
        self.path = Path(path)
        self._is_auto = str(resume).lower() == "auto"
        self._present = list_checkpoints(self.path)
        self.resume_checkpoint = self._find_checkpoint(resume)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`output_dir` must be a folder; {self.path} is a file. Choose another path.")
        self._refuse_content()
        self._fingerprints: dict[str, list[Files]] = {}
        self._same_content: list[str] = []  # options whose files were compared with those of the run that is resumed
        self._pending: dict[str, Any] = {}  # records that replace those of the run that is resumed

    def _refuse_content(self) -> None:
        # The main process decides: when the other processes check, it may already have started to write.
        if not is_main_process() or self.resume_checkpoint is not None or not self.path.is_dir():
            return
        content = {path.name for path in self.path.iterdir()} - {LOCK_FILE}
        if self._is_auto:  # what a run that was killed before its first checkpoint leaves
            content -= {ARGUMENTS_FILE, ENVIRONMENT_FILE, FINGERPRINTS_FILE, STAGING_FOLDER, PUBLISHING_FOLDER, "runs"}
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

    def check_sources(self, options: Mapping[str, Any]) -> None:
        """Takes the fingerprints of what the run reads, and compares them with those of the run that it resumes.

        Args:
            options: options of the run.

        Raises:
            ValueError: data, tokenizer or initial model have other contents than when the run began; the message names the files.
        """
        if not is_main_process():
            return
        known = self._earlier_record(FINGERPRINTS_FILE)
        self._fingerprints = fingerprints(options, known=known, without=self.path)
        if self._fingerprints and not known:
            self._warn_of_record(
                FINGERPRINTS_FILE, "data, tokenizer and initial model cannot be compared with those of its begin"
            )
        for option, found in self._fingerprints.items():
            if option not in known:
                continue
            changed = changed_files(known[option], found)
            if changed:
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise ValueError(
                    f"`{option}` is not what it was when this run began: {'; '.join(changed[:3])}{more}. A continuation would go on "
                    "with other contents than those recorded. Restore them, or begin a new run from these weights: "
                    f"`model_name_or_path={self.resume_checkpoint}`, with another `output_dir`."
                )
            self._same_content.append(option)

    def _earlier_record(self, name: str) -> dict[str, Any]:
        """A record of the run whose checkpoint is resumed; empty if there is none."""
        if self.resume_checkpoint is None:
            return {}
        try:
            found = json.loads((self.resume_checkpoint.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _warn_of_record(self, name: str, consequence: str) -> None:
        """Says that a record of the run that is resumed is missing or damaged, where there is one to resume."""
        if self.resume_checkpoint is not None:
            path = self.resume_checkpoint.parent / name
            logger.warning("%s %s: %s.", path, "is damaged" if path.is_file() else "is missing", consequence)

    @contextlib.contextmanager
    def recording(self, arguments: Mapping[str, Any], *, training: Collection[str] = ()) -> Iterator[None]:
        """Locks the folder and writes the initial records, which it removes if the run fails before it writes anything else.

        Those of a run that is resumed are replaced by `commit_records` alone.

        Args:
            arguments: all options of the run.
            training: names of those that are training arguments.

        Raises:
            BlockingIOError: another run uses the folder.
            FileExistsError: another run wrote into it since this object was made.
            ValueError: the run is resumed with options that a continuation cannot take over.
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
            environment = describe_environment()
            environment["resumed"] = self._history(to_json(arguments), environment, training)
            self._pending = {ARGUMENTS_FILE: arguments, ENVIRONMENT_FILE: environment}
            if self._fingerprints:
                self._pending[FINGERPRINTS_FILE] = self._fingerprints
            if self.resume_checkpoint is None:
                self.commit_records()
            try:
                yield
            except BaseException:
                self._withdraw_records()
                raise
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                self.path.rmdir()  # where nothing was left

    def commit_records(self) -> None:
        """Writes the initial records of a run that is resumed, once it has a checkpoint or an end of its own.

        Until then the folder keeps those of the run as it was, which a resume that fails leaves true.
        """
        if is_main_process():
            for name, record in self._pending.items():
                write_json(self.path / name, record)
            self._pending = {}

    def _withdraw_records(self) -> None:
        records = {ARGUMENTS_FILE, ENVIRONMENT_FILE, FINGERPRINTS_FILE}
        with contextlib.suppress(OSError):  # the folder may be gone; the first error is the one to show
            if self.resume_checkpoint is None and {path.name for path in self.path.iterdir()} <= {*records, LOCK_FILE}:
                for name in records:
                    (self.path / name).unlink(missing_ok=True)

    def _history(
        self, arguments: Mapping[str, Any], environment: Mapping[str, Any], training: Collection[str]
    ) -> list[dict[str, Any]]:
        """One entry for each continuation: step, time, and the options that changed from there on.

        Raises:
            ValueError: the continuation cannot take over a change.
        """
        if self.resume_checkpoint is None:
            return []
        state = json.loads((self.resume_checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        step = state.get("global_step", 0)
        before, record = self._earlier_record(ARGUMENTS_FILE), self._earlier_record(ENVIRONMENT_FILE)
        if not before:
            self._warn_of_record(ARGUMENTS_FILE, "the options of this run cannot be compared with those that it had")
        entries = record.get("resumed") or []
        kept = [entry for entry in entries if entry["step"] < step]
        for entry in reversed(entries[len(kept) :]):  # of continuations that led to nothing
            before.update({name: values[0] for name, values in entry["changed"].items()})
        processes = (record.get("world_size", environment["world_size"]), environment["world_size"])
        changed = changed_options(
            before, arguments, processes=processes, same_content=self._same_content, training=training
        )
        for name, (old, new) in changed.items():
            logger.warning("From step %d on, `%s` is %r; it was %r.", step, name, new, old)
        return [*kept, {"step": step, "started": environment["started"], "changed": changed}]

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Writes `metrics.json` (main process only)."""
        if is_main_process():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / METRICS_FILE, metrics)


def check_checkpoint(folder: str | os.PathLike[str], *, resumable: bool = False) -> None:
    """Rejects a checkpoint that cannot be read, before anything expensive starts.

    Args:
        folder: local checkpoint folder of a whole model or of an adapter.
        resumable: also require the state that a training run needs to continue.

    Raises:
        ValueError: a file is missing, truncated or of the wrong kind; the message names it.
    """
    folder = Path(folder)
    if resumable:
        _refuse_shards(folder)
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
        if not isinstance(parsed[name], dict):
            raise ValueError(f"The checkpoint file {folder / name} is corrupt: it holds no object. Copy it again.")
    if resumable and not isinstance(parsed["trainer_state.json"].get("global_step"), int):
        raise ValueError(
            f"The checkpoint file {folder / 'trainer_state.json'} is corrupt: it names no `global_step`. Copy it again."
        )
    if index.name in parsed:
        weights = sorted({*parsed[index.name].get("weight_map", {}).values()})
    else:
        weights = [ADAPTER_WEIGHTS_FILE if is_adapter else "model.safetensors"]
    if resumable:
        _check_bytes(folder)
        is_sharded = (folder / OPTIMIZER_FOLDER / ".metadata").is_file()
        for name in ("optimizer.pt", "scheduler.pt"):
            if not (folder / name).is_file() and not (is_sharded and name == "optimizer.pt"):
                raise ValueError(
                    f"{folder} cannot be resumed: {name} is missing (was it saved with save_only_model?)."
                )
    for name in weights:
        check_safetensors(folder / name)


def _refuse_shards(folder: Path) -> None:
    """Raises ValueError for the checkpoint of a run under FSDP by accelerate, or DeepSpeed: its optimizer belongs to that engine."""
    found = [name for name in SHARDED_STATES if (folder / name).exists()]
    if found:
        raise ValueError(
            f"{folder} cannot be resumed: {', '.join(found)} come from a run under FSDP or DeepSpeed, whose optimizer only its own engine reads. "
            "Start a new run from its weights (`--model_name_or_path`), or resume a checkpoint of a run without these (or with `--fsdp_size`)."
        )


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


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON atomically: a reader sees either the old file or the complete new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)

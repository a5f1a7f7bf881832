"""`--resume_from_checkpoint auto`, and one run per folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_hybrid.recipes import pretrain_clm
from hf_hybrid.training.folder_lock import LOCK_FILE, FolderLock
from hf_hybrid.training.run_folder import RunFolder


def same_weights(first, second) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (first, second))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_auto_begins_continues_and_ends(toy, finished, tmp_path):
    """One command line for a queue: sent again after any end, it leads to the same weights."""
    options = {**toy, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "auto"}
    pretrain_clm.main(options)
    assert same_weights(tmp_path / "run", finished)
    for gone in (["checkpoint-4"], ["checkpoint-2"]):
        for name in gone:
            shutil.rmtree(tmp_path / "run" / name)
        pretrain_clm.main(options)
        assert same_weights(tmp_path / "run", finished)
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_auto_begins_anew_where_a_run_was_killed_before_its_first_checkpoint(tmp_path):
    for name in ("arguments.json", "environment.json", "fingerprints.json", LOCK_FILE, ".arguments.json.12.tmp"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "_saving" / "checkpoint-2").mkdir(parents=True)
    assert RunFolder(tmp_path, "auto").resume_checkpoint is None
    with pytest.raises(FileExistsError, match="not empty"):
        RunFolder(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"no checkpoint to resume from.*metrics.json"):
        RunFolder(tmp_path, "auto")


def test_auto_does_not_begin_anew_over_damaged_checkpoints(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-2.*missing"):
        RunFolder(tmp_path, "auto")


def test_two_runs_never_share_a_folder(toy, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "arguments.json").read_text()
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(BlockingIOError, match=rf"run is in use by another run \(process {os.getpid()}\)"):
        pretrain_clm.main({**toy, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "last", "seed": 7})
    assert (tmp_path / "run" / "arguments.json").read_text() == before
    lock.release()
    FolderLock(tmp_path / "run").release()


def test_a_killed_process_leaves_no_lock(tmp_path):
    """Neither does a worker that it forked and that lives on. The worker reports its start: the lock is given up at the end of its fork."""
    code = (
        "import os, sys, time, pathlib\nfrom hf_hybrid.training.folder_lock import FolderLock\n"
        "lock = FolderLock(pathlib.Path(sys.argv[1]))\n"
        "if os.fork() == 0:\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n    os._exit(0)\ntime.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(BlockingIOError, match=f"process {holder.pid}"):
            FolderLock(tmp_path)
        holder.kill()
        holder.wait()
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_another_run_wrote_meanwhile_is_not_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    folder = RunFolder(tmp_path / "empty")
    (tmp_path / "empty" / "checkpoint-2").mkdir()
    with pytest.raises(FileExistsError), folder.recording({}):
        raise AssertionError("never reached")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["checkpoint-2"]

"""Checkpoints: whole or not there; damages are named; failed writes leave the older ones."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_hybrid.recipes import pretrain_clm
from hf_hybrid.training import trainer as trainer_module
from hf_hybrid.training.checkpoints import (
    CHECKPOINT_MANIFEST_FILE,
    STAGING_FOLDER,
    CheckpointWriteError,
    list_checkpoints,
    rotate_checkpoints,
)
from hf_hybrid.training.run_folder import SHARDED_STATES, RunFolder, check_checkpoint


def same_weights(first: Path, second: Path) -> bool:
    left, right = (load_file(folder / "model.safetensors") for folder in (first, second))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.iterdir())


def test_a_checkpoint_lists_every_file_of_it(finished):
    assert [path.name for path in list_checkpoints(finished)] == ["checkpoint-4", "checkpoint-2"]
    for checkpoint in list_checkpoints(finished):
        listed = json.loads((checkpoint / CHECKPOINT_MANIFEST_FILE).read_text())["files"]
        assert {*listed, CHECKPOINT_MANIFEST_FILE} == set(files_of(checkpoint))
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "carried_state_0.safetensors"} <= listed.keys()
        check_checkpoint(checkpoint, resumable=True)
    assert not (finished / STAGING_FOLDER).exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_no_damage_goes_unnoticed(finished, tmp_path, damage):
    for name in files_of(finished / "checkpoint-4"):
        checkpoint = tmp_path / name / "checkpoint-4"
        shutil.copytree(finished / "checkpoint-4", checkpoint)
        path = checkpoint / name
        content = bytearray(path.read_bytes())
        if damage == "cut":
            path.write_bytes(content[:-1] if name != CHECKPOINT_MANIFEST_FILE else content[: len(content) // 2])
        elif damage == "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        else:
            path.unlink()
            if name == CHECKPOINT_MANIFEST_FILE:  # only said: other programs write none
                continue
        with pytest.raises(ValueError, match="missing|corrupt") as caught:
            check_checkpoint(checkpoint, resumable=True)
        assert name in str(caught.value) or name == CHECKPOINT_MANIFEST_FILE


def test_a_checkpoint_without_manifest_or_random_state_is_said(finished, toy, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-2", run / "checkpoint-2")
    (run / "checkpoint-2" / CHECKPOINT_MANIFEST_FILE).unlink()
    (run / "checkpoint-2" / "rng_state.pth").unlink()
    pretrain_clm.main({**toy, "output_dir": str(run), "resume_from_checkpoint": "last"})
    assert f"holds no {CHECKPOINT_MANIFEST_FILE}" in caplog.text and "holds no rng_state.pth" in caplog.text


@pytest.mark.parametrize("name", SHARDED_STATES)
def test_a_checkpoint_of_a_sharded_run_is_refused_as_such(finished, tmp_path, name):
    """Not as one that lacks `optimizer.pt`, and `auto` does not begin anew over it."""
    checkpoint = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / name).touch()
    for check in (lambda: check_checkpoint(checkpoint, resumable=True), lambda: RunFolder(tmp_path / "run", "auto")):
        with pytest.raises(ValueError, match=f"{name} come from a run under FSDP or DeepSpeed.*model_name_or_path"):
            check()
    check_checkpoint(checkpoint)  # its weights can be read


def test_a_sharded_run_is_told_at_its_start(toy, tmp_path, monkeypatch, caplog):
    """Before the hours that a resume would need again."""
    options = {**toy, "max_steps": 1, "save_steps": 1}
    start = pretrain_clm.SegmentTrainer._warn_of_shards

    def sharded(self):
        for engine in ("is_fsdp_enabled", "is_deepspeed_enabled"):
            with monkeypatch.context() as patch:
                patch.setattr(self, engine, True)
                start(self)

    monkeypatch.setattr(pretrain_clm.SegmentTrainer, "_warn_of_shards", sharded)
    pretrain_clm.main({**options, "save_strategy": "no", "output_dir": str(tmp_path / "none")})
    assert "FSDP" not in caplog.text and "DeepSpeed" not in caplog.text
    pretrain_clm.main({**options, "output_dir": str(tmp_path / "some")})
    for engine in ("FSDP of Accelerate", "DeepSpeed"):
        assert f"checkpoints of a run under {engine} cannot be resumed" in caplog.text


def test_the_newest_that_verifies_is_taken(finished, toy, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-7] + b"\0" * 7)
    (run / "model.safetensors").unlink()
    pretrain_clm.main({**toy, "output_dir": str(run), "resume_from_checkpoint": "last"})
    assert "checkpoint-2 instead" in caplog.text and "optimizer.pt is corrupt" in caplog.text
    assert same_weights(run, finished)
    check_checkpoint(run / "checkpoint-4", resumable=True)  # written anew


def test_whatever_is_missing_the_older_one_is_taken(finished, tmp_path, caplog):
    """As a kill while saving once left it: each file of the newest checkpoint in turn, which is named."""
    for name in files_of(finished / "checkpoint-4"):
        if name == CHECKPOINT_MANIFEST_FILE:  # only said: other programs write none
            continue
        run = tmp_path / name
        shutil.copytree(finished, run)
        (run / "checkpoint-4" / name).unlink()
        for resume in ("last", "auto"):
            caplog.clear()
            assert RunFolder(run, resume).resume_checkpoint == run / "checkpoint-2"
            assert f"{run / 'checkpoint-2'} instead" in caplog.text and f"{name} is missing" in caplog.text


@pytest.mark.parametrize("content", ["[]", "{}", '{"global_step": "4"}', "null"])
def test_a_state_that_is_json_but_no_state(finished, tmp_path, content):
    """Of another program, without digests."""
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", checkpoint)
    (checkpoint / CHECKPOINT_MANIFEST_FILE).unlink()
    (checkpoint / "trainer_state.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"trainer_state.json is corrupt: it (holds no object|names no `global_step`)"
    ):
        check_checkpoint(checkpoint, resumable=True)


def fail_at(step: int, error: BaseException, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Let the checkpoint of a step fail in one of its parts."""
    owner = trainer_module if where == "publish_checkpoint" else pretrain_clm.SegmentTrainer
    done = getattr(owner, where)

    def fails(*args, **kwargs):
        if f"checkpoint-{step}" in " ".join(map(str, args)):
            raise error
        return done(*args, **kwargs)

    monkeypatch.setattr(owner, where, fails)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("_save", errno.ENOSPC),
        ("_save_rng_state", errno.EROFS),
        ("_save_process_state", errno.EIO),
        ("publish_checkpoint", errno.ENOSPC),
    ],
)
def test_what_fails_while_saving_leaves_the_older_checkpoint(finished, toy, tmp_path, monkeypatch, where, number):
    """Also with `save_total_limit=1`: the older one goes when the newer one is complete."""
    run = tmp_path / "run"
    options = {**toy, "output_dir": str(run), "save_total_limit": 1}
    with monkeypatch.context() as patch:
        fail_at(4, OSError(number, os.strerror(number)), patch, where)
        reason = f"step 4.*run.*{os.strerror(number)}.*last good checkpoint is .*checkpoint-2"
        with pytest.raises(CheckpointWriteError, match=reason):
            pretrain_clm.main(options)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2"]
    assert not (run / STAGING_FOLDER).exists()
    pretrain_clm.main({**options, "resume_from_checkpoint": "last"})
    assert same_weights(run, finished)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-4"]


class _AtStep3(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.action(Path(args.output_dir))


def run_with(callback: TrainerCallback, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    began = trainer_module.HybridTrainer.__init__

    def begins(self, *args, **kwargs):
        began(self, *args, **kwargs)
        self.add_callback(callback)

    monkeypatch.setattr(trainer_module.HybridTrainer, "__init__", begins)
    pretrain_clm.main(options)


def test_a_full_disk(toy, tmp_path, monkeypatch):
    """Writes end in the middle of a file, as the operating system lets them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = _AtStep3(lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1])))
    try:
        with pytest.raises(CheckpointWriteError, match=r"step 4.*last good checkpoint is .*checkpoint-2"):
            run_with(limit, {**toy, "output_dir": str(tmp_path / "run")}, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_checkpoint(tmp_path / "run" / "checkpoint-2", resumable=True)


def test_a_folder_that_is_gone(toy, tmp_path, monkeypatch):
    options = {**toy, "output_dir": str(tmp_path / "run")}
    with pytest.raises(CheckpointWriteError, match=r"step 4.*run \(the folder is gone\).*no earlier checkpoint"):
        run_with(_AtStep3(lambda run: run.rename(tmp_path / "elsewhere")), options, monkeypatch)
    check_checkpoint(tmp_path / "elsewhere" / "checkpoint-2", resumable=True)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 20]),
        (1, None, [8]),
        (2, None, [6, 8]),
        (2, 2, [2, 8]),
        (1, 4, [4, 8]),
        (3, 8, [4, 6, 8]),
    ],
)
def test_rotation(tmp_path, limit, best, left):
    """Step 20 was passed over: the run stands at 8."""
    for step in (2, 4, 6, 8, 20):
        (tmp_path / f"checkpoint-{step}" / "part").mkdir(parents=True)
    chosen = None if best is None else str(tmp_path / f"checkpoint-{best}")
    rotate_checkpoints(tmp_path, limit, tmp_path / "checkpoint-8", chosen)
    assert sorted(int(path.name[11:]) for path in tmp_path.iterdir()) == left


def test_the_best_checkpoint_is_named_by_its_place(toy, tmp_path):
    """Not by that where it was written before it was complete."""
    run = tmp_path / "run"
    options = {
        **toy,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    pretrain_clm.main({**options, "output_dir": str(run), "save_total_limit": 2})
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best == run / f"checkpoint-{state['best_global_step']}" and best.is_dir()
    assert same_weights(run, best)

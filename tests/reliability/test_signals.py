"""Runs that are stopped, killed and restarted end as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import disturbed_run
import pytest
from recipe_runs import RECIPES, options_of, records_of, same_weights

from hf_hybrid.recipes import pretrain_clm
from hf_hybrid.training.callbacks import InterruptCallback, RunInterrupted
from hf_hybrid.training.run_folder import check_checkpoint
from hf_hybrid.training.trainer import HybridTrainer

SCRIPT = Path(__file__).with_name("disturbed_run.py")


def words_of(options: dict) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def start(options: dict, *launcher: str, recipe: str = "pretrain_clm", **disturbance) -> subprocess.CompletedProcess:
    """Run a recipe in a process of its own, disturbed at a place."""
    given = json.dumps({"recipe": recipe, **disturbance})
    command = [sys.executable, *launcher, str(SCRIPT), given, *words_of(options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


# One process imports torch and the library; every run is a fork of it, made in no time. (A fork of this process could not use what
# torch has started in it.)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([f"hf_hybrid.recipes.{recipe}" for recipe in RECIPES])


def start_fork(options: dict, log: Path, *, recipe: str = "pretrain_clm", place: str = "step", call: int = 99) -> int:
    """As `start`, without a launcher and killed at a place. Returns the exit status, negative for a signal."""
    given = {"recipe": recipe, "place": place, "call": call}
    process = FORKS.Process(target=disturbed_run.run, args=(given, options, str(log)))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
    return process.exitcode


def test_killed_three_times(toy, tmp_path):
    """During a step, while saving and while evaluating."""
    options = {**toy, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "save_total_limit": 1}
    pretrain_clm.main({**options, "output_dir": str(tmp_path / "straight")})
    queued = {**options, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "auto"}
    for place, call, left in (("saving", 1, []), ("evaluating", 2, ["checkpoint-2"]), ("step", 4, ["checkpoint-4"])):
        status = start_fork(queued, tmp_path / "log", place=place, call=call)
        assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
        found = sorted((tmp_path / "run").glob("checkpoint-*"))
        assert [path.name for path in found] == left
        for checkpoint in found:
            check_checkpoint(checkpoint, resumable=True)
    pretrain_clm.main(queued)
    assert same_weights(tmp_path / "run", tmp_path / "straight")
    assert records_of(tmp_path / "run") == records_of(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_a_checkpoint_and_the_command_to_continue(toy, finished, tmp_path, monkeypatch, number):
    options = {**toy, "output_dir": str(tmp_path / "run")}
    if number == signal.SIGTERM:
        done = start(options, place="step", call=3, signal=number)
        assert done.returncode == 128 + number and "Traceback" not in done.stderr
        command = re.search(r"To continue: (python.* --resume_from_checkpoint last)$", done.stderr, re.MULTILINE)
        assert command is not None and shlex.split(command[1])[-4:-2] == ["--output_dir", str(tmp_path / "run")]
    else:
        before = signal.signal(number, signal.default_int_handler)  # a background shell has it ignored
        called, step = [], HybridTrainer.training_step

        def stopped(self, *args, **kwargs):
            called.append(1)
            if len(called) == 3:
                os.kill(os.getpid(), number)
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(HybridTrainer, "training_step", stopped)
            with pytest.raises(RunInterrupted) as caught:
                pretrain_clm.main(options)
        assert caught.value.code == 128 + number and caught.value.is_saved
        assert signal.getsignal(number) is signal.default_int_handler
        signal.signal(number, before)
    check_checkpoint(tmp_path / "run" / "checkpoint-3", resumable=True)
    assert not (tmp_path / "run" / "model.safetensors").exists()  # it does not pass for a finished run
    pretrain_clm.main({**options, "resume_from_checkpoint": "last"})
    assert same_weights(tmp_path / "run", finished)


def test_a_signal_while_saving_ends_after_that_checkpoint(toy, finished, tmp_path):
    options = {**toy, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "auto"}
    done = start(options, place="saving", signal=signal.SIGTERM)
    assert done.returncode == 128 + signal.SIGTERM and "checkpoint-2 is complete" in done.stderr
    pretrain_clm.main(options)
    assert same_weights(tmp_path / "run", finished)


def launcher_of_two(*options: str) -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *options)


@pytest.mark.slow
def test_a_launcher_that_is_stopped_leaves_a_checkpoint_of_both(toy, tmp_path):
    """As a queue does it: SIGTERM to torchrun, which passes it on. The next job ends as an uninterrupted one, records included."""
    options = {**toy, "max_steps": 6, "per_device_train_batch_size": 1, "logging_steps": 4}
    options |= {"save_steps": 99, "resume_from_checkpoint": "auto"}
    straight = start({**options, "output_dir": tmp_path / "straight"}, *launcher_of_two(), place="step", rank=9)
    assert straight.returncode == 0, straight.stderr
    queued = {**options, "output_dir": tmp_path / "run"}
    stopped = start(queued, *launcher_of_two(), place="step", call=3, rank=1, signal=signal.SIGTERM, launcher=True)
    assert stopped.returncode != 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    check_checkpoint(checkpoint, resumable=True)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    assert re.search(r"Stopped by SIGTERM; .*checkpoint-\d is complete", stopped.stderr), stopped.stderr
    again = start(queued, *launcher_of_two(), place="step", rank=9)
    assert again.returncode == 0, again.stderr
    assert same_weights(tmp_path / "run", tmp_path / "straight")
    assert records_of(tmp_path / "run") == records_of(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_launcher_restarts_what_was_killed(toy, tmp_path, number):
    """One of two processes is killed at a random step; a signal to one of them stops both."""
    launcher = launcher_of_two("--max-restarts=3")
    options = {**toy, "max_steps": 6, "per_device_train_batch_size": 1, "resume_from_checkpoint": "auto"}
    straight = start({**options, "output_dir": tmp_path / "straight"}, *launcher, place="step", rank=9)
    assert straight.returncode == 0, straight.stderr
    began = time.monotonic()
    disturbance = {"place": "step", "call": random.Random(5).randint(3, 6), "rank": 1, "once": str(tmp_path / "mark")}
    done = start({**options, "output_dir": tmp_path / "run"}, *launcher, **disturbance, signal=number)
    assert done.returncode == 0, done.stderr
    if number == signal.SIGKILL:  # torchrun names the process; by SIGTERM both end, and it names one of them
        assert "local_rank: 1" in done.stderr
    assert time.monotonic() - began < 120
    assert same_weights(tmp_path / "run", tmp_path / "straight")


KILLS = [
    ("pretrain_clm", "rotating", 2),
    ("pretrain_clm", "publishing", 3),
    ("pretrain_clm", "step", 5),
    ("pretrain_clm", "saving", 2),
    ("pretrain_mlm", "step", 4),
    ("pretrain_mlm", "saving", 1),
    ("pretrain_mlm", "evaluating", 2),
    ("pretrain_span_corruption", "rotating", 1),
    ("pretrain_span_corruption", "saving", 3),
    ("pretrain_span_corruption", "predicting", 2),
    ("finetune_glue", "step", 3),
    ("finetune_glue", "saving", 2),
    ("finetune_glue", "predicting", 3),
    ("finetune_summarization", "generating", 1),
    ("finetune_summarization", "generating", 3),
    ("finetune_summarization", "publishing", 2),
    ("finetune_summarization", "step", 5),
    ("train_synthetic", "step", 6),
    ("train_synthetic", "saving", 1),
    ("train_synthetic", "evaluating", 3),
]


@pytest.fixture(scope="module")
def straight_runs() -> dict[str, tuple[dict, Path]]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "place", "call"), KILLS)
def test_a_killed_run_ends_as_the_uninterrupted_one(
    toy, straight_runs, tmp_path, tmp_path_factory, recipe, place, call
):
    if recipe not in straight_runs:
        folder = tmp_path_factory.mktemp(recipe)
        options = options_of(recipe, toy, folder)
        status = start_fork({**options, "output_dir": str(folder / "run")}, folder / "log", recipe=recipe)
        assert status == 0, (folder / "log").read_text()
        straight_runs[recipe] = options, folder / "run"
    options, straight = straight_runs[recipe]
    log = tmp_path / "log"
    queued = {**options, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "auto"}
    status = start_fork(queued, log, recipe=recipe, place=place, call=call)
    assert status == -signal.SIGKILL, log.read_text()
    status = start_fork(queued, log, recipe=recipe)
    assert status == 0, log.read_text()
    assert same_weights(tmp_path / "run", straight)
    assert records_of(tmp_path / "run") == records_of(straight)


def test_an_ignored_signal_stays_ignored() -> None:
    """A run in the background, by `nohup`, is not stopped by a Ctrl-C that is meant for others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with InterruptCallback().listening():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

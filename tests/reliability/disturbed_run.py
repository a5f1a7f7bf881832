"""Runs a recipe and sends a signal to itself at a chosen place: `python disturbed_run.py '{"recipe": ..., "place": ...}'`."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_hybrid.training import checkpoints
from hf_hybrid.training import trainer as trainers

# The function before whose n-th call the signal comes.
PLACES: dict[str, tuple[Any, str]] = {
    "step": (trainers.HybridTrainer, "training_step"),
    "saving": (trainers.HybridTrainer, "_save_rng_state"),
    "publishing": (checkpoints.os, "rename"),
    "rotating": (checkpoints, "remove_checkpoint"),
    "evaluating": (Trainer, "_evaluate"),
    "predicting": (Trainer, "prediction_step"),
    "generating": (trainers.HybridSeq2SeqTrainer, "prediction_step"),
}


def disturb(place: str, call: int, number: int, *, launcher: bool = False) -> None:
    """Send the signal to this process, or to the launcher that started it."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), 0

    def disturbed(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getppid() if launcher else os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, disturbed)


def run(given: dict, options: dict, log: str) -> None:
    """The same in this process, which is a fork of one that has imported everything; its output goes to the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    disturb(given["place"], given["call"], signal.SIGKILL)
    importlib.import_module(f"hf_hybrid.recipes.{given['recipe']}").main(options)


def main() -> None:
    given = json.loads(sys.argv.pop(1))
    mark = given.get("once")  # of several attempts and processes, one is disturbed
    rank = int(os.environ.get("RANK", "0"))
    if rank == given.get("rank", 0) and not (mark and Path(mark).exists()):
        if mark:
            Path(mark).touch()
        launcher = given.get("launcher", False)
        disturb(given["place"], given.get("call", 1), given.get("signal", signal.SIGKILL), launcher=launcher)
    importlib.import_module(f"hf_hybrid.recipes.{given['recipe']}").main()


if __name__ == "__main__":
    main()

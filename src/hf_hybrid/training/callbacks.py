"""Trainer callbacks: a time limit, and the epoch number for data sets with new random choices in each epoch."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TimeLimitCallback(TrainerCallback):
    """Stops after a number of minutes, with a final checkpoint.

    The clock of the main process decides for all processes, so that all stop at the same step.

    Args:
        minutes: wall-clock time from the start of training, including evaluations.

    Raises:
        ValueError: `minutes` is not positive.
    """

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f"`max_minutes` must be positive; got {minutes}.")
        self.seconds = 60.0 * minutes
        self.elapsed_fraction = 0.0  # of the limit, the same number in every process
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        self._start = time.monotonic()
        self.elapsed_fraction = 0.0
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        fraction = (time.monotonic() - self._start) / self.seconds
        if dist.is_available() and dist.is_initialized():
            shared = torch.tensor(fraction, dtype=torch.float64, device=args.device)
            dist.broadcast(shared, src=0)
            fraction = shared.item()
        self.elapsed_fraction = fraction
        if fraction >= 1.0:
            control.should_training_stop = True
            control.should_save = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
            control.should_log = True
        return control


class EpochCallback(TrainerCallback):
    """Passes the number of the epoch to data sets and samplers.

    In distributed runs Accelerate forwards the epoch to either the sampler or the data set, and in resumed runs its
    wrappers forward it to neither; everything that draws from (seed, epoch) needs it.

    Args:
        targets: objects; those with a method `set_epoch` receive the epoch.
    """

    def __init__(self, *targets: object) -> None:
        self.targets: list[object] = []
        for target in targets:
            self.add(target)

    def add(self, target: object) -> None:
        """Adds an object, if it has a method `set_epoch`."""
        if hasattr(target, "set_epoch"):
            self.targets.append(target)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        for target in self.targets:
            target.set_epoch(int(state.epoch or 0))  # type: ignore[attr-defined]
        return control

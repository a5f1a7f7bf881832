"""Trainer callbacks: a time limit, the end by a signal, and the epoch number for data sets with new random choices in each epoch."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


class TimeLimitCallback(TrainerCallback):
    """Stops after a number of minutes, with a final checkpoint.

    The clock of the main process decides for all processes, so that all stop at the same step.

    Args:
        minutes: wall-clock time from the start of training, including evaluations, over all sessions of a run that is resumed.

    Attributes:
        earlier_seconds: of the limit, spent in the sessions before this one.
        elapsed_fraction: share of the limit that is spent, the same number in every process.

    Raises:
        ValueError: `minutes` is not positive.
    """

    def __init__(self, minutes: float) -> None:
        if not minutes > 0:
            raise ValueError(f"`max_minutes` must be positive; got {minutes}.")
        self.seconds: float = 60.0 * minutes
        self.earlier_seconds: float = 0.0
        self.elapsed_fraction: float = 0.0
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        self._start = time.monotonic()
        self.elapsed_fraction = self.earlier_seconds / self.seconds
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        fraction = (self.earlier_seconds + time.monotonic() - self._start) / self.seconds
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


class RunInterrupted(SystemExit):
    """A signal ended the run.

    The exit status is 128 plus the number of the signal, as shells report it.

    Attributes:
        signal: SIGTERM or SIGINT.
        is_saved: whether it ended with a checkpoint of its last step.
        is_trained: whether the training was complete and its weights are saved; only the evaluation is missing.
    """

    def __init__(self, number: int, *, is_saved: bool, is_trained: bool = False) -> None:
        super().__init__(128 + number)
        self.signal: signal.Signals = signal.Signals(number)
        self.is_saved = is_saved
        self.is_trained = is_trained


class InterruptCallback(TrainerCallback):
    """Ends a run cleanly on SIGTERM and Ctrl-C: the step is finished, a checkpoint is written, and `RunInterrupted` is raised.

    All processes of a distributed run stop at the same step, whichever got the signal. A second signal ends at once, as does one that
    arrives before training or after it, except while the final weights are saved.
    """

    _ECHO_SECONDS = 3.0  # a launcher passes on what the terminal has already sent

    def __init__(self) -> None:
        self.is_training: bool = False
        self._number = 0  # of the signal
        self._agreed = 0  # the same in every process
        self._time = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals in this block; only the main thread can. One that the process ignores, as `nohup` sets it, stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number and time.monotonic() - self._time < self._ECHO_SECONDS:
            return
        if self._number or not self.is_training:
            raise RunInterrupted(number, is_saved=False)
        self._number, self._time = number, time.monotonic()
        name = signal.Signals(number).name
        # Not by logging, which may be in the middle of a message.
        os.write(2, f"\n{name}: stopping as soon as the weights are saved; again to stop at once.\n".encode())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal wait for the end of this block, as it does in training."""
        before, self.is_training = self.is_training, True
        try:
            yield
        finally:
            self.is_training = before

    def agree(self, args: TrainingArguments) -> int:
        """The signal that ends the run, the same in every process; 0 for none. All processes must call it."""
        if not self._agreed:
            self._agreed = self._number
            if dist.is_available() and dist.is_initialized():
                shared = torch.tensor(self._number, device=args.device)
                dist.all_reduce(shared, op=dist.ReduceOp.MAX)
                self._agreed = int(shared.item())
        return self._agreed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        self.is_training = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        self.is_training = False
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        if self.agree(args):
            control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:  # an evaluation would decide whether to save
                control.should_evaluate = False
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        if self.agree(args):
            raise RunInterrupted(self._agreed, is_saved=True)
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

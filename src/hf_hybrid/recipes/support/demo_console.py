"""What the demonstration prints: one line per phase, with a bar where the output is a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_TITLE_WIDTH = 50
_TRAINED = 0.85  # share of a training phase's bar that is training; the rest is the evaluation after it


class Phase:
    """One line of the console: its bar while the phase runs, its result in the end.

    Attributes:
        result: what the line says when the phase is over.
    """

    def __init__(self, title: str, bar: tqdm) -> None:
        self.title = title
        self.result = ""
        self._bar = bar
        self._share = 0.0

    def advance(self, share: float, note: str = "") -> None:
        """Draws the bar up to `share` of the phase, never back, with a note behind it."""
        self._share = max(self._share, min(share, 1.0))
        self._bar.n = round(100 * self._share)
        self._bar.set_postfix_str(note, refresh=True)


@contextlib.contextmanager
def running(title: str) -> Iterator[Phase]:
    """A line for one phase on standard output."""
    started = time.monotonic()
    is_terminal = sys.stdout.isatty()
    layout = "{desc:<" + str(_TITLE_WIDTH) + "} |{bar:16}| {elapsed} {postfix}"
    with tqdm(total=100, desc=title, bar_format=layout, leave=False, disable=not is_terminal, file=sys.stdout) as bar:
        bar.set_description_str(title)
        phase = Phase(title, bar)
        yield phase
    seconds = f"{time.monotonic() - started:.0f} s"
    say(f"{title:<{_TITLE_WIDTH}} {seconds:>6}  {phase.result}".rstrip())


def say(text: str) -> None:
    """Prints a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class PhaseProgress(TrainerCallback):
    """Moves the bar of a phase with the steps, the time limit and the batches of the evaluation after them.

    Args:
        phase: line of the console.
        seconds: time limit of the training.
    """

    def __init__(self, phase: Phase, seconds: float) -> None:
        self.phase, self.seconds = phase, seconds
        self._start = time.monotonic()
        self._is_trained = False
        self._evaluated = 0
        self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        share = max(state.global_step / max(1, state.max_steps), (time.monotonic() - self._start) / self.seconds)
        self.phase.advance(_TRAINED * min(share, 1.0), self._note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._note = f"step {state.global_step}, loss {float(logs['loss']):.2f}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_trained = True

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._is_trained and hasattr(eval_dataloader, "__len__"):
            self._evaluated += 1
            self.phase.advance(
                _TRAINED + (1 - _TRAINED) * self._evaluated / max(1, len(eval_dataloader)), "evaluation"
            )

"""The progress of a run on the console: one bar, and one line per event."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

logger = logging.getLogger(__name__)

UNLIMITED_STEPS = 10_000_000  # of a run that ends only by its time limit

# Entries of the logs that every event has, or that the bar shows.
_NOT_SHOWN = ("epoch", "learning_rate", "num_input_tokens_seen", "total_flos", "step")
_TIMES = ("_runtime", "_per_second")


def shows_bars() -> bool:
    """Whether standard error is a terminal or a notebook, and the library may print more than warnings."""
    return logger.isEnabledFor(logging.INFO) and (sys.stderr.isatty() or "ipykernel" in sys.modules)


class ProgressReport(TrainerCallback):
    """Shows loss, tokens per second and the time left in one bar, and each evaluation and checkpoint in a line.

    Where standard error is no terminal, a line per log takes the place of the bar.

    Args:
        max_minutes: time limit of the training, if there is one.
        bar: whether to draw a bar; None for where standard error is a terminal or a notebook.
    """

    def __init__(self, max_minutes: float | None = None, bar: bool | None = None) -> None:
        self.seconds = None if max_minutes is None else 60.0 * max_minutes
        self.draws_bar = bar
        self._bar: Any = None
        self._evaluation: Any = None
        self._shown: dict[str, str] = {}
        self._start, self._first_step = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        self._shown = {}
        if not state.is_world_process_zero:
            return
        if state.global_step:
            logger.info("Training goes on from step %d.", state.global_step)
        if not args.disable_tqdm and (shows_bars() if self.draws_bar is None else self.draws_bar):
            self._bar = tqdm(
                total=state.max_steps if self._has_end(state) else None,
                initial=state.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
                if self._has_end(state)
                else None,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            left = self._left(state)
            self._bar.set_postfix({**self._shown, **({} if left is None else {"left": left})}, refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        self._shown = {"loss": f"{logs['loss']:.4g}"}
        if "tokens_per_second" in logs:
            self._shown["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
        if self._bar is None:
            left = self._left(state)
            step = f"step {state.global_step:,}" + (f" of {state.max_steps:,}" if self._has_end(state) else "")
            parts = [f"loss {self._shown['loss']}"]
            parts += [f"{self._shown['tokens/s']} tokens/s"] if "tokens/s" in self._shown else []
            logger.info("%s: %s", step, ", ".join([*parts, *([] if left is None else [f"{left} left"])]))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or args.disable_tqdm or not hasattr(eval_dataloader, "__len__"):
            return
        if self._bar is not None:  # one bar
            self._evaluation = (self._evaluation or 0) + 1
            self._bar.set_description_str(f"evaluating {self._evaluation}/{len(eval_dataloader)}")
            return
        if self._evaluation is None and (shows_bars() if self.draws_bar is None else self.draws_bar):
            self._evaluation = tqdm(total=len(eval_dataloader), desc="evaluating", leave=False, dynamic_ncols=True)
        if self._evaluation is not None:
            self._evaluation.update(1)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._end_evaluation()
        if state.is_world_process_zero and metrics:
            found = ", ".join(f"{name.removeprefix('eval_')} {value}" for name, value in readable(metrics).items())
            logger.info("evaluation after step %s: %s", f"{state.global_step:,}", found)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        self._end_evaluation()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            logger.info("checkpoint-%d is saved", state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._evaluation = None

    def _end_evaluation(self) -> None:
        if self._bar is not None:
            self._bar.set_description_str("training")
        elif self._evaluation is not None:
            self._evaluation.close()
        self._evaluation = None

    def _has_end(self, state: TrainerState) -> bool:
        """Whether the number of steps is known: a stream under a time limit has none."""
        return self.seconds is None or state.max_steps < UNLIMITED_STEPS

    def _left(self, state: TrainerState) -> str | None:
        """The time that is left, at the pace so far and within the time limit."""
        elapsed, steps = time.monotonic() - self._start, state.global_step - self._first_step
        left = [] if self.seconds is None else [max(self.seconds - elapsed, 0.0)]
        if steps and self._has_end(state):
            left.append(elapsed / steps * (state.max_steps - state.global_step))
        return tqdm.format_interval(min(left)) if left else None


def readable(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The figures of an evaluation in few digits, without its times."""
    return {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in metrics.items()
        if name not in _NOT_SHOWN and not name.endswith(_TIMES) and isinstance(value, (int, float))
    }


def report_progress(trainer: Trainer) -> None:
    """Reports the progress of a trainer by `ProgressReport`, in place of the bars and dictionaries of Transformers."""
    if any(isinstance(callback, ProgressReport) for callback in trainer.callback_handler.callbacks):
        return
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressReport(getattr(trainer.args, "max_minutes", None)))

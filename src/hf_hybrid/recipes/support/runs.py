"""One training run: logging, the job that a recipe builds, training, evaluation and records."""

from __future__ import annotations

import atexit
import json
import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ...hub import CARD_FILE
from ...model_card import model_card_problems
from ...training.adapters import base_model, check_resumable
from ...training.callbacks import InterruptCallback, RunInterrupted
from ...training.checkpoints import list_checkpoints, reporting_write_errors
from ...training.codebooks import CodebookCallback, has_codebooks
from ...training.progress import report_progress, shows_bars
from ...training.publishing import PublishingTrainer
from ...training.resuming import TOTALS_FILE
from ...training.run_folder import (
    CODEBOOK_FILE,
    LOSS_CURVE_FILE,
    RunFolder,
    is_main_process,
    peak_memory,
)
from ...training.trainer import HybridTrainer
from ...viz import codebook_usage, plot_loss_curves
from .console import LineFormatter, LineHandler, hide_bars_of_libraries, is_quiet
from .models import set_longest_input
from .reports import RunReport, make_card

logger = logging.getLogger(__name__)


def set_up_logging(training_args: TrainingArguments | None = None) -> None:
    """Logs to standard error: everything from the main process, only warnings from the others or if the recipe is quiet."""
    level = logging.INFO if is_main_process() and not is_quiet() else logging.WARNING
    handler = LineHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(handlers=[handler], level=level)
    logging.getLogger("hf_hybrid").setLevel(level)
    for noisy in ("httpx", "urllib3", "filelock", "fsspec", "matplotlib", "absl", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if training_args is not None:
        transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    hide_bars_of_libraries(all_of_them=not shows_bars())


@dataclass
class Job:
    """What a recipe builds from its arguments: a trainer, its report, and how to evaluate it.

    Attributes:
        trainer: trainer with data sets, collator and metrics.
        report: information for the records.
        derive: function that computes further metrics from those of the evaluation.
        write_results: function called at the end by the main process with the folder, to write additional files.
    """

    trainer: Trainer
    report: RunReport
    derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    write_results: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        report_progress(self.trainer)

    def final_metrics(self) -> dict[str, Any]:
        """Metrics of the final weights: logged last if training ended with an evaluation, else measured now."""
        if self.trainer.eval_dataset is None:
            return {}
        metrics = self._logged_metrics() or self.trainer.evaluate()
        return {**metrics, **(self.derive(metrics) if self.derive is not None else {})}

    @property
    def is_evaluated(self) -> bool:
        """Whether nothing is left to evaluate after the training."""
        return self.trainer.eval_dataset is None or bool(self._logged_metrics())

    def _logged_metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        state = self.trainer.state
        if state.global_step > 0 and not self.trainer.args.load_best_model_at_end:
            for entry in state.log_history:
                if entry.get("step") == state.global_step:
                    metrics.update({key: value for key, value in entry.items() if key.startswith("eval_")})
        return metrics

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained or evaluated, without the wrapper of its adapter."""
        model = base_model(self.trainer.model)
        assert isinstance(model, PreTrainedModel)
        return model

    def num_parameters(self) -> int:
        """Number of parameters, including an adapter; tied parameters count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def num_trainable_parameters(self) -> int:
        """Number of parameters that get gradients."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def train_and_record(job: Job, folder: RunFolder) -> dict[str, Any]:
    """Trains, saves and evaluates; then writes pictures and the model card to the folder. Returns the metrics.

    Weights and metrics come first. What comes after them can fail without an error: a warning says what is missing.

    Raises:
        RunInterrupted: SIGTERM or Ctrl-C; where it met the training there is a checkpoint of the last step.
        CheckpointWriteError: a checkpoint or the final model could not be written.
        DivergedError: the loss, a gradient or a weight is no longer finite.
    """
    trainer = job.trainer
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    try:
        with interrupt.listening():
            return _train_and_record(job, folder, interrupt)
    except RunInterrupted:
        if interrupt.is_training:  # what logs elsewhere closes its files
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        _close_group_at_exit()
        raise


def _train_and_record(job: Job, folder: RunFolder, interrupt: InterruptCallback) -> dict[str, Any]:
    trainer = job.trainer
    set_longest_input(trainer.processing_class, job.model.config)
    measured = _train(job, folder, interrupt)
    metrics = {
        **measured,
        **job.report.metrics,
        "steps": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "input_tokens_seen": trainer.state.num_input_tokens_seen,
        "tokens_per_second": getattr(trainer, "tokens_per_second", None),
        "num_parameters": job.num_parameters(),
        "num_trainable_parameters": job.num_trainable_parameters(),
    }
    metrics = {**_evaluate(job, folder, metrics, interrupt), **metrics, **peak_memory()}
    _record(trainer, folder, metrics)
    _write_the_rest(job, folder, metrics)
    finish_together(trainer)
    return metrics


def _train(job: Job, folder: RunFolder, interrupt: InterruptCallback) -> dict[str, Any]:
    """Trains and saves the weights; returns what was measured meanwhile."""
    trainer = job.trainer
    resume = None if folder.resume_checkpoint is None else str(folder.resume_checkpoint)
    if folder.resume_checkpoint is not None:
        check_resumable(trainer.model, folder.resume_checkpoint)
    start = -1 if resume is None else _step_of(resume)  # read now, because the run may delete the checkpoint
    covers_all = resume is None or (Path(resume) / TOTALS_FILE).is_file()
    if isinstance(trainer, HybridTrainer):
        trainer.before_publishing.append(folder.commit_records)
    result = trainer.train(resume_from_checkpoint=resume)
    with interrupt.deferred(), reporting_write_errors(folder.path, "The final model"):
        trainer.save_model(_internal_call=True)  # else it is pushed as well, which may fail
        folder.commit_records()
    if not covers_all and trainer.state.global_step == start:
        return {}
    return {key: value for key, value in result.metrics.items() if key != "total_flos"}


def _evaluate(job: Job, folder: RunFolder, metrics: Mapping[str, Any], interrupt: InterruptCallback) -> dict[str, Any]:
    """Metrics of the final weights. If they cannot be measured, those of the training are recorded all the same."""
    trainer = job.trainer
    try:
        number = interrupt.agree(trainer.args)
        if number and not job.is_evaluated:
            raise RunInterrupted(number, is_saved=False)
        return job.final_metrics()
    except (Exception, RunInterrupted) as error:
        _record(trainer, folder, {**metrics, **peak_memory()})
        if isinstance(error, RunInterrupted):
            error.is_trained = True
        else:
            error.add_note(
                f"The training is complete; its weights and metrics are in {folder.path}. {_how_to_repeat(folder)}"
            )
        raise


def _record(trainer: Trainer, folder: RunFolder, metrics: Mapping[str, Any]) -> None:
    with reporting_write_errors(folder.path, "The metrics"):
        folder.write_metrics(metrics)
        if is_main_process():
            trainer.state.save_to_json(str(folder.path / "trainer_state.json"))


def _write_the_rest(job: Job, folder: RunFolder, metrics: Mapping[str, Any]) -> None:
    """Pictures, card, further files and copies on the Hub: what fails here is said, and costs nothing of the run."""
    trainer, path = job.trainer, folder.path
    parts: dict[str, Callable[[], Any]] = {}
    if trainer.args.push_to_hub:  # by all processes, and first: it drafts a card of its own
        parts["the copy on the Hub"] = lambda: trainer.push_to_hub(commit_message="Model save")
    if is_main_process():
        parts[LOSS_CURVE_FILE] = lambda: plot_loss_curves(trainer.state.log_history, path / LOSS_CURVE_FILE)
        parts[CODEBOOK_FILE] = lambda: _plot_codebooks(trainer, path)
        parts[f"the model card {CARD_FILE}"] = lambda: _write_card(job, folder, metrics)
        if job.write_results is not None:
            write_results = job.write_results
            parts["the files of results"] = lambda: write_results(path)
        if trainer.args.push_to_hub and isinstance(trainer, PublishingTrainer):  # else it has pushed a card of its own
            push_records = trainer.push_records
            parts["the records on the Hub"] = lambda: push_records("Model card and figures of the run")
    missing = []
    for name, write in parts.items():
        try:
            write()
        except Exception as error:
            logger.debug("%s", name, exc_info=True)
            missing.append(f"{name} ({type(error).__name__}: {error})")
    if missing:
        logger.warning(
            "The training is complete; its weights and metrics are in %s. Not written as they should be: %s. %s",
            path,
            "; ".join(missing),
            _how_to_repeat(folder),
        )
    elif is_main_process():
        logger.info("All files of this run are in %s", path)


def _how_to_repeat(folder: RunFolder) -> str:
    """How to do again what comes after the training."""
    if list_checkpoints(folder.path):
        return (
            "To repeat what is missing: the same options with `resume_from_checkpoint=last`, which trains no further."
        )
    return (
        f"To evaluate the weights: the recipe `evaluate` with `model_name_or_path={folder.path}`. The losses of all steps are in "
        "trainer_state.json."
    )


def _write_card(job: Job, folder: RunFolder, metrics: Mapping[str, Any]) -> None:
    """Writes the card of the run, whatever it says.

    Raises:
        ValueError: it is written, but the Hub or a reader would object to it.
    """
    text = make_card(job, folder, metrics).render()
    (folder.path / CARD_FILE).write_text(text, encoding="utf-8")
    problems = model_card_problems(text)
    if problems:
        raise ValueError(f"written, but to be corrected before it is published: {'; '.join(problems)}")


def how_to_continue(error: RunInterrupted, folder: RunFolder, *, is_command: bool) -> str:
    """What to tell the user whose run a signal ended.

    Args:
        error: raised by `train_and_record`.
        folder: of the run.
        is_command: whether the words of this process are the command of the run.
    """
    newest = next(iter(list_checkpoints(folder.path)), None)
    if error.is_trained:
        ended = f"Stopped by {error.signal.name} after the training: its weights and metrics are in {folder.path}"
        return f"{ended}, only the evaluation is missing. {_how_to_repeat(folder)}"
    if newest is None:
        return f"Stopped by {error.signal.name}; {folder.path} holds no checkpoint."
    saved = f"{newest} is complete" if error.is_saved else f"the newest checkpoint is {newest}"
    if not is_command:
        return f'Stopped by {error.signal.name}; {saved}. To continue: resume_from_checkpoint="last" with the same options.'
    words = [word for word in sys.orig_argv[1:] if not word.startswith("--resume_from_checkpoint=")]
    while "--resume_from_checkpoint" in words:
        place = words.index("--resume_from_checkpoint")
        del words[place : place + 2]
    is_script = bool(words) and Path(words[0]).name == "hf-hybrid"  # of this library, on the path
    start = ["hf-hybrid", *words[1:]] if is_script else [Path(sys.executable).name, *words]
    command = shlex.join([*start, "--resume_from_checkpoint", "last"])
    launched = " (with the launcher of this run)" if dist.is_available() and dist.is_initialized() else ""
    return f"Stopped by {error.signal.name}; {saved}. To continue{launched}: {command}"


def _step_of(checkpoint: str) -> int:
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def finish_together(trainer: Trainer) -> None:
    """Waits for all processes of a distributed run, and closes their group when the interpreter exits.

    Nothing else closes it, and a process that exits with an open group sometimes aborts, whereupon the launcher kills
    the others. Further recipes in the same process may need the group, so it stays open until then.
    """
    trainer.accelerator.wait_for_everyone()
    _close_group_at_exit()


def _close_group_at_exit() -> None:
    if dist.is_available() and dist.is_initialized():
        atexit.unregister(_close_process_group)
        atexit.register(_close_process_group)


def _close_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _plot_codebooks(trainer: Trainer, folder: Path) -> None:
    """Draws the use of the codewords and their perplexity over the steps, for models with codebooks."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CodebookCallback) and has_codebooks(trainer.model):
            codebook_usage(trainer.model, folder / CODEBOOK_FILE, history=callback.history)

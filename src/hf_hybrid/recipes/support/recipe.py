"""A recipe that trains a model: one object that holds its arguments and builds, trains and evaluates its job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import set_seed

from ...data.records import counting_left_out
from ...data.truncation import counting_truncated
from ...training.callbacks import RunInterrupted
from ...training.run_folder import RunFolder, is_main_process
from .main_options import MAIN_OPTIONS, TRAINING_ONLY
from .options import parse_arguments, require, resolved_arguments
from .runs import Job, finish_together, how_to_continue, set_up_logging, train_and_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The definition of a training task.

    Attributes:
        name: name of its module in `hf_hybrid.recipes`.
        description: text shown by `--help`; its first line says what the recipe does.
        arguments: dataclasses of data, model and training; the last is a `TrainingArguments`.
        build: function that makes the job from one instance of each. With `evaluate_only=True` the job has no training
            data.
    """

    name: str
    description: str
    arguments: tuple[type, type, type]
    build: Callable[..., Job]

    def train(self, args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The `main` of the recipe: parses arguments, builds, trains, evaluates, saves and writes the records.

        Args:
            args: see `parse_arguments`.

        Returns:
            The content of `metrics.json`.

        Raises:
            ValueError: an option, the data, the tokenizer or the checkpoint cannot be used.
            FileExistsError: the output folder is not empty.
            BlockingIOError: another run uses the output folder.
            CheckpointWriteError: a checkpoint or the final model could not be written.
            DivergedError: the loss, a gradient or a weight is no longer finite (a `FloatingPointError`).
            RunInterrupted: SIGTERM or Ctrl-C ended the run (a `SystemExit`).
            ImportError: a package that training needs is missing.
        """
        groups = parse_arguments(self.arguments, args, self.description, MAIN_OPTIONS.get(self.name, ()))
        training_args = groups[-1]
        set_up_logging(training_args)
        if training_args.output_dir is None:
            raise ValueError("`output_dir` is required: the folder that receives the checkpoint and all records.")
        require("Training", "matplotlib", extra="train")  # for the loss curve: fail now rather than after training
        if training_args.hub_token is not None:
            raise ValueError(
                "`hub_token` would be written into the run folder: set HF_TOKEN or run `hf auth login` instead."
            )
        folder = RunFolder(training_args.output_dir, training_args.resume_from_checkpoint)
        folder.check_sources(resolved_arguments(*groups))
        set_seed(training_args.seed)
        job = self._job(groups)
        try:
            training = {item.name for item in fields(training_args)}
            with folder.recording(resolved_arguments(*groups), training=training):
                return train_and_record(job, folder)
        except RunInterrupted as error:
            if is_main_process():
                logger.warning(how_to_continue(error, folder, is_command=args is None))
            raise

    def _job(self, groups: Sequence[Any], **options: Any) -> Job:
        """Builds the job; its metrics count the corrupt records that are left out, and the rows that are cut."""
        with counting_left_out() as left_out, counting_truncated() as truncated:
            job = self.build(*groups, **options)
        if truncated:
            job.report.metrics["truncated_rows"] = truncated
        if getattr(groups[0], "on_bad_record", "error") == "skip":
            job.report.metrics["skipped_records"] = len(left_out)
        return job

    def evaluate(self, args: Sequence[str] | Mapping[str, Any], description: str | None = None) -> dict[str, Any]:
        """Evaluates a checkpoint with the data options and the metrics of the recipe.

        Args:
            args: see `parse_arguments`.
            description: text shown by `--help`; None for that of the recipe.

        Returns:
            The content of `metrics.json`.

        Raises:
            ValueError: an option, the data or the checkpoint cannot be used.
            FileExistsError: the output folder is not empty.
            ImportError: a package that evaluation needs is missing.
        """
        main_options = [name for name in MAIN_OPTIONS.get(self.name, ()) if name not in TRAINING_ONLY]
        groups = parse_arguments(self.arguments, args, description or self.description, main_options)
        _, model_args, training_args = groups
        set_up_logging(training_args)
        if model_args.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is required: the checkpoint to evaluate.")
        if training_args.output_dir is None:
            raise ValueError("`output_dir` is required: the folder that receives the metrics.")
        if getattr(training_args, "lora_rank", None) is not None:
            raise ValueError(
                "`lora_rank` is for training; to evaluate an adapter pass its folder as `model_name_or_path`."
            )
        folder = RunFolder(training_args.output_dir)
        job = self._job(groups, evaluate_only=True)
        with folder.recording({"recipe": self.name, **resolved_arguments(*groups)}):
            metrics = {**job.final_metrics(), **job.report.metrics, "num_parameters": job.num_parameters()}
            folder.write_metrics(metrics)
            if is_main_process() and job.write_results is not None:
                job.write_results(folder.path)
            finish_together(job.trainer)
        for name, value in metrics.items():
            logger.info("%s = %s", name, value)
        return metrics

"""Trainers with the parameter groups of hybrid models, a time limit and logged throughput."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy

from ..compatibility import device_without_number
from ..modeling.losses import align_labels, mean_over_labels
from ..ops.branches import uses_cpu_form
from .activations import ActivationCallback, has_routers
from .adapters import base_model, is_adapted, save_adapted_config
from .best_metric import check_best_metric
from .callbacks import EpochCallback, TimeLimitCallback
from .checkpoints import STAGING_FOLDER, publish_checkpoint, reporting_write_errors, rotate_checkpoints
from .codebooks import CodebookCallback, has_codebooks
from .cpu_products import fast_products, limit_kept_products
from .divergence import DivergenceMonitor, diverged, lost_weights
from .muon import MuonAdamW
from .parameter_groups import parameter_groups
from .pieces_trainer import PiecesTrainer
from .publishing import PublishingTrainer
from .resuming import TOTALS_FILE, RunTotals, apply_settings, optimizer_settings
from .shards_trainer import ShardsTrainer, lacking_weights
from .streams_trainer import StreamsTrainer

logger = logging.getLogger(__name__)


class EpochLengthSampler(LengthGroupedSampler):
    """Batches of similar lengths in an order that depends on (seed, epoch) alone.

    The sampler of Transformers draws from the global generator, so a resumed epoch would have another order than the
    interrupted one.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator: torch.Generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def smoothing_excess(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Cross-entropy with the uniform distribution minus that with the labels: the unweighted term of label smoothing.

    Args:
        logits: (..., V).
        labels: (...), -100 is ignored.
        num_items_in_batch: divisor of the sum; default: the number of labels that are not ignored.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    counted = labels != -100
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return mean_over_labels(torch.where(counted, chosen - logits.mean(-1), 0).sum(), labels, num_items_in_batch)


class _SumsCallback(TrainerCallback):
    """Continues the sums of the run that is resumed, which `Trainer` sets to zero just before this event."""

    def __init__(self, trainer: HybridTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._continue_sums()


class HybridTrainer(PublishingTrainer, PiecesTrainer, StreamsTrainer, ShardsTrainer):
    """`Trainer` with parameter groups by name, a time limit and tokens per second in its logs.

    A run that is resumed logs and reports as if it had never stopped: losses, runtime and throughput cover all its sessions up to
    the checkpoints from which they went on. Learning rates, weight decay and schedule are those of `args`, not of the checkpoint.

    Models with routers log the share of active tokens of each layer as well (`ActivationCallback`), those with codebooks their
    perplexity (`CodebookCallback`).

    The arguments are those of `Trainer`; pass `HybridTrainingArguments` as `args` for the additional options.

    Attributes:
        before_publishing: functions that are called, in the main process, when a checkpoint is complete but has not got its name yet.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_staging = self._needs_loss_only = False
        self.before_publishing: list[Callable[[], None]] = []
        self._earlier: RunTotals | None = None  # of the run that is resumed
        self._session_start = time.time()
        self._divergence: DivergenceMonitor | None = None
        super().__init__(*args, **kwargs)
        self._time_limit: TimeLimitCallback | None = None
        max_minutes = getattr(self.args, "max_minutes", None)
        if max_minutes is not None:
            self._time_limit = TimeLimitCallback(max_minutes)
            self.add_callback(self._time_limit)
        self._epochs = EpochCallback(self.train_dataset)
        self.add_callback(self._epochs)
        self._activations = ActivationCallback() if self.model is not None and has_routers(self.model) else None
        if self._activations is not None:
            self.add_callback(self._activations)
        self._codebooks = self._codebook_callback()
        self.add_callback(_SumsCallback(self))  # the last: what the others carry is continued after their beginning
        self._interval_start: tuple[float, int] | None = None
        self._paused_seconds = 0.0
        self._timed_tokens, self._timed_seconds = 0, 0.0

    def _codebook_callback(self) -> CodebookCallback | None:
        """The callback that monitors the codebooks, if there are any: that of the caller, or a new one."""
        if self.model is None or not has_codebooks(self.model):
            return None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, CodebookCallback):
                return callback
        callback = CodebookCallback()
        self.add_callback(callback)
        return callback

    @property
    def tokens_per_second(self) -> float | None:
        """Mean input tokens per second over the logged intervals, excluding evaluations and checkpoints."""
        return self._timed_tokens / self._timed_seconds if self._timed_seconds > 0 else None

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer from `parameter_groups`; optimizers that choose their own groups keep them."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            target: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            chooses_groups = {"params", "model", "optimizer_dict"} & options.keys()
            is_plain = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
            muon_learning_rate = getattr(self.args, "muon_learning_rate", None)
            if muon_learning_rate is not None:
                if optimizer_class is not torch.optim.AdamW:
                    chosen = getattr(self.args.optim, "value", self.args.optim)
                    raise ValueError(
                        f"`muon_learning_rate` trains the matrices with Muon and the rest with AdamW, but `optim` is "
                        f"{chosen!r}: use `optim='muon'` or leave `muon_learning_rate` unset."
                    )
                optimizer_class = MuonAdamW
            if is_plain and not chooses_groups:
                groups = parameter_groups(
                    target,
                    learning_rate=self.args.learning_rate,
                    weight_decay=self.args.weight_decay,
                    ssm_learning_rate=getattr(self.args, "ssm_learning_rate", None),
                    muon_learning_rate=muon_learning_rate,
                    head_learning_rate=getattr(self.args, "head_learning_rate", None),
                )
                self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Creates the scheduler; under a time limit it reaches its end when the time is over.

        The factor at step s is f(max(s, S·t/T)) for a schedule f over S steps after t of T minutes.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._time_limit is not None and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [
                self._follow_time(factor, num_training_steps, self._time_limit) for factor in scheduler.lr_lambdas
            ]
        return scheduler

    @staticmethod
    def _follow_time(
        factor: Callable[[int], float], num_training_steps: int, limit: TimeLimitCallback
    ) -> Callable[[int], float]:
        def follow(step: int) -> float:
            return factor(max(step, min(num_training_steps, int(num_training_steps * limit.elapsed_fraction))))

        return follow

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.num_data_groups
            sampler = EpochLengthSampler(batch, lengths=sampler.lengths, seed=seed)
            self._epochs.add(sampler)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        # Rows are always evaluated in order, so that predictions can be matched with them.
        if eval_dataset is None or not hasattr(eval_dataset, "__len__") or self.args.world_size > 1:
            return None
        return SequentialSampler(eval_dataset)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of the model, plus label smoothing; logits are computed only if they are asked for.

        With label smoothing `Trainer` would withhold the labels from the model and compute the loss from the logits,
        which loses auxiliary terms and leaves encoder-decoders without decoder inputs.
        """
        labels: Any = inputs.get("labels")
        smoother: Any = self.label_smoother
        base: Any = base_model(self.accelerator.unwrap_model(model))
        has_labels = labels is not None or inputs.get("shift_labels") is not None
        smooths = smoother is not None and self.compute_loss_func is None and labels is not None
        # With labels, the adaptive softmax returns no logits in training, and it has no auxiliary terms.
        is_adaptive = bool(getattr(getattr(base, "config", None), "adaptive_cutoffs", None))
        takes_options = getattr(base, "accepts_loss_options", False) and not (smooths and is_adaptive)
        if takes_options and has_labels and self.compute_loss_func is None:
            inputs = {**inputs, "skip_logits": self._needs_loss_only or not return_outputs}
            if smooths:
                inputs["label_smoothing"] = smoother.epsilon
            return self._loss_of_model(model, inputs, return_outputs, num_items_in_batch)
        if not smooths or labels.is_floating_point() or is_adaptive:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._loss_of_model(model, inputs, True, num_items_in_batch)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        if type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # one of Transformers
            labels = align_labels(labels, inputs.get("shift_labels"), logits.shape[:2], inputs.get("position_ids"))
        excess = smoothing_excess(logits, labels, num_items_in_batch if self.model_accepts_loss_kwargs else None)
        if self._loss_is_multiplied(num_items_in_batch):
            excess = excess * (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        loss = loss + smoother.epsilon * excess
        return (loss, outputs) if return_outputs else loss

    def _loss_of_model(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Any:
        """The loss as the model computes it, without the smoother of `Trainer`."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.label_smoother = smoother

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """One evaluation step; see `Trainer`. Without logits where the loss alone is wanted."""
        self._needs_loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        finally:
            self._needs_loss_only = False

    def _loss_is_multiplied(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether `Trainer` multiplies the loss by the number of processes, which `num_items_in_batch` counts together."""
        return (
            self.args.average_tokens_across_devices
            and self.model_accepts_loss_kwargs
            and num_items_in_batch is not None
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the throughput since the previous log (excluding evaluations and checkpoints).

        Raises:
            DivergedError: the training loss or a gradient is no longer finite.
        """
        if "loss" in logs:
            self._refuse_divergence()
        if "loss" in logs:
            now, tokens = time.perf_counter(), self.state.num_input_tokens_seen
            if self._interval_start is not None and tokens > self._interval_start[1]:
                seconds = max(now - self._interval_start[0] - self._paused_seconds, 1e-9)
                new_tokens = tokens - self._interval_start[1]
                logs["tokens_per_second"] = round(new_tokens / seconds, 1)
                self._timed_tokens, self._timed_seconds = (
                    self._timed_tokens + new_tokens,
                    self._timed_seconds + seconds,
                )
            self._interval_start, self._paused_seconds = (now, tokens), 0.0
            if self._activations is not None:  # here, so that every callback that reports logs sees them
                logs.update(self._activations.entries(self.state.global_step))
            if self._codebooks is not None:
                logs.update(self._codebooks.entries(self.model, self.state.global_step))
        super().log(logs, None if start_time is None else start_time - self._earlier_seconds)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; see `Trainer.train` of Transformers."""
        limit_kept_products()
        self._interval_start, self._earlier, self._divergence = None, None, None
        self._timed_tokens, self._timed_seconds = 0, 0.0
        if self._time_limit is not None:
            self._time_limit.earlier_seconds = self._time_limit.elapsed_fraction = 0.0
        self._warn_of_shards()
        self._check_best_metric()
        return super().train(*args, **kwargs)

    def _check_best_metric(self) -> None:
        check_best_metric(self)

    def _warn_of_shards(self) -> None:
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.args.save_strategy != SaveStrategy.NO:
            engine, whole = "FSDP of Accelerate", "`fsdp_state_dict_type: FULL_STATE_DICT`"
            if self.is_deepspeed_enabled:
                engine, whole = "DeepSpeed", "`stage3_gather_16bit_weights_on_model_save: true`"
            logger.warning(
                f"The checkpoints of a run under {engine} cannot be resumed (`resume_from_checkpoint`), only started from: their weights are "
                f"whole with {whole}. Those of `fsdp_size` can be resumed."
            )

    @property
    def _earlier_seconds(self) -> float:
        """Seconds of the sessions before this one."""
        return 0.0 if self._earlier is None else self._earlier.seconds

    def _continue_sums(self) -> None:
        self._session_start = time.time()
        # The state of a checkpoint would bring back the intervals of logs, evaluations and checkpoints.
        self.state.compute_steps(self.args, self.state.max_steps)
        earlier = self._earlier
        if earlier is None:
            return
        pending = earlier.pending_losses
        is_same_world = len(pending) == self.args.world_size
        mean = sum(pending) / max(len(pending), 1)
        self._tr_loss.fill_(pending[self.args.process_index] if is_same_world else mean)
        self._total_loss_scalar = earlier.loss_sum
        self._globalstep_last_logged = earlier.last_logged_step
        self._initial_global_step = self._initial_num_input_tokens_seen = 0
        self._timed_tokens, self._timed_seconds = earlier.timed_tokens, earlier.timed_seconds
        for name, monitor in self._monitors().items():
            monitor.load_state_dict(earlier.monitors.get(name, {}))

    def _monitors(self) -> dict[str, Any]:
        """The callbacks that observe the model between two logs."""
        found = {"activations": self._activations, "codebooks": self._codebooks}
        return {name: monitor for name, monitor in found.items() if monitor is not None}

    def _sums(self) -> RunTotals:
        """The sums up to now; to be called by all processes."""
        return RunTotals(
            loss_sum=self._total_loss_scalar,
            pending_losses=self.accelerator.gather(self._tr_loss.reshape(1)).tolist(),
            last_logged_step=self._globalstep_last_logged,
            seconds=self._earlier_seconds + time.time() - self._session_start,
            timed_tokens=self._timed_tokens,
            timed_seconds=self._timed_seconds,
            monitors={name: monitor.state_dict() for name, monitor in self._monitors().items()},
        )

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        self._refuse_lost_weights()
        return super()._finalize_training(trial, num_train_samples, start_time - self._earlier_seconds)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_stream(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        settings = optimizer_settings(optimizer)
        with device_without_number(self.args):
            super()._load_optimizer_and_scheduler(checkpoint)
        self._earlier = RunTotals.read(Path(checkpoint))
        if self._time_limit is not None:  # before the schedule, which follows it
            self._time_limit.earlier_seconds = self._earlier_seconds
            self._time_limit.elapsed_fraction = self._earlier_seconds / self._time_limit.seconds
        apply_settings(optimizer, self.lr_scheduler, settings)
        if self._earlier is None:
            logger.warning(
                "%s holds no %s: the training loss, runtime and throughput of this run will be those of the steps after it.",
                checkpoint,
                TOTALS_FILE,
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A finished run that is resumed has nothing left to train, but `Trainer` checks only after another step.
        is_over = self._time_limit is not None and self._time_limit.elapsed_fraction >= 1.0
        if is_over or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; the first one starts the clock for the throughput."""
        if self._interval_start is None:
            self._interval_start, self._paused_seconds = (time.perf_counter(), self.state.num_input_tokens_seen), 0.0
        with fast_products(self.args.device):
            loss = super().training_step(*args, **kwargs)
        if self._divergence is None:
            model = args[0] if args else kwargs["model"]
            self._divergence = DivergenceMonitor(model, gradients_overflow=self.args.fp16)
        is_complete = self.accelerator.sync_gradients
        self._divergence.observe(loss, self.state.global_step + 1, is_complete=is_complete)
        if is_complete and self._checks_every_step:
            self._refuse_divergence()
        return loss

    @property
    def _checks_every_step(self) -> bool:
        """Whether a value can be read without waiting for the device; else divergence is noticed when it is waited for anyway."""
        return uses_cpu_form(self.args.device)

    def _refuse_divergence(self) -> None:
        if self._divergence is None or self.args.logging_nan_inf_filter:
            return
        step = self._divergence.step()
        if step is not None:
            what, grown = self._divergence.describe(self.optimizer.param_groups if self.optimizer is not None else ())
            raise diverged(step, what, Path(str(self.args.output_dir)), self.args, grown)

    def _refuse_lost_weights(self) -> None:
        """Ends the run rather than letting a checkpoint that nothing can be done with displace a good one."""
        self._refuse_divergence()
        model: Any = self.model
        lost = lost_weights(model)
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            what = f"weights are not finite ({', '.join(lost[:3])}{more})."
            raise diverged(self.state.global_step, what, Path(str(self.args.output_dir)), self.args)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; the time does not count as training time."""
        start = time.perf_counter()
        if self.is_in_train:
            self._refuse_divergence()
        metrics = super().evaluate(*args, **kwargs)
        self._paused_seconds += time.perf_counter() - start
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir if output_dir is not None else self.args.output_dir
        if is_adapted(self.model) and self.args.should_save and folder is not None:
            save_adapted_config(self.model, folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        start = time.perf_counter()
        run = Path(self._get_output_dir(trial))
        self._refuse_lost_weights()
        with reporting_write_errors(run, f"The checkpoint of step {self.state.global_step}"):
            self._write_checkpoint(model, trial, run)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / f"checkpoint-{self.state.global_step}"))
        self._paused_seconds += time.perf_counter() - start

    def _write_checkpoint(self, model: Any, trial: Any, run: Path) -> None:
        """Write beside, then rename; older checkpoints go only after that."""
        final = run / f"checkpoint-{self.state.global_step}"
        staged = run / STAGING_FOLDER / final.name
        if self.args.should_save:
            if not Path(str(self.args.output_dir)).is_dir():  # it would be made anew, without what it held
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.args.output_dir))
            shutil.rmtree(staged.parent, ignore_errors=True)  # of a killed run
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_staging = False
        self._save_process_state(staged)
        sums = self._sums()
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == final or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))  # again: with the place of the best checkpoint
            sums.write(staged)
            for function in self.before_publishing:
                function()
            publish_checkpoint(staged, final)
            rotate_checkpoints(run, self.args.save_total_limit, final, self.state.best_model_checkpoint)
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING_FOLDER) if self._is_staging else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_staging:  # else it is pushed when it is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of missing weights, except of tied ones whose partner was loaded: a checkpoint stores these once."""
        missing = lacking_weights(self.model, load_result.missing_keys)
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        several = self.args.world_size > 1
        name = f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth"
        if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, name)):
            logger.warning(
                "%s holds no %s, the state of the random numbers: dropout and sampling will differ from those of the uninterrupted "
                "run. (Was it saved by another number of processes?)",
                checkpoint,
                name,
            )
        super()._load_rng_state(checkpoint)


class HybridSeq2SeqTrainer(HybridTrainer, Seq2SeqTrainer):
    """`Seq2SeqTrainer` (generation in the evaluation) with the additions of `HybridTrainer`."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`. `Seq2SeqTrainer` would also keep the rows that several processes repeat to fill up the last batch."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

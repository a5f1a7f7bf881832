"""Trains one contender with the trainer and the arguments of the pretraining recipes, and follows its held-out loss."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, PrinterCallback, TrainerCallback, default_data_collator, set_seed
from transformers.optimization import Adafactor
from transformers.trainer_utils import get_last_checkpoint

from hf_hybrid.data.span_corruption import SpanCorruptionCollator
from hf_hybrid.training.arguments import PretrainingArguments
from hf_hybrid.training.parameter_groups import parameter_groups
from hf_hybrid.training.text_tokens import text_mask, text_metrics, token_results
from hf_hybrid.training.trainer import HybridTrainer

from .contenders import Contender, count_parameters
from .optimizers import Lion, RmsAdamW, round_moments
from .settings import NEXT_TOKEN, RANDOM_ROWS, SPAN_CORRUPTION, Settings
from .text import Text, byte_lengths, datasets_of

MEASURED_STEPS = 4  # of the rate of a contender, after one that is not counted


class ProcessorClock(TrainerCallback):
    """Processor seconds of the training steps, of all threads of this process; evaluations and checkpoints are not counted."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps: list[float] = []
        self._start = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        earlier = [entry["processor_seconds"] for entry in state.log_history if "processor_seconds" in entry]
        self.seconds = earlier[-1] if earlier else 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.append(time.process_time() - self._start)
        self.seconds += self.steps[-1]


class GrowingBatches(Sampler[list[int]]):
    """Batches of given sizes in a random order of the rows, which begins anew when all were seen.

    Args:
        rows: number of rows of the data.
        sizes: rows of each batch.
        seed: seed of the order.
    """

    def __init__(self, rows: int, sizes: Sequence[int], seed: int) -> None:
        self.rows, self.sizes, self.seed = rows, sizes, seed

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for size in self.sizes:
            while len(order) < size:
                order += torch.randperm(self.rows, generator=generator).tolist()
            yield order[:size]
            del order[:size]


class LearningTrainer(HybridTrainer):
    """`HybridTrainer` with the other optimizers and growing batches, whose logs contain the processor seconds."""

    def __init__(self, *args: Any, settings: Settings, clock: ProcessorClock, **kwargs: Any) -> None:
        self.settings, self.clock = settings, clock
        super().__init__(*args, **kwargs)
        self.add_callback(clock)
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Those of the library, or one of the laboratory on the same parameter groups."""
        settings = self.settings
        if self.optimizer is None and settings.optimizer not in ("adamw", "muon"):
            groups = parameter_groups(
                self.model if model is None else model,
                learning_rate=settings.learning_rate,
                ssm_learning_rate=settings.ssm_learning_rate,
                weight_decay=settings.weight_decay,
            )
            if settings.optimizer == "adafactor":
                self.optimizer = Adafactor(
                    groups, lr=settings.learning_rate, scale_parameter=True, relative_step=False, warmup_init=False
                )
            elif settings.optimizer == "rms_adamw":
                self.optimizer = RmsAdamW(groups, betas=(0.9, settings.beta2), eps=self.args.adam_epsilon)
            else:
                self.optimizer = Lion(groups, settings.learning_rate)
        optimizer = super().create_optimizer(model)
        if settings.rounded_moments:
            optimizer.register_step_post_hook(round_moments)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """The usual one, or one whose batches grow."""
        if self.settings.batch_growth == 1:
            return super().get_train_dataloader()
        sizes = self.settings.batch_sizes(self.args.max_steps)
        batches = GrowingBatches(len(self.train_dataset), sizes, self.args.seed)  # type: ignore[arg-type]
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the processor seconds."""
        super().log(logs | {"processor_seconds": self.clock.seconds}, start_time)


def objective_results(logits: Any, labels: torch.Tensor, objective: str) -> torch.Tensor:
    """`token_results` of the labels that are predicted: under `NEXT_TOKEN` each by the token before it."""
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    if objective == NEXT_TOKEN:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return token_results(logits, labels)


def held_out_metrics(
    results: np.ndarray, labels: np.ndarray, special_ids: Sequence[int], lengths: np.ndarray
) -> dict[str, float]:
    """Means over held-out labels.

    Args:
        results: (N, L, 2) of `token_results`.
        labels: (N, L) their labels.
        special_ids: ids that are not text.
        lengths: (V,) bytes of each token.

    Returns:
        `text_loss`, `text_accuracy` and `nats_per_byte` of text tokens, `all_loss` with the special ones.
    """
    is_text = text_mask(labels, special_ids)
    nats_per_byte = float(results[is_text][:, 0].sum() / lengths[labels[is_text]].sum())
    return {**text_metrics(results, labels, special_ids), "nats_per_byte": nats_per_byte}


def training_arguments(settings: Settings, folder: Path, seed: int, steps: int, evaluations: int) -> Any:
    """The arguments of the pretraining recipes with these settings; no evaluation if there are none."""
    every = max(1, -(-steps // max(1, evaluations)))
    schedule: dict[str, Any] = {}
    if settings.schedule == "warmup_stable_decay":
        schedule = {"num_decay_steps": max(1, round(settings.decay * steps)), "decay_type": "linear"}
    return PretrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        # The default of pretraining, Muon, would give its rate to the matrices of the others too.
        optim="muon" if settings.optimizer == "muon" else "adamw_torch",
        learning_rate=settings.learning_rate,
        ssm_learning_rate=settings.ssm_learning_rate,
        muon_learning_rate=settings.matrix_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=settings.schedule,
        lr_scheduler_kwargs=schedule,
        warmup_steps=settings.warmup,
        eval_strategy="steps" if evaluations else "no",
        eval_steps=every,
        save_strategy="steps" if evaluations else "no",
        save_steps=every,
        save_total_limit=1,
        logging_steps=every,
        prediction_loss_only=False,
        train_sampling_strategy="random" if settings.order == RANDOM_ROWS else "sequential",
        include_num_input_tokens_seen="no",
        torch_compile=settings.compile,
        bf16=settings.bf16,
        seed=seed,
        data_seed=seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def make_trainer(
    contender: Contender,
    settings: Settings,
    text: Text,
    width: int,
    *,
    folder: Path,
    seed: int,
    steps: int,
    evaluations: int,
    rows: int,
) -> LearningTrainer:
    """Model, data and trainer of a run; `rows` are held out."""
    set_seed(seed)
    model = contender.build(settings, text.vocab_size, width)
    train, held_out = datasets_of(text, settings, contender.objective, rows, seed=seed)
    lengths, special_ids = byte_lengths(text.tokenizer, text.vocab_size), text.special_ids

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:] if contender.objective == NEXT_TOKEN else prediction.label_ids
        return held_out_metrics(prediction.predictions, labels, special_ids, lengths)

    return LearningTrainer(
        settings=settings,
        clock=ProcessorClock(),
        model=model,
        args=training_arguments(settings, folder, seed, steps, evaluations),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=SpanCorruptionCollator(model)
        if contender.objective == SPAN_CORRUPTION
        else default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: objective_results(logits, labels, contender.objective),
    )


def seconds_per_step(contender: Contender, settings: Settings, text: Text, width: int) -> float:
    """Processor seconds of a training step, optimizer included: the median of a few, without the first.

    Where batches grow, it is that of a step of the mean size.
    """
    growth = statistics.mean(settings.batch_sizes(3)) / settings.batch_size
    settings = settings.changed({"batch_growth": 1})
    with tempfile.TemporaryDirectory(prefix="learning-") as folder:
        trainer = make_trainer(
            contender,
            settings,
            text,
            width,
            folder=Path(folder),
            seed=0,
            steps=MEASURED_STEPS + 1,
            evaluations=0,
            rows=1,
        )
        trainer.train()
        return growth * statistics.median(trainer.clock.steps[1:])


def train_contender(
    contender: Contender,
    settings: Settings,
    text: Text,
    width: int,
    *,
    folder: Path,
    seed: int,
    steps: int,
    evaluations: int,
    rows: int,
) -> dict[str, Any]:
    """Trains a contender, from the last checkpoint in `folder` if there is one.

    Returns:
        `parameters`, `steps`, `seconds` (processor seconds of the training steps) and `curve`: a list of `step`, `tokens` (input
        tokens seen), `seconds` and the metrics of `held_out_metrics`. A run whose loss is no longer finite has `diverged`.
    """
    trainer = make_trainer(
        contender,
        settings,
        text,
        width,
        folder=folder,
        seed=seed,
        steps=steps,
        evaluations=evaluations,
        rows=rows,
    )
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    diverged = False
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError:
        diverged = True
    history = [entry for entry in trainer.state.log_history if "eval_text_loss" in entry]
    if not diverged and (not history or history[-1]["step"] < steps):
        trainer.evaluate()
        history = [entry for entry in trainer.state.log_history if "eval_text_loss" in entry]
    tokens = [settings.length * rows for rows in accumulate(settings.batch_sizes(steps))]
    curve = [
        {
            "step": entry["step"],
            "tokens": tokens[entry["step"] - 1],
            "seconds": round(entry["processor_seconds"], 2),
            **{name: entry[f"eval_{name}"] for name in ("text_loss", "text_accuracy", "nats_per_byte", "all_loss")},
        }
        for entry in history
    ]
    return {
        "parameters": count_parameters(trainer.model),
        "steps": trainer.state.global_step,
        "seconds": round(trainer.clock.seconds, 2),
        "diverged": diverged,
        "curve": curve,
    }

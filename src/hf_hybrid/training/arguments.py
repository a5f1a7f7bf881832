"""Training arguments: those of Transformers, and additions for hybrid models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import IntervalStrategy, Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .adapters import check_lora_options

_TRAINER_FIELDS = {item.name: item for item in fields(TrainingArguments)}
SAMPLING_STRATEGIES: Any = _TRAINER_FIELDS["train_sampling_strategy"].metadata["choices"]

MUON = "muon"
MUON_LEARNING_RATE = 5e-3
_ADAMW: Any = _TRAINER_FIELDS["optim"].default  # the AdamW that Transformers prefers for the installed torch
# What training arguments accept at least; Transformers and torch find most of these only after data and model were loaded, or after
# the last step.
_AT_LEAST = {
    **dict.fromkeys(
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps "
        "context_parallel_size generation_num_beams generation_max_length".split(),
        1,
    ),
    "max_steps": -1,
    **dict.fromkeys(
        "num_train_epochs learning_rate ssm_learning_rate muon_learning_rate head_learning_rate weight_decay adam_epsilon max_grad_norm "
        "warmup_steps max_minutes dataloader_num_workers seed data_seed label_smoothing_factor adam_beta1 adam_beta2".split(),
        0,
    ),
}
_BELOW = {"seed": 2**32, "data_seed": 2**32, "label_smoothing_factor": 1, "adam_beta1": 1, "adam_beta2": 1}
_INTERVALS = {"save_strategy": "save_steps", "eval_strategy": "eval_steps", "logging_strategy": "logging_steps"}
_OPTIM_HELP = (
    "Optimizer: `muon` (Muon for the matrices of the blocks, AdamW at `learning_rate` for the rest), `adamw_torch`, or another "
    "name that Transformers knows."
)


def check_numbers(arguments: TrainingArguments) -> None:
    """Rejects numbers that no training can follow.

    Raises:
        ValueError: a number is not finite, or out of its range; the message names the argument.
    """
    for item in fields(arguments):
        value = getattr(arguments, item.name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{item.name}` must be a finite number; got {value}.")
        least, limit = _AT_LEAST.get(item.name), _BELOW.get(item.name)
        if (least is not None and value < least) or (limit is not None and value >= limit):
            wanted = [f"at least {least}"] if least is not None else []
            wanted += [f"below {limit}"] if limit is not None else []
            raise ValueError(f"`{item.name}` must be {' and '.join(wanted)}; got {value}.")
    for strategy, name in _INTERVALS.items():
        chosen, interval = getattr(arguments, strategy), getattr(arguments, name)
        if getattr(chosen, "value", chosen) == "steps" and isinstance(interval, (int, float)) and interval <= 0:
            raise ValueError(f"`{name}` must be above 0 with `{strategy}` steps; got {interval}.")


@dataclass
class HybridTrainingArguments(TrainingArguments):
    """`TrainingArguments` with a learning rate for state space parameters, Muon, a time limit and token counts.

    `optim="muon"` becomes AdamW with a `muon_learning_rate`, which is what records and checkpoints hold: the plain `Trainer` then
    trains everything with AdamW.
    """

    optim: str = field(default=_ADAMW, metadata={"help": _OPTIM_HELP})
    ssm_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the state space parameters (no weight decay). Default: `learning_rate`."},
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the matrices of the blocks under `optim='muon'`, which it implies. Default: 5e-3 with "
            "`optim='muon'`."
        },
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Stop after this many minutes of training, evaluate and save. The learning rate schedule then "
            "follows whichever is further ahead, the steps or the time."
        },
    )
    context_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Cut every text over this many processes, each of which holds a piece of it. The batch size is then that of a "
            "group of so many processes."
        },
    )
    fsdp_size: int = field(
        default=1,
        metadata={
            "help": "Shard parameters, gradients and optimizer over this many processes (FSDP2). A run may be resumed with another "
            "number of processes."
        },
    )
    include_num_input_tokens_seen: Literal["all", "non_padding", "no"] = field(
        default="non_padding", metadata={"help": "Count the tokens of the inputs: all, non_padding or no."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite. Default: stop with an error instead."}
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if getattr(self.optim, "value", self.optim) == MUON:
            self.optim = _ADAMW
            if self.muon_learning_rate is None:
                self.muon_learning_rate = MUON_LEARNING_RATE
        super().__post_init__()
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # for transfers to an accelerator; without one torch warns


@dataclass
class HybridSeq2SeqTrainingArguments(HybridTrainingArguments, Seq2SeqTrainingArguments):
    """`HybridTrainingArguments` for sequence-to-sequence training with generation in the evaluation."""


@dataclass
class PretrainingArguments(HybridTrainingArguments):
    """Training arguments with defaults for pretraining from scratch; docs/guides/training.md says why these."""

    optim: str = field(default=MUON, metadata={"help": _OPTIM_HELP})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    ssm_learning_rate: float | None = field(
        default=1e-3, metadata={"help": "Peak learning rate of the state space parameters (no weight decay)."}
    )
    # Muon's updates have one size, so that matrices grow until the decay balances them: at 0.01 to ten times their initial size.
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of the matrices."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Second-moment decay of AdamW."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps, or a share of all steps if below 1."})
    logging_steps: float = field(default=20, metadata={"help": "Number of steps between logs."})
    eval_strategy: IntervalStrategy | str = field(
        default="steps", metadata={"help": "When to evaluate: no, steps or epoch."}
    )
    eval_steps: float | None = field(default=200, metadata={"help": "Number of steps between evaluations."})
    save_steps: float = field(default=1000, metadata={"help": "Number of steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep this many checkpoints."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluate only the loss."})


@dataclass
class SyntheticTrainingArguments(PretrainingArguments):
    """Training arguments with defaults for synthetic tasks."""

    optim: str = field(default=_ADAMW, metadata={"help": _OPTIM_HELP})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the matrices."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples per step and device."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    ssm_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the state space parameters. Default: `learning_rate`."}
    )
    include_num_input_tokens_seen: Literal["all", "non_padding", "no"] = field(
        default="all", metadata={"help": "Count the tokens of the inputs: all, non_padding or no."}
    )
    prediction_loss_only: bool = field(default=False, metadata={"help": "Evaluate only the loss."})


@dataclass
class FinetuningArguments(HybridTrainingArguments):
    """Defaults for fine-tuning: one evaluation and checkpoint per epoch, batches of similar lengths."""

    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up steps, or a share of all steps if below 1."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the matrices."})
    logging_steps: float = field(default=50, metadata={"help": "Number of steps between logs."})
    eval_strategy: IntervalStrategy | str = field(
        default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."}
    )
    save_strategy: SaveStrategy | str = field(
        default="epoch", metadata={"help": "When to save: no, steps, epoch or best."}
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Keep this many checkpoints."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Order of the samples.", "choices": SAMPLING_STRATEGIES}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the modules that the task adds to the checkpoint. Default: `learning_rate`."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train low-rank updates (LoRA) of this rank, and the head; the checkpoint stays unchanged."},
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Scale of the updates, which are multiplied by alpha / rank. Default: twice the rank."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the inputs of the updates."})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Names of the linear maps to adapt. Default: those of the architecture."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further modules to train in full, e.g. ssm (SPADE) or ema_gate (Mega); `state` means all "
            "recurrent parts."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_targets is not None and not self.lora_targets:
            raise ValueError("`lora_targets` is empty; leave it out to adapt the linear maps of the architecture.")
        if self.lora_rank is not None:
            check_lora_options(self.lora_rank, self.lora_alpha, self.lora_dropout)
        elif self.lora_alpha or self.lora_dropout or self.lora_targets or self.lora_modules_to_save:
            raise ValueError("The options `lora_...` need `lora_rank`, the rank of the updates, e.g. 8.")


@dataclass
class Seq2SeqFinetuningArguments(FinetuningArguments, HybridSeq2SeqTrainingArguments):
    """Fine-tuning of sequence-to-sequence models, evaluated on generated text."""

    predict_with_generate: bool = field(default=True, metadata={"help": "Evaluate on generated text."})

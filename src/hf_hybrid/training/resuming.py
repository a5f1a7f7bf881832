"""What a resumed run takes over from its checkpoint besides weights and optimizer state, and what from its own options.

The sums behind the records go on where the checkpoint left them (`run_totals.json`). Learning rates, weight decay and schedule are
those of the options: optimizers and schedulers store them too, and would bring back the old ones without a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Seq2SeqTrainingArguments

TOTALS_FILE = "run_totals.json"

# Options that may differ between a run and its continuation without changing what is trained or measured.
_FREE = frozenset(
    "resume_from_checkpoint max_steps num_train_epochs max_minutes save_steps save_total_limit eval_steps eval_strategy save_strategy "
    "disable_tqdm report_to run_name local_rank per_device_eval_batch_size output_dir trust_remote_code num_processes quiet "
    "push_to_hub fsdp_size".split()
)
_FREE_PARTS = ("log_", "logging_", "dataloader_", "hub_")  # beginnings of the names of others
# Options of training that a continuation cannot take over: they decide what the stored optimizer state, the order of the rows or
# the adapter mean. Everything else among them is applied from the first step on.
_FIXED = frozenset(
    "optim optim_args optim_target_modules seed data_seed train_sampling_strategy length_column_name dataloader_drop_last "
    "sortish_sampler lora_rank lora_alpha lora_targets lora_modules_to_save".split()
)
# Options of recipes that concern the evaluation alone; all others say what the model is or what it reads.
_APPLIED = frozenset(
    "validation_data validation_split max_eval_samples max_validation_segments metrics length_penalty no_repeat_ngram_size "
    "min_new_tokens targets_column num_test".split()
)
_TRAINING = _FIXED.union(item.name for item in fields(Seq2SeqTrainingArguments))
_RATES = frozenset(
    "learning_rate ssm_learning_rate muon_learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps".split()
)
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # whose rates are not a function of the step


@dataclass
class RunTotals:
    """The sums of a run up to a checkpoint, over all its sessions.

    Attributes:
        loss_sum: training losses summed over the steps up to the last log.
        pending_losses: for each process, the losses summed over the steps since then.
        last_logged_step: step of the last log.
        seconds: time of training, evaluating and saving that led to this checkpoint.
        timed_tokens, timed_seconds: for the mean throughput.
        monitors: what callbacks carry, by their names.
    """

    loss_sum: float = 0.0
    pending_losses: list[float] = field(default_factory=list)
    last_logged_step: int = 0
    seconds: float = 0.0
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    monitors: dict[str, Any] = field(default_factory=dict)

    def write(self, checkpoint: Path) -> None:
        """Writes them into a checkpoint that is not complete yet."""
        (checkpoint / TOTALS_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> RunTotals | None:
        """Those of a checkpoint; None if another program wrote it."""
        path = checkpoint / TOTALS_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def optimizer_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Learning rate, weight decay and all other settings of each parameter group."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_settings(optimizer: torch.optim.Optimizer, scheduler: Any, settings: Sequence[Mapping[str, Any]]) -> None:
    """Puts the settings of a new optimizer and schedule in force after the state of a checkpoint was loaded.

    Args:
        optimizer: with loaded state, and the settings that came with it.
        scheduler: its schedule, at the step of the checkpoint. Rates of a schedule that is no function of the step stay as loaded.
        settings: of the new optimizer before loading, see `optimizer_settings`.

    Raises:
        ValueError: the state is that of another kind of optimizer.
    """
    for group, own in zip(optimizer.param_groups, settings):
        if [name in group for name in ("betas", "momentum")] != [name in own for name in ("betas", "momentum")]:
            raise ValueError(
                "The checkpoint holds the state of another optimizer: resume with the `optim` of the run, or begin a new run from "
                "its weights."
            )
        group.update({name: value for name, value in own.items() if name != "lr"})
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [own["initial_lr"] for own in settings]
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def changed_options(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    processes: tuple[int, int],
    same_content: Sequence[str] = (),
    training: Collection[str] = (),
) -> dict[str, list[Any]]:
    """The options that a continuation changes: name -> [value before, value after].

    Args:
        before, after: recorded and current options, in JSON types.
        processes: number of processes of the run and of its continuation.
        same_content: options whose files were compared; they may have moved.
        training: names of the training arguments, if they are more than those of Transformers.

    Raises:
        ValueError: a change could not be applied to the rest of the run; the message names the option and the remedy.
    """
    free = _FREE.union(same_content)
    names = [
        name
        for name in after
        if name in before and before[name] != after[name] and name not in free
        if name in _FIXED or not name.startswith(_FREE_PARTS)
    ]
    rows = [_rows_per_step(options, count) for options, count in zip((before, after), processes)]
    if None not in rows and rows[0] != rows[1]:
        raise ValueError(
            f"A step of this run takes {rows[0]} rows; the continuation would take {rows[1]} (`per_device_train_batch_size` x "
            f"`gradient_accumulation_steps` x {processes[1]} processes) and go on at another place of the data. Choose them so that "
            f"the product is {rows[0]}."
        )
    stateful = [str(options.get("lr_scheduler_type")) in _STATEFUL_SCHEDULES for options in (before, after)]
    for name in names:
        is_applied = name not in _FIXED if name in _TRAINING.union(training) else name in _APPLIED
        if name in ("validation_data", "muon_learning_rate"):  # without it, other rows or parameters are trained
            is_applied = before[name] is not None and after[name] is not None
        if name in _RATES and any(stateful):
            is_applied = False
        if not is_applied:
            raise ValueError(
                f"`{name}` was {before[name]!r} in this run and is {after[name]!r} now, which a continuation cannot take over. Give it "
                "its former value, or begin a new run from these weights: pass the checkpoint as `model_name_or_path`, with "
                "another `output_dir`."
            )
    return {name: [before[name], after[name]] for name in names}


def _rows_per_step(options: Mapping[str, Any], processes: int) -> int | None:
    sizes = [options.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    if not all(isinstance(size, int) for size in sizes):
        return None
    # The processes of a group for context parallelism read the same rows.
    return sizes[0] * sizes[1] * processes // (options.get("context_parallel_size") or 1)  # type: ignore[operator]

"""The model card of a run, and the names that may appear in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ...hub import EvaluationResult, ModelCard
from ...training.adapters import is_adapted
from ...training.run_folder import ENVIRONMENT_FILE, RunFolder, describe_environment

if TYPE_CHECKING:
    from .runs import Job


@dataclass
class RunReport:
    """What a recipe records about its run.

    Attributes:
        description: sentences for the model card.
        task_type: Hub task of the results.
        data_name: name of the evaluation data in the results.
        auto_class: Auto class that loads the checkpoint.
        pipeline_tag: Hub pipeline, if one fits.
        training_data: description of the training data.
        lengths: lengths of inputs and targets.
        datasets: Hub names of the data sets, if any.
        base_model: Hub name of the initial checkpoint, if any.
        metrics: additional numbers for `metrics.json`.
        result_names: keys of the final evaluation metrics that go into the card -> their names there.
    """

    description: str
    task_type: str
    data_name: str
    auto_class: str
    pipeline_tag: str | None = None
    training_data: str = ""
    lengths: str = ""
    datasets: Sequence[str] = ()
    base_model: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    result_names: Mapping[str, str] = field(default_factory=lambda: {"eval_loss": "loss"})


def make_card(job: Job, folder: RunFolder, metrics: Mapping[str, Any]) -> ModelCard:
    """Fills the model card from the run."""
    environment_file = folder.path / ENVIRONMENT_FILE
    environment = json.loads(environment_file.read_text()) if environment_file.is_file() else describe_environment()
    report, versions = job.report, environment["versions"]
    processor = f"{environment['processor']}, {environment['torch_threads']} threads"
    return ModelCard(
        model_name=folder.path.resolve().name,
        description=report.description,
        model_type=str(job.model.config.model_type),
        architecture=type(job.model).__name__,
        num_parameters=metrics["num_parameters"],
        auto_class=report.auto_class,
        has_processor=job.trainer.processing_class is not None,
        task_type=report.task_type,
        pipeline_tag=report.pipeline_tag,
        datasets=report.datasets,
        base_model=report.base_model,
        training_data=report.training_data,
        lengths=report.lengths,
        adapter_of=display_names([str(job.model.name_or_path)]) if is_adapted(job.trainer.model) else None,
        extra_tags=["lora", "peft"] if is_adapted(job.trainer.model) else [],
        training=_training_rows(job.trainer, metrics) | _resumed_rows(environment),
        environment={
            "hardware": ", ".join(environment["accelerators"]) or processor,
            "processes": environment["world_size"],
            "python": environment["python"],
            "revision of hf_hybrid": environment["git_revision"] or versions.get("hf_hybrid"),
            **{name: versions.get(name) for name in ("torch", "transformers", "datasets")},
        },
        results=[
            EvaluationResult(name, float(metrics[key]), report.data_name, baseline=_baseline(name, metrics))
            for key, name in report.result_names.items()
            if isinstance(metrics.get(key), (int, float))
        ],
    )


def _baseline(name: str, metrics: Mapping[str, Any]) -> str:
    """The baseline that the run measured for the metric `name`, as text."""
    if name == "accuracy" and "majority_accuracy" in metrics:
        return f"{metrics['majority_accuracy']:.3g} (most frequent class)"
    return ""


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _training_rows(trainer: Trainer, metrics: Mapping[str, Any]) -> dict[str, Any]:
    args = trainer.args
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    muon_rate = getattr(args, "muon_learning_rate", None)
    return {
        "optimizer steps": f"{trainer.state.global_step:,}",
        "input tokens seen": f"{trainer.state.num_input_tokens_seen:,}",
        "batch (sequences per step)": args.train_batch_size
        * args.gradient_accumulation_steps
        * (args.world_size // getattr(args, "context_parallel_size", 1)),
        "optimizer": getattr(args.optim, "value", args.optim)
        if muon_rate is None
        else "Muon for matrices, AdamW for the rest",
        **({} if muon_rate is None else {"learning rate of Muon": muon_rate}),
        "learning rate": args.learning_rate,
        "learning rate of state space parameters": getattr(args, "ssm_learning_rate", None) or args.learning_rate,
        "schedule": f"{schedule}, warm-up {args.warmup_steps}",
        "weight decay": args.weight_decay,
        "betas and epsilon of Adam": f"{args.adam_beta1}, {args.adam_beta2}, {args.adam_epsilon}",
        "largest norm of the gradient": args.max_grad_norm,
        **_adapter_rows(trainer, metrics),
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "seed": args.seed,
        "minutes of this run": f"{metrics.get('train_runtime', 0.0) / 60:.1f}",
        "input tokens per second": _rounded(metrics.get("tokens_per_second")),
        "peak memory of the process": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB",
        "training loss": f"{metrics['train_loss']:.4g}" if "train_loss" in metrics else None,
    }


def _resumed_rows(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What was changed when the run was resumed; the other rows say what it ended with."""
    changes = []
    for entry in environment.get("resumed", []):
        for option, values in entry["changed"].items():
            # Names of files say nothing to others.
            is_shown = not any(isinstance(value, (list, dict)) or os.sep in str(value) for value in values)
            shown = f" {values[0]} -> {values[1]}" if is_shown else ""
            changes.append(f"{option}{shown} (step {entry['step']})")
    return {"changed when resumed": ", ".join(changes)} if changes else {}


def _adapter_rows(trainer: Trainer, metrics: Mapping[str, Any]) -> dict[str, Any]:
    if getattr(trainer.args, "lora_rank", None) is None:
        return {}
    model: Any = trainer.model
    options = next(iter(model.peft_config.values()))
    return {
        "adapter": f"LoRA of rank {options.r}, alpha {options.lora_alpha:g}, dropout {options.lora_dropout}",
        "adapted linear maps": ", ".join(sorted(options.target_modules)),
        "trainable parameters": f"{metrics['num_trainable_parameters']:,}",
    }


def hub_names(sources: Sequence[str]) -> list[str]:
    """The names among data or model sources that are neither local paths nor URLs."""
    return [name for name in sources if not os.path.exists(name) and "://" not in name]


def display_names(sources: Sequence[str]) -> str:
    """Sources as they may appear in a public card: Hub names, or the last part of a local path or URL."""
    return ", ".join(Path(name).name if os.path.exists(name) or "://" in name else name for name in sources)

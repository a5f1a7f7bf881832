"""Train a causal model on recall, copying or induction.

    python -m hf_hybrid.recipes.train_synthetic --task associative_recall --arch longvq --length 128 --distance 48 \
        --config_overrides "hidden_size=64,num_hidden_layers=2,shared_representation_size=32,codebook_size=64,window_size=16,chunk_size=16" \
        --max_steps 1000 --output_dir runs/recall
    python -m hf_hybrid.recipes.train_synthetic --task copying --num_tokens 16 --arch mega \
        --config_overrides "hidden_size=64,num_hidden_layers=2" --output_dir runs/copying

Examples are generated on the fly. `--arch` is any model type with a causal language model head, of this library or of
Transformers; a new model gets a vocabulary for the task. The recipe reports the shares of predictable tokens
(`eval_accuracy`) and of whole examples (`eval_exact_match`) that are right.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, EvalPrediction, PreTrainedModel, default_data_collator

from ..data.synthetic import IGNORED, TASKS, SyntheticDataset, shares_right
from ..training.arguments import SyntheticTrainingArguments
from ..training.best_metric import NamedMetrics
from ..training.trainer import HybridTrainer
from .support.models import (
    check_positions,
    load_config,
    load_model,
    make_room,
    parse_overrides,
    require_head,
    role_fields,
)
from .support.recipe import Recipe
from .support.reports import RunReport
from .support.runs import Job
from .support.sequence_classification import ClassifierArguments

TASK_OPTIONS = ("length", "vocab_size", "num_pairs", "num_queries", "distance", "num_tokens", "gap")


@dataclass
class SyntheticArguments:
    """The task. Unset options have the defaults of the task; options of other tasks are rejected."""

    task: str = field(default="associative_recall", metadata={"help": f"{', '.join(TASKS)}."})
    length: int | None = field(default=None, metadata={"help": "Tokens of an example (recall and induction: 128)."})
    vocab_size: int | None = field(
        default=None, metadata={"help": "Number of different tokens (64 for recall, or 32)."}
    )
    num_pairs: int | None = field(default=None, metadata={"help": "Recall: number of key-value pairs (8)."})
    num_queries: int | None = field(default=None, metadata={"help": "Recall: number of queried keys (all)."})
    distance: int | None = field(
        default=None, metadata={"help": "Recall: minimum number of tokens between the pairs and the first query (0)."}
    )
    num_tokens: int | None = field(default=None, metadata={"help": "Copying: number of tokens to copy (32)."})
    gap: int | None = field(default=None, metadata={"help": "Copying: additional tokens between text and copy (0)."})
    num_train: int = field(default=100_000, metadata={"help": "Number of training examples; they are never stored."})
    num_validation: int = field(default=200, metadata={"help": "Validation examples."})
    task_seed: int = field(default=0, metadata={"help": "Seed of the examples."})

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(TASKS)}; got {self.task!r}.")
        known = inspect.signature(TASKS[self.task]).parameters
        wrong = [name for name in TASK_OPTIONS if getattr(self, name) is not None and name not in known]
        if wrong:
            accepted = ", ".join(f"`{name}`" for name in TASK_OPTIONS if name in known)
            raise ValueError(f"The task {self.task!r} has no `{wrong[0]}`; its options are {accepted}.")
        for name in ("num_train", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive number of examples; got {getattr(self, name)}.")
        if self.task_seed < 0:
            raise ValueError(f"`task_seed` must not be negative; got {self.task_seed}.")

    def examples(self, size: int, *, validation: bool) -> SyntheticDataset:
        """The given number of examples; training and validation never share a seed."""
        options = {name: getattr(self, name) for name in TASK_OPTIONS if getattr(self, name) is not None}
        return TASKS[self.task](size, seed=2 * self.task_seed + validation, **options)

    def tokens(self) -> int:
        """Size of the vocabulary."""
        default: int = inspect.signature(TASKS[self.task]).parameters["vocab_size"].default
        return default if self.vocab_size is None else self.vocab_size


def build_model(arguments: ClassifierArguments, vocab_size: int, length: int) -> PreTrainedModel:
    """The checkpoint, or a new causal model.

    Raises:
        ValueError: it cannot be loaded, has no causal head, or cannot read the ids or lengths of the task.
    """
    trust = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.model_name_or_path is not None:
        model = load_model(AutoModelForCausalLM, arguments.model_name_or_path, **trust)
        if model.config.vocab_size < vocab_size:
            raise ValueError(
                f"The task has {vocab_size} tokens but the model only {model.config.vocab_size}: lower `vocab_size`, or train "
                "a new model."
            )
        check_positions(model.config, length, "length")
        return model
    name, overrides = str(arguments.arch), parse_overrides(arguments.config_overrides)
    known = load_config(name, {}, **trust)
    require_head(AutoModelForCausalLM, known)
    ids = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    fields = {**ids, **role_fields(AutoModelForCausalLM, known, overrides), **overrides}
    config = load_config(name, fields, **trust)
    make_room(config, length, overrides, "length")
    return AutoModelForCausalLM.from_config(config, **trust)


def best_tokens(outputs: Any, labels: Any) -> Any:
    """`preprocess_logits_for_metrics`: gathers only the most likely ids."""
    return (outputs[0] if isinstance(outputs, tuple) else outputs).argmax(-1)


def measure(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy by token and by example."""
    return shares_right(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))


def build(
    data_args: SyntheticArguments,
    model_args: ClassifierArguments,
    training_args: SyntheticTrainingArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Model, examples and trainer.

    Raises:
        ValueError: an option or the checkpoint cannot be used.
    """
    validation = data_args.examples(data_args.num_validation, validation=True)
    train = None if evaluate_only else data_args.examples(data_args.num_train, validation=False)
    example = validation[0]
    length, counted = len(example["input_ids"]), int((example["labels"] != IGNORED).sum())
    model = build_model(model_args, data_args.tokens(), length)
    trainer = HybridTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
        compute_metrics=NamedMetrics(measure, lambda: shares_right(np.zeros((1, 2)), np.zeros((1, 2)))),
        preprocess_logits_for_metrics=best_tokens,
    )
    size = 0 if train is None else len(train)
    report = RunReport(
        description=f"A {model.config.model_type} model for the synthetic task {data_args.task}.",
        task_type="text-generation",
        data_name=f"{data_args.task}, generated with seed {data_args.task_seed}",
        auto_class="AutoModelForCausalLM",
        training_data=f"{size:,} examples, generated",
        lengths=f"{length} tokens, {counted} of them predictable",
        metrics={"task": data_args.task, "length": length, "train_samples": size, "eval_samples": len(validation)},
        result_names={"eval_accuracy": "accuracy", "eval_exact_match": "exact_match"},
    )
    return Job(trainer, report)


RECIPE = Recipe(
    "train_synthetic", __doc__ or "", (SyntheticArguments, ClassifierArguments, SyntheticTrainingArguments), build
)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

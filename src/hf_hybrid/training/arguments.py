"""Training arguments: those of the library plus what hybrid models need."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments


@dataclass
class HybridTrainingArguments(TrainingArguments):
    """`TrainingArguments` with a learning rate for state space parameters, a time limit and counted tokens."""

    ssm_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the state space parameters (no weight decay). Default: `learning_rate`."},
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Stop after this many minutes of training, evaluate and save. The learning rate schedule then "
            "follows whichever is further, the steps or the time."
        },
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Count the tokens of the inputs: all, non_padding or no."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite. Default: stop with an error instead."}
    )


@dataclass
class HybridSeq2SeqTrainingArguments(HybridTrainingArguments, Seq2SeqTrainingArguments):
    """The same for sequence-to-sequence training with generation in the evaluation."""

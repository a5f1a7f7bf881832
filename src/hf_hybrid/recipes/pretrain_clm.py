"""Pretrain a causal language model on raw text; reports perplexity and bits per byte.

    python -m hf_hybrid.recipes.pretrain_clm --data corpus.txt --tokenizer tokenizer/ \
        --config_overrides "d_model=256,num_heads=4,d_ff=1024,num_hidden_layers=4,attention_window=127" \
        --block_length 1024 --max_steps 1000 --output_dir runs/lm
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, default_data_collator, set_seed

from ..data.packing import CausalBlockDataset
from ..data.streaming import CausalBlockStream
from ..training.arguments import PretrainingArguments
from ..training.run_folder import RunFolder
from ..training.trainer import HybridTrainer
from .common import (
    NewModelArguments,
    RunReport,
    build_new_or_pretrained,
    check_decoder_table,
    display_names,
    hub_names,
    load_tokenizer,
    parse_arguments,
    resolved_arguments,
    set_up_logging,
    train_and_record,
)
from .pretraining_data import (
    SHUFFLE_WINDOW,
    PretrainingDataArguments,
    PretrainingText,
    TokenSplit,
    check_length_of_run,
    limited,
    load_text,
)


@dataclass
class CausalDataArguments(PretrainingDataArguments):
    """Text of the run."""

    block_length: int = field(default=1024, metadata={"help": "Tokens of one training sequence."})


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `--help` for the options.

    Args:
        args: command line words, a mapping of options, or None for the words of this process.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: an option, the data, the tokenizer or the checkpoint cannot be used.
        FileExistsError: the output folder is not empty.
    """
    data_args, model_args, training_args = parse_arguments(
        (CausalDataArguments, NewModelArguments, PretrainingArguments), args, __doc__
    )
    set_up_logging(training_args)
    check_length_of_run(data_args, training_args)
    folder = RunFolder(training_args.output_dir, training_args.resume_from_checkpoint)
    tokenizer = load_tokenizer(model_args.tokenizer or model_args.model_name_or_path)
    set_seed(training_args.seed)
    model = build_new_or_pretrained(AutoModelForCausalLM, model_args, tokenizer, default_type="spade_lm")
    check_decoder_table(model.config, data_args.block_length, "The training sequences", "block_length")
    train_dataset, eval_dataset, text = build_datasets(data_args, tokenizer, training_args.seed)
    trainer = HybridTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    report = RunReport(
        description=f"A {model.config.model_type} causal language model, trained on packed documents.",
        task_type="text-generation",
        data_name=display_names(data_args.validation_data or data_args.data) + " (held-out text)",
        auto_class="AutoModelForCausalLM",
        pipeline_tag="text-generation",
        training_data=f"{display_names(data_args.data)} ({text})",
        datasets=hub_names(data_args.data),
        lengths=f"blocks of {data_args.block_length} tokens",
        metrics={"corpus": str(text), "bytes_per_token": text.validation.num_bytes / text.validation.tokens.size},
        result_names={"eval_loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits_per_byte"},
    )

    def evaluate() -> dict[str, Any]:
        metrics = trainer.evaluate()
        return {**metrics, **language_metrics(metrics["eval_loss"], text.validation)}

    arguments = resolved_arguments(data_args, model_args, training_args)
    return train_and_record(trainer, folder, arguments, report, evaluate)


def language_metrics(loss: float, validation: TokenSplit) -> dict[str, float]:
    """Perplexity per token, and bits per byte of the validation text (documents' end tokens included in the cost).

    Args:
        loss: mean negative log-likelihood of a token, in nats.
        validation: the text; its tokens per byte convert the unit.
    """
    bits = loss / math.log(2) * validation.tokens.size / validation.num_bytes
    return {"perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}


def build_datasets(
    arguments: CausalDataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Dataset, Dataset, PretrainingText]:
    """Blocks to train on, blocks to evaluate on, and the text they come from."""
    text = load_text(arguments, tokenizer)
    length = arguments.block_length
    train: Dataset
    if isinstance(text.train, TokenSplit):
        train = CausalBlockDataset(text.train.tokens, length)
    else:
        options: dict[str, Any] = {"seed": seed, "shuffle_window": SHUFFLE_WINDOW, "repeat": True}
        train = CausalBlockStream(text.train, tokenizer, block_length=length, **options)
    evaluation = CausalBlockDataset(text.validation.tokens, length)
    return train, limited(evaluation, arguments.max_validation_segments), text


if __name__ == "__main__":
    main()

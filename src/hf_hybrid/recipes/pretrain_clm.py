"""Pretrain a causal language model on raw text; reports perplexity and bits per byte.

    python -m hf_hybrid.recipes.pretrain_clm --data corpus.txt --tokenizer tokenizer/ \
        --config_overrides "d_model=256,num_heads=4,d_ff=1024,num_hidden_layers=4,attention_window=127" \
        --block_length 1024 --max_steps 1000 --output_dir runs/lm
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, default_data_collator

from ..data.packing import CausalBlockDataset, SeparateDocumentsCollator
from ..data.streaming import CausalBlockStream
from ..data.token_corpus import end_of_document
from ..metrics import bits_per_byte, perplexity
from ..training.arguments import PretrainingArguments
from ..training.trainer import HybridTrainer
from .common import (
    Job,
    NewModelArguments,
    RunReport,
    build_new_or_pretrained,
    check_decoder_table,
    display_names,
    hub_names,
    load_tokenizer,
    run_recipe,
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
    separate_documents: bool = field(
        default=False,
        metadata={
            "help": "Documents that share a block do not see each other: the state is cut between them. Costs the padding of each "
            "to the longest."
        },
    )


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `run_recipe` for arguments and errors, `--help` for the options."""
    return run_recipe((CausalDataArguments, NewModelArguments, PretrainingArguments), build, args, __doc__)


def build(
    data_args: CausalDataArguments,
    model_args: NewModelArguments,
    training_args: PretrainingArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Model, blocks of tokens and trainer.

    Raises:
        ValueError: an option, the data, the tokenizer or the checkpoint cannot be used.
    """
    if not evaluate_only:
        check_length_of_run(data_args, training_args)
    tokenizer = load_tokenizer(model_args.tokenizer or model_args.model_name_or_path)
    model = build_new_or_pretrained(AutoModelForCausalLM, model_args, tokenizer, default_type="spade_lm")
    check_decoder_table(model.config, data_args.block_length, "The training sequences", "block_length")
    train_dataset, eval_dataset, text = build_datasets(
        data_args, tokenizer, training_args.seed, evaluate_only=evaluate_only
    )
    collator: Callable[..., Any] = default_data_collator
    if data_args.separate_documents:
        collator = SeparateDocumentsCollator(end_of_document(tokenizer))
    trainer = HybridTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
    )
    num_tokens, num_bytes = text.validation.tokens.size, text.validation.num_bytes
    report = RunReport(
        description=f"A {model.config.model_type} causal language model, trained on packed documents.",
        task_type="text-generation",
        data_name=display_names(data_args.validation_data or data_args.data) + " (held-out text)",
        auto_class="AutoModelForCausalLM",
        pipeline_tag="text-generation",
        training_data=f"{display_names(data_args.data)} ({text})",
        datasets=hub_names(data_args.data),
        lengths=f"blocks of {data_args.block_length} tokens",
        metrics={"corpus": str(text), "bytes_per_token": num_bytes / num_tokens},
        result_names={"eval_loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits_per_byte"},
    )

    def derive(metrics: Mapping[str, Any]) -> dict[str, float]:
        loss = metrics["eval_loss"]
        # Tokens per byte of the whole validation text convert the unit; the ends of documents are part of the cost.
        return {"perplexity": perplexity(loss), "bits_per_byte": bits_per_byte(loss, num_tokens, num_bytes)}

    return Job(trainer, report, derive)


def build_datasets(
    arguments: CausalDataArguments, tokenizer: PreTrainedTokenizerBase, seed: int, *, evaluate_only: bool = False
) -> tuple[Dataset | None, Dataset, PretrainingText]:
    """Blocks to train on, blocks to evaluate on, and the text they come from."""
    text = load_text(arguments, tokenizer, evaluate_only=evaluate_only)
    length = arguments.block_length
    train: Dataset | None = None
    if isinstance(text.train, TokenSplit):
        train = CausalBlockDataset(text.train.tokens, length)
    elif text.train is not None:
        options: dict[str, Any] = {"seed": seed, "shuffle_window": SHUFFLE_WINDOW, "repeat": True}
        train = CausalBlockStream(text.train, tokenizer, block_length=length, **options)
    evaluation = CausalBlockDataset(text.validation.tokens, length)
    return train, limited(evaluation, arguments.max_validation_segments), text


if __name__ == "__main__":
    main()

"""Pretrain a causal language model on raw text.

Reports perplexity and bits per byte.

    python -m hf_hybrid.recipes.pretrain_clm --data corpus.txt --tokenizer tokenizer/ \
        --config_overrides "hidden_size=256,num_attention_heads=4,intermediate_size=1024,num_hidden_layers=4,window_size=128" \
        --block_length 1024 --max_steps 1000 --output_dir runs/lm

With `--segment_length` every row of the batch reads whole documents in consecutive segments, and the state of the
model is carried from one segment to the next; the evaluation then reads the held-out documents whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from ..data.conversations import documents_of, prepare_chat_template
from ..data.packing import CausalBlockDataset, SeparateDocumentsCollator
from ..data.segments import DocumentSegments
from ..data.streaming import CausalBlockStream
from ..data.token_corpus import end_of_document
from ..metrics import bits_per_byte, perplexity
from ..training.arguments import PretrainingArguments
from ..training.segments import SegmentTrainer, new_state
from ..training.trainer import HybridTrainer
from .support.models import NewModelArguments, build_new_or_pretrained, check_decoder_table, load_tokenizer
from .support.pretraining_data import (
    CONVERSATIONS_HELP,
    SHUFFLE_WINDOW,
    PretrainingDataArguments,
    PretrainingText,
    TokenSplit,
    check_run,
    limited,
    load_text,
    sharded,
)
from .support.recipe import Recipe
from .support.reports import RunReport, display_names, hub_names
from .support.runs import Job


@dataclass
class CausalDataArguments(PretrainingDataArguments):
    """Data of the run."""

    block_length: int = field(default=1024, metadata={"help": "Tokens of one training sequence."})
    segment_length: int | None = field(
        default=None,
        metadata={
            "help": "Instead of shuffled blocks, read documents in order in segments of this many tokens, with the state of the "
            "model carried from one to the next."
        },
    )
    conversations: bool = field(default=False, metadata={"help": CONVERSATIONS_HELP})
    separate_documents: bool = field(
        default=False,
        metadata={
            "help": "Documents that share a block do not see each other: the state is reset between them. Costs the "
            "padding of each document to the longest."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment_length is not None and (self.segment_length < 1 or self.streaming or self.separate_documents):
            raise ValueError(
                "`segment_length` must be a positive number of tokens, without `streaming` and `separate_documents`: documents "
                f"are read whole, in order; got {self.segment_length}."
            )


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
        check_run(data_args, training_args)
    tokenizer = load_tokenizer(
        model_args.tokenizer or model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
    )
    if data_args.conversations:
        prepare_chat_template(tokenizer)
    model = build_new_or_pretrained(AutoModelForCausalLM, model_args, tokenizer, default_arch="spade_lm")
    if data_args.segment_length is None:
        check_decoder_table(model.config, data_args.block_length, "The training sequences", "block_length")
        train_dataset, eval_dataset, text = build_datasets(
            data_args, tokenizer, training_args, evaluate_only=evaluate_only
        )
    else:
        new_state(model, in_training=not evaluate_only)  # fail now rather than after reading the data
        train_dataset, eval_dataset, text = build_segments(
            data_args, tokenizer, training_args, evaluate_only=evaluate_only
        )
    collator: Callable[..., Any] = default_data_collator
    if data_args.separate_documents:
        collator = SeparateDocumentsCollator(end_of_document(tokenizer))
    trainer_class = HybridTrainer if data_args.segment_length is None else SegmentTrainer
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=tokenizer,
    )
    num_tokens, num_bytes = text.validation.tokens.size, text.validation.num_bytes

    def derive(metrics: Mapping[str, Any]) -> dict[str, float]:
        loss = metrics["eval_loss"]
        # Converted by the tokens per byte of the whole validation text; end-of-document tokens are part of the cost.
        found = {"perplexity": perplexity(loss), "bits_per_byte": bits_per_byte(loss, num_tokens, num_bytes)}
        for name, value in metrics.items():
            if name.startswith("eval_loss_"):  # of a range of positions
                found[name.replace("eval_loss", "bits_per_byte")] = bits_per_byte(value, num_tokens, num_bytes)
        return found

    return Job(trainer, _report(data_args, model, text), derive)


def _report(data_args: CausalDataArguments, model: PreTrainedModel, text: PretrainingText) -> RunReport:
    if data_args.segment_length is None:
        material, lengths = "packed documents", f"blocks of {data_args.block_length} tokens"
    else:
        material = "consecutive segments of whole documents"
        lengths = f"segments of {data_args.segment_length} tokens with carried state"
    return RunReport(
        description=f"A {model.config.model_type} causal language model, trained on {material}.",
        task_type="text-generation",
        data_name=display_names(data_args.validation_data or data_args.data) + " (held-out text)",
        auto_class="AutoModelForCausalLM",
        pipeline_tag="text-generation",
        training_data=f"{display_names(data_args.data)} ({text})",
        datasets=hub_names(data_args.data),
        lengths=lengths,
        metrics={
            "corpus": str(text),
            "bytes_per_token": text.validation.num_bytes / text.validation.tokens.size,
        },
        result_names={"eval_loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits_per_byte"},
    )


def _load(arguments: CausalDataArguments, tokenizer: PreTrainedTokenizerBase, evaluate_only: bool) -> PretrainingText:
    read = partial(documents_of, tokenizer=tokenizer) if arguments.conversations else None
    return load_text(arguments, tokenizer, evaluate_only=evaluate_only, documents_of=read)


def build_datasets(
    arguments: CausalDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: PretrainingArguments,
    *,
    evaluate_only: bool = False,
) -> tuple[Dataset | None, Dataset, PretrainingText]:
    """Blocks to train on, blocks to evaluate on, and the text they come from."""
    text = _load(arguments, tokenizer, evaluate_only)
    length = arguments.block_length
    train: Dataset | None = None
    if isinstance(text.train, TokenSplit):
        train = CausalBlockDataset(text.train.tokens, length)
    elif text.train is not None:
        make = partial(
            CausalBlockStream,
            text.train,
            tokenizer,
            block_length=length,
            seed=training_args.seed,
            shuffle_window=SHUFFLE_WINDOW,
            repeat=True,
        )
        train = sharded(make, arguments.stream_shards, training_args)
    evaluation = CausalBlockDataset(text.validation.tokens, length)
    return train, limited(evaluation, arguments.max_validation_segments), text


def build_segments(
    arguments: CausalDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: PretrainingArguments,
    *,
    evaluate_only: bool = False,
) -> tuple[Dataset | None, Dataset, PretrainingText]:
    """Documents in segments to train on and to evaluate on, and the text they come from."""
    text = _load(arguments, tokenizer, evaluate_only)
    options: dict[str, Any] = {"length": arguments.segment_length, "pad_token_id": tokenizer.pad_token_id or 0}
    eos = end_of_document(tokenizer)
    train: Dataset | None = None
    if isinstance(text.train, TokenSplit):
        rows = training_args.train_batch_size * training_args.world_size
        train = DocumentSegments(text.train.tokens, eos, num_rows=rows, **options)
    rows = min(training_args.eval_batch_size * training_args.world_size, text.validation.num_documents)
    return train, DocumentSegments(text.validation.tokens, eos, num_rows=rows, **options), text


RECIPE = Recipe("pretrain_clm", __doc__ or "", (CausalDataArguments, NewModelArguments, PretrainingArguments), build)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

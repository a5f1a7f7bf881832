"""Pretrain an encoder-decoder on raw text (T5 objective).

Span corruption as in section 3.1.4 of arXiv 1910.10683.

    python -m hf_hybrid.recipes.pretrain_span_corruption --data corpus.txt --tokenizer tokenizer/ \
        --config_overrides "hidden_size=256,num_attention_heads=4,intermediate_size=1024,num_hidden_layers=4,decoder_layers=4" \
        --input_length 512 --max_steps 1000 --learning_rate 1e-3 --output_dir runs/pretrain

The evaluation loss is that of all targets. With `--prediction_loss_only False` evaluations also measure `text_loss`, `text_accuracy`
(of the hidden text alone, without sentinels and `</s>`) and `all_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from ..data.span_corruption import (
    SpanCorruptionCollator,
    SpanCorruptionDataset,
    check_sentinels,
    span_corruption_lengths,
)
from ..data.streaming import SpanCorruptionStream
from ..tokenization.special_tokens import sentinel_ids
from ..training.arguments import PretrainingArguments
from ..training.text_tokens import make_text_metrics, token_results
from ..training.trainer import HybridTrainer
from .support.models import (
    NewModelArguments,
    build_new_or_pretrained,
    check_decoder_table,
    check_positions,
    load_tokenizer,
)
from .support.pretraining_data import (
    SHUFFLE_WINDOW,
    PretrainingDataArguments,
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
class SpanCorruptionArguments(PretrainingDataArguments):
    """Data of the run and its noise."""

    input_length: int = field(
        default=512, metadata={"help": "Tokens of the corrupted input, end of sequence included."}
    )
    noise_density: float = field(default=0.15, metadata={"help": "Share of the tokens that is masked."})
    mean_span_length: float = field(default=3.0, metadata={"help": "Mean length of a masked span, in tokens."})


def build(
    data_args: SpanCorruptionArguments,
    model_args: NewModelArguments,
    training_args: PretrainingArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Model, corrupted segments and trainer.

    Raises:
        ValueError: an option, the data, the tokenizer or the checkpoint cannot be used.
    """
    if not evaluate_only:
        check_run(data_args, training_args)
    tokenizer = load_tokenizer(
        model_args.tokenizer or model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
    )
    lengths = span_corruption_lengths(data_args.input_length, data_args.noise_density, data_args.mean_span_length)
    check_sentinels(sentinel_ids(tokenizer), lengths.num_spans, lengths.segment_length)
    model = build_new_or_pretrained(AutoModelForSeq2SeqLM, model_args, tokenizer, default_arch="spade")
    check_positions(model.config, data_args.input_length, "input_length")
    check_decoder_table(model.config, lengths.target_length, "The span-corruption targets", "input_length")
    train_dataset, eval_dataset, text = build_datasets(
        data_args, tokenizer, training_args, evaluate_only=evaluate_only
    )
    trainer = HybridTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=SpanCorruptionCollator(model),
        processing_class=tokenizer,
        compute_metrics=make_text_metrics(tokenizer),
        preprocess_logits_for_metrics=token_results,
    )
    report = RunReport(
        description=(
            f"A {model.config.model_type} encoder-decoder pretrained by span corruption (noise density "
            f"{data_args.noise_density}, mean span {data_args.mean_span_length}). It fills in masked spans; fine-tune it "
            "for a task."
        ),
        task_type="text-generation",
        data_name=display_names(data_args.validation_data or data_args.data) + " (held-out text)",
        auto_class="AutoModelForSeq2SeqLM",
        training_data=f"{display_names(data_args.data)} ({text})",
        datasets=hub_names(data_args.data),
        lengths=f"inputs of {data_args.input_length} tokens, targets of {lengths.target_length}",
        metrics={"corpus": text, "target_length": lengths.target_length},
    )
    return Job(trainer, report)


def build_datasets(
    arguments: SpanCorruptionArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: PretrainingArguments,
    *,
    evaluate_only: bool = False,
) -> tuple[Dataset | None, Dataset, str]:
    """Training set (new noise in each epoch), evaluation set (fixed noise) and a description of the text."""
    options: dict[str, Any] = {
        "input_length": arguments.input_length,
        "noise_density": arguments.noise_density,
        "mean_span_length": arguments.mean_span_length,
        "sentinel_ids": sentinel_ids(tokenizer),
        "seed": training_args.seed,
    }
    eos = tokenizer.eos_token_id
    text = load_text(arguments, tokenizer, evaluate_only=evaluate_only)
    train: Dataset | None = None
    if isinstance(text.train, TokenSplit):
        train = SpanCorruptionDataset(text.train.tokens, eos_token_id=eos, **options)
    elif text.train is not None:
        stream: dict[str, Any] = {"shuffle_window": SHUFFLE_WINDOW, "repeat": True}
        make = partial(SpanCorruptionStream, text.train, tokenizer, **stream, **options)
        train = sharded(make, arguments.stream_shards, training_args)
    evaluation = SpanCorruptionDataset(text.validation.tokens, eos_token_id=eos, resample_each_epoch=False, **options)
    return train, limited(evaluation, arguments.max_validation_segments), str(text)


RECIPE = Recipe(
    "pretrain_span_corruption",
    __doc__ or "",
    (SpanCorruptionArguments, NewModelArguments, PretrainingArguments),
    build,
)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

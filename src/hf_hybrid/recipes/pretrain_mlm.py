"""Pretrain a masked language model on raw text (BERT objective).

Tokens are masked as in arXiv 1810.04805.

    python -m hf_hybrid.recipes.pretrain_mlm --data corpus.txt --tokenizer tokenizer/ --arch mega \
        --config_overrides "hidden_size=256,num_hidden_layers=4" --block_length 512 --max_steps 1000 --output_dir runs/mlm

`--arch` is any model type with a masked-language-model head. If the tokenizer has no mask token, its first sentinel,
`<extra_id_0>`, is used. The loss and its exponential, the perplexity, are those of the masked tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase, default_data_collator

from ..data.masking import MaskedBlockDataset, MaskedBlockStream, MaskingVocabulary, check_probability
from ..metrics import perplexity
from ..training.arguments import PretrainingArguments
from ..training.trainer import HybridTrainer
from .support.models import NewModelArguments, build_new_or_pretrained, check_positions, load_tokenizer
from .support.pretraining_data import (
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
class MaskedDataArguments(PretrainingDataArguments):
    """Data of the run, and the share of it that is masked."""

    block_length: int = field(default=512, metadata={"help": "Tokens of one training sequence."})
    mask_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to predict."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self.mask_probability)


def build(
    data_args: MaskedDataArguments,
    model_args: NewModelArguments,
    training_args: PretrainingArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Model, masked blocks and trainer.

    Raises:
        ValueError: an option, the data, the tokenizer or the checkpoint cannot be used.
    """
    if not evaluate_only:
        check_run(data_args, training_args)
    tokenizer = load_tokenizer(
        model_args.tokenizer or model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
    )
    vocabulary = MaskingVocabulary.of(tokenizer)
    model = build_new_or_pretrained(AutoModelForMaskedLM, model_args, tokenizer, default_arch="mega")
    check_positions(model.config, data_args.block_length, "block_length")
    train_dataset, eval_dataset, text = build_datasets(
        data_args, tokenizer, vocabulary, training_args, evaluate_only=evaluate_only
    )
    trainer = HybridTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    report = RunReport(
        description=(
            f"A {model.config.model_type} masked language model ({data_args.mask_probability:.0%} of the tokens are predicted), "
            "trained on packed documents. It fills in masked tokens; fine-tune it for a task."
        ),
        task_type="fill-mask",
        pipeline_tag="fill-mask",
        data_name=display_names(data_args.validation_data or data_args.data) + " (held-out text)",
        auto_class="AutoModelForMaskedLM",
        training_data=f"{display_names(data_args.data)} ({text})",
        datasets=hub_names(data_args.data),
        lengths=f"blocks of {data_args.block_length} tokens",
        metrics={"corpus": str(text)},
        result_names={"eval_loss": "loss", "perplexity": "perplexity of masked tokens"},
    )
    return Job(trainer, report, lambda metrics: {"perplexity": perplexity(metrics["eval_loss"])})


def build_datasets(
    arguments: MaskedDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: MaskingVocabulary,
    training_args: PretrainingArguments,
    *,
    evaluate_only: bool = False,
) -> tuple[Dataset | None, Dataset, PretrainingText]:
    """Training set (masked anew in each epoch), evaluation set (fixed masks) and the text they come from."""
    text = load_text(arguments, tokenizer, evaluate_only=evaluate_only)
    length = arguments.block_length
    options: dict[str, Any] = {
        "vocabulary": vocabulary,
        "mask_probability": arguments.mask_probability,
        "seed": training_args.seed,
    }
    train: Dataset | None = None
    if isinstance(text.train, TokenSplit):
        train = MaskedBlockDataset(text.train.tokens, length, **options)
    elif text.train is not None:
        stream: dict[str, Any] = {"block_length": length, "shuffle_window": SHUFFLE_WINDOW, "repeat": True}
        make = partial(MaskedBlockStream, text.train, tokenizer, **stream, **options)
        train = sharded(make, arguments.stream_shards, training_args)
    evaluation = MaskedBlockDataset(text.validation.tokens, length, resample_each_epoch=False, **options)
    return train, limited(evaluation, arguments.max_validation_segments), text


RECIPE = Recipe("pretrain_mlm", __doc__ or "", (MaskedDataArguments, NewModelArguments, PretrainingArguments), build)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

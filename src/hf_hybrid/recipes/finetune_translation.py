"""Train or fine-tune an encoder-decoder to translate.

Evaluated by BLEU (sacrebleu) and chrF on generated text.

    python -m hf_hybrid.recipes.finetune_translation --data pairs/ --source_lang en --target_lang de --tokenizer tokenizer/ \
        --arch mega --config_overrides "hidden_size=256,decoder_layers=4" \
        --learning_rate 2e-3 --num_train_epochs 10 --generation_num_beams 5 --output_dir runs/en-de

Rows have a column `translation` with one text per language, or two columns of text. Without `--model_name_or_path` a new model
is trained. Predictions of the last evaluation are written to `predictions.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSeq2SeqLM

from .. import metrics
from ..data.records import origin_of, remember_origin
from ..training.arguments import Seq2SeqFinetuningArguments
from .support.finetuning_data import (
    GenerationArguments,
    GenerationScorer,
    encode_pairs,
    load_tables,
    require_columns,
    require_text,
    sequence_to_sequence_job,
    set_generation,
    single_validation_set,
)
from .support.models import NewModelArguments, build_new_or_pretrained, load_tokenizer, with_adapter
from .support.recipe import Recipe
from .support.reports import RunReport, display_names, hub_names
from .support.runs import Job

if TYPE_CHECKING:
    from datasets import Dataset

TRANSLATION_COLUMN = "translation"


@dataclass
class TranslationArguments(GenerationArguments):
    """Data, languages, lengths and generation."""

    source_lang: str | None = field(
        default=None, metadata={"help": "Language (key in `translation`) or column to translate from."}
    )
    target_lang: str | None = field(
        default=None, metadata={"help": "Language (key in `translation`) or column to translate into."}
    )
    max_source_length: int = field(default=256, metadata={"help": "Tokens of an input; longer ones are truncated."})
    max_target_length: int = field(default=256, metadata={"help": "Tokens of a target; longer ones are truncated."})


def text_pairs(rows: Dataset, arguments: TranslationArguments, what: str) -> Dataset:
    """The rows with the two columns `source` and `target`.

    Raises:
        ValueError: a language is not given or not in the data, or a text is missing.
    """
    languages = (arguments.source_lang, arguments.target_lang)
    is_nested = TRANSLATION_COLUMN in rows.column_names
    there = list(rows.features[TRANSLATION_COLUMN]) if is_nested else rows.column_names
    if None in languages or languages[0] == languages[1]:
        raise ValueError(
            f"`source_lang` and `target_lang` must name two of {', '.join(there)}; got {languages[0]!r} and {languages[1]!r}."
        )
    if is_nested:
        origin = origin_of(rows)
        rows = rows.select_columns([TRANSLATION_COLUMN]).flatten()
        rows = remember_origin(rows.rename_columns({f"{TRANSLATION_COLUMN}.{name}": name for name in there}), origin)
    require_columns(rows, languages, what)
    require_text(rows, languages, what)
    rows = rows.select_columns(list(languages))
    return rows.rename_columns(dict(zip(languages, ("source", "target"))))


def translation_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU and chrF of a corpus, both in percent, with the default settings of sacrebleu."""
    return {
        name: metrics.load(name).compute(predictions=predictions, references=references)["score"]
        for name in ("sacrebleu", "chrf")
    }


def build(
    data_args: TranslationArguments,
    model_args: NewModelArguments,
    training_args: Seq2SeqFinetuningArguments,
    *,
    evaluate_only: bool = False,
) -> Job:
    """Encoder-decoder, encoded rows and trainer.

    Raises:
        ValueError: an option, the data or the checkpoint cannot be used, or targets exceed the decoder's positions.
    """
    tokenizer = load_tokenizer(
        model_args.tokenizer or model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
    )
    model = build_new_or_pretrained(AutoModelForSeq2SeqLM, model_args, tokenizer, default_arch="spade")
    set_generation(model, data_args, training_args)
    train, validation = load_tables(data_args, seed=training_args.seed, evaluate_only=evaluate_only)
    rows = text_pairs(single_validation_set(validation), data_args, "validation data")
    train = None if train is None else text_pairs(train, data_args, "training data")

    def encode(pairs: Dataset, what: str) -> Dataset:
        return encode_pairs(pairs, lambda batch: (batch["source"], batch["target"]), tokenizer, data_args, what)

    with training_args.main_process_first(desc="tokenize"):
        encoded_train = None if train is None else encode(train, "training data")
        encoded_rows = encode(rows, "validation data")
    scorer = GenerationScorer(tokenizer, [[text] for text in rows["target"]], translation_scores)
    report = _report(data_args, model_args, train, rows)
    model = with_adapter(model, model_args.model_name_or_path, training_args)
    return sequence_to_sequence_job(model, tokenizer, training_args, report, scorer, encoded_train, encoded_rows)


def _report(
    data_args: TranslationArguments, model_args: NewModelArguments, train: Dataset | None, rows: Dataset
) -> RunReport:
    sources = data_args.data or data_args.validation_data or []
    checkpoint = model_args.model_name_or_path
    start = "from random weights" if checkpoint is None else "from a pretrained checkpoint"
    direction = f"{data_args.source_lang} to {data_args.target_lang}"
    train_samples = 0 if train is None else len(train)
    return RunReport(
        description=f"Trained {start} to translate from {direction}: {display_names(sources)}.",
        task_type="translation",
        pipeline_tag="translation",
        data_name=f"{display_names(sources)} ({direction})",
        auto_class="AutoModelForSeq2SeqLM",
        training_data=f"{display_names(sources)}, {train_samples:,} rows",
        datasets=hub_names(sources),
        base_model=None if checkpoint is None else next(iter(hub_names([checkpoint])), None),
        lengths=f"inputs of up to {data_args.max_source_length} tokens, targets of up to {data_args.max_target_length}",
        metrics={"train_samples": train_samples, "eval_samples": len(rows), "from_scratch": checkpoint is None},
        result_names={"eval_sacrebleu": "sacrebleu", "eval_chrf": "chrf"},
    )


RECIPE = Recipe(
    "finetune_translation", __doc__ or "", (TranslationArguments, NewModelArguments, Seq2SeqFinetuningArguments), build
)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

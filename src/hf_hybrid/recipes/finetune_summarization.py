"""Fine-tune an encoder-decoder to summarise or rewrite texts.

Evaluated by ROUGE on generated text.

    python -m hf_hybrid.recipes.finetune_summarization --model_name_or_path runs/pretrain --data articles/ \
        --max_source_length 4096 --max_target_length 128 --generation_num_beams 4 --output_dir runs/summaries

With `--query_column` the input is the query, a blank line, and the document. A list column `targets` holds several
references; ROUGE is then the best over them. Predictions of the last evaluation are written to `predictions.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from .. import metrics
from ..data.records import place_of, shortened
from ..training.arguments import Seq2SeqFinetuningArguments
from .support.finetuning_data import (
    CheckpointArguments,
    GenerationArguments,
    GenerationScorer,
    check_vocabulary,
    choose_column,
    encode_pairs,
    load_or_initialize,
    load_tables,
    require_columns,
    require_text,
    sequence_to_sequence_job,
    set_generation,
    single_validation_set,
)
from .support.models import load_tokenizer, with_adapter
from .support.recipe import Recipe
from .support.reports import RunReport, display_names, hub_names
from .support.runs import Job

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_COLUMNS = ("document", "article", "text", "source", "dialogue")
SUMMARY_COLUMNS = ("summary", "highlights", "abstract", "target")


@dataclass
class SummarizationArguments(GenerationArguments):
    """Data, columns, lengths and generation."""

    text_column: str | None = field(
        default=None, metadata={"help": f"Column of the input. Default: the first of {', '.join(TEXT_COLUMNS)}."}
    )
    summary_column: str | None = field(
        default=None, metadata={"help": f"Column of the target. Default: the first of {', '.join(SUMMARY_COLUMNS)}."}
    )
    targets_column: str | None = field(
        default=None, metadata={"help": "List column with all references. Default: `targets` where it exists."}
    )
    query_column: str | None = field(default=None, metadata={"help": "Column of a query to put before the document."})


@dataclass
class Columns:
    """Names of the columns in use."""

    text: str
    summary: str
    targets: str | None
    query: str | None


def find_columns(rows: Dataset, arguments: SummarizationArguments) -> Columns:
    """The columns to read.

    Raises:
        ValueError: a named column does not exist, or none of the usual names does.
    """
    named = [arguments.text_column, arguments.summary_column, arguments.targets_column, arguments.query_column]
    require_columns(rows, named, "data")

    return Columns(
        text=choose_column(rows, arguments.text_column, TEXT_COLUMNS, "text_column"),
        summary=choose_column(rows, arguments.summary_column, SUMMARY_COLUMNS, "summary_column"),
        targets=arguments.targets_column or ("targets" if "targets" in rows.column_names else None),
        query=arguments.query_column,
    )


def references_of(rows: Dataset, columns: Columns) -> list[list[str]]:
    """All references of every row: those of the list column if it is filled, else the summary; one string is one reference.

    Raises:
        ValueError: a reference is no text; the message names the row.
    """
    summaries = rows[columns.summary]
    targets = [None] * len(rows) if columns.targets is None else rows[columns.targets]
    found = []
    for number, (several, summary) in enumerate(zip(targets, summaries)):
        references = [several] if isinstance(several, str) else list(several or [])
        for reference in references:
            if not isinstance(reference, str):
                place = place_of(rows, number, "validation data")
                raise ValueError(
                    f"{place} has a reference that is no text in {columns.targets!r}: {shortened(several)}."
                )
        found.append(references or [summary])
    return found


def encode(
    rows: Dataset, columns: Columns, tokenizer: PreTrainedTokenizerBase, arguments: SummarizationArguments, what: str
) -> Dataset:
    """Token ids of inputs and targets."""
    require_columns(rows, [columns.text, columns.summary, columns.query], what)
    require_text(rows, [columns.text, columns.summary, columns.query], what)

    def texts_of(batch: Mapping[str, list[str]]) -> tuple[list[str], list[str]]:
        texts = batch[columns.text]
        if columns.query is not None:
            texts = [f"{query}\n\n{text}" for query, text in zip(batch[columns.query], texts)]
        return texts, batch[columns.summary]

    return encode_pairs(rows, texts_of, tokenizer, arguments, what)


def rouge_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """ROUGE in percent, with stemming and one sentence per line."""
    rouge = metrics.load("rouge")
    scores = rouge.compute(predictions=predictions, references=references, use_stemmer=True, split_sentences=True)
    return {name: 100.0 * value for name, value in scores.items()}


def build(
    data_args: SummarizationArguments,
    model_args: CheckpointArguments,
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
    model = load_or_initialize(AutoModelForSeq2SeqLM, model_args)
    check_vocabulary(model, tokenizer)
    set_generation(model, data_args, training_args)
    train, validation = load_tables(data_args, seed=training_args.seed, evaluate_only=evaluate_only)
    rows = single_validation_set(validation)
    columns = find_columns(rows if train is None else train, data_args)
    scorer = GenerationScorer(tokenizer, references_of(rows, columns), rouge_scores)
    with training_args.main_process_first(desc="tokenize"):
        encoded_train = None if train is None else encode(train, columns, tokenizer, data_args, "training data")
        encoded_rows = encode(rows, columns, tokenizer, data_args, "validation data")
    report = _report(data_args, model_args, train, rows)
    model = with_adapter(model, None if model_args.from_scratch else model_args.model_name_or_path, training_args)
    return sequence_to_sequence_job(model, tokenizer, training_args, report, scorer, encoded_train, encoded_rows)


def _report(
    data_args: SummarizationArguments, model_args: CheckpointArguments, train: Dataset | None, rows: Dataset
) -> RunReport:
    sources = data_args.data or data_args.validation_data or []
    start = "random weights" if model_args.from_scratch else "a pretrained checkpoint"
    train_samples = 0 if train is None else len(train)
    return RunReport(
        description=f"Fine-tuned from {start} to write summaries: {display_names(sources)}.",
        task_type="summarization",
        pipeline_tag="summarization",
        data_name=display_names(sources),
        auto_class="AutoModelForSeq2SeqLM",
        training_data=f"{display_names(sources)}, {train_samples:,} rows",
        datasets=hub_names(sources),
        base_model=next(iter(hub_names([model_args.model_name_or_path])), None),
        lengths=f"inputs of up to {data_args.max_source_length} tokens, targets of up to {data_args.max_target_length}",
        metrics={"train_samples": train_samples, "eval_samples": len(rows), "from_scratch": model_args.from_scratch},
        result_names={f"eval_{name}": name for name in metrics.ROUGE_TYPES},
    )


RECIPE = Recipe(
    "finetune_summarization",
    __doc__ or "",
    (SummarizationArguments, CheckpointArguments, Seq2SeqFinetuningArguments),
    build,
)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `Recipe.train` for arguments and errors, `--help` for the options."""
    return RECIPE.train(args)


if __name__ == "__main__":
    main()

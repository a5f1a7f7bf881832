"""Fine-tune an encoder-decoder for summarization, or any other rewriting of text, evaluated by ROUGE on generated text.

    python -m hf_hybrid.recipes.finetune_summarization --model_name_or_path runs/pretrain --data articles/ \
        --max_source_length 4096 --max_target_length 128 --generation_num_beams 4 --output_dir runs/summaries

With `--query_column` the input is the query, a blank line, and the document. A list column `targets` holds several
references; ROUGE is then the best over them. Predictions of the last evaluation are written to `predictions.jsonl`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import metrics as offline_metrics
from ..training.arguments import Seq2SeqFinetuningArguments
from ..training.trainer import HybridSeq2SeqTrainer
from .common import Job, RunReport, check_decoder_table, display_names, hub_names, load_tokenizer, run_recipe
from .finetuning_data import (
    CheckpointArguments,
    TableArguments,
    check_vocabulary,
    load_or_initialize,
    load_tables,
    require_columns,
    require_text,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("document", "article", "text", "source", "dialogue")
SUMMARY_COLUMNS = ("summary", "highlights", "abstract", "target")
PREDICTIONS_FILE = "predictions.jsonl"


@dataclass
class SummarizationArguments(TableArguments):
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
    query_column: str | None = field(default=None, metadata={"help": "Column of a query put before the document."})
    source_prefix: str = field(default="", metadata={"help": 'Text before every input, e.g. "summarize: ".'})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of an input; longer ones are cut."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a target; longer ones are cut."})
    length_penalty: float | None = field(default=None, metadata={"help": "Length penalty of beam search."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "Never generate an n-gram twice."})
    min_new_tokens: int | None = field(default=None, metadata={"help": "Generate at least this many tokens."})


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

    def choose(given: str | None, usual: Sequence[str], option: str) -> str:
        found = given or next((name for name in usual if name in rows.column_names), None)
        if found is None:
            raise ValueError(
                f"None of the columns {', '.join(usual)} exists; there are {', '.join(rows.column_names)}. Name one with "
                f"`{option}`."
            )
        return found

    return Columns(
        text=choose(arguments.text_column, TEXT_COLUMNS, "text_column"),
        summary=choose(arguments.summary_column, SUMMARY_COLUMNS, "summary_column"),
        targets=arguments.targets_column or ("targets" if "targets" in rows.column_names else None),
        query=arguments.query_column,
    )


def references_of(rows: Dataset, columns: Columns) -> list[list[str]]:
    """All references of every row: the list column where it is filled, else the summary."""
    summaries = rows[columns.summary]
    targets = [None] * len(rows) if columns.targets is None else rows[columns.targets]
    return [list(several) if several else [summary] for several, summary in zip(targets, summaries)]


def encode(
    rows: Dataset, columns: Columns, tokenizer: PreTrainedTokenizerBase, arguments: SummarizationArguments, what: str
) -> Dataset:
    """Token ids of inputs and targets."""
    require_columns(rows, [columns.text, columns.summary, columns.query], what)
    require_text(rows, [columns.text, columns.summary, columns.query], what)

    def tokenize(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        texts = batch[columns.text]
        if columns.query is not None:
            texts = [f"{query}\n\n{text}" for query, text in zip(batch[columns.query], texts)]
        texts = [arguments.source_prefix + text for text in texts]
        options: dict[str, Any] = {"truncation": True, "return_token_type_ids": False}
        encoded = tokenizer(texts, max_length=arguments.max_source_length, **options)
        targets = tokenizer(text_target=batch[columns.summary], max_length=arguments.max_target_length, **options)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**encoded, "labels": targets["input_ids"], "length": lengths}

    return rows.map(tokenize, batched=True, batch_size=200, remove_columns=rows.column_names, desc=f"tokenize {what}")


def set_generation(
    model: PreTrainedModel, data_args: SummarizationArguments, training_args: Seq2SeqFinetuningArguments
) -> None:
    """Put the decoding options into the generation configuration, which is saved with the model.

    Raises:
        ValueError: options contradict each other, or exceed the decoder's positions.
    """
    if training_args.generation_max_length is None:
        training_args.generation_max_length = data_args.max_target_length + 1  # the start token counts
    longest = training_args.generation_max_length - 1
    check_decoder_table(model.config, data_args.max_target_length, "Targets", "max_target_length")
    check_decoder_table(model.config, longest, "Generated texts", "generation_max_length")
    beams = training_args.generation_num_beams or 1
    if data_args.length_penalty is not None and beams == 1:
        raise ValueError("`length_penalty` acts on beam search: set `generation_num_beams` above 1 or leave it out.")
    model.generation_config.max_length = training_args.generation_max_length  # the default of 20 would cut summaries
    options = {
        "num_beams": beams if beams > 1 else None,
        "length_penalty": data_args.length_penalty,
        "no_repeat_ngram_size": data_args.no_repeat_ngram_size,
        "min_new_tokens": data_args.min_new_tokens,
    }
    for name, value in options.items():
        if value is not None:
            setattr(model.generation_config, name, value)


class GenerationScorer:
    """ROUGE of generated ids against all references; keeps the decoded text of the last evaluation.

    Args:
        tokenizer: decodes.
        references: of every evaluated row, in order.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, references: list[list[str]]) -> None:
        self.tokenizer = tokenizer
        self.references = references
        self.predictions: list[str] = []
        self.rouge = offline_metrics.load("rouge")

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        ids = ids[: len(self.references)]  # distributed evaluation repeats rows to fill the last batch
        ids = np.where(ids < 0, self.tokenizer.pad_token_id, ids)
        self.predictions = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        scores = self.rouge.compute(
            predictions=self.predictions, references=self.references, use_stemmer=True, split_sentences=True
        )
        lengths = (ids != self.tokenizer.pad_token_id).sum(axis=1)
        return {**{name: 100.0 * value for name, value in scores.items()}, "generated_tokens": float(lengths.mean())}

    def write(self, folder: Path) -> None:
        """Write the predictions of the last evaluation beside their references."""
        if self.predictions:
            with (folder / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
                for text, references in zip(self.predictions, self.references):
                    file.write(json.dumps({"prediction": text, "references": references}, ensure_ascii=False) + "\n")


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
    tokenizer = load_tokenizer(model_args.tokenizer or model_args.model_name_or_path)
    model = load_or_initialize(AutoModelForSeq2SeqLM, model_args)
    check_vocabulary(model, tokenizer)
    set_generation(model, data_args, training_args)
    train, validation = load_tables(data_args, seed=training_args.seed, evaluate_only=evaluate_only)
    rows = validation.get("")
    if rows is None:
        raise ValueError("The data has several validation sets; name one with `validation_split`.")
    columns = find_columns(rows if train is None else train, data_args)
    scorer = GenerationScorer(tokenizer, references_of(rows, columns))
    with training_args.main_process_first(desc="tokenize"):
        encoded_train = None if train is None else encode(train, columns, tokenizer, data_args, "training data")
        encoded_rows = encode(rows, columns, tokenizer, data_args, "validation data")
    trainer = HybridSeq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded_train,
        eval_dataset=encoded_rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8),
        processing_class=tokenizer,
        compute_metrics=scorer if training_args.predict_with_generate else None,
    )
    return Job(trainer, _report(data_args, model_args, train, rows), write_results=scorer.write)


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
        result_names={f"eval_{name}": name for name in offline_metrics.ROUGE_TYPES},
    )


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the recipe; see `run_recipe` for arguments and errors, `--help` for the options."""
    return run_recipe((SummarizationArguments, CheckpointArguments, Seq2SeqFinetuningArguments), build, args, __doc__)


if __name__ == "__main__":
    main()

"""Evaluate a saved checkpoint on a data set, with the metrics of its task.

    python -m hf_hybrid.recipes.evaluate glue --model_name_or_path runs/sst2 --task sst2 --output_dir runs/sst2-eval
    python -m hf_hybrid.recipes.evaluate summarization --model_name_or_path runs/summaries --data articles/ \
        --generation_num_beams 4 --output_dir runs/summaries-eval

The first word is the kind of task: span_corruption, clm, mlm, glue, summarization, translation, lra, synthetic, image or
audio. The other options are those of the recipe that trains it; `<kind> --help` lists them. `metrics.json`, `arguments.json` and
`environment.json` are written.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from ..training.arguments import (
    FinetuningArguments,
    PretrainingArguments,
    Seq2SeqFinetuningArguments,
    SyntheticTrainingArguments,
)
from ..training.run_folder import RunFolder, is_main_process
from .support.finetuning_data import CheckpointArguments
from .support.models import NewModelArguments
from .support.options import parse_arguments, resolved_arguments
from .support.runs import finish_together, set_up_logging
from .support.sequence_classification import ClassifierArguments

logger = logging.getLogger(__name__)

# kind -> (module, data arguments, model arguments, training arguments)
KINDS: dict[str, tuple[str, str, type, type]] = {
    "span_corruption": (
        "pretrain_span_corruption",
        "SpanCorruptionArguments",
        NewModelArguments,
        PretrainingArguments,
    ),
    "clm": ("pretrain_clm", "CausalDataArguments", NewModelArguments, PretrainingArguments),
    "mlm": ("pretrain_mlm", "MaskedDataArguments", NewModelArguments, PretrainingArguments),
    "glue": ("finetune_glue", "GlueArguments", CheckpointArguments, FinetuningArguments),
    "summarization": (
        "finetune_summarization",
        "SummarizationArguments",
        CheckpointArguments,
        Seq2SeqFinetuningArguments,
    ),
    "translation": ("finetune_translation", "TranslationArguments", NewModelArguments, Seq2SeqFinetuningArguments),
    "lra": ("train_lra", "LraArguments", ClassifierArguments, FinetuningArguments),
    "synthetic": ("train_synthetic", "SyntheticArguments", ClassifierArguments, SyntheticTrainingArguments),
    "image": ("classify_image", "ImageArguments", ClassifierArguments, FinetuningArguments),
    "audio": ("classify_audio", "AudioArguments", ClassifierArguments, FinetuningArguments),
}


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Args:
        args: command line words, the kind first; a mapping of options with the key `kind`; or None.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: unknown kind, or an option, the data or the checkpoint cannot be used.
        FileExistsError: the output folder is not empty.
    """
    kind, options = _split_kind(args)
    module_name, data_name, model_type, training_type = KINDS[kind]
    module = import_module(f".{module_name}", __package__)
    groups = parse_arguments((getattr(module, data_name), model_type, training_type), options, __doc__)
    _, model_args, training_args = groups
    set_up_logging(training_args)
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is required: the checkpoint to evaluate.")
    if training_args.output_dir is None:
        raise ValueError("`output_dir` is required: the folder that receives the metrics.")
    if getattr(training_args, "lora_rank", None) is not None:
        raise ValueError("`lora_rank` is for training; an adapter is evaluated by its folder as `model_name_or_path`.")
    folder = RunFolder(training_args.output_dir)
    job = partial(module.build, evaluate_only=True)(*groups)
    with folder.recording({"kind": kind, **resolved_arguments(*groups)}):
        metrics = {**job.final_metrics(), **job.report.metrics, "num_parameters": job.num_parameters()}
        folder.write_metrics(metrics)
        if is_main_process() and job.write_results is not None:
            job.write_results(folder.path)
        finish_together(job.trainer)
    for name, value in metrics.items():
        logger.info("%s = %s", name, value)
    return metrics


def _split_kind(
    args: Sequence[str] | Mapping[str, Any] | None,
) -> tuple[str, Sequence[str] | Mapping[str, Any]]:
    options: Sequence[str] | Mapping[str, Any]
    if isinstance(args, Mapping):
        kind = args.get("kind")
        options = {key: value for key, value in args.items() if key != "kind"}
    else:
        words = list(sys.argv[1:] if args is None else args)
        if words[:1] in (["-h"], ["--help"]):
            sys.stdout.write(__doc__ or "")
            raise SystemExit(0)
        kind, options = (words[0] if words else None), words[1:]
    if kind not in KINDS:
        raise ValueError(f"The kind of evaluation must be one of {', '.join(KINDS)}; got {kind!r}.")
    return kind, options


if __name__ == "__main__":
    main()

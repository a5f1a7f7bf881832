"""What all recipes share: reading arguments, building tokenizer and model, running a Trainer, leaving the records."""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_hybrid  # noqa: F401  registers the architectures with the Auto classes

from ..hub import CARD_FILE, MANIFEST_FILE, EvaluationResult, ModelCard, verify_export, write_model_card
from ..tokenization.special_tokens import padded_vocab_size
from ..training.adapters import (
    adapted_config,
    adapter_folder,
    add_lora,
    base_model,
    check_resumable,
    is_adapted,
    load_adapted_model,
    state_modules,
)
from ..training.arguments import FinetuningArguments
from ..training.codebooks import CodebookCallback, has_codebooks
from ..training.run_folder import (
    CODEBOOK_FILE,
    ENVIRONMENT_FILE,
    LOSS_CURVE_FILE,
    METRICS_FILE,
    RunFolder,
    check_checkpoint,
    describe_environment,
    is_main_process,
    peak_memory,
)
from ..viz import codebook_usage, plot_loss_curves

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------- arguments


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, so that example commands can be copied, and shows the defaults of the options."""


def parse_arguments(
    dataclass_types: Sequence[type], args: Sequence[str] | Mapping[str, Any] | None, description: str | None
) -> tuple[Any, ...]:
    """Fill dataclasses from flags, from a YAML or JSON file followed by flags that override it, or from a mapping.

    Args:
        dataclass_types: one instance of each is returned, in this order.
        args: list of command line words; a mapping of option names to values; None = the words of this process.
        description: shown by `--help`.

    Raises:
        ValueError: the file cannot be read or is no mapping.
    """
    parser = HfArgumentParser(
        list(dataclass_types),  # type: ignore[arg-type]
        description=description,
        formatter_class=HelpFormatter,
    )
    if isinstance(args, Mapping):
        words = _to_flags(args)
    else:
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0].endswith((".yaml", ".yml", ".json")):
            words = _to_flags(_read_options(Path(words[0]))) + words[1:]
    return parser.parse_args_into_dataclasses(args=words)


def _read_options(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The option file {path} cannot be read: {error}.") from error
    if path.suffix == ".json":
        options = json.loads(text)
    else:
        import yaml

        options = yaml.safe_load(text)
    if not isinstance(options, Mapping):
        raise ValueError(f"The option file {path} must hold `name: value` pairs at its top level.")
    return options


def _to_flags(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif isinstance(value, (list, tuple)):
            words += [str(item) for item in value]
        else:
            words.append(str(value))
    return words


def resolved_arguments(*dataclasses_: Any) -> dict[str, Any]:
    """All options of a run in one flat dictionary, for `arguments.json`."""
    resolved: dict[str, Any] = {}
    for group in dataclasses_:
        is_training = isinstance(group, TrainingArguments)
        resolved.update(group.to_dict() if is_training else {f.name: getattr(group, f.name) for f in fields(group)})
    return resolved


def split_names(names: Sequence[str] | str | None) -> list[str]:
    """Several names given as separate words, separated by commas, or both; an existing path is never split."""
    names = [names] if isinstance(names, str) else list(names or [])
    split: list[str] = []
    for name in names:
        split += [name] if Path(name).exists() else [part.strip() for part in name.split(",") if part.strip()]
    return split


def set_up_logging(training_args: TrainingArguments | None = None) -> None:
    """Log to standard error: everything from the main process, warnings from the others."""
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=level)
    logging.getLogger("hf_hybrid").setLevel(level)
    for noisy in ("httpx", "urllib3", "filelock", "fsspec", "matplotlib", "absl", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if training_args is not None:
        transformers.utils.logging.set_verbosity(training_args.get_process_log_level())


# ------------------------------------------------------------------------------------------------ tokenizer, model


@dataclass
class NewModelArguments:
    """Which model to train: a checkpoint, or a fresh one from a configuration."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue from (folder or Hub name). Default: a new model."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a new model: a model type, a folder, or a Hub name."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'Fields of the configuration, e.g. "d_model=256,encoder_layers=4,ssm_layers=[0,1]".'},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer (folder or Hub name). Default: that of the checkpoint."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a checkpoint."})


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Read `"a=1,b=[0,1],c=name"`; values are JSON where they can be, else plain words.

    Raises:
        ValueError: an entry has no `=`.
    """
    overrides: dict[str, Any] = {}
    # A comma separates entries when a `name=` follows it, so lists need no quoting.
    for entry in filter(None, re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text or "")):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not name:
            raise ValueError(f"`config_overrides` must look like `name=value,name=value`; got {entry!r}.")
        try:
            overrides[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            overrides[name] = value
    return overrides


def load_tokenizer(name_or_path: str | None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        ValueError: no name was given, or it cannot be loaded.
    """
    if name_or_path is None:
        raise ValueError("`tokenizer` is required for a new model: a folder or a Hub name (see `train_tokenizer`).")
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"`tokenizer` {name_or_path!r} cannot be loaded: {error}") from error


def load_config(name_or_path: str, overrides: Mapping[str, Any], **kwargs: Any) -> PreTrainedConfig:
    """A configuration by model type, folder or Hub name, with changed fields.

    Raises:
        ValueError: the configuration cannot be loaded or has no such field.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    is_type = name_or_path in CONFIG_MAPPING and not Path(name_or_path).exists()
    try:
        if is_type:
            base = AutoConfig.for_model(name_or_path)
        elif (adapter := adapter_folder(name_or_path)) is not None:
            base = adapted_config(adapter)
        else:
            base = AutoConfig.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"The configuration {name_or_path!r} cannot be loaded: {error}") from error
    unknown = sorted(name for name in overrides if not hasattr(base, name))
    if unknown:
        raise ValueError(
            f"`config_overrides` names {unknown}, which {type(base).__name__} does not have. Fields: "
            + ", ".join(sorted(key for key in base.to_dict() if not key.startswith("_")))
            + "."
        )
    overrides = {type(base).attribute_map.get(name, name): value for name, value in overrides.items()}
    try:
        return type(base)(**overrides) if is_type else type(base).from_dict({**base.to_dict(), **overrides})
    except StrictDataclassError as error:
        raise ValueError(f"`config_overrides` do not fit together: {error.__cause__ or error}") from error


def build_new_or_pretrained(
    auto_class: Any, arguments: NewModelArguments, tokenizer: PreTrainedTokenizerBase, default_type: str
) -> PreTrainedModel:
    """The model to pretrain: loaded, or new with a vocabulary for the tokenizer.

    Args:
        auto_class: e.g. `AutoModelForSeq2SeqLM`.
        arguments: which model.
        tokenizer: gives vocabulary size and special tokens of a new model.
        default_type: model type of a new model when no configuration is named.

    Raises:
        ValueError: options contradict each other, a checkpoint is damaged, or its vocabulary is too small.
    """
    overrides = parse_overrides(arguments.config_overrides)
    if arguments.model_name_or_path is not None:
        if arguments.config_name or overrides:
            raise ValueError("`config_name` and `config_overrides` describe a new model; drop `model_name_or_path`.")
        model = load_model(auto_class, arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code)
        if model.config.vocab_size < len(tokenizer):
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} ids but the model only {model.config.vocab_size}: use the "
                "tokenizer of the checkpoint."
            )
        return model
    specials: dict[str, Any] = {"vocab_size": padded_vocab_size(tokenizer)}
    if tokenizer.pad_token_id is not None:
        specials["pad_token_id"] = tokenizer.pad_token_id
    specials["eos_token_id"] = tokenizer.eos_token_id
    name = arguments.config_name or default_type
    config = load_config(name, {**specials, **overrides}, trust_remote_code=arguments.trust_remote_code)
    if config.is_encoder_decoder and "decoder_start_token_id" not in overrides:
        config.decoder_start_token_id = tokenizer.pad_token_id
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"`vocab_size` {config.vocab_size} is smaller than the tokenizer ({len(tokenizer)} ids).")
    return auto_class.from_config(config, trust_remote_code=arguments.trust_remote_code)


def load_model(auto_class: Any, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint through an Auto class, with a clear error for a damaged or missing one.

    An adapter is merged into the checkpoint that it was trained on. The names of parameters that the checkpoint did not
    hold are left in `model.untrained_parameters`.

    Raises:
        ValueError: nothing can be loaded from there, or it is an export that was changed.
    """
    if Path(name_or_path).is_dir():
        check_checkpoint(name_or_path)
        if (Path(name_or_path) / MANIFEST_FILE).is_file():
            verify_export(name_or_path)
    adapter = adapter_folder(name_or_path)
    try:
        if adapter is not None:
            return load_adapted_model(auto_class, adapter, **kwargs)
        model, report = auto_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
        model.untrained_parameters = sorted(report["missing_keys"])
        return model
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The checkpoint {name_or_path!r} cannot be loaded as {auto_class.__name__}: {error}"
        ) from error


def with_adapter(model: PreTrainedModel, checkpoint: str | None, training_args: FinetuningArguments) -> Any:
    """The model to train: with LoRA where `lora_rank` asks for it, else as it is.

    Args:
        model: loaded from `checkpoint`.
        checkpoint: name or path; None for a model with random weights.
        training_args: with the options of the adapter.

    Raises:
        ValueError: there is no checkpoint to adapt, or it is an adapter itself.
    """
    if training_args.lora_rank is None:
        return model
    if checkpoint is None:
        raise ValueError(
            "`lora_rank` adapts a pretrained checkpoint and saves the difference alone: pass `model_name_or_path`, "
            "without `from_scratch`, or train the new model without `lora_rank`."
        )
    if adapter_folder(checkpoint) is not None:
        raise ValueError(
            f"{checkpoint!r} is an adapter itself. Continue its run with `resume_from_checkpoint`, or merge it into a "
            "checkpoint first (python -m hf_hybrid.recipes.merge_adapter) and adapt that."
        )
    in_full: list[str] = []
    for name in split_names(training_args.lora_modules_to_save):
        in_full += state_modules(model) if name == "state" else [name]
    return add_lora(
        model,
        training_args.lora_rank,
        alpha=training_args.lora_alpha,
        dropout=training_args.lora_dropout,
        target_modules=split_names(training_args.lora_targets) or None,
        modules_to_save=in_full,
        untrained=getattr(model, "untrained_parameters", ()),
    )


def check_decoder_table(config: PreTrainedConfig, target_length: int, what: str, remedy: str) -> None:
    """Refuse targets that the decoder has no positions for, before training begins.

    Raises:
        ValueError: `target_length` exceeds `max_position_embeddings`.
    """
    rows = getattr(config, "max_position_embeddings", None)
    if rows is not None and target_length > rows:
        raise ValueError(
            f"{what} have up to {target_length} tokens, but the decoder's position table has {rows} rows "
            f"(`max_position_embeddings`). Lower `{remedy}`, or train a new model with a longer table "
            f"(`config_overrides max_position_embeddings={target_length}`)."
        )


def check_positions(config: PreTrainedConfig, length: int, remedy: str) -> None:
    """Refuse inputs that a model has no positions for, before training begins.

    Raises:
        ValueError: `length` exceeds `max_position_embeddings`.
    """
    rows = getattr(config, "max_position_embeddings", None)
    if rows is not None and not config.is_encoder_decoder and length > rows:
        raise ValueError(
            f"Inputs have up to {length} tokens, but the position table of the model has {rows} rows "
            f"(`max_position_embeddings`). Lower `{remedy}`, or train a new model with a longer table "
            f"(`config_overrides max_position_embeddings={length}`)."
        )


# -------------------------------------------------------------------------------------------------------- the run


@dataclass
class RunReport:
    """What a recipe knows about its run, for the records.

    Attributes:
        description: sentences for the model card.
        task_type: Hub task of the results.
        data_name: name of the evaluation data in the results.
        auto_class: Auto class that loads the checkpoint.
        pipeline_tag: Hub pipeline, if one fits.
        training_data: description of the training data.
        lengths: lengths of inputs and targets.
        datasets: Hub names among the data.
        base_model: Hub name of the initial checkpoint, if any.
        metrics: additional numbers for `metrics.json`.
        result_names: keys of the final evaluation metrics that go into the card -> their names there.
    """

    description: str
    task_type: str
    data_name: str
    auto_class: str
    pipeline_tag: str | None = None
    training_data: str = ""
    lengths: str = ""
    datasets: Sequence[str] = ()
    base_model: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    result_names: Mapping[str, str] = field(default_factory=lambda: {"eval_loss": "loss"})


@dataclass
class Job:
    """What a recipe builds from its arguments: a trainer, what to say about it, and how to evaluate it.

    Attributes:
        trainer: with data sets, collator and metrics.
        report: for the records.
        derive: computes further metrics from those of the evaluation.
        write_results: called by the main process at the end with the folder, for additional files.
    """

    trainer: Trainer
    report: RunReport
    derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    write_results: Callable[[Path], None] | None = None

    def final_metrics(self) -> dict[str, Any]:
        """Metrics of the final weights: those just logged where training ended with an evaluation, else measured."""
        trainer = self.trainer
        if trainer.eval_dataset is None:
            return {}
        metrics: dict[str, Any] = {}
        if trainer.state.global_step > 0 and not trainer.args.load_best_model_at_end:
            for entry in trainer.state.log_history:
                if entry.get("step") == trainer.state.global_step:
                    metrics.update({key: value for key, value in entry.items() if key.startswith("eval_")})
        metrics = metrics or trainer.evaluate()
        return {**metrics, **(self.derive(metrics) if self.derive is not None else {})}

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained or evaluated, without the wrapper of its adapter."""
        model = base_model(self.trainer.model)
        assert isinstance(model, PreTrainedModel)
        return model

    def num_parameters(self) -> int:
        """Parameters, tied ones counted once, those of an adapter included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def num_trainable_parameters(self) -> int:
        """Parameters that get gradients."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def run_recipe(
    dataclass_types: Sequence[type],
    build: Callable[..., Job],
    args: Sequence[str] | Mapping[str, Any] | None,
    description: str | None,
) -> dict[str, Any]:
    """The `main` of every training recipe: arguments, output folder, build, train, evaluate, save, records.

    Args:
        dataclass_types: data, model and training arguments, the last a `TrainingArguments`.
        build: makes the job from one instance of each.
        args: see `parse_arguments`.
        description: shown by `--help`.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: an option, the data, the tokenizer or the checkpoint cannot be used.
        FileExistsError: the output folder is not empty.
    """
    groups = parse_arguments(dataclass_types, args, description)
    training_args = groups[-1]
    set_up_logging(training_args)
    if training_args.output_dir is None:
        raise ValueError("`output_dir` is required: the folder that receives the checkpoint and all records.")
    if importlib.util.find_spec("matplotlib") is None:  # better now than after the training
        raise ImportError('The loss curve of a run needs matplotlib: pip install "hf_hybrid[train]".')
    if training_args.hub_token is not None:
        raise ValueError(
            "`hub_token` would be written into the run folder: set HF_TOKEN or run `hf auth login` instead."
        )
    folder = RunFolder(training_args.output_dir, training_args.resume_from_checkpoint)
    set_seed(training_args.seed)
    job = build(*groups)
    with folder.recording(resolved_arguments(*groups)):
        return _train_and_record(job, folder)


def _train_and_record(job: Job, folder: RunFolder) -> dict[str, Any]:
    trainer = job.trainer
    resume = None if folder.resume_checkpoint is None else str(folder.resume_checkpoint)
    if folder.resume_checkpoint is not None:
        check_resumable(trainer.model, folder.resume_checkpoint)
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    metrics = {
        **{key: value for key, value in result.metrics.items() if key != "total_flos"},
        **job.final_metrics(),
        **job.report.metrics,
        "steps": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "input_tokens_seen": trainer.state.num_input_tokens_seen,
        "tokens_per_second": getattr(trainer, "tokens_per_second", None),
        "num_parameters": job.num_parameters(),
        "num_trainable_parameters": job.num_trainable_parameters(),
        **peak_memory(),
    }
    folder.write_metrics(metrics)
    if is_main_process():
        trainer.state.save_to_json(str(folder.path / "trainer_state.json"))
        plot_loss_curves(trainer.state.log_history, folder.path / LOSS_CURVE_FILE)
        _plot_codebooks(trainer, folder.path)
        write_model_card(make_card(job, folder, metrics), folder.path)
        if job.write_results is not None:
            job.write_results(folder.path)
        if trainer.args.push_to_hub:
            _push_records(trainer, folder)
        logger.info("Everything about this run is in %s", folder.path)
    finish_together(trainer)
    return metrics


def finish_together(trainer: Trainer) -> None:
    """Wait for all processes of a distributed run, and close their group when the interpreter ends.

    Nobody else closes it, and a process that exits with an open group now and then aborts, whereupon the launcher kills
    the others. Further recipes of this process may need the group, so it stays open until then.
    """
    trainer.accelerator.wait_for_everyone()
    if dist.is_available() and dist.is_initialized():
        atexit.unregister(_close_process_group)
        atexit.register(_close_process_group)


def _close_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _plot_codebooks(trainer: Trainer, folder: Path) -> None:
    """Use of the codewords and their perplexity over the steps, of models that have codebooks."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CodebookCallback) and has_codebooks(trainer.model):
            codebook_usage(trainer.model, folder / CODEBOOK_FILE, history=callback.history)


def _push_records(trainer: Trainer, folder: RunFolder) -> None:
    """Replaces the card that the Trainer drafted on the Hub by that of the run, and adds its figures."""
    from huggingface_hub import HfApi

    HfApi(library_name="hf_hybrid").upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=folder.path,
        allow_patterns=[CARD_FILE, METRICS_FILE, LOSS_CURVE_FILE, CODEBOOK_FILE],
        revision=trainer.args.hub_revision,
        commit_message="Model card and figures of the run",
    )


def make_card(job: Job, folder: RunFolder, metrics: Mapping[str, Any]) -> ModelCard:
    """Fill the model card from the run."""
    environment_file = folder.path / ENVIRONMENT_FILE
    environment = json.loads(environment_file.read_text()) if environment_file.is_file() else describe_environment()
    report, versions = job.report, environment["versions"]
    processor = f"{environment['processor']}, {environment['torch_threads']} threads"
    return ModelCard(
        model_name=folder.path.resolve().name,
        description=report.description,
        model_type=str(job.model.config.model_type),
        architecture=type(job.model).__name__,
        num_parameters=metrics["num_parameters"],
        auto_class=report.auto_class,
        has_processor=job.trainer.processing_class is not None,
        task_type=report.task_type,
        pipeline_tag=report.pipeline_tag,
        datasets=report.datasets,
        base_model=report.base_model,
        training_data=report.training_data,
        lengths=report.lengths,
        adapter_of=display_names([str(job.model.name_or_path)]) if is_adapted(job.trainer.model) else None,
        extra_tags=["lora", "peft"] if is_adapted(job.trainer.model) else [],
        training=_training_rows(job.trainer, metrics),
        environment={
            "hardware": ", ".join(environment["accelerators"]) or processor,
            "processes": environment["world_size"],
            "python": environment["python"],
            "revision of hf_hybrid": environment["git_revision"] or versions.get("hf_hybrid"),
            **{name: versions.get(name) for name in ("torch", "transformers", "datasets")},
        },
        results=[
            EvaluationResult(name, float(metrics[key]), report.data_name, baseline=_baseline(name, metrics))
            for key, name in report.result_names.items()
            if isinstance(metrics.get(key), (int, float))
        ],
    )


def _baseline(name: str, metrics: Mapping[str, Any]) -> str:
    """What the run measured of something simpler, for the metric `name`."""
    if name == "accuracy" and "majority_accuracy" in metrics:
        return f"{metrics['majority_accuracy']:.3g} (most frequent class)"
    return ""


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _training_rows(trainer: Trainer, metrics: Mapping[str, Any]) -> dict[str, Any]:
    args = trainer.args
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return {
        "optimizer steps": f"{trainer.state.global_step:,}",
        "input tokens seen": f"{trainer.state.num_input_tokens_seen:,}",
        "batch (sequences per step)": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "optimizer": getattr(args.optim, "value", args.optim),
        "learning rate": args.learning_rate,
        "learning rate of state space parameters": getattr(args, "ssm_learning_rate", None) or args.learning_rate,
        "schedule": f"{schedule}, warm-up {args.warmup_steps}",
        "weight decay": args.weight_decay,
        "betas and epsilon of Adam": f"{args.adam_beta1}, {args.adam_beta2}, {args.adam_epsilon}",
        "largest norm of the gradient": args.max_grad_norm,
        **_adapter_rows(trainer, metrics),
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "seed": args.seed,
        "minutes of this run": f"{metrics.get('train_runtime', 0.0) / 60:.1f}",
        "input tokens per second": _rounded(metrics.get("tokens_per_second")),
        "peak memory of the process": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB",
        "training loss": f"{metrics['train_loss']:.4g}" if "train_loss" in metrics else None,
    }


def _adapter_rows(trainer: Trainer, metrics: Mapping[str, Any]) -> dict[str, Any]:
    if getattr(trainer.args, "lora_rank", None) is None:
        return {}
    model: Any = trainer.model
    options = next(iter(model.peft_config.values()))
    return {
        "adapter": f"LoRA of rank {options.r}, alpha {options.lora_alpha:g}, dropout {options.lora_dropout}",
        "adapted linear maps": ", ".join(sorted(options.target_modules)),
        "trainable parameters": f"{metrics['num_trainable_parameters']:,}",
    }


def hub_names(sources: Sequence[str]) -> list[str]:
    """The names among data or model sources that are no local paths."""
    return [name for name in sources if not os.path.exists(name)]


def display_names(sources: Sequence[str]) -> str:
    """Sources as they may appear in a public card: Hub names, or the last part of a local path."""
    return ", ".join(Path(name).name if os.path.exists(name) else name for name in sources)

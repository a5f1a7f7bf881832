"""Tokenizer and model of a run: loaded, new, or with an adapter; and checks of the sequence lengths they accept."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ...auto import ARCHITECTURES
from ...configuration.lengths import check_source_length, check_target_length, room_for
from ...remote_code import check_export
from ...tokenization.special_tokens import padded_vocab_size
from ...training.adapters import adapted_config, adapter_folder, add_lora, load_adapted_model, state_modules
from ...training.arguments import FinetuningArguments
from ...training.run_folder import check_checkpoint
from .options import split_names

logger = logging.getLogger(__name__)


@dataclass
class NewModelArguments:
    """Which model to train: a checkpoint, or a new model from a configuration."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue from (folder or Hub name). Default: a new model."}
    )
    arch: str | None = field(
        default=None,
        metadata={
            "help": "Architecture of a new model: a model type (spade, mega, seqboat ...), or a folder or Hub name with a "
            "configuration."
        },
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Fields of the new configuration, e.g. "hidden_size=256,num_hidden_layers=4,ssm_layers=[0,1]"; a '
            "mapping in option files."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer (folder or Hub name). Default: that of the checkpoint."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a checkpoint."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and (self.arch is not None or self.config_overrides):
            raise ValueError(
                "`arch` and `config_overrides` describe a new model; drop either them or `model_name_or_path`."
            )


# Settings of a new model for a task, in the terms of all configurations: each gets the fields that it has.
_ROLES: dict[str, tuple[str, dict[str, bool]]] = {
    "AutoModelForCausalLM": (
        "causal language model",
        {"is_decoder": True, "bidirectional": False},
    ),
    "AutoModelForMaskedLM": (
        "masked language model",
        {"is_decoder": False, "bidirectional": True},
    ),
    "AutoModelForSeq2SeqLM": ("encoder-decoder", {"is_encoder_decoder": True}),
}


def parse_overrides(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Parses `"a=1,b=[0,1],c=name"`; values are JSON where possible, else text. A mapping is returned unchanged.

    Raises:
        ValueError: an entry has no `=`.
    """
    if isinstance(given, Mapping):
        return dict(given)
    overrides: dict[str, Any] = {}
    # A comma separates entries when a `name=` follows it, so lists need no quoting.
    for entry in filter(None, re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", given or "")):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not name:
            raise ValueError(f"`config_overrides` must look like `name=value,name=value`; got {entry!r}.")
        try:
            overrides[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            overrides[name] = value
    return overrides


def load_tokenizer(name_or_path: str | None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Raises:
        ValueError: no name was given, or the tokenizer cannot be loaded or belongs to an export that was changed.
    """
    if name_or_path is None:
        raise ValueError("`tokenizer` is required for a new model: a folder or a Hub name (see `train_tokenizer`).")
    check_export(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`tokenizer` (where it is not given, `model_name_or_path`) {name_or_path!r} cannot be loaded: {_looked_up(name_or_path)}{error}"
        ) from error


def _looked_up(name_or_path: str) -> str:
    """Says that a mistyped folder was taken for a name of the Hub; the errors of Transformers then speak of the network alone."""
    return "" if Path(name_or_path).exists() else "no such folder exists; looked up on the Hub: "


def load_config(name_or_path: str, overrides: Mapping[str, Any], **kwargs: Any) -> PreTrainedConfig:
    """A configuration by model type, folder or Hub name, with changed fields.

    Raises:
        ValueError: the configuration cannot be loaded, has no such field, or belongs to an export that was changed.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    is_type = name_or_path in CONFIG_MAPPING and not Path(name_or_path).exists()
    check_export(name_or_path)
    try:
        if is_type:
            base = AutoConfig.for_model(name_or_path)
        elif (adapter := adapter_folder(name_or_path)) is not None:
            base = adapted_config(adapter)
        else:
            base = AutoConfig.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        own = [item.model_type for item in ARCHITECTURES]
        close = difflib.get_close_matches(name_or_path.lower(), own, n=1)
        hint = f" Did you mean the architecture {close[0]!r}?" if close else ""
        raise ValueError(
            f"The configuration {name_or_path!r} cannot be loaded: {_looked_up(name_or_path)}{error}{hint}"
        ) from error
    former = getattr(base, "former_fields", {})
    unknown = sorted(name for name in overrides if not hasattr(base, name) and name not in former)
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


def require_head(auto_class: Any, config: PreTrainedConfig) -> None:
    """Rejects an architecture without the head of a task.

    Raises:
        ValueError: there is no such head; the message names the architectures of this library that have one.
    """
    comes_with_code = auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto_class._model_mapping and not comes_with_code:
        own = [item.model_type for item in ARCHITECTURES if auto_class.__name__ in item.heads]
        raise ValueError(
            f"The model type {config.model_type!r} has no head for {auto_class.__name__}; architectures of this "
            f"library that have one: {', '.join(own) or 'none'}."
        )


def role_fields(auto_class: Any, known: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, bool]:
    """The fields that make a new model a decoder, an encoder or both, as the head requires.

    Args:
        auto_class: Auto class of the head.
        known: configuration of the architecture.
        overrides: fields that the user sets.

    Raises:
        ValueError: the user sets one of them to another value.
    """
    what, role = _ROLES.get(auto_class.__name__, ("", {}))
    fields = {name: value for name, value in role.items() if hasattr(known, name)}
    stored = {type(known).attribute_map.get(name, name): value for name, value in fields.items()}
    for name, value in overrides.items():
        needed = stored.get(type(known).attribute_map.get(name, name), value)
        if value != needed:
            raise ValueError(
                f"`config_overrides` set `{name}` to {value!r}, but a {what} of the architecture {known.model_type!r} needs "
                f"{needed!r}: leave it out, the recipe sets it."
            )
    return fields


def build_new_or_pretrained(
    auto_class: Any, arguments: NewModelArguments, tokenizer: PreTrainedTokenizerBase, default_arch: str
) -> PreTrainedModel:
    """The model to pretrain: loaded, or new with a vocabulary for the tokenizer.

    Args:
        auto_class: e.g. `AutoModelForSeq2SeqLM`.
        arguments: choice of the model.
        tokenizer: source of the vocabulary size and special tokens of a new model.
        default_arch: architecture of a new model when none is given.

    Raises:
        ValueError: options contradict each other, a checkpoint is damaged, or its vocabulary is too small.
    """
    trust = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.model_name_or_path is not None:
        model = load_model(auto_class, arguments.model_name_or_path, **trust)
        if model.config.vocab_size < len(tokenizer):
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} ids but the model only {model.config.vocab_size}: use the "
                "tokenizer of the checkpoint."
            )
        return model
    overrides = parse_overrides(arguments.config_overrides)
    name = arguments.arch or default_arch
    known = load_config(name, {}, **trust)
    require_head(auto_class, known)
    fields: dict[str, Any] = {**role_fields(auto_class, known, overrides), "vocab_size": padded_vocab_size(tokenizer)}
    if tokenizer.pad_token_id is not None:
        fields["pad_token_id"] = tokenizer.pad_token_id
    fields["eos_token_id"] = tokenizer.eos_token_id
    config = load_config(name, {**fields, **overrides}, **trust)
    if config.is_encoder_decoder and "decoder_start_token_id" not in overrides:
        config.decoder_start_token_id = tokenizer.pad_token_id
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"`vocab_size` {config.vocab_size} is smaller than the tokenizer ({len(tokenizer)} ids).")
    return auto_class.from_config(config, **trust)


def load_model(auto_class: Any, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint with an Auto class, with a clear error if it is damaged or missing.

    An adapter is merged into its base checkpoint. `model.untrained_parameters` lists the names of the parameters that
    the checkpoint does not contain.

    Raises:
        ValueError: the checkpoint cannot be loaded, or is an export that was changed.
    """
    if Path(name_or_path).is_dir():
        check_export(name_or_path)
        check_checkpoint(name_or_path)
    adapter = adapter_folder(name_or_path)
    with _collected_load_reports() as reports:
        try:
            if adapter is not None:
                return load_adapted_model(auto_class, adapter, **kwargs)
            model, report = auto_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
        except (OSError, ValueError, RuntimeError) as error:
            details = "".join(f"\n{text}" for text in reports)
            raise ValueError(
                f"The checkpoint {name_or_path!r} cannot be loaded as {auto_class.__name__}: "
                f"{_looked_up(name_or_path)}{error}{details}"
            ) from error
    model.untrained_parameters = sorted(report["missing_keys"])
    _say_what_differs(name_or_path, report)
    return model


@contextlib.contextmanager
def _collected_load_reports() -> Iterator[list[str]]:
    """Keeps the tables of Transformers about missing and unused weights off the console: `_say_what_differs` takes a line."""
    reports: list[str] = []
    source = logging.getLogger("transformers.modeling_utils")
    level, shown_from = source.level, source.getEffectiveLevel()

    def collect(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return record.levelno >= shown_from
        reports.append(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()))
        return False

    source.addFilter(collect)
    # An error needs its table however little is to be printed. From WARNING on, loading would also list what no plan for tensor
    # parallelism cuts.
    source.setLevel(min(shown_from, logging.WARNING - 1))
    try:
        yield reports
    finally:
        source.setLevel(level)
        source.removeFilter(collect)


def _say_what_differs(name: str, report: Mapping[str, Any]) -> None:
    """One line for the weights that a checkpoint lacks, and one for those that the model has no use for."""
    for key, message in (
        ("missing_keys", "%s has no weights for %s: they start from random values."),
        ("unexpected_keys", "%s has weights that this model does not use: %s."),
    ):
        modules = sorted({tensor.rpartition(".")[0] or tensor for tensor in report[key]})
        if modules:
            shown = ", ".join(modules[:4]) + (f" and {len(modules) - 4} more modules" if len(modules) > 4 else "")
            logger.info(message, name, shown)


def with_adapter(model: PreTrainedModel, checkpoint: str | None, training_args: FinetuningArguments) -> Any:
    """The model to train: with LoRA if `lora_rank` is set, else unchanged.

    Args:
        model: model loaded from `checkpoint`.
        checkpoint: name or path; None for a model with random weights.
        training_args: training arguments with the options of the adapter.

    Raises:
        ValueError: there is no checkpoint to adapt, or the checkpoint is itself an adapter.
    """
    if training_args.lora_rank is None:
        return model
    if checkpoint is None:
        raise ValueError(
            "`lora_rank` adapts a pretrained checkpoint and saves only the difference: pass `model_name_or_path` "
            "without `from_scratch`, or train the new model without `lora_rank`."
        )
    if adapter_folder(checkpoint) is not None:
        raise ValueError(
            f"{checkpoint!r} is itself an adapter. Continue its run with `resume_from_checkpoint`, or merge it into a "
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
    """Rejects targets that are too long for the decoder, before training begins.

    Raises:
        ValueError: `target_length` exceeds a limit of the configuration.
    """
    check_target_length(config, target_length, what, remedy)


def check_positions(config: PreTrainedConfig, length: int, remedy: str) -> None:
    """Rejects inputs that are too long for the model, before training begins.

    Raises:
        ValueError: `length` exceeds a limit of the configuration.
    """
    check_source_length(config, length, "Inputs", remedy)


def make_room(config: PreTrainedConfig, length: int, overrides: Mapping[str, Any], remedy: str) -> None:
    """Makes a new model accept inputs of `length` tokens.

    Args:
        config: configuration of the new model; the sizes of its position tables are raised where they limit the
            inputs.
        length: length of the longest input, in tokens.
        overrides: fields that the user set, which stay unchanged.
        remedy: option that shortens the inputs.

    Raises:
        ValueError: a field that the user set is too small.
    """
    for field_name, size in room_for(config, length).items():
        if field_name not in overrides:
            logger.info("`%s` is raised to %d, the longest sequence.", field_name, size)
            setattr(config, field_name, size)
    check_positions(config, length, remedy)


def set_longest_input(tokenizer: Any, config: PreTrainedConfig) -> None:
    """Sets `model_max_length` of a tokenizer to the model's limit, because other programs truncate to it."""
    if isinstance(tokenizer, PreTrainedTokenizerBase) and hasattr(config, "max_source_length"):
        limit = config.max_source_length()
        tokenizer.model_max_length = VERY_LARGE_INTEGER if limit is None else limit

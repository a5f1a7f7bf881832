"""Lossless conversion of official SPADE checkpoints and back (arXiv 2212.08136).

Two official formats exist:

* the encoder-decoder (`namisan/mt-dnn`, branch `msrt5`): a Transformers-style `config.json` and a state dict with names
  such as `encoder.block.0.layer.0.SelfAttention.q.weight`;
* the language model (`microsoft/EfficientLongSequenceModeling`): a fairseq checkpoint, whose command-line options are the
  configuration, with names such as `decoder.layers.0.self_attn.q.weight`.

Tensors are renamed, never changed. In particular, the output matrix of an S4 layer is kept as it is: raw (C) if the
accompanying length `L` is 0, or truncated for the length `L` (C-tilde) if it is positive; the length is kept as
`kernel_length`. Tied tensors, which the official formats store several times, are checked, stored once, and duplicated
again on export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from ..configuration.configuration_spade import FEED_FORWARD_TYPES, SpadeConfig, SpadeLMConfig
from ..modeling.spade.spade_heads import SpadeForConditionalGeneration
from ..modeling.spade.spade_lm_heads import SpadeLMForCausalLM
from .common import StateDict, TensorNames, options_of, reason_of, tensors_from_official, tensors_to_official
from .spade_names import encoder_decoder_names, language_model_names

logger = logging.get_logger(__name__)

OFFICIAL_MODEL_TYPE = "msrlongt5"

# ------------------------------------------------------------------------------------- configuration, encoder-decoder

# Official option: (our field, official default).
_ENCODER_DECODER_OPTIONS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32128),
    "d_model": ("hidden_size", 512),
    "d_kv": ("head_dim", 64),
    "d_ff": ("intermediate_size", 2048),
    "num_layers": ("num_hidden_layers", 6),
    "num_decoder_layers": ("decoder_layers", None),
    "num_heads": ("num_attention_heads", 8),
    "relative_attention_num_buckets": ("relative_attention_num_buckets", 32),
    "relative_attention_max_distance": ("relative_attention_max_distance", 128),
    "s4_state_dim": ("ssm_state_size", 64),
    "s4_n_ssm": ("ssm_num_copies", 768),
    "s4_dt_min": ("ssm_dt_min", 1e-3),
    "s4_dt_max": ("ssm_dt_max", 1e-1),
    "normalize_before": ("norm_first", False),
    "have_bias": ("attention_bias", False),
    "feed_forward_proj": ("feed_forward_proj", "relu"),
    "layer_norm_epsilon": ("norm_eps", 1e-6),
    "dropout_rate": ("hidden_dropout", 0.1),
    "initializer_factor": ("initializer_factor", 1.0),
    "max_position_embeddings": ("max_target_positions", 512),
    "tie_word_embeddings": ("tie_word_embeddings", True),
    "use_cache": ("use_cache", True),
    "pad_token_id": ("pad_token_id", 1),
    "bos_token_id": ("bos_token_id", 0),
    "eos_token_id": ("eos_token_id", 2),
}

# Options that have one supported value.
_ENCODER_DECODER_FIXED: dict[str, Any] = {
    "s4_channels": 1,
    "s4_use_residual_dropout": False,
    "decoder_roberta_lm_head": False,
}
_ENCODER_DECODER_PERIOD = 1000  # the official constant `s4_every_n_layers`: an SSM in layer 0 only

# -------------------------------------------------------------------------------------- configuration, language model

_LANGUAGE_MODEL_OPTIONS: dict[str, tuple[str, Any]] = {
    "decoder_embed_dim": ("hidden_size", 512),
    "decoder_ffn_embed_dim": ("intermediate_size", 2048),
    "decoder_layers": ("num_hidden_layers", 6),
    "decoder_attention_heads": ("num_attention_heads", 8),
    "relative_attention_num_buckets": ("relative_attention_num_buckets", 32),
    "relative_attention_max_distance": ("relative_attention_max_distance", 128),
    "s4_local_combine": ("ssm_combine", "add"),
    "s4_weight": ("ssm_add_weight", 0.5),
    "s4_state_dim": ("ssm_state_size", 64),
    "s4_n_ssm": ("ssm_num_copies", 1),
    "s4_dt_min": ("ssm_dt_min", 1e-3),
    "s4_dt_max": ("ssm_dt_max", 1e-1),
    "activation_fn": ("feed_forward_proj", "relu"),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.0),
    "activation_dropout": ("activation_dropout", 0.0),
    "adaptive_softmax_dropout": ("adaptive_dropout", 0.0),
    "tie_adaptive_proj": ("tie_adaptive_projections", False),
    "scale_attn": ("scale_attention", False),
    "scale_fc": ("scale_feed_forward", False),
    "scale_resids": ("scale_residuals", False),
    "scale_heads": ("scale_heads", False),
}

# Options that have one supported value, and their defaults in fairseq.
_LANGUAGE_MODEL_FIXED: dict[str, tuple[Any, Any]] = {
    "attention_type": ("local", "full"),
    "decoder_normalize_before": (True, True),
    "no_token_positional_embeddings": (True, False),
    "character_embeddings": (False, False),
    "layernorm_embedding": (False, False),
    "quant_noise_pq": (0, 0),
    "base_layers": (0, 0),
    "s4_channels": (1, 1),
}
_FAIRSEQ_ACTIVATIONS = ("relu", "gelu")
_COMBINATIONS = ("concat", "add", "stack")
_LANGUAGE_MODEL_PERIOD = 100  # `s4_every_n_layers` of the published run
_DEFAULT_MAX_TARGET_POSITIONS = 1024

# Fields that only concern training from scratch or heads; they have no official options.
_NEUTRAL_FIELDS = {
    "initializer_scheme",
    "initializer_range",
    "classifier_dropout",
    "pooling",
    "use_cache",
    "is_encoder_decoder",
    "ssm_init",
}


def _check_fixed(options: Mapping[str, Any], name: str, supported: Any, default: Any) -> None:
    value = options.get(name, default)
    if value is None:
        value = default
    if value != supported:
        raise ValueError(f"The official option `{name}={value!r}` is not supported; only {supported!r} is.")


def _check_choice(options: Mapping[str, Any], name: str, supported: tuple[str, ...], default: str) -> None:
    value = options.get(name, default)
    if value not in supported:
        raise ValueError(
            f"The official option `{name}={value!r}` is not supported; accepted are {', '.join(map(repr, supported))}."
        )


def _read_options(official: Mapping[str, Any], table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Values of our fields from the options of a table, or their defaults."""
    fields = {}
    for name, (field, default) in table.items():
        value = official.get(name, default)
        accepted = (int, float) if isinstance(default, float) else type(default)
        if value is not None and default is not None and not isinstance(value, accepted):
            raise ValueError(f"The official option `{name}` must be of type {type(default).__name__}; got {value!r}.")
        fields[field] = value
    if fields["ssm_num_copies"] == fields["hidden_size"]:
        fields["ssm_num_copies"] = None  # one per channel
    return fields


def _ssm_layers(period: int, depth: int) -> list[int]:
    if not isinstance(period, int) or period < 1:
        raise ValueError(f"The official option `s4_every_n_layers` must be a positive integer; got {period!r}.")
    return list(range(0, depth, period))


def _period(config: SpadeConfig | SpadeLMConfig, depth: int, usual: int) -> int:
    """`s4_every_n_layers` for a list of SSM layers."""
    layers = sorted(config.ssm_layers or [])
    period = max(usual, depth) if layers == [0] else (layers[1] - layers[0] if len(layers) > 1 else 0)
    if period < 1 or list(range(0, depth, period)) != layers:
        raise ValueError(
            f"`ssm_layers={config.ssm_layers}` has no counterpart in the official SPADE, whose SSM layers are 0, k, 2k, … for "
            f"one k, up to the last of the {depth} layers."
        )
    return period


def _encoder_decoder_from_official(official: Mapping[str, Any]) -> SpadeConfig:
    for name, supported in _ENCODER_DECODER_FIXED.items():
        _check_fixed(official, name, supported, supported)
    _check_choice(official, "feed_forward_proj", FEED_FORWARD_TYPES, "relu")
    fields = _read_options(official, _ENCODER_DECODER_OPTIONS)
    if fields["decoder_layers"] is None:
        fields["decoder_layers"] = fields["num_hidden_layers"]
    fields["window_size"] = official.get("local_radius", 128) + 1
    fields["ssm_max_length"] = fields["max_target_positions"]
    fields["attention_dropout"] = fields["activation_dropout"] = fields["hidden_dropout"]
    fields["ssm_layers"] = _ssm_layers(
        official.get("s4_every_n_layers", _ENCODER_DECODER_PERIOD), fields["num_hidden_layers"]
    )
    # The official configuration has no default; its tokens follow fairseq, which starts with the end-of-sentence token.
    start = official.get("decoder_start_token_id")
    fields["decoder_start_token_id"] = fields["eos_token_id"] if start is None else start
    return SpadeConfig.official(**fields)


def _encoder_decoder_to_official(config: SpadeConfig) -> dict[str, Any]:
    if config.max_target_positions is None:
        raise ValueError(
            "`max_target_positions=None` has no counterpart in the official SPADE, whose decoder has a learned table of positions."
        )
    options = {name: getattr(config, field) for name, (field, _) in _ENCODER_DECODER_OPTIONS.items()}
    if options["s4_n_ssm"] is None:
        options["s4_n_ssm"] = config.hidden_size
    return options | {
        "model_type": OFFICIAL_MODEL_TYPE,
        "local_radius": config.window_size - 1,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.decoder_start_token_id,
        "s4_every_n_layers": _period(config, config.num_hidden_layers, _ENCODER_DECODER_PERIOD),
        "s4_lr": {"A": 0.0, "B": 0.0, "dt": None},
        **_ENCODER_DECODER_FIXED,
    }


def _integers(value: Any, name: str) -> list[int] | None:
    """A list of integers from fairseq's text ("20000,60000"), or from a list."""
    if value is None or value == "":
        return None
    try:
        items = value.strip("[]() ").split(",") if isinstance(value, str) else list(value)
        return [int(item) for item in items]
    except (TypeError, ValueError):
        raise ValueError(f"The official option `{name}` must be a list of integers; got {value!r}.") from None


def _adaptive_fields(official: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Fields of adaptive input and softmax: both or neither, with the same bands."""
    cutoffs = _integers(official.get("adaptive_softmax_cutoff"), "adaptive_softmax_cutoff")
    has_adaptive_input = bool(official.get("adaptive_input", False))
    if has_adaptive_input != (cutoffs is not None):
        raise ValueError(
            f"The official options `adaptive_input={has_adaptive_input}` and `adaptive_softmax_cutoff={cutoffs}` are only "
            "supported together."
        )
    if cutoffs is None:
        tied = bool(official.get("share_decoder_input_output_embed", False))
        return {"adaptive_cutoffs": None, "tie_word_embeddings": tied}
    _check_fixed(official, "tie_adaptive_weights", True, False)
    input_cutoffs = _integers(official.get("adaptive_input_cutoff"), "adaptive_input_cutoff")
    factor = official.get("adaptive_softmax_factor", 4)
    input_factor = official.get("adaptive_input_factor", 4)
    if input_cutoffs != cutoffs or input_factor != factor:
        raise ValueError(
            "Adaptive input and softmax must have the same bands: `adaptive_input_cutoff` and `adaptive_softmax_cutoff` are "
            f"{input_cutoffs} and {cutoffs}, `adaptive_input_factor` and `adaptive_softmax_factor` {input_factor} and {factor}."
        )
    bands = cutoffs[:-1] if cutoffs[-1] == vocab_size else cutoffs  # fairseq accepts both spellings
    return {"adaptive_cutoffs": bands, "adaptive_factor": int(factor), "tie_word_embeddings": True}


def _language_model_from_official(official: Mapping[str, Any], vocab_size: int | None) -> SpadeLMConfig:
    for name, (supported, default) in _LANGUAGE_MODEL_FIXED.items():
        _check_fixed(official, name, supported, default)
    _check_choice(official, "activation_fn", _FAIRSEQ_ACTIVATIONS, "relu")
    _check_choice(official, "s4_local_combine", _COMBINATIONS, "add")
    vocab_size = official.get("vocab_size") if vocab_size is None else vocab_size
    if vocab_size is None:
        raise ValueError(
            "`vocab_size` is needed: the options of a fairseq checkpoint do not contain it (see `vocabulary_size`)."
        )
    fields = _read_options(official, _LANGUAGE_MODEL_OPTIONS)
    width = fields["hidden_size"]
    for name in ("decoder_input_dim", "decoder_output_dim"):
        _check_fixed(official, name, width, width)
    fields["window_size"] = official.get("local_radius", 127) + 1
    if not fields["activation_dropout"]:
        fields["activation_dropout"] = official.get("relu_dropout") or 0.0
    reach = official.get("max_target_positions")
    if reach is None:
        reach = official.get("tokens_per_sample")
    fields["ssm_max_length"] = _DEFAULT_MAX_TARGET_POSITIONS if reach is None else reach
    fields["ssm_layers"] = _ssm_layers(official.get("s4_every_n_layers", 1), fields["num_hidden_layers"])
    fields["position_encoding"] = "bias" if official.get("use_relative_attention", False) else "none"
    fields["use_final_norm"] = not official.get("no_decoder_final_norm", False)
    fields["scale_embedding"] = not official.get("no_scale_embedding", False)
    return SpadeLMConfig.official(**(fields | _adaptive_fields(official, vocab_size)), vocab_size=vocab_size)


def _language_model_to_official(config: SpadeLMConfig) -> dict[str, Any]:
    for field, supported in (("ssm_combine", _COMBINATIONS), ("feed_forward_proj", _FAIRSEQ_ACTIVATIONS)):
        if getattr(config, field) not in supported:
            raise ValueError(
                f"`{field}={getattr(config, field)!r}` has no counterpart in the official SPADE language model, which "
                f"supports {', '.join(map(repr, supported))}."
            )
    options = {name: getattr(config, field) for name, (field, _) in _LANGUAGE_MODEL_OPTIONS.items()}
    if options["s4_n_ssm"] is None:
        options["s4_n_ssm"] = config.hidden_size
    options |= {name: supported for name, (supported, _) in _LANGUAGE_MODEL_FIXED.items()}
    adaptive = config.adaptive_cutoffs is not None
    cutoffs = ",".join(map(str, config.adaptive_cutoffs or [])) or None
    return options | {
        "arch": "spade_lm",
        "local_radius": config.window_size - 1,
        "task": "spade_language_modeling",
        "decoder_input_dim": config.hidden_size,
        "decoder_output_dim": config.hidden_size,
        "max_target_positions": config.ssm_max_length,
        "tokens_per_sample": config.ssm_max_length,
        "s4_every_n_layers": _period(config, config.num_hidden_layers, _LANGUAGE_MODEL_PERIOD),
        "s4_lr": None,
        "use_relative_attention": config.position_encoding == "bias",
        "no_decoder_final_norm": not config.use_final_norm,
        "no_scale_embedding": not config.scale_embedding,
        "share_decoder_input_output_embed": config.tie_word_embeddings and not adaptive,
        "adaptive_input": adaptive,
        "tie_adaptive_weights": adaptive,
        "adaptive_input_cutoff": cutoffs,
        "adaptive_softmax_cutoff": cutoffs,
        "adaptive_input_factor": config.adaptive_factor,
        "adaptive_softmax_factor": config.adaptive_factor,
    }


# ------------------------------------------------------------------------------------------- configuration, both ways


def recognises(official: Mapping[str, Any]) -> bool:
    """Whether official options belong to a SPADE, whose queries and keys have no separate width (`…z_dim`)."""
    try:
        is_language_model(official)
    except ValueError:
        return False
    return "sentence_class_num" not in official and not any(name.endswith("z_dim") for name in official)


def is_fairseq(config: SpadeConfig | SpadeLMConfig) -> bool:
    """Whether the official format is a fairseq checkpoint, rather than a Transformers folder."""
    return isinstance(config, SpadeLMConfig)


def is_language_model(official: Mapping[str, Any]) -> bool:
    """Whether official options belong to the fairseq language model (else: to the encoder-decoder).

    Raises:
        ValueError: they belong to neither.
    """
    if str(official.get("arch", "")).startswith("spade_lm") or "decoder_embed_dim" in official:
        return True
    if official.get("model_type") == OFFICIAL_MODEL_TYPE or "d_model" in official:
        return False
    raise ValueError(
        "These options are neither those of the official SPADE encoder-decoder (`model_type` 'msrlongt5') nor those of its "
        f"language model (`arch` 'spade_lm…', `decoder_embed_dim`); found {sorted(official)[:20]}."
    )


def config_from_official(official: Mapping[str, Any], *, vocab_size: int | None = None) -> SpadeConfig | SpadeLMConfig:
    """Our configuration from official options.

    Args:
        official: contents of `config.json` (encoder-decoder), or the options of a fairseq checkpoint (language model).
            Missing options have their official defaults; options that only concern training are ignored.
        vocab_size: vocabulary size of a language model, whose options do not contain it.

    Raises:
        ValueError: the value of an option has no counterpart; the message names it.
    """
    try:
        if is_language_model(official):
            return _language_model_from_official(official, vocab_size)
        if official.get("pad_token_id", 1) != 1:
            logger.warning(
                "The official decoder treats id 1 as padding in its positions whatever `pad_token_id` is; here, "
                f"positions follow `pad_token_id={official['pad_token_id']}`."
            )
        return _encoder_decoder_from_official(official)
    except StrictDataclassError as error:
        raise ValueError(f"The official options do not make a valid configuration. {reason_of(error)}") from error


def _comparable(config: SpadeConfig | SpadeLMConfig) -> dict[str, Any]:
    """Fields that change the model, with equivalent values normalised."""
    own = {field.name for field in dataclasses.fields(config)} & set(vars(type(config)).get("__annotations__", {}))
    values = {name: getattr(config, name) for name in sorted(own - _NEUTRAL_FIELDS)}
    values["ssm_num_copies"] = config.ssm_num_copies or config.hidden_size
    values["ssm_layers"] = sorted(config.ssm_layers or [])
    if values["feed_forward_bias"] and not config.feed_forward_proj.startswith("gated-"):
        values["feed_forward_bias"] = None
    if config.position_encoding != "rotary":
        del values["rotary_base"]
    if config.position_encoding == "none":
        del values["share_relative_bias"]
    if config.ssm_combine != "add":
        del values["ssm_add_weight"]
    if isinstance(config, SpadeLMConfig):
        del values["initializer_factor"]
        if config.adaptive_cutoffs is None:
            for name in ("adaptive_factor", "adaptive_dropout", "tie_adaptive_projections"):
                del values[name]
    return values


def config_to_official(config: SpadeConfig | SpadeLMConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Official options from our configuration; `config_from_official` restores the configuration.

    Args:
        config: a configuration that has an official form (see `SpadeConfig.official`).
        base: official options to start from, so that options that only concern training are kept. If they already
            describe `config`, they are returned unchanged.

    Raises:
        ValueError: a field has no counterpart in the official code; the message names it.
    """
    is_language_model_config = isinstance(config, SpadeLMConfig)
    vocab_size = config.vocab_size if is_language_model_config else None
    return options_of(
        config,
        base,
        write=_language_model_to_official if is_language_model_config else _encoder_decoder_to_official,
        read=partial(config_from_official, vocab_size=vocab_size),
        comparable=_comparable,
        name="SPADE",
    )


# ---------------------------------------------------------------------------------------------------------- tensors


def tensor_names(config: SpadeConfig | SpadeLMConfig) -> TensorNames:
    """Names of all tensors in both formats.

    Raises:
        ValueError: the configuration has no official form.
    """
    config_to_official(config)
    return language_model_names(config) if isinstance(config, SpadeLMConfig) else encoder_decoder_names(config)


def model_class(config: SpadeConfig | SpadeLMConfig) -> type:
    """The model class that has all tensors of an official checkpoint."""
    return SpadeLMForCausalLM if isinstance(config, SpadeLMConfig) else SpadeForConditionalGeneration


def _shapes(config: SpadeConfig | SpadeLMConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class(config)(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def vocabulary_size(state: Mapping[str, torch.Tensor]) -> int | None:
    """Vocabulary size of an official language model, from its embedding tables; None for encoder-decoders.

    Raises:
        ValueError: the state dict contains no embedding.
    """
    if "shared.weight" in state:
        return None
    tables = [
        tensor
        for name, tensor in state.items()
        if name == "decoder.embed_tokens.weight"
        or (name.startswith("decoder.embed_tokens.embeddings.") and name.endswith(".0.weight"))
    ]
    if not tables:
        raise ValueError(
            "The checkpoint contains no embedding (`decoder.embed_tokens…`): it is not a SPADE language model."
        )
    return sum(table.shape[0] for table in tables)


def state_dict_from_official(state: Mapping[str, torch.Tensor], config: SpadeConfig | SpadeLMConfig) -> StateDict:
    """Tensors of `model_class(config)` from those of an official checkpoint. Nothing is copied or changed.

    Raises:
        ValueError: tensors are missing, superfluous or of another shape, or tied tensors differ; the message names
            them.
    """
    return tensors_from_official(state, tensor_names(config), "the official checkpoint", _shapes(config))


def state_dict_to_official(
    state: Mapping[str, torch.Tensor], config: SpadeConfig | SpadeLMConfig, *, with_copies: bool = True
) -> StateDict:
    """Tensors of an official checkpoint from those of `model_class(config)`.

    Args:
        state: our state dict, with or without the tied copies.
        config: the configuration, which must have an official form.
        with_copies: also write the redundant tensors of the official formats: second copies of tied tensors, version
            marks.

    Raises:
        ValueError: as `state_dict_from_official`, or the configuration has no official form.
    """
    names = tensor_names(config)
    return tensors_to_official(state, names, "the checkpoint", _shapes(config), with_copies=with_copies)


__all__ = [
    "config_from_official",
    "config_to_official",
    "is_fairseq",
    "is_language_model",
    "model_class",
    "recognises",
    "state_dict_from_official",
    "state_dict_to_official",
    "tensor_names",
    "vocabulary_size",
]

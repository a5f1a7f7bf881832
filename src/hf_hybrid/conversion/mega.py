"""Lossless conversion of official Mega checkpoints (fairseq, `facebookresearch/mega`) and back (arXiv 2209.10655).

Four official models exist: `lra` (Long Range Arena classifiers of text, pairs of texts and pixels), `sc_raw` (classifier of
waveforms), `mega_lm` (language model) and `mega` (translation). Their command-line options are the configuration.

Tensors are renamed, never changed. Tied tensors, which the official format stores several times, are checked, stored once, and
duplicated again on export. Checkpoints of Transformers 4.x need no conversion: they have the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration.configuration_mega import MegaConfig
from ..modeling.mega.mega_heads import (
    MegaForAudioClassification,
    MegaForCausalLM,
    MegaForConditionalGeneration,
    MegaForImageClassification,
    MegaForSequenceClassification,
)
from .common import StateDict, TensorNames, options_of, reason_of, tensors_from_official, tensors_to_official
from .mega_names import classifier_names, language_model_names, translation_names

KINDS = ("lra", "sc_raw", "mega_lm", "mega")

# Official option: (our field, official default). Options without a direct counterpart are handled in code.
_SHARED: dict[str, tuple[str, Any]] = {
    "dropout": ("dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.0),
    "activation_fn": ("activation", "silu"),
    "attention_activation_fn": ("attention_activation", "softmax"),
    "rel_pos_bias": ("relative_positional_bias", "simple"),
    "feature_dropout": ("use_feature_dropout", False),
    "normalize_embedding": ("normalize_embeddings", False),
}
_CLASSIFIER: dict[str, tuple[str, Any]] = _SHARED | {
    "encoder_embed_dim": ("hidden_size", 512),
    "encoder_hidden_dim": ("intermediate_size", 1024),
    "z_dim": ("shared_representation_size", 128),
    "n_dim": ("ema_projection_size", 16),
    "encoder_layers": ("num_hidden_layers", 6),
    "max_positions": ("max_positions", 1024),
    "norm_type": ("normalization_type", "layernorm"),
    "classifier_layers": ("num_classifier_layers", 1),
    "classifier_out_dim": ("classifier_hidden_size", None),
    "classifier_activation_fn": ("classifier_activation", "gelu"),
}
_GENERATOR: dict[str, tuple[str, Any]] = _SHARED | {
    "hidden_dropout": ("hidden_dropout_prob", 0.0),
    "activation_dropout": ("nffn_activation_dropout_prob", 0.0),
    "normalization_type": ("normalization_type", "layernorm"),
}
_LANGUAGE_MODEL: dict[str, tuple[str, Any]] = _GENERATOR | {
    "decoder_embed_dim": ("hidden_size", 512),
    "decoder_hidden_dim": ("intermediate_size", 1024),
    "decoder_z_dim": ("shared_representation_size", 128),
    "decoder_n_dim": ("ema_projection_size", 16),
    "decoder_layers": ("num_hidden_layers", 6),
    "max_target_positions": ("max_positions", 1024),
}
_TRANSLATION: dict[str, tuple[str, Any]] = _GENERATOR | {
    "encoder_embed_dim": ("hidden_size", 512),
    "encoder_hidden_dim": ("intermediate_size", 1024),
    "encoder_z_dim": ("shared_representation_size", 128),
    "encoder_n_dim": ("ema_projection_size", 16),
    "encoder_layers": ("num_hidden_layers", 6),
    "max_source_positions": ("max_positions", 1024),
    "decoder_hidden_dim": ("decoder_intermediate_size", None),
    "decoder_z_dim": ("decoder_shared_representation_size", None),
    "decoder_n_dim": ("decoder_ema_projection_size", None),
    "decoder_layers": ("decoder_layers", None),
    "max_target_positions": ("max_target_positions", None),
}
_TABLES = {"lra": _CLASSIFIER, "sc_raw": _CLASSIFIER, "mega_lm": _LANGUAGE_MODEL, "mega": _TRANSLATION}
_DEFAULT_TRUNCATION = {"lra": 1024, "sc_raw": 1024, "mega_lm": 2048, "mega": 1024}
_POOLING = {"mp": "mean", "cls": "first"}

# Fields that only concern training from scratch, heads or generation; they have no official options.
_NEUTRAL_FIELDS = {
    "initializer_scheme",
    "initializer_range",
    "ema_delta_alpha_range",
    "ema_beta_range",
    "ema_gamma_omega_range",
    "classifier_dropout",
    "tied_weights_conflict",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "image_size",
    "type_vocab_size",
    "auto_pad_to_chunk",
    "vocab_size",
}


# ----------------------------------------------------------------------------------------------------- configuration


def is_fairseq(config: MegaConfig) -> bool:
    """Whether the official format is a fairseq checkpoint: always."""
    return True


def kind_of(official: Mapping[str, Any]) -> str:
    """The one of `KINDS` that official options describe.

    Raises:
        ValueError: they describe none.
    """
    if official.get("model") in KINDS:
        return official["model"]
    if "sentence_class_num" in official:
        names = f"{official.get('arch', '')} {official.get('task', '')}"
        return "sc_raw" if "sc_raw" in names or "speech" in names else "lra"
    if "encoder_z_dim" in official:
        return "mega"
    if "decoder_z_dim" in official:
        return "mega_lm"
    raise ValueError(
        "These options are not those of an official Mega, which has `sentence_class_num` (classifiers), `encoder_z_dim` "
        f"(translation) or `decoder_z_dim` (language models); found {sorted(official)[:20]}."
    )


def recognises(official: Mapping[str, Any]) -> bool:
    """Whether official options belong to a Mega, which unlike a SeqBoat has no router temperature."""
    if "init_temp_scale" in official:
        return False
    try:
        return kind_of(official) in KINDS
    except ValueError:
        return False


def _chunks(value: int | None) -> dict[str, Any]:
    """`use_chunking` and `chunk_size` for an official chunk size; None or a value <= 0 means full attention."""
    size = -1 if value is None or value <= 0 else int(value)
    return {"use_chunking": size > 0, "chunk_size": size}


def _feed_forward(width: int) -> dict[str, Any]:
    return {"nffn_hidden_size": width, "use_normalized_ffn": width > 0}


def _integers(value: Any, name: str) -> list[int] | None:
    """A list of integers from fairseq's text ("20000,60000"), or from a list."""
    if value is None or value == "":
        return None
    try:
        items = value.strip("[]() ").split(",") if isinstance(value, str) else list(value)
        return [int(item) for item in items]
    except (TypeError, ValueError):
        raise ValueError(f"The official option `{name}` must be a list of integers; got {value!r}.") from None


def _classifier_fields(official: Mapping[str, Any], kind: str) -> dict[str, Any]:
    is_text = kind == "lra" and official.get("input_type", "text") == "text"
    pooling = official.get("sen_rep_type", "cls")
    if pooling not in _POOLING:
        raise ValueError(f"The official option `sen_rep_type={pooling!r}` is not supported; only 'mp' and 'cls' are.")
    width = official.get("encoder_embed_dim", 512)
    activation_dropout = official.get("act_dropout", official.get("activation_dropout", 0.0))
    architecture = MegaForSequenceClassification if is_text else MegaForImageClassification
    return {
        "hidden_dropout_prob": activation_dropout,
        "nffn_activation_dropout_prob": activation_dropout,
        "input_type": "tokens" if is_text else "values",
        "pooling_type": _POOLING[pooling],
        "classifier_type": "lra",
        "dual_encoder": official.get("classifier_in_dim", width) == 2 * width,
        "num_labels": official["sentence_class_num"],
        "architectures": [(MegaForAudioClassification if kind == "sc_raw" else architecture).__name__],
        **_chunks(official.get("chunk_size")),
        **_feed_forward(official.get("encoder_ffn_embed_dim", 1024)),
    }


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
        return {"tie_word_embeddings": bool(official.get("share_decoder_input_output_embed", False))}
    if not official.get("tie_adaptive_weights", False):
        raise ValueError("The official option `tie_adaptive_weights=False` is not supported; only True is.")
    factors = [official.get(f"adaptive_{side}_factor", 4) for side in ("input", "softmax")]
    if _integers(official.get("adaptive_input_cutoff"), "adaptive_input_cutoff") != cutoffs or len(set(factors)) > 1:
        raise ValueError(
            "Adaptive input and softmax must have the same bands: `adaptive_input_cutoff`, `adaptive_softmax_cutoff` and their "
            f"factors differ ({official.get('adaptive_input_cutoff')}, {cutoffs}, {factors})."
        )
    return {
        "adaptive_cutoffs": cutoffs[:-1] if cutoffs[-1] == vocab_size else cutoffs,
        "adaptive_factor": int(factors[0]),
        "adaptive_dropout": official.get("adaptive_softmax_dropout", 0.0),
        "tie_adaptive_projections": bool(official.get("tie_adaptive_proj", False)),
        "tie_word_embeddings": True,
    }


def _generator_fields(official: Mapping[str, Any], kind: str, vocab_size: int) -> dict[str, Any]:
    side = "decoder" if kind == "mega_lm" else "encoder"
    width = official.get(f"{side}_embed_dim", 512)
    for name in ("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim"):
        if official.get(name, width) != width:
            raise ValueError(
                f"The official option `{name}={official[name]}` is not supported; only the hidden size {width} is."
            )
    fields = {
        "scale_embeddings": not official.get("no_scale_embedding", False),
        "lm_head_bias": False,
        "add_lm_hidden_dense_layer": False,
        **_chunks(official.get(f"{side}_chunk_size")),
        **_feed_forward(official.get(f"{side}_ffn_embed_dim", 1024)),
    }
    if kind == "mega_lm":
        return fields | {
            "is_decoder": True,
            "bidirectional": False,
            "final_norm_affine": not official.get("no_affine_final_norm", False),
            "architectures": [MegaForCausalLM.__name__],
            **_adaptive_fields(official, vocab_size),
        }
    shared = bool(official.get("share_all_embeddings", False))
    chunk = _chunks(official.get("decoder_chunk_size"))["chunk_size"]
    return fields | {
        "is_encoder_decoder": True,
        "decoder_nffn_hidden_size": official.get("decoder_ffn_embed_dim", fields["nffn_hidden_size"]),
        "decoder_chunk_size": chunk,
        "share_encoder_decoder_embeddings": shared,
        "tie_word_embeddings": shared or bool(official.get("share_decoder_input_output_embed", False)),
        "architectures": [MegaForConditionalGeneration.__name__],
    }


def config_from_official(official: Mapping[str, Any], *, vocab_size: int | None = None) -> MegaConfig:
    """Our configuration from the options of a fairseq checkpoint.

    Args:
        official: the options. Missing options have their official defaults; those that only concern training are
            ignored.
        vocab_size: vocabulary size, which the options do not contain (see `vocabulary_size`); not needed for
            classifiers of real numbers.

    Raises:
        ValueError: the value of an option has no counterpart; the message names it.
    """
    kind = kind_of(official)
    fields = {field: official.get(name, default) for name, (field, default) in _TABLES[kind].items()}
    truncation = official.get("truncation_length", _DEFAULT_TRUNCATION[kind])
    norm_first = official.get("encoder_normalize_before" if kind in ("lra", "sc_raw") else "normalize_before", False)
    fields |= {
        "truncation": truncation if truncation and truncation > 0 else None,
        "normalize_before_mega": norm_first,
        "normalize_before_ffn": norm_first,
        "final_norm": norm_first,
        "embedding_dropout_prob": fields["dropout_prob"],
        "mask_padded_states": True,
        "rms_norm_legacy": False,
        "initializer_scheme": "official",
    }
    has_tokens = kind in ("mega_lm", "mega") or official.get("input_type", "text") == "text" and kind == "lra"
    if has_tokens and vocab_size is None:
        vocab_size = official.get("vocab_size")
        if vocab_size is None:
            raise ValueError(
                "`vocab_size` is needed: the options of a fairseq checkpoint do not contain it (see `vocabulary_size`)."
            )
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    if kind in ("lra", "sc_raw"):
        fields |= _classifier_fields(official, kind)
    else:
        fields |= _generator_fields(official, kind, vocab_size or 0)
    if kind != "mega":
        fields["rel_bias_table_size"] = fields["chunk_size"] if fields["use_chunking"] else fields["max_positions"]
    try:
        return MegaConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"The official options do not make a valid configuration. {reason_of(error)}") from error


def kind_of_config(config: MegaConfig) -> str:
    """The official model that a configuration of ours describes."""
    if config.is_encoder_decoder:
        return "mega"
    if config.is_decoder:
        return "mega_lm"
    return "sc_raw" if model_class(config) is MegaForAudioClassification else "lra"


def _comparable(config: MegaConfig) -> dict[str, Any]:
    """Fields that change the model, with equivalent values normalised."""
    own = {field.name for field in dataclasses.fields(config)} & set(vars(type(config)).get("__annotations__", {}))
    values = {name: getattr(config, name) for name in sorted(own - _NEUTRAL_FIELDS)}
    values["num_labels"] = config.num_labels
    values["embedding_dropout_prob"] = values["dropout_prob"]
    if config.is_encoder_decoder:
        for name in ("intermediate_size", "nffn_hidden_size", "ema_projection_size", "shared_representation_size"):
            values[f"decoder_{name}"] = getattr(config.decoder_config(), name)
        values["max_target_positions"] = config.max_target_positions or config.max_positions
        values["decoder_chunk_size"] = config.decoder_config().chunk_size
    if config.adaptive_cutoffs is None:
        for name in ("adaptive_factor", "adaptive_dropout", "tie_adaptive_projections"):
            del values[name]
    if kind_of_config(config) in ("lra", "sc_raw"):
        for name in ("tie_word_embeddings", "add_lm_hidden_dense_layer", "lm_head_bias"):
            del values[name]
        values["classifier_hidden_size"] = config.classifier_hidden_size or config.hidden_size
    else:
        for name in ("num_classifier_layers", "classifier_hidden_size", "num_labels", "classifier_activation"):
            del values[name]
        for name in ("classifier_type", "pooling_type", "dual_encoder"):
            del values[name]
    return values


def _to_official(config: MegaConfig) -> dict[str, Any]:
    kind = kind_of_config(config)
    official: dict[str, Any] = {name: getattr(config, field) for name, (field, _) in _TABLES[kind].items()}
    official |= {"truncation_length": config.truncation, "arch": kind}
    if kind in ("lra", "sc_raw"):
        is_text = config.input_type == "tokens"
        official |= {
            "encoder_normalize_before": config.normalize_before_mega,
            "act_dropout": config.hidden_dropout_prob,
            "chunk_size": config.chunk_size if config.use_chunking else -1,
            "encoder_ffn_embed_dim": config.nffn_hidden_size if config.use_normalized_ffn else 0,
            "sen_rep_type": {ours: name for name, ours in _POOLING.items()}[config.pooling_type],
            "classifier_in_dim": config.hidden_size * (2 if config.dual_encoder else 1),
            "classifier_out_dim": config.classifier_hidden_size or config.hidden_size,
            "sentence_class_num": config.num_labels,
        }
        return official | ({"input_type": "text" if is_text else "image"} if kind == "lra" else {})
    side = "decoder" if kind == "mega_lm" else "encoder"
    official |= {
        "normalize_before": config.normalize_before_mega,
        "no_scale_embedding": not config.scale_embeddings,
        f"{side}_chunk_size": config.chunk_size if config.use_chunking else -1,
        f"{side}_ffn_embed_dim": config.nffn_hidden_size if config.use_normalized_ffn else 0,
        "decoder_embed_dim": config.hidden_size,
        "decoder_input_dim": config.hidden_size,
    }
    if kind == "mega":
        decoder = config.decoder_config()
        for name in ("hidden_dim", "z_dim", "n_dim"):
            official[f"decoder_{name}"] = getattr(decoder, _TRANSLATION[f"encoder_{name}"][0])
        return official | {
            "max_target_positions": decoder.max_positions,
            "decoder_ffn_embed_dim": decoder.nffn_hidden_size if decoder.use_normalized_ffn else 0,
            "decoder_chunk_size": decoder.chunk_size if decoder.use_chunking else -1,
            "share_all_embeddings": config.shares_embeddings,
            "share_decoder_input_output_embed": config.tie_word_embeddings,
        }
    adaptive = config.adaptive_cutoffs is not None
    cutoffs = ",".join(map(str, config.adaptive_cutoffs or [])) or None
    return official | {
        "no_affine_final_norm": not config.final_norm_affine,
        "share_decoder_input_output_embed": config.tie_word_embeddings and not adaptive,
        "adaptive_input": adaptive,
        "tie_adaptive_weights": adaptive,
        "tie_adaptive_proj": adaptive and config.tie_adaptive_projections,
        "adaptive_input_cutoff": cutoffs,
        "adaptive_softmax_cutoff": cutoffs,
        "adaptive_input_factor": config.adaptive_factor,
        "adaptive_softmax_factor": config.adaptive_factor,
        "adaptive_softmax_dropout": config.adaptive_dropout,
    }


def config_to_official(config: MegaConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Official options from our configuration; `config_from_official` restores the configuration.

    Args:
        config: a configuration that has an official form.
        base: official options to start from, so that options that only concern training are kept. If they already
            describe `config`, they are returned unchanged.

    Raises:
        ValueError: a field has no counterpart in the official code; the message names it.
    """
    read = partial(config_from_official, vocab_size=config.vocab_size)
    return options_of(config, base, write=_to_official, read=read, comparable=_comparable, name="Mega")


# ----------------------------------------------------------------------------------------------------------- tensors


def tensor_names(config: MegaConfig) -> TensorNames:
    """Names of all tensors in both formats.

    Raises:
        ValueError: the configuration has no official form.
    """
    config_to_official(config)
    kind = kind_of_config(config)
    if kind == "mega":
        return translation_names(config)
    return language_model_names(config) if kind == "mega_lm" else classifier_names(config)


def model_class(config: MegaConfig) -> type:
    """The model class that has all tensors of an official checkpoint."""
    if config.is_encoder_decoder:
        return MegaForConditionalGeneration
    if config.is_decoder:
        return MegaForCausalLM
    if config.input_type == "tokens":
        return MegaForSequenceClassification
    is_audio = config.architectures == [MegaForAudioClassification.__name__]
    return MegaForAudioClassification if is_audio else MegaForImageClassification


def _shapes(config: MegaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class(config)(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def vocabulary_size(state: Mapping[str, torch.Tensor]) -> int | None:
    """Vocabulary size of an official checkpoint, from its embedding tables; None for classifiers of real numbers.

    Raises:
        ValueError: the state dict contains no embedding.
    """
    for name in (
        "encoder.encoder.embed_tokens.embed.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    ):
        if name in state:
            return state[name].shape[0]
    bands = [
        tensor.shape[0]
        for name, tensor in state.items()
        if name.startswith("decoder.embed_tokens.embeddings.") and name.endswith(".0.weight")
    ]
    if bands:
        return sum(bands)
    if "encoder.encoder.embed_tokens.bias" in state:
        return None
    raise ValueError("The checkpoint contains no embedding (`…embed_tokens…`): it is not an official Mega.")


def state_dict_from_official(state: Mapping[str, torch.Tensor], config: MegaConfig) -> StateDict:
    """Tensors of `model_class(config)` from those of an official checkpoint. Nothing is copied or changed.

    Raises:
        ValueError: tensors are missing, superfluous or of another shape, or tied tensors differ; the message names
            them.
    """
    return tensors_from_official(state, tensor_names(config), "the official checkpoint", _shapes(config))


def state_dict_to_official(
    state: Mapping[str, torch.Tensor], config: MegaConfig, *, with_copies: bool = True
) -> StateDict:
    """Tensors of an official checkpoint from those of `model_class(config)`.

    Args:
        state: our state dict, with or without the tied copies.
        config: the configuration, which must have an official form.
        with_copies: also write the redundant tensors of the official format: second copies of tied tensors, version
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
    "kind_of",
    "kind_of_config",
    "model_class",
    "recognises",
    "state_dict_from_official",
    "state_dict_to_official",
    "tensor_names",
    "vocabulary_size",
]

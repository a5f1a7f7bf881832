"""Lossless conversion of official SeqBoat checkpoints (fairseq, `renll/SeqBoat`) and back (arXiv 2306.11197).

Two official models exist: `lm` (language model) and `lra` (classifiers of text, pairs of texts, pixels and waveforms). Their
command-line options are the configuration.

Tensors are renamed, never changed, with one exception: the official projection whose first two rows are the router is
split. Tied tensors, which the official format stores twice, are checked, stored once, and duplicated again on export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration.configuration_seqboat import SeqBoatConfig
from ..modeling.seqboat.seqboat_heads import (
    SeqBoatForAudioClassification,
    SeqBoatForCausalLM,
    SeqBoatForImageClassification,
    SeqBoatForSequenceClassification,
)
from .common import (
    MOVING_AVERAGE_NAMES,
    NORM_LEAVES,
    NORM_STATISTICS,
    StateDict,
    TensorNames,
    options_of,
    reason_of,
    tensors_from_official,
    tensors_to_official,
)

KINDS = ("lm", "lra")

# Official option: (our field, official default). Options without a direct counterpart are handled in code.
_SHARED: dict[str, tuple[str, Any]] = {
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.0),
    "activation_fn": ("hidden_act", "silu"),
    "attention_activation_fn": ("attention_activation", "softmax"),
    "feature_dropout": ("feature_dropout", False),
    "normalize_embedding": ("embedding_norm", False),
    "init_temp_scale": ("router_init_temp_scale", 0.3),
}
_LANGUAGE_MODEL = _SHARED | {
    "decoder_embed_dim": ("hidden_size", 512),
    "decoder_hidden_dim": ("value_dim", 1024),
    "decoder_z_dim": ("qk_dim", 128),
    "decoder_n_dim": ("ema_dim", 16),
    "decoder_layers": ("num_hidden_layers", 6),
    "max_target_positions": ("distance_table_size", 1024),
    "hidden_dropout": ("activation_dropout", 0.0),
    "normalization_type": ("norm_type", "layernorm"),
    "normalize_before": ("norm_first", False),
}
_CLASSIFIER = _SHARED | {
    "encoder_embed_dim": ("hidden_size", 512),
    "encoder_hidden_dim": ("value_dim", 1024),
    "z_dim": ("qk_dim", 128),
    "n_dim": ("ema_dim", 16),
    "encoder_layers": ("num_hidden_layers", 6),
    "max_positions": ("distance_table_size", 1024),
    "act_dropout": ("activation_dropout", 0.0),
    "norm_type": ("norm_type", "layernorm"),
    "encoder_normalize_before": ("norm_first", False),
    "act_bias": ("router_act_bias", 0.0),
    "always_act": ("always_active", False),
    "add_apos": ("absolute_sinusoid", False),
    "classifier_layers": ("classifier_layers", 1),
    "classifier_out_dim": ("classifier_dim", None),
    "classifier_activation_fn": ("classifier_act", "gelu"),
    "use_nli": ("pair_features", False),
}
_TABLES = {"lm": _LANGUAGE_MODEL, "lra": _CLASSIFIER}
_DEFAULT_TRUNCATION = {"lm": 2048, "lra": 1024}
_POOLING = {"mp": "mean", "cls": "first"}
_BIAS = {"simple": "distance", "rotary": "rotary", "t5": "t5"}

# Fields that only concern training from scratch, other heads or generation; they have no official options.
_NEUTRAL_FIELDS = {
    "initializer_scheme",
    "initializer_range",
    "classifier_dropout",
    "dead_layer_loss_weight",
    "dead_layer_min_rate",
    "output_activations",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "image_size",
    "vocab_size",
}


# ----------------------------------------------------------------------------------------------------- configuration


def recognises(official: Mapping[str, Any]) -> bool:
    """Whether official options belong to a SeqBoat, which unlike a Mega has a router temperature."""
    return "init_temp_scale" in official


def is_fairseq(config: SeqBoatConfig) -> bool:
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
        return "lra"
    if "decoder_z_dim" in official:
        return "lm"
    raise ValueError(
        "These options are not those of an official SeqBoat, which has `sentence_class_num` (classifiers) or `decoder_z_dim` "
        f"(language models); found {sorted(official)[:20]}."
    )


def _classifier_fields(official: Mapping[str, Any]) -> dict[str, Any]:
    kind = official.get("input_type", "text")
    architectures = {
        "text": SeqBoatForSequenceClassification,
        "image": SeqBoatForImageClassification,
        "speech": SeqBoatForAudioClassification,
    }
    if kind not in architectures:
        raise ValueError(
            f"The official option `input_type={kind!r}` is not supported; only {sorted(architectures)} are."
        )
    pooling = official.get("sen_rep_type", "cls")
    if pooling not in _POOLING:
        raise ValueError(f"The official option `sen_rep_type={pooling!r}` is not supported; only 'mp' and 'cls' are.")
    width = official.get("encoder_embed_dim", 512)
    is_pair = official.get("classifier_in_dim", width) > width
    fields = {
        "input_type": "tokens" if kind == "text" else "values",
        "scale_embedding": False,
        "pooling": _POOLING[pooling],
        "dual_encoder": is_pair,
        "pair_features": is_pair and bool(official.get("use_nli", False)),
        "num_labels": official["sentence_class_num"],
        "architectures": [architectures[kind].__name__],
    }
    return fields | ({"absolute_sinusoid": True} if kind == "speech" else {})


def _language_model_fields(official: Mapping[str, Any]) -> dict[str, Any]:
    width = official.get("decoder_embed_dim", 512)
    if official.get("adaptive_input") or official.get("adaptive_softmax_cutoff"):
        raise ValueError("The official options `adaptive_input` and `adaptive_softmax_cutoff` are not supported.")
    if official.get("decoder_output_dim", width) != width:
        raise ValueError(
            f"The official option `decoder_output_dim={official['decoder_output_dim']}` is not supported; only {width} is."
        )
    embedding = official.get("decoder_input_dim", width)
    return {
        "is_decoder": True,
        "embedding_size": None if embedding == width else embedding,
        "scale_embedding": not official.get("no_scale_embedding", False),
        "final_norm_affine": not official.get("no_affine_final_norm", False),
        "tie_word_embeddings": bool(official.get("share_decoder_input_output_embed", False)),
        "architectures": [SeqBoatForCausalLM.__name__],
    }


def config_from_official(official: Mapping[str, Any], *, vocab_size: int | None = None) -> SeqBoatConfig:
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
    side = "decoder" if kind == "lm" else "encoder"
    fields = {field: official.get(name, default) for name, (field, default) in _TABLES[kind].items()}
    truncation = official.get("truncation_length", _DEFAULT_TRUNCATION[kind])
    window = official.get("decoder_chunk_size" if kind == "lm" else "chunk_size", -1)
    bias = official.get("rel_pos_bias", "simple")
    if bias not in _BIAS:
        raise ValueError(f"The official option `rel_pos_bias={bias!r}` is not supported; only {sorted(_BIAS)} are.")
    has_window = window is not None and window > 0
    uses_ranks = bias == "simple" and has_window and official.get("local_pos", False)
    feed_forward = official.get(f"{side}_ffn_embed_dim", -1)
    fields |= {
        "ema_truncation": truncation if truncation and truncation > 0 else None,
        "window_size": window + 1 if has_window else None,
        "position_bias": "rank" if uses_ranks else _BIAS[bias],
        "intermediate_size": max(feed_forward or 0, 0),
        "initializer_scheme": "official",
    }
    has_tokens = kind == "lm" or official.get("input_type", "text") == "text"
    if has_tokens:
        vocab_size = official.get("vocab_size") if vocab_size is None else vocab_size
        if vocab_size is None:
            raise ValueError(
                "`vocab_size` is needed: the options of a fairseq checkpoint do not contain it (see `vocabulary_size`)."
            )
        fields["vocab_size"] = vocab_size
    fields |= _language_model_fields(official) if kind == "lm" else _classifier_fields(official)
    try:
        return SeqBoatConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"The official options do not make a valid configuration. {reason_of(error)}") from error


def _comparable(config: SeqBoatConfig) -> dict[str, Any]:
    """Fields that change the model, with equivalent values normalised."""
    own = {field.name for field in dataclasses.fields(config)} & set(vars(type(config)).get("__annotations__", {}))
    values = {name: getattr(config, name) for name in sorted(own - _NEUTRAL_FIELDS)}
    values["embedding_size"] = config.embedding_width
    if config.position_bias != "distance":
        del values["distance_table_size"]
    if config.is_decoder:
        for name in [name for name in values if name.startswith("classifier_")] + [
            "pooling",
            "pair_features",
            "dual_encoder",
        ]:
            del values[name]
    else:
        del values["tie_word_embeddings"]
        values |= {"num_labels": config.num_labels, "classifier_dim": config.classifier_dim or config.hidden_size}
    return values


def _to_official(config: SeqBoatConfig) -> dict[str, Any]:
    kind = "lm" if config.is_decoder else "lra"
    side = "decoder" if kind == "lm" else "encoder"
    official: dict[str, Any] = {name: getattr(config, field) for name, (field, _) in _TABLES[kind].items()}
    names = {ours: name for name, ours in _BIAS.items()} | {"rank": "simple"}
    official |= {
        "truncation_length": config.ema_truncation,
        "rel_pos_bias": names[config.position_bias],
        "local_pos": config.position_bias == "rank",
        f"{side}_ffn_embed_dim": config.intermediate_size or -1,
        "decoder_chunk_size" if kind == "lm" else "chunk_size": -1
        if config.window_size is None
        else config.window_size - 1,
    }
    if kind == "lm":
        return official | {
            "decoder_input_dim": config.embedding_width,
            "no_scale_embedding": not config.scale_embedding,
            "no_affine_final_norm": not config.final_norm_affine,
            "share_decoder_input_output_embed": config.tie_word_embeddings,
        }
    copies = 1 if not config.dual_encoder else 4 if config.pair_features else 2
    is_audio = config.architectures == [SeqBoatForAudioClassification.__name__]
    return official | {
        "input_type": "text" if config.input_type == "tokens" else "speech" if is_audio else "image",
        "sen_rep_type": {ours: name for name, ours in _POOLING.items()}[config.pooling],
        "classifier_in_dim": config.hidden_size * copies,
        "classifier_out_dim": config.classifier_dim or config.hidden_size,
        "sentence_class_num": config.num_labels,
    }


def config_to_official(config: SeqBoatConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Official options from our configuration; `config_from_official` restores the configuration.

    Args:
        config: a configuration that has an official form.
        base: official options to start from, so that options that only concern training are kept. If they already
            describe `config`, they are returned unchanged.

    Raises:
        ValueError: a field has no counterpart in the official code; the message names it.
    """
    read = partial(config_from_official, vocab_size=config.vocab_size)
    return options_of(config, base, write=_to_official, read=read, comparable=_comparable, name="SeqBoat")


# ----------------------------------------------------------------------------------------------------------- tensors

_ROUTER_ROWS = 2  # of the official `hx_proj`, before those of the skip branch


def _norm(official: str, ours: str, config: SeqBoatConfig, affine: bool = True) -> dict[str, str]:
    leaves = NORM_LEAVES[config.norm_type] if affine else ()
    if config.norm_type.endswith("batchnorm"):
        leaves = (*leaves, *NORM_STATISTICS)
    return {f"{official}.norm.{leaf}": f"{ours}.norm.{leaf}" for leaf in leaves}


def _linear(official: str, ours: str) -> dict[str, str]:
    return {f"{official}.{leaf}": f"{ours}.{leaf}" for leaf in ("weight", "bias")}


def unit_names(official: str, ours: str, config: SeqBoatConfig) -> dict[str, str]:
    """Names of the tensors of one unit; the prefixes end with a dot. `hx_proj.router` is the part that `_split` makes."""
    names = {f"{official}gamma": f"{ours}qk_weight", f"{official}beta": f"{ours}qk_bias"}
    names |= {f"{official}move.{theirs}": f"{ours}ema.{name}" for theirs, name in MOVING_AVERAGE_NAMES.items()}
    names |= _norm(f"{official}norm", f"{ours}norm", config)
    names |= _linear(f"{official}hx_proj", f"{ours}skip_proj")
    names |= _linear(f"{official}mx_proj", f"{ours}in_proj") | _linear(f"{official}h_proj", f"{ours}out_proj")
    if not config.always_active:
        names |= _linear(f"{official}hx_proj.router", f"{ours}router")
        names[f"{official}q_router.temp"] = f"{ours}router.log_temperature"
    if config.position_bias == "t5":
        names[f"{official}rel_pos_bias.relative_attention_bias"] = f"{ours}position_bias.rel_pos_bias"
    elif config.position_bias != "rotary":
        names[f"{official}rel_pos_bias.rel_pos_bias"] = f"{ours}position_bias.rel_pos_bias"
    return names


def split_router(state: Mapping[str, torch.Tensor], config: SeqBoatConfig) -> StateDict:
    """The official tensors with the router rows of every `hx_proj` under separate names; views, nothing is copied."""
    split: StateDict = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith("hx_proj") and not config.always_active:
            split[f"{module}.router.{leaf}"] = tensor[:_ROUTER_ROWS]
            split[name] = tensor[_ROUTER_ROWS:]
        else:
            split[name] = tensor
    return split


def join_router(state: Mapping[str, torch.Tensor]) -> StateDict:
    """Inverse of `split_router`."""
    joined = {name: tensor for name, tensor in state.items() if ".router." not in name}
    for name, tensor in state.items():
        if ".router." in name:
            target = name.replace(".router.", ".")
            joined[target] = torch.cat([tensor, joined[target]])
    return joined


def _stack(root: str, unit: str, config: SeqBoatConfig) -> dict[str, str]:
    names: dict[str, str] = {}
    for index in range(config.num_hidden_layers):
        source, target = f"{root}layers.{index}.", f"model.layers.{index}."
        names |= unit_names(f"{source}{unit}.", f"{target}unit.", config)
        if config.intermediate_size > 0:
            for projection in ("fc1", "fc2"):
                names |= _linear(f"{source}nffn.{projection}", f"{target}ffn.{projection}")
            names |= _norm(f"{source}nffn.norm", f"{target}ffn.norm", config)
    if config.embedding_norm:
        names |= _norm(f"{root}embed_norm", "model.embed_norm", config)
    if config.norm_first:
        names |= _norm(f"{root}final_norm", "model.final_norm", config, affine=config.final_norm_affine)
    return names


def _classifier_names(config: SeqBoatConfig) -> TensorNames:
    root, ours = "encoder.encoder.", "model.embeddings"
    names = _stack(root, "mega_layer", config)
    if config.input_type == "values":
        names |= {f"{root}embed_tokens.{leaf}": f"{ours}.value_embeddings.{leaf}" for leaf in ("weight", "bias")}
    else:
        names[f"{root}embed_tokens.embed.weight"] = f"{ours}.embed_tokens.weight"
    constants = {}
    if config.absolute_sinusoid:
        names[f"{root}pos_emb.scale"] = f"{ours}.position_scale"
        exponents = torch.arange(0, config.hidden_size, 2).float() / config.hidden_size
        constants[f"{root}pos_emb.inv_freq"] = 1.0 / (10000**exponents)
    for index in range(config.classifier_layers):
        names |= _linear(f"classifier.{index}.0", f"classifier.layers.{index}")
    names["sentence_projection_layer.weight"] = "classifier.out_proj.weight"
    return TensorNames(names, constants=constants)


def _language_model_names(config: SeqBoatConfig) -> TensorNames:
    names = _stack("decoder.", "slag_layer", config)
    embedding, ours = "decoder.embed_tokens.weight", "model.embeddings.embed_tokens.weight"
    head = "decoder.output_projection.weight"
    names[embedding] = ours
    if config.embedding_width != config.hidden_size:
        names["decoder.project_in_dim.weight"] = "model.embeddings.project_in.weight"
    constants = {"decoder.version": torch.tensor([3.0])}
    if config.tie_word_embeddings:
        return TensorNames(names, {head: embedding}, constants, {"lm_head.weight": ours})
    return TensorNames(names | {head: "lm_head.weight"}, {}, constants)


def tensor_names(config: SeqBoatConfig) -> TensorNames:
    """Names of all tensors in both formats, the official router rows already split off.

    Raises:
        ValueError: the configuration has no official form.
    """
    config_to_official(config)
    return _language_model_names(config) if config.is_decoder else _classifier_names(config)


def model_class(config: SeqBoatConfig) -> type:
    """The model class that has all tensors of an official checkpoint."""
    if config.is_decoder:
        return SeqBoatForCausalLM
    if config.input_type == "tokens":
        return SeqBoatForSequenceClassification
    is_audio = config.architectures == [SeqBoatForAudioClassification.__name__]
    return SeqBoatForAudioClassification if is_audio else SeqBoatForImageClassification


def _shapes(config: SeqBoatConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class(config)(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def vocabulary_size(state: Mapping[str, torch.Tensor]) -> int | None:
    """Vocabulary size of an official checkpoint, from its embedding table; None for classifiers of real numbers.

    Raises:
        ValueError: the state dict contains no embedding.
    """
    for name in ("encoder.encoder.embed_tokens.embed.weight", "decoder.embed_tokens.weight"):
        if name in state:
            return state[name].shape[0]
    if "encoder.encoder.embed_tokens.bias" in state:
        return None
    raise ValueError("The checkpoint contains no embedding (`…embed_tokens…`): it is not an official SeqBoat.")


def state_dict_from_official(state: Mapping[str, torch.Tensor], config: SeqBoatConfig) -> StateDict:
    """Tensors of `model_class(config)` from those of an official checkpoint. Nothing is copied or changed.

    Raises:
        ValueError: tensors are missing, superfluous or of another shape, or tied tensors differ; the message names
            them.
    """
    split = split_router(state, config)
    return tensors_from_official(split, tensor_names(config), "the official checkpoint", _shapes(config))


def state_dict_to_official(
    state: Mapping[str, torch.Tensor], config: SeqBoatConfig, *, with_copies: bool = True
) -> StateDict:
    """Tensors of an official checkpoint from those of `model_class(config)`.

    Args:
        state: our state dict, with or without the tied copies.
        config: the configuration, which must have an official form.
        with_copies: also write the redundant tensors of the official format: second copies of tied tensors, version
            marks, frequencies.

    Raises:
        ValueError: as `state_dict_from_official`, or the configuration has no official form.
    """
    names = tensor_names(config)
    official = tensors_to_official(state, names, "the checkpoint", _shapes(config), with_copies=with_copies)
    return join_router(official)


__all__ = [
    "config_from_official",
    "config_to_official",
    "is_fairseq",
    "kind_of",
    "model_class",
    "recognises",
    "split_router",
    "state_dict_from_official",
    "state_dict_to_official",
    "tensor_names",
    "unit_names",
    "vocabulary_size",
]

"""Names of the tensors of official Mega checkpoints (fairseq, `facebookresearch/mega`) and ours."""

from __future__ import annotations

import torch

from ..configuration.configuration_mega import MegaConfig
from .common import MOVING_AVERAGE_NAMES, NORM_LEAVES, NORM_STATISTICS, TensorNames


def _norm(official: str, ours: str, config: MegaConfig, affine: bool = True) -> dict[str, str]:
    leaves = NORM_LEAVES[config.normalization_type] if affine and config.norm_affine else ()
    if config.normalization_type.endswith("batchnorm"):
        leaves = (*leaves, *NORM_STATISTICS)
    return {f"{official}.norm.{leaf}": f"{ours}.norm.{leaf}" for leaf in leaves}


def _linear(official: str, ours: str, *projections: str) -> dict[str, str]:
    return {
        f"{official}.{projection}.{leaf}": f"{ours}.{projection}.{leaf}"
        for projection in projections
        for leaf in ("weight", "bias")
    }


def _bias(official: str, ours: str, config: MegaConfig) -> TensorNames:
    if config.relative_positional_bias == "simple":
        return TensorNames({f"{official}.rel_pos_bias.rel_pos_bias": f"{ours}.rel_pos_bias.rel_pos_bias"})
    names = {
        f"{official}.rel_pos_bias.alpha": f"{ours}.rel_pos_bias.alpha",
        f"{official}.rel_pos_bias.beta": f"{ours}.rel_pos_bias.b_param",
    }
    return TensorNames(names, constants={f"{official}.rel_pos_bias._float_tensor": torch.zeros(1)})


def _merge(*parts: TensorNames) -> TensorNames:
    merged = TensorNames({}, {}, {}, {})
    for part in parts:
        for name in ("ours", "aliases", "constants", "our_aliases"):
            getattr(merged, name).update(getattr(part, name))
    return merged


def _stack(official: str, ours: str, config: MegaConfig) -> TensorNames:
    """Names of the layers and the final and embedding norms of one stack; the prefixes end with a dot or are empty."""
    parts = []
    for index in range(config.num_hidden_layers):
        source, target = f"{official}layers.{index}", f"{ours}layers.{index}"
        block, layer = f"{source}.mega_layer", f"{target}.mega_layer"
        names = {f"{block}.gamma": f"{layer}.qk_weight", f"{block}.beta": f"{layer}.qk_bias"}
        names |= {
            f"{block}.move.{theirs}": f"{layer}.ema_gate.{name}" for theirs, name in MOVING_AVERAGE_NAMES.items()
        }
        names |= _linear(block, layer, "v_proj", "mx_proj", "h_proj")
        names |= _norm(f"{block}.norm", f"{layer}.norm", config)
        parts += [TensorNames(names), _bias(block, layer, config)]
        if config.add_cross_attention:
            block, layer = f"{source}.cross_attn", f"{target}.cross_attn"
            names = _linear(block, layer, "k_proj", "v_proj", "q_proj", "h_proj")
            parts += [TensorNames(names | _norm(f"{block}.norm", f"{layer}.norm", config))]
            parts += [_bias(block, layer, config)]
        if config.use_normalized_ffn and config.nffn_hidden_size > 0:
            names = _linear(f"{source}.nffn", f"{target}.nffn", "fc1", "fc2")
            parts += [TensorNames(names | _norm(f"{source}.nffn.norm", f"{target}.nffn.norm", config))]
    if config.normalize_embeddings:
        parts += [TensorNames(_norm(f"{official}embed_norm", f"{ours}embed_norm", config))]
    if config.final_norm:
        names = _norm(f"{official}final_norm", f"{ours}final_norm", config, affine=config.final_norm_affine)
        parts += [TensorNames(names)]
    return _merge(*parts)


def classifier_names(config: MegaConfig) -> TensorNames:
    """Names of a classifier of tokens or real numbers."""
    root, ours = "encoder.encoder.", "mega.embedding_layer"
    if config.input_type == "values":
        names = {f"{root}embed_tokens.{leaf}": f"{ours}.value_embeddings.{leaf}" for leaf in ("weight", "bias")}
    else:
        names = {f"{root}embed_tokens.embed.weight": f"{ours}.word_embeddings.weight"}
    for index in range(config.num_classifier_layers):
        for leaf in ("weight", "bias"):
            names[f"classifier.{index}.0.{leaf}"] = f"classifier.layers.{index}.{leaf}"
    names["sentence_projection_layer.weight"] = "classifier.out_proj.weight"
    return _merge(_stack(root, "mega.", config), TensorNames(names))


def language_model_names(config: MegaConfig) -> TensorNames:
    """Names of a language model, with a single or an adaptive embedding table."""
    official, ours = "decoder.embed_tokens", "mega.embedding_layer.word_embeddings"
    constants = {"decoder.version": torch.tensor([3.0])}
    head = "decoder.output_projection.weight"
    stack = _stack("decoder.", "mega.", config)
    if config.adaptive_cutoffs is None:
        names = {f"{official}.weight": f"{ours}.weight"}
        if config.tie_word_embeddings:
            aliases = {head: f"{official}.weight"}
            return _merge(stack, TensorNames(names, aliases, constants, {"lm_head.weight": f"{ours}.weight"}))
        return _merge(stack, TensorNames(names | {head: "lm_head.weight"}, {}, constants))
    softmax = "decoder.adaptive_softmax"
    names = {f"{softmax}.head.class_proj.weight": "lm_head.class_proj.weight"}
    aliases = {f"{softmax}.head.word_proj.weight": f"{official}.embeddings.0.0.weight"}
    for band in range(len(config.adaptive_cutoffs) + 1):
        names[f"{official}.embeddings.{band}.0.weight"] = f"{ours}.embeddings.{band}.weight"
        names[f"{official}.embeddings.{band}.1.weight"] = f"{ours}.projections.{band}.weight"
        if band == 0:
            continue
        tail = f"{softmax}.tail.{band - 1}"
        aliases[f"{tail}.2.weight"] = f"{official}.embeddings.{band}.0.weight"
        if config.tie_adaptive_projections:
            aliases[f"{tail}.0.weight"] = f"{official}.embeddings.{band}.1.weight"
        else:
            names[f"{tail}.0.weight"] = f"lm_head.tail_projections.{band - 1}.weight"
    constants[f"{softmax}.version"] = torch.tensor([1])
    for module in (official, f"{softmax}.head"):
        constants[f"{module}._float_tensor"] = torch.zeros(1)
    return _merge(stack, TensorNames(names, aliases, constants))


def translation_names(config: MegaConfig) -> TensorNames:
    """Names of an encoder-decoder."""

    def ours(side: str) -> str:
        return f"{side}.embedding_layer.word_embeddings.weight"

    encoder, decoder, head = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"
    output = "decoder.output_projection.weight"
    constants = {f"{side}.version": torch.tensor([3.0]) for side in ("encoder", "decoder")}
    names = {encoder: ours("encoder")}
    aliases: dict[str, str] = {}
    our_aliases: dict[str, str] = {}
    if config.shares_embeddings:
        aliases |= {decoder: encoder, output: encoder}
        our_aliases |= {ours("decoder"): ours("encoder"), head: ours("encoder")}
    else:
        names[decoder] = ours("decoder")
        if config.tie_word_embeddings:
            aliases[output] = decoder
            our_aliases[head] = ours("decoder")
        else:
            names[output] = head
    return _merge(
        _stack("encoder.", "encoder.", config.encoder_config()),
        _stack("decoder.", "decoder.", config.decoder_config()),
        TensorNames(names, aliases, constants, our_aliases),
    )


__all__ = ["classifier_names", "language_model_names", "translation_names"]

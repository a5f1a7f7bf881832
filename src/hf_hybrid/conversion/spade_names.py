"""Names of the tensors of official SPADE checkpoints (encoder-decoder, language model) and ours."""

from __future__ import annotations

import dataclasses

import torch

from ..configuration.configuration_spade import SpadeConfig, SpadeLMConfig
from .common import TensorNames

_SSM_LEAVES = ("C", "log_dt", "B", "P", "inv_w_real", "w_imag")


def _norm(official: str, ours: str) -> dict[str, str]:
    return {f"{official}.{leaf}": f"{ours}.{leaf}" for leaf in ("weight", "bias")}


def _linear(official: str, ours: str, bias: bool) -> dict[str, str]:
    return {f"{official}.{leaf}": f"{ours}.{leaf}" for leaf in (("weight", "bias") if bias else ("weight",))}


def _attention(official: str, ours: str, bias: bool = False) -> dict[str, str]:
    names: dict[str, str] = {}
    for letter in "qkvo":
        names |= _linear(f"{official}.{letter}", f"{ours}.{letter}_proj", bias)
    return names


def _ssm(official: str, ours: str) -> dict[str, str]:
    names = {f"{official}.s4.D": f"{ours}.D", f"{official}.s4.kernel.kernel.L": f"{ours}.kernel_length"}
    return names | {f"{official}.s4.kernel.kernel.{leaf}": f"{ours}.{leaf}" for leaf in _SSM_LEAVES}


def _mixer_extras(official: str, ours: str, combine: str) -> dict[str, str]:
    """Names of the norms and the linear map of a layer with an SSM."""
    names: dict[str, str] = {}
    if combine != "stack":
        names |= _norm(f"{official}.norm_global", f"{ours}.norm_global")
        names |= _norm(f"{official}.norm_local", f"{ours}.norm_local")
    if combine == "concat":
        names |= _linear(f"{official}.aggregate", f"{ours}.aggregate", True)
    return names


def encoder_decoder_names(config: SpadeConfig) -> TensorNames:
    """Names of an encoder-decoder."""
    embedding = "model.encoder.embed_tokens.weight"
    names = {"shared.weight": embedding, "decoder.pos_embed.weight": "model.decoder.embed_positions.weight"}
    gated = config.feed_forward_proj.startswith("gated-")

    def feed_forward(official: str, ours: str, bias: bool) -> dict[str, str]:
        found = _norm(f"{official}.layer_norm", f"{ours}.feed_forward_norm")
        for projection in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            found |= _linear(f"{official}.DenseReluDense.{projection}", f"{ours}.feed_forward.{projection}", bias)
        return found

    for stack in ("encoder", "decoder"):
        names |= _norm(f"{stack}.first_layer_norm", f"model.{stack}.embedding_norm")
    for index in range(config.encoder_layers):
        block, layer = f"encoder.block.{index}.layer", f"model.encoder.layers.{index}"
        names |= _attention(f"{block}.0.SelfAttention", f"{layer}.mixer.attention")
        table = "relative_attention_bias.weight"
        names[f"{block}.0.SelfAttention.{table}"] = f"{layer}.mixer.attention.{table}"
        names |= _norm(f"{block}.0.layer_norm", f"{layer}.mixer_norm")
        if index in (config.ssm_layers or []):
            names |= _mixer_extras(f"{block}.0", f"{layer}.mixer", config.ssm_combine)
            names |= _ssm(f"{block}.0.s4", f"{layer}.mixer.ssm")
        names |= feed_forward(f"{block}.1", layer, bias=not gated)
    for index in range(config.decoder_layers):
        block, layer = f"decoder.block.{index}.layer", f"model.decoder.layers.{index}"
        names |= _attention(f"{block}.0.SelfAttention", f"{layer}.self_attention", config.attention_bias)
        names |= _norm(f"{block}.0.layer_norm", f"{layer}.self_attention_norm")
        names |= _attention(f"{block}.1.EncDecAttention", f"{layer}.cross_attention", config.attention_bias)
        names |= _norm(f"{block}.1.layer_norm", f"{layer}.cross_attention_norm")
        names |= feed_forward(f"{block}.2", layer, bias=config.attention_bias or not gated)
    aliases = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
    if not config.tie_word_embeddings:
        return TensorNames(names | {"lm_head.weight": "lm_head.weight"}, aliases)
    return TensorNames(names, aliases | {"lm_head.weight": "shared.weight"}, our_aliases={"lm_head.weight": embedding})


def _language_model_head(config: SpadeLMConfig) -> TensorNames:
    """Names of the embeddings and the output layer."""
    constants = {"decoder.version": torch.tensor([3.0])}
    if config.adaptive_cutoffs is None:
        official, ours, head = (
            "decoder.embed_tokens.weight",
            "model.embed_tokens.weight",
            "decoder.output_projection.weight",
        )
        if config.tie_word_embeddings:
            return TensorNames({official: ours}, {head: official}, constants, {"lm_head.weight": ours})
        return TensorNames({official: ours, head: "lm_head.weight"}, {}, constants)
    softmax, embedding = "decoder.adaptive_softmax", "decoder.embed_tokens.embeddings"
    names = {f"{softmax}.head.class_proj.weight": "lm_head.class_proj.weight"}
    aliases = {f"{softmax}.head.word_proj.weight": f"{embedding}.0.0.weight"}
    for band in range(len(config.adaptive_cutoffs) + 1):
        names[f"{embedding}.{band}.0.weight"] = f"model.embed_tokens.embeddings.{band}.weight"
        names[f"{embedding}.{band}.1.weight"] = f"model.embed_tokens.projections.{band}.weight"
        if band == 0:
            continue
        tail = f"{softmax}.tail.{band - 1}"
        aliases[f"{tail}.2.weight"] = f"{embedding}.{band}.0.weight"
        if config.tie_adaptive_projections:
            aliases[f"{tail}.0.weight"] = f"{embedding}.{band}.1.weight"
        else:
            names[f"{tail}.0.weight"] = f"lm_head.tail_projections.{band - 1}.weight"
    constants[f"{softmax}.version"] = torch.tensor([1])
    for module in ("decoder.embed_tokens", f"{softmax}.head"):
        constants[f"{module}._float_tensor"] = torch.zeros(1)
    return TensorNames(names, aliases, constants)


def language_model_names(config: SpadeLMConfig) -> TensorNames:
    """Names of a language model."""
    head = _language_model_head(config)
    names = dict(head.ours)
    for index in range(config.num_layers):
        official, ours = f"decoder.layers.{index}", f"model.layers.{index}"
        names |= _attention(f"{official}.self_attn", f"{ours}.mixer.attention")
        if config.position_encoding == "bias" and index == 0:
            table = "relative_attention_bias.weight"
            names[f"{official}.self_attn.{table}"] = f"{ours}.mixer.attention.{table}"
        names |= _norm(f"{official}.self_attn_layer_norm", f"{ours}.mixer_norm")
        names |= _norm(f"{official}.final_layer_norm", f"{ours}.feed_forward_norm")
        names |= _linear(f"{official}.fc1", f"{ours}.feed_forward.wi", True)
        names |= _linear(f"{official}.fc2", f"{ours}.feed_forward.wo", True)
        if index in (config.ssm_layers or []):
            names |= _mixer_extras(official, f"{ours}.mixer", config.ssm_combine)
            names |= _ssm(f"{official}.s4_module", f"{ours}.mixer.ssm")
        if config.scale_attention:
            names |= _norm(f"{official}.attn_ln", f"{ours}.mixer.attention.output_norm")
        if config.scale_feed_forward:
            names |= _norm(f"{official}.ffn_layernorm", f"{ours}.feed_forward.inner_norm")
        if config.scale_residuals:
            names[f"{official}.w_resid"] = f"{ours}.residual_scale"
        if config.scale_heads:
            names[f"{official}.c_attn"] = f"{ours}.mixer.attention.head_scale"
    if config.use_final_norm:
        names |= _norm("decoder.layer_norm", "model.final_norm")
    return dataclasses.replace(head, ours=names)


__all__ = ["encoder_decoder_names", "language_model_names"]

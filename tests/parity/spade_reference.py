"""SPADE written down a second time, slowly: dense float64 formulas over official parameter names.

Shares nothing with the package. Used where no stored vectors of the official code exist (other options and sizes); the stored ones
are reproduced by it as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = Mapping[str, Tensor]


def bucket(offset: int, bidirectional: bool, buckets: int, distance: int) -> int:
    """T5 bucket of `key position - query position` (arXiv 1910.10683), logarithms in float32."""
    base, half = 0, buckets
    if bidirectional:
        half = buckets // 2
        base, offset = (half if offset > 0 else 0), abs(offset)
    else:
        offset = max(-offset, 0)
    exact = half // 2
    if offset < exact:
        return base + offset
    ratio = torch.log(torch.tensor(offset / exact, dtype=torch.float32)) / math.log(distance / exact) * (half - exact)
    return base + min(half - 1, exact + int(ratio))


def norm(p: Parameters, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(
    p: Parameters, name: str, x: Tensor, source: Tensor, count: int, allowed: Tensor, bias: Tensor | float
) -> Tensor:
    """Softmax attention with a boolean mask broadcast to (B, n, queries, keys)."""
    query, key, value = (
        heads(linear(p, f"{name}.{part}", y), count) for part, y in (("q", x), ("k", source), ("v", source))
    )
    scores = query @ key.mT * query.shape[-1] ** -0.5 + bias
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return linear(p, f"{name}.o", (weights @ value).transpose(1, 2).flatten(2))


def relative_bias(table: Tensor, length: int, bidirectional: bool, options: Mapping[str, Any]) -> Tensor:
    """(buckets, n) to (n, L, L)."""
    buckets, distance = options["relative_attention_num_buckets"], options["relative_attention_max_distance"]
    index = [[bucket(j - i, bidirectional, buckets, distance) for j in range(length)] for i in range(length)]
    return table[torch.tensor(index)].permute(2, 0, 1)


def ssm(p: Parameters, name: str, x: Tensor, bidirectional: bool, reach: int) -> Tensor:
    """S4 with dense matrices, one feature and one tap at a time (arXiv 2111.00396); C is raw. x is (B, L, H)."""
    kernel = f"{name}.s4.kernel.kernel"
    w = torch.complex(-p[f"{kernel}.inv_w_real"].exp(), p[f"{kernel}.w_imag"])
    low_rank, inputs, output = (torch.view_as_complex(p[f"{kernel}.{leaf}"].contiguous()) for leaf in "PBC")
    copies, length, taps = w.shape[0], x.shape[1], min(x.shape[1], reach)
    result = torch.zeros_like(x)
    for feature in range(x.shape[2]):
        copy, dt = feature % copies, p[f"{kernel}.log_dt"][feature].exp()
        both = torch.cat([w[copy], w[copy].conj()])
        vector = torch.cat([low_rank[0, copy], low_rank[0, copy].conj()])
        matrix = torch.diag(both) - torch.outer(vector, vector.conj())
        identity = torch.eye(len(both), dtype=matrix.dtype)
        step = torch.linalg.inv(identity - dt / 2 * matrix)
        transition = step @ (identity + dt / 2 * matrix)
        state = step @ torch.cat([inputs[0, copy], inputs[0, copy].conj()]) * dt
        rows = torch.cat([output[:, feature], output[:, feature].conj()], dim=-1)
        for lag in range(taps):
            response = (rows @ state).real
            result[:, lag:, feature] += response[0] * x[:, : length - lag, feature]
            if bidirectional and lag + 1 < length:
                result[:, : length - lag - 1, feature] += response[1] * x[:, lag + 1 :, feature]
            state = transition @ state
    return result + p[f"{name}.s4.D"][0] * x


# ------------------------------------------------------------------------------------------------- encoder-decoder


def encoder_decoder(
    options: Mapping[str, Any], parameters: Parameters, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs under the names of the vector files."""
    p = {name: tensor.double() for name, tensor in parameters.items()}
    eps, before, count = options["layer_norm_epsilon"], options["normalize_before"], options["num_heads"]
    found: dict[str, Tensor] = {}

    def sublayer(x: Tensor, name: str, function: Any) -> Tensor:
        if before:
            return x + function(norm(p, f"{name}.layer_norm", x, eps))
        return norm(p, f"{name}.layer_norm", x + function(x), eps)

    def feed_forward(name: str) -> Any:
        def run(x: Tensor) -> Tensor:
            if options["feed_forward_proj"] == "gated-gelu":
                inner = F.gelu(linear(p, f"{name}.wi_0", x), approximate="tanh") * linear(p, f"{name}.wi_1", x)
            else:
                inner = getattr(F, options["feed_forward_proj"])(linear(p, f"{name}.wi", x))
            return linear(p, f"{name}.wo", inner)

        return run

    real = inputs["attention_mask"].bool()
    length = real.shape[1]
    place = torch.arange(length)
    near = (place[:, None] - place).abs() <= options["local_radius"]
    x = norm(p, "encoder.first_layer_norm", p["shared.weight"][inputs["input_ids"]], eps)
    found["encoder_hidden.0"] = x
    for index in range(options["num_layers"]):
        name = f"encoder.block.{index}.layer"

        def mix(h: Tensor, name: str = f"{name}.0", index: int = index) -> Tensor:
            bias = relative_bias(p[f"{name}.SelfAttention.relative_attention_bias.weight"], length, True, options)
            near_real = near & real[:, None, None, :]
            local = attend(p, f"{name}.SelfAttention", h, h, count, near_real, bias)
            found[f"enc{index}_local_attn"] = local
            if index % options["s4_every_n_layers"]:
                return local
            distant = ssm(p, f"{name}.s4", h * real[..., None], True, options["max_position_embeddings"])
            found[f"enc{index}_s4"] = distant
            both = [norm(p, f"{name}.norm_global", distant, eps), norm(p, f"{name}.norm_local", local, eps)]
            return linear(p, f"{name}.aggregate", torch.cat(both, -1))

        x = found[f"enc{index}_attn_sublayer"] = sublayer(x, f"{name}.0", mix)
        x = found[f"encoder_hidden.{index + 1}"] = sublayer(x, f"{name}.1", feed_forward(f"{name}.1.DenseReluDense"))
    source, targets = x, inputs["decoder_input_ids"]
    known = targets != options["pad_token_id"]
    rows = known.cumsum(1) * known + 1
    x = p["shared.weight"][targets] + p["decoder.pos_embed.weight"][rows]
    x = found["decoder_hidden.0"] = norm(p, "decoder.first_layer_norm", x, eps)
    past = torch.ones(targets.shape[1], targets.shape[1]).tril().bool() & known[:, None, None, :]
    for index in range(options["num_decoder_layers"]):
        name = f"decoder.block.{index}.layer"

        def look_back(h: Tensor, name: str = f"{name}.0.SelfAttention", index: int = index) -> Tensor:
            for part in "kv":
                found[f"dec{index}_self_{part}"] = heads(linear(p, f"{name}.{part}", h), count)
            return attend(p, name, h, h, count, past, 0.0)

        def look_across(h: Tensor, name: str = f"{name}.1.EncDecAttention", index: int = index) -> Tensor:
            for part in "kv":
                found[f"dec{index}_cross_{part}"] = heads(linear(p, f"{name}.{part}", source), count)
            return attend(p, name, h, source, count, real[:, None, None, :], 0.0)

        x = sublayer(x, f"{name}.0", look_back)
        x = sublayer(x, f"{name}.1", look_across)
        x = found[f"decoder_hidden.{index + 1}"] = sublayer(x, f"{name}.2", feed_forward(f"{name}.2.DenseReluDense"))
    found["logits"] = x @ p.get("lm_head.weight", p["shared.weight"]).T
    found["incremental_logits"] = found["logits"]
    found["loss"] = F.cross_entropy(found["logits"].flatten(0, 1), inputs["labels"].flatten())
    return found


# -------------------------------------------------------------------------------------------------- language model


def adaptive_embedding(p: Parameters, ids: Tensor, limits: list[int]) -> Tensor:
    tables = [
        p[f"decoder.embed_tokens.embeddings.{band}.0.weight"] @ p[f"decoder.embed_tokens.embeddings.{band}.1.weight"].T
        for band in range(len(limits) - 1)
    ]
    return torch.cat(tables)[ids]


def adaptive_log_probs(p: Parameters, x: Tensor, limits: list[int]) -> Tensor:
    table, softmax = "decoder.embed_tokens.embeddings", "decoder.adaptive_softmax"
    head = torch.cat([x @ p[f"{table}.0.0.weight"].T, x @ p[f"{softmax}.head.class_proj.weight"].T], -1).log_softmax(
        -1
    )
    parts = [head[..., : limits[1]]]
    for band in range(1, len(limits) - 1):
        own = p.get(f"{softmax}.tail.{band - 1}.0.weight")
        inner = x @ (p[f"{table}.{band}.1.weight"] if own is None else own.T)
        tail = (inner @ p[f"{table}.{band}.0.weight"].T).log_softmax(-1)
        parts.append(head[..., limits[1] + band - 1, None] + tail)
    return torch.cat(parts, -1)


def language_model(
    options: Mapping[str, Any], parameters: Parameters, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs under the names of the vector files. Padding stands on the right."""
    p = {name: tensor.double() for name, tensor in parameters.items()}
    eps, count, ids = options["layer_norm_eps"], options["num_heads"], inputs["tokens"]
    limits = [0, *options["cutoffs"], options["vocab_size"]] if options["adaptive"] else []
    scale = 1.0 if options["no_scale_embedding"] else math.sqrt(options["d_model"])
    x = scale * (adaptive_embedding(p, ids, limits) if limits else p["decoder.embed_tokens.weight"][ids])
    found = {"hidden.0": x}
    place = torch.arange(ids.shape[1])
    behind = place[:, None] - place
    allowed = (behind >= 0) & (behind <= options["local_radius"]) & (ids != options["pad_token_id"])[:, None, None, :]
    bias: Tensor | float = 0.0
    if options["use_relative_attention"]:
        table = p["decoder.layers.0.self_attn.relative_attention_bias.weight"]
        bias = relative_bias(table, ids.shape[1], False, options)
    for index in range(options["num_layers"]):
        name = f"decoder.layers.{index}"
        h, combine = norm(p, f"{name}.self_attn_layer_norm", x, eps), None
        if index % options["s4_every_n_layers"] == 0:
            combine = options["s4_local_combine"]
            distant = found[f"l{index}_s4"] = ssm(p, f"{name}.s4_module", h, False, options["max_target_positions"])
        h = distant if combine == "stack" else h
        local = found[f"l{index}_local_attn"] = attend(p, f"{name}.self_attn", h, h, count, allowed, bias)
        if options.get("scale_attn"):
            local = norm(p, f"{name}.attn_ln", local, eps)
        if combine in ("concat", "add"):
            near, far = norm(p, f"{name}.norm_local", local, eps), norm(p, f"{name}.norm_global", distant, eps)
            weight = options["s4_weight"]
            local = (
                linear(p, f"{name}.aggregate", torch.cat([far, near], -1))
                if combine == "concat"
                else weight * far + (1 - weight) * near
            )
        x = x + local
        inner = getattr(F, options["activation"])(
            linear(p, f"{name}.fc1", norm(p, f"{name}.final_layer_norm", x, eps))
        )
        if options.get("scale_fc"):
            inner = norm(p, f"{name}.ffn_layernorm", inner, eps)
        x = x * p.get(f"{name}.w_resid", 1.0) + linear(p, f"{name}.fc2", inner)
        found[f"hidden.{index + 1}"] = x
    if options["decoder_final_norm"]:
        x = norm(p, "decoder.layer_norm", x, eps)
    if limits:
        found["final"], found["log_probs"] = x, adaptive_log_probs(p, x, limits)
    else:
        found["final"] = x @ p.get("decoder.output_projection.weight", p["decoder.embed_tokens.weight"]).T
        found["log_probs"] = found["final"].log_softmax(-1)
    target = inputs["target"]
    scores = found["log_probs"].gather(-1, target[..., None])[..., 0]
    found["loss_sum"] = -scores[target != options["pad_token_id"]].sum()
    return found

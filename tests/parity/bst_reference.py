"""The Block-State Transformer written down a second time, slowly: one token and one head at a time, over parameter names.

Shares nothing with the package: filters are explicit taps in complex arithmetic, attention is a list of visible keys. Used for the
combinations of options for which no vectors are stored; the stored ones are reproduced by it as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
Options = Mapping[str, Any]


def bucket(distance: int, buckets: int, farthest: int) -> int:
    """Bucket of T5 for `query position - key position` >= 0."""
    exact = buckets // 2
    if distance < exact:
        return distance
    steps = math.log(distance / exact) / math.log(farthest / exact) * (buckets - exact)
    return min(buckets - 1, exact + math.floor(steps))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def taps(p: Parameters, name: str, options: Options, count: int) -> Tensor:
    """K, (F, D, count): the response of every filter to a single input."""
    p = {key.removeprefix(f"{name}."): value for key, value in p.items() if key.startswith(f"{name}.")}
    filters, width = p["D"].shape
    if options["ssm_type"] == "unstructured":
        return _explicit_taps(p, options, filters, width, count)
    kernel = torch.zeros(filters, width, count, dtype=torch.float64)
    for channel in range(width):
        transition, state, rows = _recurrence(p, channel)
        for lag in range(count):
            kernel[:, channel, lag] = (rows @ state).real
            state = transition @ state
    return kernel


def _explicit_taps(p: Parameters, options: Options, filters: int, width: int, count: int) -> Tensor:
    size, base, length = options["ssm_filter_emb_dim"], options["ssm_filter_emb_base"], options["ssm_filter_length"]
    kernel = torch.zeros(filters, width, count, dtype=torch.float64)
    for lag in range(min(count, length)):
        angles = [lag * base ** (-2 * index / size) for index in range(size // 2)]
        features = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
        linear = p["filter_proj.weight"] @ features + p["filter_proj.bias"]
        kernel[:, :, lag] = linear.view(filters, width) * torch.exp(-p["alpha"] * lag / (length - 1))
    return kernel


def _recurrence(p: Parameters, channel: int) -> tuple[Tensor, Tensor, Tensor]:
    """A_bar, B_bar and the rows of C of one channel, over both members of each conjugate pair."""
    dt = p["log_dt"][channel].exp()
    output = torch.view_as_complex(p["C"][:, channel].contiguous())
    rows = torch.cat([output, output.conj()], dim=-1)
    if "log_A_real" in p:  # diagonal, zero-order hold
        rate = torch.complex(-p["log_A_real"][channel].exp(), p["A_imag"][channel])
        rate = torch.cat([rate, rate.conj()])
        decay = torch.exp(dt * rate)
        return torch.diag(decay), (decay - 1) / rate, rows
    rate = torch.complex(-p["inv_w_real"][channel].exp(), p["w_imag"][channel])  # diagonal plus low rank, bilinear
    low_rank, inputs = (torch.view_as_complex(p[leaf][0, channel].contiguous()) for leaf in "PB")
    rate, low_rank, inputs = (torch.cat([part, part.conj()]) for part in (rate, low_rank, inputs))
    matrix = torch.diag(rate) - torch.outer(low_rank, low_rank.conj())
    identity = torch.eye(len(rate), dtype=matrix.dtype)
    inverse = torch.linalg.inv(identity - dt / 2 * matrix)
    return inverse @ (identity + dt / 2 * matrix), dt * inverse @ inputs, rows


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | float, scale: Tensor | None, eps: float
) -> Tensor:
    """One token of one head, (e,) against (k, e); `scale` None: without normalised queries and keys."""
    if scale is None:
        scores = keys @ query / math.sqrt(len(query)) + bias
    else:
        query = query / (query.square().sum() + eps).sqrt()
        keys = keys / (keys.square().sum(-1, keepdim=True) + eps).sqrt()
        scores = abs(scale) * (keys @ query + bias)
    return torch.softmax(scores, dim=0) @ values


def _eps(options: Options) -> float:
    return options.get("norm_eps", options.get("rms_norm_eps"))  # the latter in the stored vectors


def row_logits(options: Options, p: Parameters, ids: list[int]) -> Tensor:
    """Logits (T, V) of one text without padding."""
    x = torch.stack([p["model.embed_tokens.weight"][token] for token in ids])
    for index in range(options["num_hidden_layers"]):
        layer = {
            key.removeprefix(f"model.layers.{index}."): value
            for key, value in p.items()
            if key.startswith(f"model.layers.{index}.")
        }
        x = _layer(options, layer, x)
    x = rms_norm(x, p["model.norm.weight"], _eps(options))
    divisor = options.get("logits_scaling", options.get("logit_divisor"))  # the latter in the stored vectors
    divisor = divisor or math.sqrt(options["hidden_size"])
    return x @ p.get("lm_head.weight", p["model.embed_tokens.weight"]).T / divisor


def _layer(options: Options, p: Parameters, x: Tensor) -> Tensor:
    u = rms_norm(x, p["input_norm.weight"], _eps(options))
    mixed = _local(options, p, u)
    if "context.q_proj.weight" in p:
        mixed = torch.cat([mixed, _context(options, p, u)], dim=-1)
    x = x + mixed @ p["attn.o_proj.weight"].T
    inner = rms_norm(x, p["ffn_norm.weight"], _eps(options)) @ p["mlp.up_proj.weight"].T
    return x + inner.clamp(min=0) @ p["mlp.down_proj.weight"].T


def _head(options: Options, weight: Tensor, head: int) -> Tensor:
    return weight[head * options["head_dim"] : (head + 1) * options["head_dim"]]


def _local(options: Options, p: Parameters, u: Tensor) -> Tensor:
    size, length = options["block_size"], len(u)
    slides = "context.q_proj.weight" not in p or options["local_attention"] == "sliding_window"
    results = []
    for head in range(options["num_attention_heads"]):
        query, key, value = (u @ _head(options, p[f"attn.{part}_proj.weight"], head).T for part in "qkv")
        scale = p["attn.qk_scale"][head] if options["qk_norm"] else None
        tokens = []
        for t in range(length):
            seen = range(max(0, t - size + 1), t + 1) if slides else range(t // size * size, t + 1)
            places = [
                bucket(t - j, options["relative_attention_num_buckets"], options["relative_attention_max_distance"])
                for j in seen
            ]
            bias = p["attn.rel_bias.weight"][places, head]
            tokens.append(attend(query[t], key[seen], value[seen], bias, scale, options["qk_norm_eps"]))
        results.append(torch.stack(tokens))
    return torch.cat(results, dim=-1)


def _context(options: Options, p: Parameters, u: Tensor) -> Tensor:
    size, length, variant = options["block_size"], len(u), options["context_variant"]
    kernel = taps(p, "ssm", options, length)
    outputs = torch.zeros(length, *p["ssm.D"].shape, dtype=torch.float64)  # (T, F, D)
    for t in range(length):
        past = u[: t + 1].flip(0).T  # (D, t + 1), newest first
        outputs[t] = p["ssm.D"] * u[t] + (kernel[:, :, : t + 1] * past).sum(-1)
    results = []
    for head in range(options["num_attention_heads"]):
        query, key, value = (_head(options, p[f"context.{part}_proj.weight"], head) for part in "qkv")
        scale = p["context.qk_scale"][head] if options["qk_norm"] else None
        tokens = []
        for t in range(length):
            start = t // size * size
            if variant == "mf":
                states = p["context.initial"] if start == 0 else outputs[start - 1]
            else:
                states = outputs[start : t + 1, head if variant == "mh" else 0]
            states = rms_norm(states, p["context.norm.weight"], _eps(options))
            states = states + p["context.ids"] if variant == "mf" else states
            tokens.append(attend(query @ u[t], states @ key.T, states @ value.T, 0.0, scale, options["qk_norm_eps"]))
        results.append(torch.stack(tokens))
    return torch.cat(results, dim=-1)


def language_model(options: Options, parameters: Parameters, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (B, T, V); padding, wherever it is, is taken out of a row first, and gets zeros."""
    p = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in parameters.items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    logits = torch.zeros(*ids.shape, options["vocab_size"], dtype=torch.float64)
    for row in range(len(ids)):
        logits[row, mask[row]] = row_logits(options, p, ids[row, mask[row]].tolist())
    return logits

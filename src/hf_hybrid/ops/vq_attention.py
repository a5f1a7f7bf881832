"""Softmax attention over vector-quantised keys in linear time (arXiv 2404.11163; arXiv 2309.16354, section 3).

Key j is replaced by its codeword k^_j = C_{z_j}, and query i gives it the score

    s_ij = q_i . k^_j + [j in the window of i] bias(i - j),        o_i = sum_j softmax_j(s_ij) v_j

over the real tokens j <= i (causal) or all of them. All tokens of one code have the same score but for the bias, so those
outside the window count as one: sum_j exp(q . C_s) v_j = exp(q . C_s + log n_s) mu_s with n_s their number and mu_s the mean
of their values. The tokens are cut into chunks: a chunk of queries sees the keys of its own and the neighbouring chunks one by
one (near), and the codewords of all others (far), in one softmax. The result does not depend on the size of the chunks.

The gradient does: a near key has the straight-through gradient of its own scores, while the far keys of one codeword share
theirs equally (or have none: `far_key_gradient`). The codebook has none.

Shapes: B batch, H heads, L tokens, S codewords, d width of keys, e width of values, C chunk size, T chunks, K chunks of keys
(with empty ones around), w window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .autocast import outside_autocast
from .branches import takes_plain_form
from .code_memory import CodeMemory, join_token, remember_token
from .relative_position import toeplitz_bias
from .sequence_group import SequenceGroup
from .vq_pieces import far_sums_of_others, put_neighbours_around
from .vq_scores import far_sums, near_bias, vq_scores_attention


@outside_autocast
def vq_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    window_bias: torch.Tensor,
    *,
    chunk_size: int,
    causal: bool,
    key_mask: torch.Tensor | None = None,
    memory: CodeMemory | None = None,
    far_key_gradient: bool = True,
    group: SequenceGroup | None = None,
) -> torch.Tensor:
    """Attention over quantised keys.

    Args:
        query: (B, H, L, d), scaled.
        key: (B, H, L, d), the keys themselves: they get gradients, the scores are computed from `codebook`.
        value: (B, H, L, e).
        codes: (B, H, L) int64, index of the codeword of each key.
        codebook: (H, S, d); without gradient.
        window_bias: (H, w), entry i - j, if causal; else (H, 2 w - 1), entry i - j + w - 1.
        chunk_size: C >= w - 1 tokens.
        causal: a token sees itself and earlier tokens only.
        key_mask: (B, L) bool, True at real tokens, or None.
        memory: memory of the text before these tokens (causal only); it gets no gradient.
        far_key_gradient: False stops the gradient of far keys, as arXiv 2309.16354 does; the outputs are the same.
        group: processes that hold the other pieces of the texts; L is then a multiple of C.

    Returns:
        (B, H, L, e) in the dtype of `value`; zeros for queries that see no token. The softmax is in float32 or better.

    Raises:
        ValueError: the chunks are shorter than the window, or a memory for bidirectional attention.
    """
    window = _check_arguments(window_bias, chunk_size, causal, memory)
    length = query.shape[2]
    if not torch.compiler.is_exporting():
        chunk_size = min(chunk_size, max(length, window - 1, 1))  # with a single chunk all keys are near anyway
    arguments = (query, key, value, codes, codebook, window_bias, key_mask, memory)
    if group is not None:
        return _composed_attention(*arguments, chunk_size, causal, far_key_gradient, group)
    keeps_gradient = torch.is_grad_enabled() and memory is not None and memory.code_value_mean.requires_grad
    if not (torch.compiler.is_exporting() or takes_plain_form() or keeps_gradient):
        return vq_scores_attention(*arguments, chunk_size, causal, far_key_gradient)
    return _composed_attention(*arguments, chunk_size, causal, far_key_gradient)


def _check_arguments(window_bias: torch.Tensor, chunk_size: int, causal: bool, memory: CodeMemory | None) -> int:
    """Returns the window w."""
    entries = window_bias.shape[-1]
    window = entries if causal else (entries + 1) // 2
    if chunk_size < max(window - 1, 1):
        raise ValueError(
            f"`chunk_size` must be at least the window less one, {window - 1}, and at least 1; got {chunk_size}."
        )
    if memory is not None and not causal:
        raise ValueError("Bidirectional attention sees the whole text at once: `memory` needs `causal=True`.")
    return window


def vq_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    window_bias: torch.Tensor,
    *,
    chunk_size: int,
    causal: bool,
    key_mask: torch.Tensor | None = None,
    far_key_gradient: bool = True,
) -> torch.Tensor:
    """`vq_attention` by its definition, with all L x L scores (and L x L keys for the gradient rule)."""
    length = query.shape[2]
    window = window_bias.shape[-1] if causal else (window_bias.shape[-1] + 1) // 2
    places = torch.arange(length, device=query.device)
    distance = places.unsqueeze(1) - places  # (i, j)
    real = torch.ones_like(codes[:, 0], dtype=torch.bool) if key_mask is None else key_mask
    allowed = real[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        allowed = allowed & (distance >= 0)
    chunk_distance = places.unsqueeze(1) // chunk_size - places // chunk_size
    near = (chunk_distance >= 0) & (chunk_distance <= 1) if causal else chunk_distance.abs() <= 1
    residual = key - key.detach()  # 0, with the gradient of a key
    same = (codes.unsqueeze(-1) == codes.unsqueeze(-2))[:, :, None]  # (B, H, 1, j, j')
    far = ((chunk_distance >= 1) if causal else (chunk_distance != 0)) & ~near
    members = same & far[:, None, :] & real[:, None, None, None, :]  # (B, H, i, j, j')
    shares = members.to(key.dtype) / members.sum(-1, keepdim=True).clamp(min=1)
    far_residual = residual if far_key_gradient else torch.zeros_like(residual)
    mean_residual = torch.einsum("bhijk,bhkd->bhijd", shares, far_residual)
    own_residual = residual.unsqueeze(2).expand_as(mean_residual)
    heads = torch.arange(codebook.shape[0], device=codes.device)[:, None]
    quantised = codebook.to(key.dtype)[heads, codes]
    keys = quantised.unsqueeze(2) + torch.where(near[..., None], own_residual, mean_residual)
    scores = torch.einsum("bhid,bhijd->bhij", query, keys)
    in_window = distance.abs() < window if not causal else (distance >= 0) & (distance < window)
    entry = (distance if causal else distance + window - 1).clamp(0, window_bias.shape[-1] - 1)
    scores = scores + torch.where(in_window, window_bias[:, entry], 0)
    seen = allowed.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(allowed | ~seen, scores, -torch.inf), dim=-1)
    return torch.where(seen, weights, 0) @ value


def _composed_attention(
    query, key, value, codes, codebook, window_bias, key_mask, memory, chunk_size, causal, far_key_gradient, group=None
):
    """Attention by operations that PyTorch differentiates: for exported graphs, and for a memory with a gradient."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, _ = query.shape
    words = codebook.to(dtype)
    number = (length + chunk_size - 1) // chunk_size
    if torch.compiler.is_exporting():
        number += 1  # an empty chunk: graphs in which there may be one alone fix whether there is
    tail = number * chunk_size - length
    layout = (chunk_size, tail if causal else tail + chunk_size)  # an empty chunk in front, and one behind
    if key_mask is None:
        key_mask = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    mask, all_codes = F.pad(key_mask, layout), F.pad(codes, layout)
    values = F.pad(value.to(dtype), (0, 0, *layout))
    residual = F.pad((key - key.detach()).to(dtype), (0, 0, *layout))
    if memory is not None:
        mask, all_codes, values = _put_window_in_front(mask, all_codes, values, memory, chunk_size)
    if group is not None:
        padded = (mask, all_codes, values, residual)
        mask, all_codes, values, residual = put_neighbours_around(group, *padded, chunk_size, causal)
    row = torch.arange(heads, device=codes.device)[:, None]
    near_keys = words[row, all_codes] + residual  # (B, H, K C, d)

    # far: counts and means of every code before (and after) the neighbouring chunks
    size = words.shape[1]
    cut = (-1, chunk_size)
    hot = all_codes.unsqueeze(-1) == torch.arange(size, device=codes.device)  # F.one_hot would read the codes
    hot = (hot & mask[:, None, :, None]).to(dtype)
    hot = hot.unflatten(2, cut).transpose(-1, -2)  # (B, H, K, S, C)
    parts = [hot.sum(-1), hot @ values.unflatten(2, cut), hot @ residual.unflatten(2, cut)]
    counts, means, shift = _far_sums(parts, causal, group)  # (B, H, T, S), then with widths e and d
    if memory is not None:
        before = memory.code_count.to(dtype).unsqueeze(2)
        counts = counts + before
        means = means + (before.unsqueeze(-1) * memory.code_value_mean.to(dtype).unsqueeze(2))
    divisor = counts.clamp(min=1).unsqueeze(-1)
    means, far_keys = means / divisor, words.unsqueeze(1)
    if far_key_gradient:
        far_keys = far_keys + shift / divisor

    span = (2 if causal else 3) * chunk_size
    queries = F.pad(query.to(dtype), (0, 0, 0, tail)).unflatten(2, cut)  # (B, H, T, C, d)
    slabs = [part.unfold(2, span, chunk_size) for part in (near_keys, values)]  # (B, H, T, ., span)
    hiding = torch.finfo(dtype).min / 2
    band = near_bias(window_bias.to(dtype), chunk_size, causal)
    bias = toeplitz_bias(band, chunk_size, span, shift=chunk_size - 1).unsqueeze(1)  # (H, 1, C, span)
    # a copy: graphs that compare the strides of overlapping views fix the lengths they accept
    visible = mask.unfold(1, span, chunk_size).contiguous()[:, None, :, None, :]
    if causal:
        places = torch.arange(span, device=query.device)
        visible = visible & (places <= torch.arange(chunk_size, device=query.device)[:, None] + chunk_size)
    near_scores = (queries @ slabs[0] + bias).masked_fill(~visible, hiding)
    has_far = (counts > 0).unsqueeze(-2)
    far_scores = queries @ far_keys.mT + counts.clamp(min=1).log().unsqueeze(-2)
    far_scores = far_scores.masked_fill(~has_far, hiding)
    seen = visible.any(-1, keepdim=True) | has_far.any(-1, keepdim=True)
    weights = torch.softmax(torch.cat([far_scores, near_scores], dim=-1), dim=-1)
    outputs = weights[..., :size] @ means + weights[..., size:] @ slabs[1].mT
    return outputs.masked_fill(~seen, 0).flatten(2, 3)[:, :, :length].to(value.dtype)


def _far_sums(parts: list[torch.Tensor], causal: bool, group: SequenceGroup | None) -> list[torch.Tensor]:
    """`far_sums` of (B, H, K, ...) sums of chunks, those of the pieces of other processes included."""
    found = [far_sums(part.flatten(0, 1), causal).unflatten(0, part.shape[:2]) for part in parts]
    if group is None:
        return found
    return [own + others for own, others in zip(found, far_sums_of_others(group, parts, causal))]


def _put_window_in_front(mask, codes, values, memory: CodeMemory, chunk_size: int):
    """Puts the last tokens of the earlier text at the end of the empty chunk in front."""
    kept = memory.window_codes.shape[-1]
    gap = chunk_size - kept
    mask = torch.cat([mask[:, :gap], memory.window_mask, mask[:, chunk_size:]], dim=1)
    codes = torch.cat([codes[..., :gap], memory.window_codes, codes[..., chunk_size:]], dim=2)
    window = memory.window_values.to(values.dtype)
    values = torch.cat([values[..., :gap, :], window, values[..., chunk_size:, :]], dim=2)
    return mask, codes, values


@outside_autocast
def vq_token_attention(
    query: torch.Tensor,
    value: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    window_bias: torch.Tensor,
    memory: CodeMemory,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, CodeMemory]:
    """`vq_attention` of one token that continues a text, and the memory after it.

    Its scores with all codewords contain those of the window and its own.

    Args:
        query: (B, H, 1, d), scaled.
        value: (B, H, 1, e).
        codes: (B, H, 1) int64.
        codebook: (H, S, d).
        window_bias: (H, w).
        memory: memory of the text before; changed in place if possible.
        key_mask: (B, 1) bool, True if the token is real; None where all are.

    Returns:
        (B, H, 1, e) in the dtype of `value`, and the memory.
    """
    dtype, size = torch.promote_types(query.dtype, torch.float32), codebook.shape[1]
    window = join_token(memory, codes, value, key_mask)
    scores = query.to(dtype) @ codebook.to(dtype).mT  # (B, H, 1, S)
    near = scores.gather(-1, window.codes.unsqueeze(2)) + window_bias.to(dtype).flip(-1).unsqueeze(1)
    # How many tokens each score stands for
    numbers = torch.cat([memory.code_count.to(dtype), window.real.to(dtype).unsqueeze(1).expand_as(window.codes)], -1)
    scores = torch.cat([scores, near], dim=-1) + numbers.log().unsqueeze(2)
    if key_mask is None:  # the token sees itself
        weights = torch.softmax(scores, dim=-1)
    else:
        scores = scores.clamp(min=torch.finfo(dtype).min / 2)
        weights = torch.softmax(scores, dim=-1) * (numbers > 0).unsqueeze(2)
    weights, means, values = (part.flatten(0, 1) for part in (weights, memory.code_value_mean, window.values))
    output = torch.baddbmm(weights[..., :size] @ means.to(dtype), weights[..., size:], values.to(dtype))
    return output.unflatten(0, codes.shape[:2]).to(value.dtype), remember_token(memory, window)

"""Weights of groups of queries for their keys, and the sums of values they make: the engine of gated attention.

A weight is an activation of a score, `query . key + bias`, whose bias depends on the offset of the key from the query alone.
Shape letters: G groups that do not see each other, with R queries and S keys each; Z width of queries and keys, E width of
values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .autocast import without_autocast
from .branches import takes_plain_form, uses_cpu_form
from .dropout_masks import dropout_factors
from .pieces import PAIRS_AT_A_TIME, even_slices
from .products import split_bmm, wide_bmm
from .relative_position import toeplitz_bias, toeplitz_bias_gradient
from .second_derivatives import refuse_second_derivatives

ACTIVATIONS = ("softmax", "laplace", "relu2")

LAPLACE_MEAN, LAPLACE_STD = 0.707107, 0.282095  # of the method: sqrt(1/2) and sqrt(1/(4 pi)), in six digits

ACCELERATOR_PAIRS_AT_A_TIME = 1 << 26  # pairs of query and key whose scores exist at one time on an accelerator
# Queries of a causal block, at least: fewer waste less on hidden keys, more make better products.
CAUSAL_ROWS, ACCELERATOR_CAUSAL_ROWS = 64, 512


class Scores(NamedTuple):
    """What the scores of groups are made from: query . key + bias, hidden where they must not be seen.

    The bias of row i and key j is entry `shift + j - i`.
    """

    query: torch.Tensor  # (G, R, Z), scaled, float32 or better
    key: torch.Tensor  # (G, S, Z)
    bias: torch.Tensor  # (1 or G, entries)
    hidden: torch.Tensor | None  # (G, S) bool, True = never seen
    activation: str
    causal: bool  # the last query stands at the last key
    shift: int


def score_weights(scores: Scores) -> torch.Tensor:
    """Weights of all pairs at once, (G, R, S); differentiable, in float32 or better."""
    query, key, bias, hidden, activation, causal, shift = scores
    dtype = query.dtype
    band = _band(bias.to(dtype), causal, shift, slice(0, query.shape[1]), key.shape[1], key.shape[1] - query.shape[1])
    raw = query @ key.to(dtype).mT + band
    return activate_visible(raw, None if hidden is None else hidden.unsqueeze(1), activation)


def activate_visible(scores: torch.Tensor, hidden: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Weights of scores, 0 where `hidden` (bool, broadcast) is True."""
    if hidden is None:
        return activate(scores, activation)
    weights = activate(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), activation)
    return weights.masked_fill(hidden, 0)


def activate(scores: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "softmax":
        return torch.softmax(scores, dim=-1)
    if activation == "relu2":
        return torch.relu(scores).square()
    if takes_plain_form():  # the second derivative at minus infinity is 0, not NaN
        scores = scores.clamp(min=-1e4)
    return 0.5 * (1 + torch.erf((scores - LAPLACE_MEAN) / (LAPLACE_STD * math.sqrt(2))))


def _band(bias: torch.Tensor, causal: bool, shift: int, rows: slice, num_keys: int, ahead: int) -> torch.Tensor:
    """Bias (1 or G, rows, keys) of some rows and the first keys; -inf at keys after the query when causal.

    Row i is the query at key i + ahead, for which the offset 0 has entry `shift + ahead`.
    """
    first = shift - rows.start
    if rows.stop - rows.start == 1 and 0 <= first <= bias.shape[1] - num_keys:  # a decoding step, which sees all keys
        return bias[:, None, first : first + num_keys]
    if causal:
        bias = bias[:, : shift + ahead + 1]
    fill = -torch.inf if causal else 0.0
    return toeplitz_bias(bias, rows.stop - rows.start, num_keys, shift=first, fill=fill)


def attend(scores: Scores, value: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Outputs (G, R, E) of groups with the values (G, S, E)."""
    query, key, bias = scores[:3]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value, bias))
    single = query.shape[1] == 1 and not trains and dropout_p == 0  # a decoding step
    if single or torch.compiler.is_exporting() or takes_plain_form():
        weights = F.dropout(score_weights(scores), dropout_p)
        return (weights @ value.to(weights.dtype)).to(value.dtype)
    seed = torch.randint(2**62, (1,)) if dropout_p > 0 else None
    return _gated_attention(query, key, value, bias, scores.hidden, seed, *scores[4:], dropout_p)


# ---------------------------------------------------------------------------------------------------------------------
# operator
# ---------------------------------------------------------------------------------------------------------------------

# Scores, weights and their derivative exist for some rows of some groups at a time, which stay in cache on a CPU; the
# backward pass computes them again. It is one opaque operator for torch.compile, which would otherwise unroll the loop
# over parts. Its namespace is that of the module, so that a second copy of this file (remote code beside the installed
# package) does not clash.
_NAMESPACE = re.sub(r"\W", "_", __name__)


class _Part(NamedTuple):
    """Some rows of some groups, and the keys they may see."""

    groups: slice
    rows: slice
    keys: slice

    @property
    def queries_index(self) -> tuple[slice, slice]:
        return self.groups, self.rows

    @property
    def keys_index(self) -> tuple[slice, slice]:
        return self.groups, self.keys


class _Parts:
    """Weights of one call, part by part, in the same order (and with the same dropout) whenever it is iterated.

    On CPUs everything is computed in float32 or better; accelerators multiply matrices in the dtype of the keys, with sums
    in float32.
    """

    def __init__(self, query, key, bias, hidden, seed, activation, causal, shift, dropout_p):
        self.query, self.key, self.bias, self.hidden = query, key, bias, hidden
        self.activation, self.causal, self.shift, self.dropout_p = activation, causal, shift, dropout_p
        self.dtype = query.dtype
        self.product_dtype = self.dtype if uses_cpu_form(query) else key.dtype
        self.generator = None if seed is None else torch.Generator(query.device).manual_seed(int(seed))

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Batched matrix product in the working precision."""
        return wide_bmm(left, right, self.product_dtype)

    def forward_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`product` for scores and outputs."""
        multiply = split_bmm if self.activation == "relu2" else wide_bmm
        return multiply(left, right, self.product_dtype)

    def add_product(self, target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: int = 1) -> None:
        """target = beta * target + left @ right; without a tensor for the product where the dtypes allow it."""
        if target.dtype == self.product_dtype:
            target.baddbmm_(left.to(self.product_dtype), right.to(self.product_dtype), beta=beta)
        elif beta:
            target.add_(self.product(left, right))
        else:
            target.copy_(self.product(left, right))

    def each(self, with_slope: bool) -> Iterator[tuple[_Part, torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """(part, weights, their derivative with respect to the scores if asked and pointwise, factors of dropout)."""
        num_groups, num_rows = self.query.shape[:2]
        num_keys = self.key.shape[1]
        ahead = num_keys - num_rows
        on_cpu = uses_cpu_form(self.query)
        pairs = PAIRS_AT_A_TIME if on_cpu else ACCELERATOR_PAIRS_AT_A_TIME
        at_most = min(num_rows, max(16, pairs // num_keys))
        if self.causal:  # keys after a block of rows are not even computed
            fewest = max(CAUSAL_ROWS, num_keys // 8) if on_cpu else max(ACCELERATOR_CAUSAL_ROWS, num_keys // 4)
            at_most = min(at_most, fewest)
        for rows in even_slices(0, num_rows, at_most):
            keys = slice(0, rows.stop + ahead if self.causal else num_keys)
            band = _band(self.bias.to(self.dtype), self.causal, self.shift, rows, keys.stop, ahead)
            together = max(1, pairs // ((rows.stop - rows.start) * keys.stop))
            for groups in even_slices(0, num_groups, together):
                part = _Part(groups, rows, keys)
                weights, slope = self._weights(part, band if len(band) == 1 else band[groups], with_slope)
                factors = None
                if self.generator is not None:
                    factors = dropout_factors(weights.shape, self.dropout_p, self.generator, self.dtype)
                yield part, weights, slope, factors

    def _weights(self, part: _Part, band: torch.Tensor, with_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key = (s.to(self.product_dtype) for s in (self.query[part.queries_index], self.key[part.keys_index]))
        if self.product_dtype == self.dtype:
            scores = torch.baddbmm(band, query, key.mT)
        else:
            scores = self.forward_product(self.query[part.queries_index], key.mT).add_(band)
        hidden = None
        if self.hidden is not None:  # sums and products, as masked_fill_ takes twenty times longer
            hidden = self.hidden[part.keys_index].to(self.dtype).unsqueeze(1)
            scores.add_(hidden, alpha=torch.finfo(self.dtype).min)
        if self.activation == "softmax":
            weights = torch.softmax(scores, dim=-1)
            return weights if hidden is None else weights.mul_(1 - hidden), None
        if self.activation == "relu2":
            scores.relu_()
            return scores.square(), scores.mul_(2)
        scores.sub_(LAPLACE_MEAN).div_(LAPLACE_STD * math.sqrt(2))
        slope = None
        if with_slope:
            slope = scores.square().neg_().exp_().mul_(1 / (LAPLACE_STD * math.sqrt(2 * math.pi)))
        return scores.erf_().add_(1).mul_(0.5), slope


@torch.library.custom_op(f"{_NAMESPACE}::gated_attention", mutates_args=())
def _gated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    causal: bool,
    shift: int,
    dropout_p: float,
) -> torch.Tensor:
    with without_autocast(query.device):
        parts = _Parts(query, key, bias, hidden, seed, activation, causal, shift, dropout_p)
        outputs = value.new_empty(*query.shape[:2], value.shape[-1])
        for part, weights, _, factors in parts.each(with_slope=False):
            if factors is not None:
                weights.mul_(factors)
            if parts.product_dtype == parts.dtype:
                parts.add_product(outputs[part.queries_index], weights, value[part.keys_index], beta=0)
            else:
                outputs[part.queries_index] = parts.forward_product(weights, value[part.keys_index])
        return outputs


@_gated_attention.register_fake
def _(query, key, value, *arguments) -> torch.Tensor:
    return value.new_empty(*query.shape[:2], value.shape[-1])


@torch.library.custom_op(f"{_NAMESPACE}::gated_attention_backward", mutates_args=())
def _gated_attention_backward(
    gradient: torch.Tensor,
    bias_trains: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    causal: bool,
    shift: int,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with without_autocast(query.device):
        parts = _Parts(query, key, bias, hidden, seed, activation, causal, shift, dropout_p)
        query_gradient = torch.empty_like(query, memory_format=torch.contiguous_format)
        key_gradient, value_gradient, bias_gradient = (
            torch.zeros(states.shape, dtype=parts.dtype, device=states.device) for states in (key, value, bias)
        )
        for part, weights, slope, factors in parts.each(with_slope=True):
            output_gradient = gradient[part.queries_index]
            dropped = weights if factors is None else weights * factors
            parts.add_product(value_gradient[part.keys_index], dropped.mT, output_gradient)
            score_gradient = parts.product(output_gradient, value[part.keys_index].mT)
            if factors is not None:
                score_gradient.mul_(factors)
            if slope is not None:
                score_gradient.mul_(slope)
            else:  # derivative of the softmax: p * (g - sum(p * g)), one pass
                score_gradient = torch._softmax_backward_data(score_gradient, weights, -1, weights.dtype)
            if bias_trains:
                band_gradient = score_gradient.sum(0, keepdim=True) if len(bias) == 1 else score_gradient
                groups = slice(None) if len(bias) == 1 else part.groups
                start = shift - part.rows.start
                bias_gradient[groups].add_(toeplitz_bias_gradient(band_gradient, bias.shape[1], shift=start))
            parts.add_product(query_gradient[part.queries_index], score_gradient, key[part.keys_index], beta=0)
            parts.add_product(key_gradient[part.keys_index], score_gradient.mT, query[part.queries_index])
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), bias_gradient.to(bias.dtype)


@_gated_attention_backward.register_fake
def _(gradient, bias_trains, query, key, value, bias, *arguments) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value, bias))


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx, gradient):
    gradients = _gated_attention_backward(gradient, ctx.needs_input_grad[3], *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * 6


_gated_attention.register_autograd(_backward, setup_context=_save_for_backward)
refuse_second_derivatives(_gated_attention_backward, "gated attention")

"""Codebooks of vector quantisation that follow the keys by moving averages (arXiv 1711.00937, appendix A.1).

The codewords are not parameters: each is the mean of the keys that were recently assigned to it. Three rules keep them
in use: they start at keys of the first batch, the first averages are short, and unused codewords are moved to badly
quantised keys.

Shapes: B batch, H heads (each with its codebook), L tokens, S codewords, d width of keys, R candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .autocast import without_autocast
from .branches import uses_cpu_form, widest_float

PAIRS_AT_A_TIME = 1 << 19  # pairs of key and codeword whose distances exist at one time on CPU
LEAST_COUNT = 1e-6  # average count below which a codeword is left where it is
REVIVED_SHARE = 0.1  # count of a revived codeword, in uniform shares


class Codebook(NamedTuple):
    """Codewords and the averages they are computed from.

    Attributes:
        words: (H, S, d).
        count: (H, S), averaged number of keys of each.
        sums: (H, S, d), averaged sum of these keys.
        num_updates: (), int64.
    """

    words: torch.Tensor
    count: torch.Tensor
    sums: torch.Tensor
    num_updates: torch.Tensor


class CodeStatistics(NamedTuple):
    """Statistics of the keys of a batch by codeword; sums of them over batches and processes are statistics too.

    Attributes:
        count: (H, S) keys of each codeword.
        sums: (H, S, d) their sums.
        candidates: (H, R, d) keys to which codewords may be moved.
        is_key: (R,), 1 where a candidate is a key, 0 where the batch had none.
    """

    count: torch.Tensor
    sums: torch.Tensor
    candidates: torch.Tensor
    is_key: torch.Tensor


@torch.no_grad()
def nearest_codes(keys: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Index of the nearest codeword, the lowest among equals: (B, H, L, d) and (H, S, d) to (B, H, L) int64."""
    dtype = torch.promote_types(torch.promote_types(keys.dtype, words.dtype), torch.float32)
    words = words.to(dtype)
    squares = words.square().sum(-1).unsqueeze(-2)  # (H, 1, S)
    size = max(1, PAIRS_AT_A_TIME // (words.shape[0] * words.shape[1]))
    # Autocast would round the products and so assign keys to other codewords.
    with without_autocast(keys.device):
        return _nearest_codes(keys.to(dtype), words, squares, size)


def _nearest_codes(keys: torch.Tensor, words: torch.Tensor, squares: torch.Tensor, size: int) -> torch.Tensor:
    is_whole = not uses_cpu_form(keys) or torch.compiler.is_compiling() or torch.compiler.is_exporting()
    rows = keys.transpose(0, 1).flatten(1, 2)  # (H, B L, d)
    parts = [rows] if is_whole or rows.shape[1] <= size else rows.split(size, dim=1)
    codes = [torch.baddbmm(squares, part, words.mT, beta=-0.5).argmax(-1) for part in parts]
    found = codes[0] if len(codes) == 1 else torch.cat(codes, dim=1)
    return found.unflatten(1, (keys.shape[0], -1)).transpose(0, 1).contiguous()


def look_up(words: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Codewords (B, H, L, d) of codes (B, H, L)."""
    return words[torch.arange(words.shape[0], device=words.device)[:, None], codes]


def code_counts(codes: torch.Tensor, mask: torch.Tensor | None, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Number of real tokens of each code: (B, H, L) and mask (B, L) to (H, S)."""
    codes = codes.transpose(0, 1).flatten(1)
    real = torch.ones((), dtype=dtype, device=codes.device) if mask is None else mask.flatten().to(dtype)
    return torch.zeros(len(codes), size, dtype=dtype, device=codes.device).scatter_add(
        -1, codes, real.expand(codes.shape)
    )


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the codes of each head: 1 for a single code, S for equal use; (H, S) to (H,)."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(-1).exp()


@torch.no_grad()
def gather_statistics(
    keys: torch.Tensor,
    codes: torch.Tensor,
    error: torch.Tensor,
    mask: torch.Tensor | None,
    counts: torch.Tensor,
    *,
    num_candidates: int,
    uniform: torch.Tensor,
) -> CodeStatistics:
    """Statistics of a batch.

    Candidates are real keys, drawn without replacement with a probability proportional to their quantisation error (plus
    1e-6), or uniformly. When there are fewer real keys, they are used again, with a little noise.

    Args:
        keys: (B, H, L, d), float32 or better.
        codes: (B, H, L).
        error: (B, H, L), squared distance from the codeword.
        mask: (B, L) bool or None.
        counts: (H, S) of `code_counts`.
        num_candidates: R.
        uniform: () bool, draw uniformly.
    """
    rows = keys.transpose(0, 1).flatten(1, 2)  # (H, B L, d)
    heads, number, width = rows.shape
    real = torch.ones(number, device=keys.device) if mask is None else mask.flatten().to(rows.dtype)
    index = codes.transpose(0, 1).flatten(1).unsqueeze(-1).expand(-1, -1, width)
    sums = rows.new_zeros(*counts.shape, width).scatter_add(1, index, rows * real.unsqueeze(-1))
    # The largest values of log weight + Gumbel noise are a draw without replacement.
    weight = torch.where(uniform, 1.0, error.transpose(0, 1).flatten(1) + 1e-6)
    noise = -torch.log(-torch.log(torch.rand_like(weight).clamp(1e-20, 1 - 1e-7)))
    scores = torch.where(real > 0, weight.log() + noise, -torch.inf)
    order = scores.topk(min(num_candidates, number), dim=-1).indices  # (H, min(R, B L))
    turn = torch.arange(num_candidates, device=keys.device)
    available = real.sum().long().clamp(min=1)
    chosen = order[:, turn % available.clamp(max=order.shape[1])]
    candidates = rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, width))
    again = (turn >= available).to(rows.dtype).unsqueeze(-1)
    candidates = candidates + 0.01 * again * torch.randn_like(candidates)
    is_key = (real.sum() > 0).to(rows.dtype).expand(num_candidates)
    return CodeStatistics(counts, sums, candidates, is_key)


def averaging_decay(num_updates: torch.Tensor, decay: float, warmup: bool) -> torch.Tensor:
    """Decay of the next update: at first that of a mean over all batches, min(decay, (1 + t) / (10 + t))."""
    steps = num_updates.to(widest_float(num_updates))
    target = torch.full_like(steps, decay)
    return torch.minimum(target, (1 + steps) / (10 + steps)) if warmup else target


@torch.no_grad()
def average_codebook(
    codebook: Codebook,
    statistics: CodeStatistics,
    *,
    decay: float,
    decay_warmup: bool,
    dead_code_threshold: float,
) -> tuple[Codebook, torch.Tensor]:
    """One update: moving averages of counts and sums, then codewords that are hardly used move to candidates.

    Args:
        codebook: codebook before the update.
        statistics: counts and sums of a batch, added up over processes.
        decay, decay_warmup: see `averaging_decay`.
        dead_code_threshold: share of the uniform count below which a codeword is revived; 0 for never.

    Returns:
        The codebook after the update, and the number of revived codewords of each head, (H,) int64.
    """
    dtype = codebook.words.dtype
    keep = averaging_decay(codebook.num_updates, decay, decay_warmup).to(dtype)
    count = keep * codebook.count + (1 - keep) * statistics.count.to(dtype)
    sums = keep * codebook.sums + (1 - keep) * statistics.sums.to(dtype)
    used = (count > LEAST_COUNT).unsqueeze(-1)
    words = torch.where(used, sums / torch.where(used, count.unsqueeze(-1), 1), codebook.words)

    share = count.mean(-1, keepdim=True)
    dead = count < dead_code_threshold * share
    rank = count.argsort(dim=-1, stable=True).argsort(-1)  # the r-th code that is used least; dead ones come first
    order = statistics.is_key.argsort(descending=True, stable=True)
    candidates = statistics.candidates.to(dtype)[:, order]
    revived = dead & (rank < statistics.is_key.sum())
    place = rank.clamp(max=candidates.shape[1] - 1).unsqueeze(-1).expand(-1, -1, candidates.shape[-1])
    words = torch.where(revived.unsqueeze(-1), candidates.gather(1, place), words)
    count = torch.where(revived, REVIVED_SHARE * share, count)
    sums = torch.where(revived.unsqueeze(-1), words * count.unsqueeze(-1), sums)
    return Codebook(words, count, sums, codebook.num_updates + 1), revived.sum(-1)


@torch.no_grad()
def start_codebook(codebook: Codebook, statistics: CodeStatistics, iterations: int = 0) -> Codebook:
    """The first update from data: codewords at candidates, moved by some iterations of k-means among them."""
    dtype, size = codebook.words.dtype, codebook.words.shape[1]
    order = statistics.is_key.argsort(descending=True, stable=True)
    pool = statistics.candidates.to(dtype)[:, order]
    valid = statistics.is_key[order].to(dtype)
    number = statistics.is_key.sum().long().clamp(min=1)
    turn = torch.arange(size, device=pool.device)
    words = pool[:, turn % number]
    for _ in range(iterations):
        words = _lloyd(pool, valid, words)
    count = (statistics.count.to(dtype).sum(-1, keepdim=True) / size).expand_as(codebook.count)
    return Codebook(words, count, words * count.unsqueeze(-1), torch.ones_like(codebook.num_updates))


def _lloyd(pool: torch.Tensor, valid: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Centres moved to the means of what is nearest to them; empty ones stay. (H, R, d), (R,), (H, S, d) to (H, S, d)."""
    codes = nearest_codes(pool.unsqueeze(0), words)[0]
    counts = torch.zeros_like(words[..., 0]).scatter_add(-1, codes, valid.expand(codes.shape))
    index = codes.unsqueeze(-1).expand_as(pool)
    sums = torch.zeros_like(words).scatter_add(1, index, pool * valid.unsqueeze(-1))
    filled = (counts > 0).unsqueeze(-1)
    return torch.where(filled, sums / counts.clamp(min=1).unsqueeze(-1), words)

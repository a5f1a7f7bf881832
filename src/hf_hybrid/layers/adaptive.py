"""Adaptive input embeddings (arXiv 1809.10853) and the adaptive softmax tied to them (arXiv 1609.04309).

The vocabulary is ordered by frequency and cut into bands; band i has embeddings of width D / factor**i, projected to D.
Shapes: B batch, L tokens, D hidden size, V vocabulary, K bands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..ops.branches import can_read_values

# 1 GB in float32, recomputed in the backward pass, where every band is evaluated for every token.
SCORES_AT_A_TIME = 1 << 28


class BandTable(nn.Embedding):
    """Embeddings of the tokens of one band, which also score them."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Ids (...) to embeddings (..., W), or vectors (..., W) to their products with all embeddings (..., rows)."""
        return F.linear(inputs, self.weight) if inputs.is_floating_point() else super().forward(inputs)


class AdaptiveEmbedding(nn.Module):
    """Embeds each token with the table of its band and projects it to the hidden size (without biases).

    Args:
        vocab_size: V.
        hidden_size: D.
        cutoffs: first ids of the bands 1..K-1, rising.
        factor: width ratio of neighbouring bands.
        padding_idx: id (in band 0) whose embedding stays zero, or None.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, cutoffs: list[int], factor: int, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.factor = factor
        self.limits = [0, *cutoffs, vocab_size]
        widths = [hidden_size // factor**band for band in range(len(cutoffs) + 1)]
        in_first = padding_idx is not None and padding_idx < self.limits[1]
        self.embeddings = nn.ModuleList(
            BandTable(high - low, width, padding_idx=padding_idx if low == 0 and in_first else None)
            for low, high, width in zip(self.limits, self.limits[1:], widths)
        )
        self.projections = nn.ModuleList(nn.Linear(width, hidden_size, bias=False) for width in widths)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "Adaptive embeddings have a table for each band of the vocabulary (`embeddings`) and no single `weight`. What needs "
                "one, such as the trainable tokens of PEFT, works with plain embeddings (`adaptive_cutoffs=None`)."
            )
        return super().__getattr__(name)

    def forward(self, inputs: torch.Tensor, band: int | None = None, is_projected: bool = True) -> torch.Tensor:
        """(B, L) ids to (B, L, D); for the softmax that is tied to the tables, vectors and a band to the scores of the band.

        Args:
            inputs: (B, L) ids, or with `band` vectors (..., W of the band).
            band: the band whose tokens are scored; None embeds ids.
            is_projected: False for vectors (..., D): they are mapped by the transpose of the projection of the band, and
                the result is returned.

        Returns:
            (B, L, D); or (..., tokens of the band), or (..., W).
        """
        if band is not None:
            return self._score(inputs, band) if is_projected else self._project_back(inputs, band)
        embedded = None
        for low, high, table, projection in zip(self.limits, self.limits[1:], self.embeddings, self.projections):
            rows = (inputs - low).clamp(0, high - low - 1)
            in_band = ((inputs >= low) & (inputs < high)).unsqueeze(-1)
            part = projection(table(rows)).masked_fill(~in_band, 0)
            embedded = part if embedded is None else embedded + part
        return embedded

    def _score(self, inputs: torch.Tensor, band: int) -> torch.Tensor:
        table = self.embeddings[band]
        if isinstance(table, BandTable):
            return table(inputs)
        # Whatever wraps the table (adapters, quantised weights) can look ids up.
        rows = torch.arange(self.limits[band + 1] - self.limits[band], device=inputs.device)
        return F.linear(inputs, table(rows).to(inputs))

    def _project_back(self, inputs: torch.Tensor, band: int) -> torch.Tensor:
        # The matrix is the output of the layer for unit vectors, whatever wraps it.
        width = self.hidden_size // self.factor**band
        unit = torch.eye(width, dtype=inputs.dtype, device=inputs.device)
        return F.linear(inputs, self.projections[band](unit).to(inputs))


class TiedBands:
    """The tables of an `AdaptiveEmbedding`, to be passed to another module: not a module, as offload hooks would move
    it."""

    def __init__(self, embedding: nn.Module) -> None:
        self.limits: list[int] = embedding.limits  # type: ignore[assignment]
        self._call: Callable[..., torch.Tensor] = lambda *args: embedding(*args)

    def score(self, inputs: torch.Tensor, band: int) -> torch.Tensor:
        """Vectors (..., W) to the scores of the tokens of a band, (..., tokens)."""
        return self._call(inputs, band).to(inputs.device)

    def project_back(self, inputs: torch.Tensor, band: int) -> torch.Tensor:
        """(..., D) to (..., W) by the transpose of the projection of a band."""
        return self._call(inputs, band, False).to(inputs.device)


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities whose band tables are those of an `AdaptiveEmbedding`.

    The head scores band 0 (with the embedding table itself, without its projection) and one class per further band; tail i
    scores `(x P_i) E_i^T`, with P_i the input projection of band i, or one of its own.

    Args:
        hidden_size: D.
        band_widths: widths of the tables of the bands 1..K-1.
        dropout: probability on the head input and between the two maps of a tail.
        tie_projections: reuse the input projections; False gives every tail its own.
    """

    def __init__(
        self, hidden_size: int, band_widths: list[int], *, dropout: float = 0.0, tie_projections: bool = True
    ) -> None:
        super().__init__()
        self.class_proj = nn.Linear(hidden_size, len(band_widths), bias=False)
        self.tail_projections = (
            None
            if tie_projections
            else nn.ModuleList(nn.Linear(hidden_size, width, bias=False) for width in band_widths)
        )
        self.dropout = nn.Dropout(dropout)

    def _head(self, hidden_states: torch.Tensor, bands: TiedBands) -> torch.Tensor:
        inputs = self.dropout(hidden_states)
        scores = torch.cat([bands.score(inputs, 0), self.class_proj(inputs)], dim=-1)
        return scores.float().log_softmax(-1) if scores.dtype.itemsize < 4 else scores.log_softmax(-1)

    def _tail(self, hidden_states: torch.Tensor, bands: TiedBands, band: int) -> torch.Tensor:
        if self.tail_projections is None:
            inner = bands.project_back(hidden_states, band)
        else:
            inner = self.tail_projections[band - 1](hidden_states)
        scores = bands.score(self.dropout(inner), band)
        return scores.float().log_softmax(-1) if scores.dtype.itemsize < 4 else scores.log_softmax(-1)

    def forward(
        self, hidden_states: torch.Tensor, bands: TiedBands, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, L, D) to log-probabilities (B, L, V), float32 or better; with targets to the sum of -log p(target).

        Args:
            hidden_states: (B, L, D); (T, D) with targets.
            bands: tables of the tied input embedding.
            targets: (T,) ids; -100 is ignored. Each tail is evaluated only for the tokens that it holds. (Accelerators and
                compiled graphs have fixed shapes: there every tail is evaluated for every token.)

        Returns:
            (B, L, V), or a scalar; float32 or better.
        """
        if targets is None:
            return self._log_probabilities(hidden_states, bands)
        if can_read_values(targets):
            return self._negative_log_likelihood(hidden_states, targets, bands)
        size = max(1, SCORES_AT_A_TIME // bands.limits[-1])
        if torch.compiler.is_compiling() or len(targets) <= size:
            return self._negative_log_likelihood_in_fixed_shapes(hidden_states, targets, bands)
        parts = zip(hidden_states.split(size), targets.split(size))
        loss_of = partial(self._negative_log_likelihood_in_fixed_shapes, bands=bands)
        return torch.stack([checkpoint(loss_of, *part, use_reentrant=False) for part in parts]).sum()

    def _log_probabilities(self, hidden_states: torch.Tensor, bands: TiedBands) -> torch.Tensor:
        head = self._head(hidden_states, bands)
        first = bands.limits[1]
        parts = [head[..., :first]]
        for band in range(1, len(bands.limits) - 1):
            parts.append(head[..., first + band - 1, None] + self._tail(hidden_states, bands, band))
        return torch.cat(parts, dim=-1)

    def _negative_log_likelihood(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, bands: TiedBands
    ) -> torch.Tensor:
        kept = targets != -100
        hidden_states, targets = hidden_states[kept], targets[kept]
        head = self._head(hidden_states, bands)
        first = bands.limits[1]
        slots = targets.clone()
        loss = head.new_zeros(())
        for band in range(1, len(bands.limits) - 1):
            low, high = bands.limits[band], bands.limits[band + 1]
            rows = ((targets >= low) & (targets < high)).nonzero().squeeze(-1)
            slots[rows] = first + band - 1
            tail = self._tail(hidden_states[rows], bands, band)
            loss = loss - tail.gather(-1, (targets[rows] - low).unsqueeze(-1)).sum()
        return loss - head.gather(-1, slots.unsqueeze(-1)).sum()

    def _negative_log_likelihood_in_fixed_shapes(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, bands: TiedBands
    ) -> torch.Tensor:
        head = self._head(hidden_states, bands)
        first = bands.limits[1]
        slots, losses = targets, []
        for band in range(1, len(bands.limits) - 1):
            low, high = bands.limits[band], bands.limits[band + 1]
            is_in_band = (targets >= low) & (targets < high)
            slots = slots.masked_fill(is_in_band, first + band - 1)
            tail = self._tail(hidden_states, bands, band)
            losses.append(_sum_of_losses(tail, torch.where(is_in_band, targets - low, -100)))
        return sum(losses, _sum_of_losses(head, slots))


def _sum_of_losses(log_probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(T, C) log-probabilities and (T,) ids, -100 for none, to the sum of -log p."""
    return F.nll_loss(log_probabilities, ids, ignore_index=-100, reduction="sum")

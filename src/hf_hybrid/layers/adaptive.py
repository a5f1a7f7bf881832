"""Adaptive input embeddings (arXiv 1809.10853) and the adaptive softmax tied to them (arXiv 1609.04309).

The vocabulary is ordered by frequency and cut into bands; band i has embeddings of width D / factor**i, projected to D.
Shapes: B batch, L tokens, D hidden size, V vocabulary, K bands.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


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
        self.limits = [0, *cutoffs, vocab_size]
        widths = [hidden_size // factor**band for band in range(len(cutoffs) + 1)]
        in_first = padding_idx is not None and padding_idx < self.limits[1]
        self.embeddings = nn.ModuleList(
            nn.Embedding(high - low, width, padding_idx=padding_idx if low == 0 and in_first else None)
            for low, high, width in zip(self.limits, self.limits[1:], widths)
        )
        self.projections = nn.ModuleList(nn.Linear(width, hidden_size, bias=False) for width in widths)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L) ids to (B, L, D)."""
        embedded = None
        for low, table, projection in zip(self.limits, self.embeddings, self.projections):
            rows = (input_ids - low).clamp(0, table.num_embeddings - 1)
            in_band = ((input_ids >= low) & (input_ids < low + table.num_embeddings)).unsqueeze(-1)
            band = projection(table(rows)).masked_fill(~in_band, 0)
            embedded = band if embedded is None else embedded + band
        return embedded


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities whose band tables are those of an `AdaptiveEmbedding`.

    The head scores band 0 (with the embedding table itself, without its projection) and one class per further band; tail i
    scores `(x P_i) E_i^T`, with P_i the input projection of band i, or an own one.

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

    def _head(self, hidden_states: torch.Tensor, embedding: AdaptiveEmbedding) -> torch.Tensor:
        inputs = self.dropout(hidden_states)
        scores = torch.cat([F.linear(inputs, embedding.embeddings[0].weight), self.class_proj(inputs)], dim=-1)
        return scores.float().log_softmax(-1) if scores.dtype.itemsize < 4 else scores.log_softmax(-1)

    def _tail(self, hidden_states: torch.Tensor, embedding: AdaptiveEmbedding, band: int) -> torch.Tensor:
        if self.tail_projections is None:
            inner = hidden_states @ embedding.projections[band].weight
        else:
            inner = self.tail_projections[band - 1](hidden_states)
        scores = F.linear(self.dropout(inner), embedding.embeddings[band].weight)
        return scores.float().log_softmax(-1) if scores.dtype.itemsize < 4 else scores.log_softmax(-1)

    def forward(self, hidden_states: torch.Tensor, embedding: AdaptiveEmbedding) -> torch.Tensor:
        """(B, L, D) to log-probabilities (B, L, V), float32 or better."""
        head = self._head(hidden_states, embedding)
        first = embedding.limits[1]
        parts = [head[..., :first]]
        for band in range(1, len(embedding.embeddings)):
            parts.append(head[..., first + band - 1, None] + self._tail(hidden_states, embedding, band))
        return torch.cat(parts, dim=-1)

    def negative_log_likelihood(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, embedding: AdaptiveEmbedding
    ) -> torch.Tensor:
        """Sum of -log p(target); each tail is evaluated only for the tokens that it holds.

        A compiled graph has fixed shapes: there every tail is evaluated for every token, as in `forward`.

        Args:
            hidden_states: (T, D).
            targets: (T,) ids; -100 is ignored.
            embedding: the tied input embedding.

        Returns:
            Scalar, float32 or better.
        """
        if torch.compiler.is_compiling():
            return F.nll_loss(self(hidden_states, embedding), targets, ignore_index=-100, reduction="sum")
        kept = targets != -100
        hidden_states, targets = hidden_states[kept], targets[kept]
        head = self._head(hidden_states, embedding)
        first = embedding.limits[1]
        slots = targets.clone()
        loss = head.new_zeros(())
        for band in range(1, len(embedding.embeddings)):
            low, high = embedding.limits[band], embedding.limits[band + 1]
            rows = ((targets >= low) & (targets < high)).nonzero().squeeze(-1)
            slots[rows] = first + band - 1
            tail = self._tail(hidden_states[rows], embedding, band)
            loss = loss - tail.gather(-1, (targets[rows] - low).unsqueeze(-1)).sum()
        return loss - head.gather(-1, slots.unsqueeze(-1)).sum()

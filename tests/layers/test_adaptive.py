"""Adaptive embeddings and softmax against dense tables and a plain log-softmax."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_hybrid.layers.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, TiedBands

VOCABULARY, WIDTH, CUTOFFS, FACTOR = 30, 16, [8, 19], 2


def build(tie: bool = True, dtype: torch.dtype = torch.float64) -> tuple[AdaptiveEmbedding, AdaptiveSoftmax]:
    embedding = AdaptiveEmbedding(VOCABULARY, WIDTH, CUTOFFS, FACTOR)
    widths = [table.embedding_dim for table in embedding.embeddings][1:]
    return embedding.to(dtype), AdaptiveSoftmax(WIDTH, widths, tie_projections=tie).to(dtype)


def test_bands() -> None:
    embedding, _ = build()
    shapes = [tuple(table.weight.shape) for table in embedding.embeddings]
    assert shapes == [(8, 16), (11, 8), (11, 4)]


def test_embedding_is_a_lookup_in_a_projected_table() -> None:
    embedding, _ = build()
    dense = torch.cat(
        [projection(table.weight) for table, projection in zip(embedding.embeddings, embedding.projections)]
    )
    ids = torch.arange(VOCABULARY).flip(0).view(2, 15)  # the limits of all bands included
    torch.testing.assert_close(embedding(ids), dense[ids])


def test_padding_row_gets_no_gradient() -> None:
    embedding = AdaptiveEmbedding(VOCABULARY, WIDTH, CUTOFFS, FACTOR, padding_idx=1)
    embedding(torch.tensor([[1, 2, 9]])).sum().backward()
    gradient = embedding.embeddings[0].weight.grad
    assert not gradient[1].any() and gradient[2].any()
    outside = AdaptiveEmbedding(VOCABULARY, WIDTH, CUTOFFS, FACTOR, padding_idx=20)
    assert all(table.padding_idx is None for table in outside.embeddings)


@pytest.mark.parametrize("tie", [True, False])
class TestSoftmax:
    def test_is_a_distribution(self, tie: bool) -> None:
        embedding, softmax = build(tie)
        log_probabilities = softmax(torch.randn(2, 5, WIDTH, dtype=torch.float64), TiedBands(embedding))
        assert log_probabilities.shape == (2, 5, VOCABULARY)
        ones = torch.ones(2, 5, dtype=torch.float64)
        torch.testing.assert_close(log_probabilities.exp().sum(-1), ones)

    def test_formula(self, tie: bool) -> None:
        """Head over band 0 and one class per tail; a tail token has the product of class and tail probability."""
        embedding, softmax = build(tie)
        hidden = torch.randn(7, WIDTH, dtype=torch.float64)
        head = torch.cat([hidden @ embedding.embeddings[0].weight.T, softmax.class_proj(hidden)], dim=-1).softmax(-1)
        parts = [head[:, :8]]
        for band in (1, 2):
            inner = hidden @ embedding.projections[band].weight if tie else softmax.tail_projections[band - 1](hidden)
            parts.append(head[:, 7 + band, None] * (inner @ embedding.embeddings[band].weight.T).softmax(-1))
        torch.testing.assert_close(softmax(hidden, TiedBands(embedding)).exp(), torch.cat(parts, dim=-1))

    @pytest.mark.parametrize("targets", [[0, 7, 8, 18, 19, 29, -100], [1, 2, 3, 4, 5, 6, 7], [-100] * 7])
    def test_loss_equals_the_dense_one(self, tie: bool, targets: list[int]) -> None:
        embedding, softmax = build(tie)
        hidden = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
        expected = F.nll_loss(
            softmax(hidden, TiedBands(embedding)), torch.tensor(targets), ignore_index=-100, reduction="sum"
        )
        actual = softmax(hidden, TiedBands(embedding), torch.tensor(targets))
        torch.testing.assert_close(actual, expected)
        for first, second in zip(
            *(torch.autograd.grad(loss, [hidden, embedding.embeddings[0].weight]) for loss in (actual, expected))
        ):
            torch.testing.assert_close(first, second)

    def test_every_tensor_takes_part_in_every_loss(self, tie: bool) -> None:
        """Batches without a token of some band must not leave its tables out of the graph (distributed training)."""
        embedding, softmax = build(tie)
        loss = softmax(torch.randn(2, WIDTH, dtype=torch.float64), TiedBands(embedding), torch.tensor([3, 4]))
        loss.backward()
        tables = [table.weight for table in embedding.embeddings]
        assert all(table.grad is not None for table in tables)

    def test_half_precision_is_normalised_in_float32(self, tie: bool) -> None:
        embedding, softmax = build(tie, torch.bfloat16)
        hidden = torch.randn(5, WIDTH, dtype=torch.bfloat16)
        log_probabilities = softmax(hidden, TiedBands(embedding))
        assert log_probabilities.dtype == torch.float32
        torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(5), rtol=1e-3, atol=1e-3)


def test_dropout_in_training_only() -> None:
    embedding, _ = build()
    softmax = AdaptiveSoftmax(WIDTH, [8, 4], dropout=0.5).double()
    hidden = torch.randn(3, WIDTH, dtype=torch.float64)
    assert not torch.equal(softmax(hidden, TiedBands(embedding)), softmax(hidden, TiedBands(embedding)))
    softmax.eval()
    assert torch.equal(softmax(hidden, TiedBands(embedding)), softmax(hidden, TiedBands(embedding)))


def test_compiled_loss() -> None:
    """In one graph, where each tail is evaluated for all tokens: the same number."""
    embedding, softmax = build()
    hidden, targets = torch.randn(6, WIDTH, dtype=torch.float64), torch.tensor([0, 9, 29, -100, 12, 7])
    compiled = torch.compile(softmax, fullgraph=True, backend="eager")
    expected = softmax(hidden, TiedBands(embedding), targets)
    torch.testing.assert_close(compiled(hidden, TiedBands(embedding), targets), expected)

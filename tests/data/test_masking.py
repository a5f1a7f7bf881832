"""Masked language modelling: what is hidden, how often, and that it depends on (seed, epoch, index) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_hybrid.data.masking import (
    IGNORED,
    MaskedBlockDataset,
    MaskedBlockStream,
    MaskingVocabulary,
    mask_tokens,
)
from hf_hybrid.data.span_corruption import sample_keys
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer

VOCABULARY = MaskingVocabulary(mask_token_id=99, ordinary_ids=np.arange(3, 90))


def hide(blocks, seed=0, **options):
    return mask_tokens(blocks, vocabulary=VOCABULARY, keys=sample_keys(seed, 0, np.arange(len(blocks))), **options)


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0.01, 0.9), st.integers(0, 50))
def test_labels_are_the_hidden_tokens(length, batch, probability, seed):
    blocks = np.random.default_rng(seed).integers(0, 100, (batch, length))
    input_ids, labels = hide(blocks, seed, mask_probability=probability)
    chosen = labels != IGNORED
    ordinary = (blocks >= 3) & (blocks < 90)
    assert np.array_equal(labels[chosen], blocks[chosen]) and np.array_equal(input_ids[~chosen], blocks[~chosen])
    assert not (chosen & ~ordinary).any()
    wanted = max(1, round(probability * length))
    assert np.array_equal(chosen.sum(1), np.minimum(wanted, ordinary.sum(1)))
    assert ((input_ids[chosen] == 99) | ((input_ids[chosen] >= 3) & (input_ids[chosen] < 90))).all()


def test_shares():
    blocks = np.full((400, 500), 10)
    input_ids, labels = hide(blocks)
    chosen = labels != IGNORED
    assert (chosen.sum(1) == 75).all() and chosen.mean(0).max() < 0.25
    hidden = input_ids[chosen]
    assert (hidden == 99).mean() == pytest.approx(0.8, abs=0.01)
    assert (hidden == 10).mean() == pytest.approx(0.1, abs=0.01)
    random = hidden[(hidden != 99) & (hidden != 10)]
    assert len(np.unique(random)) == 86 and random.mean() == pytest.approx(46, abs=1.5)
    assert abs(np.corrcoef(chosen[:, :-1].ravel(), chosen[:, 1:].ravel())[0, 1]) < 0.01


def test_samples_depend_on_seed_epoch_and_index():
    tokens = np.arange(3, 83).repeat(4)
    options = {"length": 20, "vocabulary": VOCABULARY, "seed": 1}
    data, fixed = (
        MaskedBlockDataset(tokens, **options),
        MaskedBlockDataset(tokens, **options, resample_each_epoch=False),
    )
    first = [data[i]["input_ids"] for i in range(len(data))]
    together = data.__getitems__([3, 1])
    assert torch.equal(together[0]["input_ids"], first[3]) and torch.equal(together[1]["input_ids"], first[1])
    data.set_epoch(1)
    fixed.set_epoch(1)
    assert any(not torch.equal(data[i]["input_ids"], first[i]) for i in range(len(data)))
    assert all(torch.equal(fixed[i]["input_ids"], first[i]) for i in range(len(data)))
    other = MaskedBlockDataset(tokens, **{**options, "seed": 2})
    assert any(not torch.equal(other[i]["input_ids"], first[i]) for i in range(len(data)))


def test_a_stream_resumes_at_the_same_sample(documents, tokenizer):
    vocabulary = MaskingVocabulary.of(tokenizer)

    def stream():
        return MaskedBlockStream(documents, tokenizer, vocabulary=vocabulary, block_length=32, shuffle_window=8)

    whole = list(stream())
    assert all((sample["labels"] != IGNORED).any() for sample in whole)
    interrupted = stream()
    samples = iter(interrupted)
    for _ in range(5):
        next(samples)
    resumed = stream()
    resumed.load_state_dict(interrupted.state_dict())
    rest = list(resumed)
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rest, whole[5:]))


def test_vocabulary_of_a_tokenizer(tmp_path):
    tokenizer = byte_tokenizer(num_sentinels=3)
    vocabulary = MaskingVocabulary.of(tokenizer)
    assert vocabulary.mask_token_id == tokenizer.convert_tokens_to_ids("<extra_id_0>") == tokenizer.mask_token_id
    assert vocabulary.ordinary_ids.tolist() == list(range(3, 259))
    with pytest.raises(ValueError, match="no mask token"):
        MaskingVocabulary.of(byte_tokenizer())
    marked = byte_tokenizer()
    marked.add_special_tokens({"mask_token": "<mask>"})
    assert MaskingVocabulary.of(marked).mask_token_id == 259


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, float("nan")])
def test_bad_probabilities(probability):
    with pytest.raises(ValueError, match="`mask_probability` must lie between 0 and 1"):
        hide(np.full((1, 4), 5), mask_probability=probability)
    with pytest.raises(ValueError, match="`mask_probability`"):
        MaskedBlockDataset(np.full(8, 5), 4, vocabulary=VOCABULARY, mask_probability=probability)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"`blocks` must be \(batch, tokens\)"):
        mask_tokens(np.zeros(4, int), vocabulary=VOCABULARY, keys=[1])

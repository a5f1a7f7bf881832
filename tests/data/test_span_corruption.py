"""Span corruption: lengths, losslessness, statistics, determinism, sentinel budget, speed of the data set."""

from __future__ import annotations

import pickle
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_hybrid.data.span_corruption import (
    SpanCorruptionDataset,
    corrupt_spans,
    restore_segment,
    sample_keys,
    span_corruption_lengths,
)
from hf_hybrid.data.token_corpus import tokenize_corpus

VOCAB, SENTINELS, EOS = 8000, list(range(9023, 7999, -1)), 1


def corrupt(segments, seed=0, epoch=0, **options):
    keys = sample_keys(seed, epoch, range(len(segments)))
    return corrupt_spans(segments, sentinel_ids=SENTINELS, eos_token_id=EOS, keys=keys, **options)


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, VOCAB, shape)


@pytest.mark.parametrize(
    ("input_length", "segment", "target", "spans"),
    [
        (512, 568, 114, 28),
        (1024, 1137, 229, 57),
        (2048, 2274, 456, 114),
        (4096, 4550, 910, 227),
        (8192, 9101, 1821, 455),
        (16384, 18204, 3642, 910),
    ],
)
def test_table_of_lengths(input_length, segment, target, spans):
    lengths = span_corruption_lengths(input_length)
    assert (lengths.segment_length, lengths.target_length, lengths.num_spans) == (segment, target, spans)
    assert lengths.input_length == input_length


@given(input_length=st.integers(3, 5000), density=st.floats(0.02, 0.6), mean=st.floats(1.0, 20.0))
def test_segment_is_the_longest_that_fits(input_length, density, mean):
    def length_of(segment):
        noise = min(max(round(segment * density), 1), segment - 1)
        spans = min(max(1, round(noise / mean)), noise, segment - noise)
        return segment - noise + spans + 1

    lengths = span_corruption_lengths(input_length, density, mean)
    assert length_of(lengths.segment_length) == lengths.input_length <= input_length
    assert length_of(lengths.segment_length + 1) > input_length


def test_example_of_the_paper_layout():
    """ "a b c d e f" with two spans: kept text first, noise last, sentinels in order, no closing sentinel."""
    inputs, labels = corrupt(np.array([[11, 12, 13, 14, 15, 16]] * 64), noise_density=1 / 3, mean_span_length=1.0)
    assert inputs.shape == (64, 7) and labels.shape == (64, 5)
    assert ([11, 12, 9023, 14, 15, 9022, 1] in inputs.tolist()) and ([9023, 13, 9022, 16, 1] in labels.tolist())
    assert (inputs[:, -2] == 9022).all() and (inputs[:, 0] == 11).all()


@given(
    length=st.integers(2, 300),
    density=st.floats(0.01, 0.95),
    mean=st.floats(1.0, 10.0),
    seed=st.integers(-(2**40), 2**70),
)
def test_lossless(length, density, mean, seed):
    segments = random_tokens(3, length, seed=length)
    inputs, labels = corrupt(segments, seed=seed, noise_density=density, mean_span_length=mean)
    spans = int((inputs[0] > 7999).sum())
    for segment, source, target in zip(segments, inputs, labels):
        assert restore_segment(source, target, sentinel_ids=SENTINELS) == segment.tolist()
        for side in (source, target):
            assert side[-1] == EOS
            assert side[side > 7999].tolist() == SENTINELS[:spans]
    assert inputs.shape[1] + labels.shape[1] == length + 2 * spans + 2


def test_statistics_on_ten_thousand_segments():
    lengths = span_corruption_lengths(512)
    span_lengths, noise, first = Counter(), 0, Counter()
    for part in range(10):
        keys = sample_keys(1, 0, range(part * 1000, (part + 1) * 1000))
        segments = np.broadcast_to(np.arange(3, 3 + lengths.segment_length), (1000, lengths.segment_length))
        inputs, labels = corrupt_spans(segments, sentinel_ids=SENTINELS, eos_token_id=EOS, keys=keys)
        positions = np.nonzero(np.concatenate([labels[:, :-1] > 7999, np.ones((1000, 1), bool)], axis=1))[1]
        gaps = np.diff(positions) - 1
        span_lengths.update(gaps[gaps > 0].tolist())
        noise += int((labels < 8000).sum()) - 1000
        first.update(labels[:, 1].tolist())
    total = sum(span_lengths.values())
    assert noise / (10_000 * lengths.segment_length) == pytest.approx(0.15, abs=0.005)
    assert sum(size * count for size, count in span_lengths.items()) / total == pytest.approx(3.0, abs=0.1)
    # A uniform composition of n into s parts has P(part = 1) = (s - 1) / (n - 1), P(part = 2) = P(1) (n - s) / (n - 2).
    n, s = lengths.num_noise_tokens, lengths.num_spans
    assert span_lengths[1] / total == pytest.approx((s - 1) / (n - 1), abs=0.005)
    assert span_lengths[2] / total == pytest.approx((s - 1) * (n - s) / (n - 1) / (n - 2), abs=0.005)
    assert len(first) > 60  # the first span begins anywhere


def test_compositions_are_uniform():
    """5 kept tokens in 3 parts: all 6 compositions, each equally often; independent of the split of the noise."""
    segments = np.broadcast_to(np.arange(3, 13), (12_000, 10))
    inputs, labels = corrupt(segments, noise_density=0.5, mean_span_length=5 / 3)
    layouts = Counter(map(tuple, (inputs > 7999).astype(int).tolist()))
    assert len(layouts) == 6
    both = Counter((tuple(i), tuple(j)) for i, j in zip((inputs > 7999).tolist(), (labels > 7999).tolist()))
    assert len(both) == 36
    assert all(abs(count - 12_000 / 36) < 5 * (12_000 / 36) ** 0.5 for count in both.values())


def test_deterministic_in_seed_epoch_index():
    tokens = random_tokens(200 * 64).astype(np.uint16)
    make = lambda **options: SpanCorruptionDataset(  # noqa: E731
        tokens, input_length=64, sentinel_ids=SENTINELS, eos_token_id=EOS, **options
    )
    dataset = make(seed=3)
    one = dataset[17]["labels"]
    batch = dataset.__getitems__([5, 17, 9])
    assert torch.equal(batch[1]["labels"], one) and torch.equal(make(seed=3)[17]["labels"], one)
    assert torch.equal(dataset[-1]["labels"], dataset[len(dataset) - 1]["labels"])
    assert not torch.equal(make(seed=4)[17]["labels"], one)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[17]["labels"], one)
    dataset.set_epoch(0)
    assert torch.equal(dataset[17]["labels"], one)
    fixed = make(seed=3, resample_each_epoch=False)
    fixed.set_epoch(5)
    assert torch.equal(fixed[17]["labels"], one)


def test_keys_do_not_collide():
    keys = np.concatenate([sample_keys(seed, epoch, range(1000)) for seed in range(5) for epoch in range(5)])
    assert len(np.unique(keys)) == len(keys)


def test_data_loader_with_workers_and_memory_map(tmp_path, tokenizer, documents):
    path = tmp_path / "tokens.bin"
    tokenize_corpus(documents, tokenizer, path, progress=False)
    dataset = SpanCorruptionDataset(path, input_length=128, sentinel_ids=list(range(463, 399, -1)), eos_token_id=1)
    dataset.set_epoch(2)
    assert len(pickle.dumps(dataset)) < 5000
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3]["input_ids"], dataset[3]["input_ids"])
    expected = [row for batch in DataLoader(dataset, batch_size=8) for row in batch["input_ids"]]
    actual = [row for batch in DataLoader(dataset, batch_size=8, num_workers=2) for row in batch["input_ids"]]
    assert len(expected) == len(dataset) and all(map(torch.equal, expected, actual))
    assert expected[0].dtype == torch.long and expected[0].shape == (128,)


def test_torch_segments_give_torch():
    segments = torch.from_numpy(random_tokens(4, 100))
    inputs, labels = corrupt(segments)
    expected = corrupt(segments.numpy())
    assert torch.equal(inputs, torch.from_numpy(expected[0])) and torch.equal(labels, torch.from_numpy(expected[1]))


def test_two_million_input_tokens_per_second():
    """The path used in training, on one core; the best of several rounds, since the machine may be busy."""
    dataset = SpanCorruptionDataset(
        random_tokens(568 * 640).astype(np.uint16), input_length=512, sentinel_ids=SENTINELS, eos_token_id=EOS
    )
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    best = 0.0
    for _ in range(5):
        started = time.process_time()
        for start in range(0, 640, 64):
            dataset.__getitems__(order[start : start + 64])
        best = max(best, 640 * 512 / (time.process_time() - started))
    assert best >= 2e6


def test_too_few_sentinels_says_how_many_and_how():
    message = "114 masked spans .* only 100.*`num_sentinels` >= 114"
    with pytest.raises(ValueError, match=message):
        SpanCorruptionDataset(random_tokens(5000), input_length=2048, sentinel_ids=SENTINELS[:100], eos_token_id=EOS)
    with pytest.raises(ValueError, match=message):
        corrupt_spans(random_tokens(1, 2274), sentinel_ids=SENTINELS[:100], eos_token_id=EOS, keys=[0])


@pytest.mark.parametrize(
    ("segments", "options", "message"),
    [
        (random_tokens(10), {}, "must have the shape"),
        (np.array([[3, 9023, 5, 6]]), {}, "which is a sentinel"),
        (np.array([[3, -1, 5, 6]]), {}, "negative id -1"),
        (random_tokens(1, 50), {"noise_density": 1.0}, "`noise_density`"),
        (random_tokens(1, 50), {"mean_span_length": 0.5}, "`mean_span_length`"),
        (random_tokens(1, 50), {"sentinel_ids": []}, "`sentinel_ids` is empty"),
        (random_tokens(1, 50), {"sentinel_ids": [8000, 8001, 8002]}, "must descend"),
        (random_tokens(2, 50), {"keys": [1]}, "must have the shape"),
    ],
)
def test_bad_input(segments, options, message):
    with pytest.raises(ValueError, match=message):
        corrupt_spans(segments, **{"sentinel_ids": SENTINELS, "eos_token_id": EOS, "keys": [0], **options})


def test_bad_lengths():
    with pytest.raises(ValueError, match="`input_length` is 2"):
        span_corruption_lengths(2)
    with pytest.raises(ValueError, match="fewer than one block of 568"):
        SpanCorruptionDataset(random_tokens(100), input_length=512, sentinel_ids=SENTINELS, eos_token_id=EOS)
    with pytest.raises(ValueError, match="one-dimensional array of integers"):
        SpanCorruptionDataset(np.zeros(1000), input_length=512, sentinel_ids=SENTINELS, eos_token_id=EOS)
    dataset = SpanCorruptionDataset(random_tokens(1200), input_length=512, sentinel_ids=SENTINELS, eos_token_id=EOS)
    with pytest.raises(IndexError):
        dataset[2]

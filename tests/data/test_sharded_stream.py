"""Streams that several processes read: no sample twice, none lost, and the same order with more or fewer of them."""

from __future__ import annotations

import itertools
import json

import datasets
import pytest
from accelerate.data_loader import IterableDatasetShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_hybrid.data.sharded_stream import ShardedStream, StreamBatches, merge_stream_states
from hf_hybrid.data.streaming import CausalBlockStream
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = [f"{index:03d} " + "some words of a document " * (index % 4) for index in range(60)]


def make(rank=0, world_size=1, *, num_shards=12, source=TEXTS, **options):
    def make_shard(index, count):
        return CausalBlockStream(source, TOKENIZER, block_length=8, rank=index, world_size=count, **options)

    return ShardedStream(make_shard, num_shards, rank=rank, world_size=world_size)


def blocks(samples):
    return [tuple(sample["input_ids"].tolist()) for sample in samples]


def read_together(sizes_and_steps, **options):
    """Samples in the order of the stream: each number of processes reads its steps, one sample each, and the next one goes on."""
    found, state, begun = [], None, 0
    for size, steps in sizes_and_steps:
        streams = [make(rank, size, **options) for rank in range(size)]
        if state is not None:
            for stream in streams:
                stream.load_state_dict(json.loads(json.dumps(state)))
        readers = [iter(stream) for stream in streams]
        for _ in range(steps) if steps is not None else itertools.count():
            row = [next(reader, None) for reader in readers]
            first = begun % size  # reads the sample that follows; a step sums over all of them, in any order
            row, begun = row[first:] + row[:first], begun + size
            found += blocks(sample for sample in row if sample is not None)
            if steps is None and not any(row):
                break
        state = merge_stream_states([stream.state_dict() for stream in streams])
    return found


@settings(max_examples=20)
@given(
    plan=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 40)), max_size=4),
    last=st.sampled_from([1, 3, 4]),
    window=st.sampled_from([0, 5]),
)
def test_any_numbers_of_processes_read_one_epoch(plan, last, window):
    """Stopped at two and resumed at one or three, and so on: every sample comes once, in the order of a single process."""
    expected = blocks(make(shuffle_window=window))
    found = read_together([*plan, (last, None)], shuffle_window=window)
    assert sorted(found) == sorted(expected)
    lengths = [len(list(shard)) for shard in make(shuffle_window=window).shards.values()]
    full = 12 * min(lengths)  # behind it some shards have ended, and a step has fewer samples
    assert found[:full] == expected[:full]


def test_repeated_epochs_keep_the_order_for_ever():
    options = {"repeat": True, "shuffle_window": 4}
    expected = blocks(itertools.islice(make(**options), 1200))
    assert read_together([(2, 151), (1, 100), (3, 266)], **options) == expected[: 302 + 100 + 798]
    assert len(set(expected)) < 600  # several epochs


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 3])
def test_workers_do_not_change_the_order(workers):
    source = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=12)
    for rank in range(2):
        loader = DataLoader(make(rank, 2, source=source), batch_size=4, num_workers=workers)
        rows = [tuple(row.tolist()) for batch in loader for row in batch["input_ids"]]
        assert rows == blocks(make(rank, 2, source=source))


@pytest.mark.parametrize(("workers", "later"), [(0, 3), (3, 0)])
def test_workers_read_their_own_shards(workers, later):
    """Whatever the workers have read ahead, the state is that behind the last batch; another number of them goes on."""
    source = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=12)
    options = {"source": source, "repeat": True, "shuffle_window": 3}
    expected = blocks(itertools.islice(make(1, 2, **options), 36))

    def batches(number):
        return StreamBatches(
            make(1, 2, **options), 4, lambda rows: [row["input_ids"] for row in rows], num_workers=number
        )

    first, second = batches(workers), batches(later)
    found = [tuple(row.tolist()) for rows in itertools.islice(first, 5) for row in rows]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), skipped=2)
    continued = list(itertools.islice(second, 6))
    assert continued[:2] == [{}, {}]
    assert found + [tuple(row.tolist()) for rows in continued[2:] for row in rows] == expected


@pytest.mark.parametrize("resumed", [1, 3, 6])
def test_the_division_of_the_trainer_resumes_at_any_number(resumed):
    """The Trainer's way: processes take turns in one stream, and a resumed run skips the batches that were trained."""
    stream, rows = CausalBlockStream(TEXTS, TOKENIZER, block_length=8, repeat=True), 6
    expected = blocks(itertools.islice(CausalBlockStream(TEXTS, TOKENIZER, block_length=8, repeat=True), 20 * rows))
    found = []
    for size, first, stop in [(2, 0, 7), (resumed, 7, 20)]:
        parts = [
            blocks(
                itertools.islice(IterableDatasetShard(stream, rows // size, False, size, rank), stop * rows // size)
            )
            for rank in range(size)
        ]
        each = rows // size
        for step in range(first, stop):
            found += [block for part in parts for block in part[step * each : (step + 1) * each]]
    assert found == expected


def test_misuse_is_named():
    with pytest.raises(ValueError, match="`num_shards` must be a multiple .* got 12 for 5"):
        make(0, 5)
    with pytest.raises(ValueError, match="`rank`"):
        make(2, 2)
    first, second = make(0, 2).state_dict(), make(1, 2).state_dict()
    with pytest.raises(ValueError, match="pass the state of each process once"):
        merge_stream_states([first])
    with pytest.raises(ValueError, match="6 of them different"):
        merge_stream_states([first, first])
    with pytest.raises(ValueError, match="lacks the shards .*merge_stream_states"):
        make(0, 3).load_state_dict(first)
    with pytest.raises(ValueError, match="`state` is that of 12 shards, this stream has 24"):
        make(num_shards=24).load_state_dict(merge_stream_states([first, second]))
    with pytest.raises(ValueError, match="`state` must be what"):
        make().load_state_dict({"epoch": 0})
    with pytest.raises(ValueError, match="12 shards of this process cannot be divided among 5 workers"):
        next(make().numbered_samples(0, 5))
    with pytest.raises(ValueError, match="Shard 0 of 12 holds fewer tokens than one block of 8"):
        next(iter(make(source=["a"], repeat=True)))

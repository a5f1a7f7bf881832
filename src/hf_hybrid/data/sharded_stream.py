"""A stream of samples that several processes read together, each its own documents, and that any other number of them continues.

The documents are divided into a fixed number of shards, each packed by itself. Sample g of the whole stream is sample g // S of shard
g % S, whatever the number of processes: process r of N reads the shards r, r + N, r + 2N ... and yields the samples
g with g % N = r, in order. So all of them together read every document once, and after n samples each they have read the first
n * N samples of the stream, which is where another number of processes goes on.

`StreamBatches` makes batches of such a stream, with workers that share the shards of their process in the same way.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from .streaming import PackedStream, pass_for_only_worker


class ShardedStream(IterableDataset):
    """The part of a stream that one process reads.

    `HybridTrainer` trains on it. In a loop of your own use `StreamBatches`, or a DataLoader of which one worker reads, as in
    `PackedStream`; not Accelerate, which divides the samples of a data set among the processes itself.

    Args:
        make_shard: makes the stream of a shard from its index and the number of shards, for example
            `lambda rank, world_size: CausalBlockStream(documents, tokenizer, block_length=1024, rank=rank, world_size=world_size)`.
            Streams of `datasets` should have a multiple of `num_shards` files.
        num_shards: number of shards, a multiple of every number of processes that will read the stream. Each keeps a window of blocks.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        ValueError: `num_shards` is not a multiple of `world_size`, or `rank` is out of range.
    """

    def __init__(
        self, make_shard: Callable[[int, int], PackedStream], num_shards: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must lie in [0, world_size); got rank {rank} of {world_size}.")
        if num_shards < 1 or num_shards % world_size:
            raise ValueError(
                f"`num_shards` must be a multiple of the number of processes; got {num_shards} for {world_size}. Choose one "
                "that all numbers of processes to come divide, such as 48 or 60."
            )
        self.num_shards = num_shards
        self.rank, self.world_size = rank, world_size
        self.shards = {index: make_shard(index, num_shards) for index in range(rank, num_shards, world_size)}
        self._taken = dict.fromkeys(self.shards, 0)
        self._is_continued = False

    @property
    def is_endless(self) -> bool:
        """Whether every shard begins anew at its end."""
        return all(shard.repeat for shard in self.shards.values())

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        for shard in self.shards.values():
            shard.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Position of each shard after the last sample, in JSON types; see `merge_stream_states`."""
        shards = {
            str(index): {"taken": self._taken[index], "position": shard.state_dict()}
            for index, shard in self.shards.items()
        }
        return {"num_shards": self.num_shards, "shards": shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue from a position.

        Args:
            state: that of `state_dict`, or of all former processes (`merge_stream_states`) if their number was another.

        Raises:
            ValueError: the state is that of another number of shards, or lacks shards of this process.
        """
        _check_state(state)
        if state["num_shards"] != self.num_shards:
            raise ValueError(
                f"`state` is that of {state['num_shards']} shards, this stream has {self.num_shards}; `num_shards` must stay the same."
            )
        missing = [index for index in self.shards if str(index) not in state["shards"]]
        if missing:
            raise ValueError(
                f"`state` lacks the shards {missing}; pass the states of all former processes, joined by `merge_stream_states`."
            )
        for index, shard in self.shards.items():
            shard.load_state_dict(state["shards"][str(index)]["position"])
            self._taken[index] = state["shards"][str(index)]["taken"]
        self._is_continued = True

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _, _, sample in self.numbered_samples():
            yield sample

    def numbered_samples(
        self, reader: int = 0, readers: int = 1
    ) -> Iterator[tuple[int, dict[str, Any], dict[str, torch.Tensor]]]:
        """The shard of each sample, the state of that shard behind it, and the sample.

        Args:
            reader, readers: read what the first, second … of so many readers have to read, which take turns sample by sample.

        Raises:
            ValueError: the shards cannot be divided among the readers, or one that repeats itself has not a single sample.
        """
        if len(self.shards) % readers:
            raise ValueError(
                f"The {len(self.shards)} shards of this process cannot be divided among {readers} workers: choose a number of workers "
                "that divides it, or other `num_shards`."
            )
        if not self._is_continued:
            self._taken = dict.fromkeys(self.shards, 0)
        self._is_continued = False
        places = sorted((self._taken[index] * self.num_shards + index, index) for index in self.shards)
        queue = places[reader::readers]  # the reader after the last sample goes on
        streams = {index: iter(self.shards[index]) for _, index in queue}
        while queue:
            place, index = queue[0]
            shard = self.shards[index]
            sample = next(streams[index], None)
            if sample is None:  # the shard has ended
                if shard.repeat:
                    raise ValueError(
                        f"Shard {index} of {self.num_shards} holds fewer tokens than one block of {shard.block_length}, and would leave "
                        "gaps in the order of the samples. Use fewer shards, or more text."
                    )
                heapq.heappop(queue)
                continue
            self._taken[index] += 1
            heapq.heapreplace(queue, (place + self.num_shards, index))
            yield index, {"taken": self._taken[index], "position": shard.position}, sample


class _Reader(IterableDataset):
    """Numbered samples of a stream; every worker of a DataLoader reads the shards that are its own."""

    def __init__(self, stream: ShardedStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any], dict[str, torch.Tensor]]]:
        return self.stream.numbered_samples(*pass_for_only_worker())


class StreamBatches(IterableDataset):
    """Batches of a stream that several processes read. The order of the samples does not depend on the number of workers.

    `state_dict` is that of the stream behind the last batch that was taken, whatever the workers have read ahead.

    Args:
        stream: the part of this process.
        batch_size: samples of a batch.
        collate: makes a batch of a list of samples.
        num_workers: processes that read and tokenize, a divisor of the number of shards of this process; 0: this one.
        prefetch_factor: batches that each worker reads ahead.
        options: further arguments of the DataLoader.
    """

    def __init__(
        self,
        stream: ShardedStream,
        batch_size: int,
        collate: Callable[[list[dict[str, torch.Tensor]]], Any],
        *,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        **options: Any,
    ) -> None:
        self.stream, self.batch_size, self.collate = stream, batch_size, collate
        if num_workers:
            options["prefetch_factor"] = (prefetch_factor or 2) * batch_size
        self._loader = DataLoader(_Reader(stream), batch_size=None, num_workers=num_workers, **options)
        self._shards = stream.state_dict()["shards"]
        self._pending: dict[str, Any] | None = None
        self._skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """Position of each shard of this process behind the last batch, in JSON types; see `merge_stream_states`."""
        return {"num_shards": self.stream.num_shards, "shards": copy.deepcopy(self._shards)}

    def load_state_dict(self, state: dict[str, Any], skipped: int = 0) -> None:
        """Makes the next iteration continue from a position; see `ShardedStream.load_state_dict`.

        Args:
            state: the position.
            skipped: number of batches before it. In their place come empty ones, for a caller that counts, and drops, them.
        """
        self.stream.load_state_dict(state)
        self._pending, self._skipped = state, skipped
        self._shards = {str(index): state["shards"][str(index)] for index in self.stream.shards}

    def __iter__(self) -> Iterator[Any]:
        skipped, self._skipped = self._skipped, 0
        if self._pending is not None:  # again: a new epoch would begin at its start
            self.stream.load_state_dict(self._pending)
        self._pending = None
        for _ in range(skipped):
            yield {}
        states: dict[str, Any] = {}
        samples = []
        for index, state, sample in self._loader:
            states[str(index)] = state
            samples.append(sample)
            if len(samples) == self.batch_size:
                self._shards = self._shards | states
                yield self.collate(samples)
                samples, states = [], {}
        if samples:
            self._shards = self._shards | states
            yield self.collate(samples)


def merge_stream_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the states of all processes of a `ShardedStream`, for another number of processes.

    Raises:
        ValueError: the states are not those of all processes of one stream.
    """
    for state in states:
        _check_state(state)
    numbers = sorted({state["num_shards"] for state in states})
    merged: dict[str, Any] = {}
    for state in states:
        merged.update(state["shards"])
    count = sum(len(state["shards"]) for state in states)
    if len(numbers) != 1 or not len(merged) == count == numbers[0]:
        raise ValueError(
            f"`states` hold {count} shards, {len(merged)} of them different, of streams with {numbers} shards; pass the state of each "
            "process once."
        )
    return {"num_shards": numbers[0], "shards": copy.deepcopy(merged)}


def _check_state(state: Any) -> None:
    if not isinstance(state, dict) or set(state) != {"num_shards", "shards"}:
        raise ValueError("`state` must be what `ShardedStream.state_dict` or `merge_stream_states` returned.")

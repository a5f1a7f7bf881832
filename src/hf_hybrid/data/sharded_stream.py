"""A stream of samples that several processes read together, each its own documents, and that any other number of them continues.

The documents are divided into a fixed number of shards, each packed by itself. Sample g of the whole stream is sample g // S of shard
g % S, whatever the number of processes: process r of N reads the shards r, r + N, r + 2N ... and yields the samples
g with g % N = r, in order. So all of them together read every document once, and after n samples each they have read the first
n * N samples of the stream, which is where another number of processes goes on.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from .streaming import PackedStream


class ShardedStream(IterableDataset):
    """The part of a stream that one process reads.

    Pass it to a DataLoader as it is, not through Accelerate or a Trainer, which divide the samples of a data set among the processes
    themselves. Of the workers of the DataLoader one reads, as in `PackedStream`.

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
        self.shards = {index: make_shard(index, num_shards) for index in range(rank, num_shards, world_size)}
        self._taken = dict.fromkeys(self.shards, 0)
        self._is_continued = False

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
        if not self._is_continued:
            self._taken = dict.fromkeys(self.shards, 0)
        self._is_continued = False
        streams = {index: iter(shard) for index, shard in self.shards.items()}
        queue = [(self._taken[index] * self.num_shards + index, index) for index in self.shards]
        heapq.heapify(queue)
        while queue:
            place, index = queue[0]
            sample = next(streams[index], None)
            if sample is None:  # the shard has ended
                heapq.heappop(queue)
                continue
            self._taken[index] += 1
            heapq.heapreplace(queue, (place + self.num_shards, index))
            yield sample


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

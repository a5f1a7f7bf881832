"""Training samples from a stream of documents: tokenise, pack, corrupt, shard and resume at the same sample.

For corpora that should not be tokenised in advance. Documents are read in order, joined with `</s>` and split into
blocks. The sequence of samples depends only on (documents, seed, epoch) and the shard, and `state_dict` describes a
position in it: after `load_state_dict` the next sample is bit for bit the one that would have followed.

Sharding. Processes divide the documents among themselves only if `rank` and `world_size` are given, because the Trainer (Accelerate)
already distributes the samples of an iterable data set over its processes. Of the workers of a DataLoader, one reads: so the order
of the samples does not depend on their number, and a resumed run may have another one. A second worker would not help, because
tokens have a place in the stream only when all before them are counted.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as workers
from transformers import PreTrainedTokenizerBase

from .packing import concatenate_documents
from .span_corruption import check_sentinels, corrupt_spans, sample_keys, span_corruption_lengths
from .token_corpus import document_batches, encode_documents, end_of_document

_CHUNK = 64  # samples made at a time
_BATCH_CHARACTERS = 200_000  # characters tokenised at a time

Documents = Iterable[Any] | Callable[[], Iterator[Any]]


class _DocumentSource:
    """Documents of one shard, from the beginning or from a stored position.

    Map-style data sets and lists are indexed; `datasets` streams use their own state; anything else is read again up to the
    position, as is a stream whose state is not exact: with a shuffle buffer, which is no part of it, or before datasets 5.1 behind
    functions and in batches, of which it counts some twice.
    """

    def __init__(self, documents: Documents, rank: int, world_size: int) -> None:
        if isinstance(documents, (str, bytes)):
            raise ValueError("`documents` is a single string; pass a list of documents.")
        if _is_one_shot(documents):
            raise ValueError(
                "`documents` is an iterator, which can be read only once; pass a list, a data set, or a function that returns "
                "a new iterator at each call."
            )
        self.rank, self.world_size = rank, world_size
        self.is_stream = hasattr(documents, "load_state_dict") and hasattr(documents, "set_epoch")
        if self.is_stream and world_size > 1:
            from datasets.distributed import split_dataset_by_node

            documents = split_dataset_by_node(documents, rank=rank, world_size=world_size)
        # All iterations of a `datasets` stream share its state: keep a stream of our own.
        self.documents = copy.deepcopy(documents) if self.is_stream else documents
        self.has_state = self.is_stream and _has_exact_state(documents)

    def set_epoch(self, epoch: int) -> None:
        if self.is_stream:
            self.documents.set_epoch(epoch)  # type: ignore[union-attr]

    def read(self, position: dict[str, Any] | None) -> tuple[Iterator[Any], Callable[[], dict[str, Any]]]:
        """Returns the documents after `position` and a function that returns the position reached so far."""
        read = 0 if position is None else position["documents"]
        source: Any = self.documents
        index, count = self.rank, self.world_size
        if self.has_state:
            # `load_state_dict` affects all later iterations of an object, and `copy.copy` of a stream returns itself.
            source = object.__new__(type(source))
            source.__dict__.update(self.documents.__dict__)
            if position is not None and position["source"] is not None:
                source.load_state_dict(position["source"])
            iterator = iter(source)
        elif self.is_stream:
            iterator = itertools.islice(iter(source), read, None)
        elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            iterator = (source[i] for i in range(index + read * count, len(source), count))
        else:
            fresh = iter(source() if callable(source) else source)
            iterator = itertools.islice(fresh, index + read * count, None, count)

        done = read

        def counted() -> Iterator[Any]:
            nonlocal done
            for document in iterator:
                done += 1
                yield document

        def position_now() -> dict[str, Any]:
            state = source.state_dict() if self.has_state and done > 0 else None
            return {"documents": done, "source": copy.deepcopy(state)}

        return counted(), position_now


def _reads_alone() -> bool:
    """Whether this process reads the stream; of the workers of a DataLoader the first does, and passes for the only one from now on.

    Streams of `datasets` divide their shards among the workers that they see.
    """
    info = get_worker_info()
    if info is None:
        return True
    if info.id == 0:
        pass_for_only_worker()
    return info.id == 0


def pass_for_only_worker() -> tuple[int, int]:
    """Makes this worker of a DataLoader read streams as if it were the only one; returns its number and that of all workers."""
    info = get_worker_info()
    if info is None:
        return 0, 1
    if info.num_workers > 1:
        workers._worker_info = workers.WorkerInfo(id=0, num_workers=1, seed=info.seed, dataset=info.dataset)
    return info.id, info.num_workers


def _is_one_shot(documents: object) -> bool:
    """Whether the object is an iterator that can be read only once."""
    return hasattr(documents, "__next__")


def _has_exact_state(stream: object) -> bool:
    """Whether the state of a `datasets` stream is that behind the last document: one that shuffles forgets rows that it has read ahead."""
    if not hasattr(stream, "_ex_iterable"):  # a stream of another library
        return True
    layers = [stream._ex_iterable]
    for layer in layers:  # which grows
        if "Buffer" in type(layer).__name__:
            return False
        layers += [layer.ex_iterable] if hasattr(layer, "ex_iterable") else getattr(layer, "ex_iterables", [])
    return True


class PackedStream(IterableDataset):
    """Blocks of packed documents as a stream; the base of the causal and the span-corruption streams.

    Args:
        documents: strings, or rows with a column `text`: a list, a `datasets` data set (streamed or not), another
            iterable that can be read repeatedly, or a function that returns a new iterator.
        tokenizer: a fast tokenizer with an end-of-sequence token.
        block_length: tokens per block.
        seed: seed of the order within windows (and of the noise, in the subclass).
        shuffle_window: number of blocks within which to shuffle; 0 keeps their order. Neighbouring blocks of a long
            document are similar, so a window of a few hundred gives better batches.
        repeat: start again at the end, with the next epoch, indefinitely. Use it with `max_steps`: the Trainer then
            resumes at the right place by skipping samples, whatever the number of epochs.
        rank: index of this process, if the documents are to be divided among processes here.
        world_size: number of processes for `rank`.

    Raises:
        ValueError: the documents are a one-shot iterator, the tokenizer has no end-of-sequence token, or an argument
            is invalid.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_length: int,
        seed: int = 0,
        shuffle_window: int = 0,
        repeat: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if block_length < 1:
            raise ValueError(f"`block_length` must be positive; got {block_length}.")
        if shuffle_window < 0:
            raise ValueError(f"`shuffle_window` must be zero or a positive number of blocks; got {shuffle_window}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must lie in [0, world_size); got rank {rank} of {world_size}.")
        self.source = _DocumentSource(documents, rank, world_size)
        self.tokenizer = tokenizer
        self.eos_token_id = end_of_document(tokenizer)
        self.block_length = block_length
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.repeat = repeat
        self.epoch = 0
        self._place: dict[str, Any] = self._beginning(0)
        self._pending: dict[str, Any] | None = None

    @staticmethod
    def _beginning(epoch: int) -> dict[str, Any]:
        """Position at the start of an epoch. `carry` holds the tokens left over from earlier windows, `first` is the index
        of the first sample of the window, and `emitted` the number of samples of the window already returned."""
        return {"epoch": epoch, "position": None, "carry": [], "first": 0, "emitted": 0}

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration, which determines noise, order and shuffling."""
        if self._pending is not None and self._pending["epoch"] != epoch:
            self._pending = None
        self.epoch = epoch

    @property
    def position(self) -> dict[str, Any]:
        """Position after the last sample, as `state_dict`; not to be changed, and never changed by the stream."""
        return self._pending if self._pending is not None else self._place

    def state_dict(self) -> dict[str, Any]:
        """Position after the last sample, made of plain numbers, lists and dictionaries."""
        return copy.deepcopy(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue from a stored position.

        Raises:
            ValueError: the state does not come from `state_dict`.
        """
        if not isinstance(state, dict) or set(state) != set(self._beginning(0)):
            raise ValueError(
                f"`state` must be what `state_dict` returned, with the keys {sorted(self._beginning(0))}."
            )
        self._pending = copy.deepcopy(state)
        self.epoch = state["epoch"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        place = self._pending if self._pending is not None else self._beginning(self.epoch)
        self._pending = None
        if not _reads_alone():
            return
        while True:
            self._place = place
            yield from self._epoch_samples()
            is_empty = self._place["first"] == 0
            if is_empty and self.source.world_size == 1:
                raise ValueError(
                    f"`documents` hold fewer tokens than one block of {self.block_length}. Use more text or a shorter length."
                )
            if is_empty or not self.repeat:  # one shard of several may be empty
                return
            place = self._beginning(self._place["epoch"] + 1)

    def _epoch_samples(self) -> Iterator[dict[str, torch.Tensor]]:
        """Samples from `self._place` to the end of its epoch, with `self._place` kept up to date."""
        place = self._place
        self.source.set_epoch(place["epoch"])
        documents, position_now = self.source.read(place["position"])
        batches = document_batches(documents, characters=_BATCH_CHARACTERS, limit=256)
        shard, num_shards = self.source.rank, self.source.world_size
        at_end = False
        while not at_end:
            tokens = np.asarray(place["carry"], dtype=np.int64)
            wanted = max(self.shuffle_window, 1) * self.block_length
            parts, size = [tokens], len(tokens)
            while size < wanted:
                texts = next(batches, None)
                if texts is None:
                    at_end = True
                    break
                parts.append(concatenate_documents(encode_documents(self.tokenizer, texts), self.eos_token_id))
                size += len(parts[-1])
            tokens = np.concatenate(parts)
            count = len(tokens) // self.block_length
            blocks = tokens[: count * self.block_length].reshape(count, self.block_length)
            numbers = place["first"] + np.arange(count)
            if self.shuffle_window:
                order = np.argsort(sample_keys(self.seed + 1, place["epoch"], numbers * num_shards + shard))
                blocks, numbers = blocks[order], numbers[order]
            after = {
                "epoch": place["epoch"],
                "position": position_now(),
                "carry": tokens[count * self.block_length :].tolist(),
                "first": place["first"] + count,
                "emitted": 0,
            }
            for start in range(place["emitted"], count, _CHUNK):
                part = slice(start, start + _CHUNK)
                samples = self.make_samples(blocks[part], numbers[part] * num_shards + shard, place["epoch"])
                for number, sample in enumerate(samples, start + 1):
                    self._place = after if number == count else {**place, "emitted": number}
                    yield sample
            place = self._place = after

    def make_samples(self, blocks: np.ndarray, indices: np.ndarray, epoch: int) -> Sequence[dict[str, torch.Tensor]]:
        """Turns blocks (B, block_length) with their sample numbers (B,) into samples."""
        raise NotImplementedError


class CausalBlockStream(PackedStream):
    """Blocks for causal language modelling: equal `input_ids` and `labels`, (block_length,); the models shift labels."""

    def make_samples(self, blocks: np.ndarray, indices: np.ndarray, epoch: int) -> Sequence[dict[str, torch.Tensor]]:
        return [{"input_ids": row, "labels": row.clone()} for row in torch.from_numpy(blocks.copy()).unbind(0)]


class SpanCorruptionStream(PackedStream):
    """Span corruption over a stream of documents: `input_ids` (input_length,) and `labels`.

    Args:
        documents: see `PackedStream`.
        tokenizer: a fast tokenizer with an end-of-sequence token and sentinels.
        input_length: tokens of the model's input.
        sentinel_ids: ids of the sentinels; None finds them by name.
        noise_density: share of the tokens that are masked.
        mean_span_length: mean length of a masked span, in tokens.
        options: `seed`, `shuffle_window`, `repeat`, `rank` and `world_size` of `PackedStream`.

    Raises:
        ValueError: there are no or too few sentinels, or as in `PackedStream`.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        *,
        input_length: int,
        sentinel_ids: Sequence[int] | None = None,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        **options: Any,
    ) -> None:
        if sentinel_ids is None:
            from ..tokenization.special_tokens import sentinel_ids as find_sentinel_ids

            sentinel_ids = find_sentinel_ids(tokenizer)
        self.lengths = span_corruption_lengths(input_length, noise_density, mean_span_length)
        check_sentinels(sentinel_ids, self.lengths.num_spans, self.lengths.segment_length)
        super().__init__(documents, tokenizer, block_length=self.lengths.segment_length, **options)
        self.sentinel_ids = list(sentinel_ids)
        self.noise_density = noise_density
        self.mean_span_length = mean_span_length

    def make_samples(self, blocks: np.ndarray, indices: np.ndarray, epoch: int) -> Sequence[dict[str, torch.Tensor]]:
        input_ids, labels = corrupt_spans(
            blocks,
            sentinel_ids=self.sentinel_ids,
            eos_token_id=self.eos_token_id,
            keys=sample_keys(self.seed, epoch, indices),
            noise_density=self.noise_density,
            mean_span_length=self.mean_span_length,
        )
        return [
            {"input_ids": inputs, "labels": target}
            for inputs, target in zip(torch.from_numpy(input_ids).unbind(0), torch.from_numpy(labels).unbind(0))
        ]

"""Span corruption, the pretraining objective of T5 (arXiv 1910.10683, §3.1.4), exact and vectorised.

A segment of T tokens has n = round(rho T) noise tokens in s = round(n / mu) spans (rho: noise density, mu: mean span length;
rounding half to even). The n noise tokens and the T - n kept tokens are each split into s positive parts, uniformly
among all such compositions, and interleaved: kept, noise, kept, noise ... A span becomes one sentinel in the input;
the target lists each sentinel with the tokens it hides; both end with `</s>`. All lengths are the same for every
segment, so no padding is needed and batches are plain stacks.

    segment  a b c d e f        noise {c, f}
    input    a b X0 d e X1 </s>
    target   X0 c X1 f </s>

The noise of a sample depends only on (seed, epoch, index), not on the batch, the worker or the process: random numbers
come from a counter-based hash, not from a stateful generator.

Shape letters: B segments, T segment length, S input length, L target length, s spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import default_data_collator

from .packing import TokenBlocks, Tokens

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SpanCorruptionLengths:
    """All lengths of one setting, in tokens. `input_length` and `target_length` include the closing `</s>`."""

    segment_length: int
    input_length: int
    target_length: int
    num_spans: int
    num_noise_tokens: int


def _lengths_of_segment(segment_length: int, noise_density: float, mean_span_length: float) -> SpanCorruptionLengths:
    noise = min(max(round(segment_length * noise_density), 1), segment_length - 1)
    spans = max(1, round(noise / mean_span_length))
    spans = min(spans, noise, segment_length - noise)  # every part has at least one token
    return SpanCorruptionLengths(segment_length, segment_length - noise + spans + 1, noise + spans + 1, spans, noise)


def _check_rates(noise_density: float, mean_span_length: float) -> None:
    if not 0.0 < noise_density < 1.0:
        raise ValueError(f"`noise_density` must lie between 0 and 1, both excluded; got {noise_density}.")
    if not 1.0 <= mean_span_length < float("inf"):
        raise ValueError(f"`mean_span_length` must be at least 1 token; got {mean_span_length}.")


@lru_cache(maxsize=256)
def span_corruption_lengths(
    input_length: int, noise_density: float = 0.15, mean_span_length: float = 3.0
) -> SpanCorruptionLengths:
    """Lengths for the longest segment whose corrupted input has at most `input_length` tokens (exactly so at usual rates).

    Args:
        input_length: S, tokens of the model's input, including `</s>`.
        noise_density: share of the tokens that are masked.
        mean_span_length: mean length of a masked span, in tokens.

    Raises:
        ValueError: a length or a rate is out of range.
    """
    _check_rates(noise_density, mean_span_length)
    if input_length < 3:
        raise ValueError(
            f"`input_length` is {input_length}; at least 3 tokens are needed (one kept, one sentinel, one `</s>`)."
        )
    low, high = 2, 4  # the input length never falls when the segment grows: bisect
    while _lengths_of_segment(high, noise_density, mean_span_length).input_length <= input_length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = _lengths_of_segment(middle, noise_density, mean_span_length).input_length <= input_length
        low, high = (middle, high) if fits else (low, middle)
    return _lengths_of_segment(low, noise_density, mean_span_length)


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64: a bijection of 64-bit integers whose output bits all depend on all input bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample_keys(seed: int, epoch: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """One 64-bit key per sample, (B,) uint64, a function of (seed, epoch, index) alone."""
    base = _mix_int(_mix_int(seed + 0x9E3779B97F4A7C15) + epoch)
    return mix_bits(
        np.asarray(indices, dtype=np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(base)
    )


def _part_starts(keys: np.ndarray, stream: int, total: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform compositions of `total` into `parts` positive parts, one per key.

    Returns:
        starts (B, parts): first element of each part; part (B, total): the part each element belongs to.
    """
    batch = len(keys)
    is_start = np.zeros((batch, total), dtype=bool)
    is_start[:, 0] = True
    if parts > 1:
        # A uniform (parts - 1)-subset of the inner cut points: those with the smallest random numbers. The low 32 bits are
        # the position itself, so that no two numbers are equal.
        position = np.arange(1, total, dtype=np.uint64)
        random = mix_bits(keys[:, None] + position * np.uint64(0xD1342543DE82EF95) + np.uint64(stream))
        random = (random & np.uint64(0xFFFFFFFF00000000)) | position
        bound = np.partition(random, parts - 2, axis=1)[:, parts - 2 : parts - 1]
        is_start[:, 1:] = random <= bound
    starts = np.nonzero(is_start)[1].reshape(batch, parts)
    return starts, np.cumsum(is_start, axis=1, dtype=np.int64) - 1


def check_sentinels(sentinel_ids: Sequence[int], needed: int, segment_length: int) -> int:
    """Returns the id of the first sentinel."""
    if len(sentinel_ids) == 0:
        raise ValueError("`sentinel_ids` is empty; pass `sentinel_ids(tokenizer)` of a tokenizer that has sentinels.")
    if len(sentinel_ids) < needed:
        raise ValueError(
            f"Segments of {segment_length} tokens have {needed} masked spans and need as many sentinels, but there "
            "are only "
            f"{len(sentinel_ids)}. Train the tokenizer with `num_sentinels` >= {needed}, or use a shorter input, or a larger "
            "`mean_span_length` (fewer, longer spans)."
        )
    first = int(sentinel_ids[0])
    if not np.array_equal(np.asarray(sentinel_ids), np.arange(first, first - len(sentinel_ids), -1)):
        raise ValueError(f"`sentinel_ids` must descend one by one; they begin {list(sentinel_ids[:4])}.")
    return first


def corrupt_spans(
    segments: np.ndarray | torch.Tensor,
    *,
    sentinel_ids: Sequence[int],
    eos_token_id: int,
    keys: np.ndarray | Sequence[int],
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> tuple[np.ndarray, np.ndarray] | tuple[torch.Tensor, torch.Tensor]:
    """Corrupts a batch of segments of equal length.

    Args:
        segments: (B, T) token ids, numpy or torch.
        sentinel_ids: ids of the sentinels in order, descending one by one.
        eos_token_id: id of `</s>`.
        keys: (B,) the random key of each segment, see `sample_keys`.
        noise_density: share of the tokens that are masked.
        mean_span_length: mean length of a masked span, in tokens.

    Returns:
        `input_ids` (B, S) and `labels` (B, L), int64, numpy or torch like `segments`. Labels contain no padding; the
        model derives its decoder inputs from them.

    Raises:
        ValueError: there are too few sentinels, a segment already contains a sentinel or a negative id, or a shape is
            wrong.
    """
    array = segments.cpu().numpy() if isinstance(segments, torch.Tensor) else np.asarray(segments)
    keys = np.asarray(keys, dtype=np.uint64)
    if array.ndim != 2 or array.shape[1] < 2 or keys.shape != array.shape[:1]:
        raise ValueError(
            "`segments` must have the shape (batch, tokens) with at least 2 tokens and `keys` the shape (batch,); got "
            f"{array.shape} and {keys.shape}."
        )
    _check_rates(noise_density, mean_span_length)
    lengths = _lengths_of_segment(array.shape[1], noise_density, mean_span_length)
    first_sentinel = check_sentinels(sentinel_ids, lengths.num_spans, lengths.segment_length)
    _check_tokens(array, first_sentinel, len(sentinel_ids))
    input_ids, labels = _corrupt_arrays(array, keys, lengths, first_sentinel, eos_token_id)
    if isinstance(segments, torch.Tensor):
        return torch.from_numpy(input_ids).to(segments.device), torch.from_numpy(labels).to(segments.device)
    return input_ids, labels


def _corrupt_arrays(
    segments: np.ndarray, keys: np.ndarray, lengths: SpanCorruptionLengths, first_sentinel: int, eos_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """`corrupt_spans` for validated arrays: scatters every token and sentinel to its place by rank and span."""
    batch, length = segments.shape
    noise, spans, kept = lengths.num_noise_tokens, lengths.num_spans, length - lengths.num_noise_tokens
    with np.errstate(over="ignore"):
        noise_starts, noise_span = _part_starts(keys, 1, noise, spans)
        kept_starts, kept_span = _part_starts(keys, 2, kept, spans)
    # Kept tokens before noise span k: (B, s).
    kept_ends = np.concatenate([kept_starts[:, 1:], np.full((batch, 1), kept)], axis=1)
    span = np.arange(spans)
    row = np.arange(batch)[:, None]

    input_ids = np.empty((batch, lengths.input_length), dtype=np.int64)
    kept_rank = np.arange(kept)
    # Before kept token j of part k lie the noise spans 0 .. k-1, that is noise_starts[k] tokens, or k sentinels.
    source = kept_rank + np.take_along_axis(noise_starts, kept_span, axis=1)
    input_ids[row, kept_rank + kept_span] = np.take_along_axis(segments, source, axis=1)
    input_ids[row, kept_ends + span] = first_sentinel - span
    input_ids[:, -1] = eos_token_id

    labels = np.empty((batch, lengths.target_length), dtype=np.int64)
    noise_rank = np.arange(noise)
    source = noise_rank + np.take_along_axis(kept_ends, noise_span, axis=1)
    labels[row, noise_rank + noise_span + 1] = np.take_along_axis(segments, source, axis=1)
    labels[row, noise_starts + span] = first_sentinel - span
    labels[:, -1] = eos_token_id
    return input_ids, labels


def _check_tokens(segments: np.ndarray, first_sentinel: int, num_sentinels: int) -> None:
    last_sentinel = first_sentinel - num_sentinels + 1
    if segments.size == 0 or (segments.min() >= 0 and segments.max() < last_sentinel):
        return
    if segments.min() < 0:
        raise ValueError(f"`segments` contains the negative id {int(segments.min())}; token ids start at 0.")
    inside = (segments >= last_sentinel) & (segments <= first_sentinel)
    if inside.any():
        raise ValueError(
            f"`segments` contains the id {int(segments[inside][0])}, which is a sentinel ({last_sentinel} to "
            f"{first_sentinel}), so "
            "the corruption could not be undone. Tokenise the corpus with `split_special_tokens=True`."
        )


def restore_segment(
    input_ids: Sequence[int] | np.ndarray | torch.Tensor,
    labels: Sequence[int] | np.ndarray | torch.Tensor,
    *,
    sentinel_ids: Sequence[int],
) -> list[int]:
    """Undoes the corruption of one sample: replaces each sentinel with its masked span.

    Args:
        input_ids: (S,) corrupted input with its `</s>`.
        labels: (L,) target with its `</s>`; -100 is ignored.
        sentinel_ids: ids of the sentinels in order.
    """
    rank = {int(token): index for index, token in enumerate(sentinel_ids)}
    hidden: dict[int, list[int]] = {}
    current: list[int] = []
    for token in [int(token) for token in labels if int(token) != -100][:-1]:
        if token in rank:
            current = hidden.setdefault(rank[token], [])
        else:
            current.append(token)
    restored: list[int] = []
    for token in [int(token) for token in input_ids][:-1]:
        restored.extend(hidden[rank[token]] if token in rank else [token])
    return restored


class SpanCorruptionDataset(Dataset[dict[str, Any]]):
    """Span corruption over a packed array of tokens, as a map-style data set with `input_ids` (S,) and `labels` (L,).

    Sample `index` is segment `index` of the array, with noise that depends on (seed, epoch, index). The Trainer calls
    `set_epoch` in each epoch, so the same text is masked differently every time.

    Args:
        tokens: (N,) packed token ids, or the path of a file written by `tokenize_corpus`; memory-mapped arrays stay on
            disk.
        input_length: S, tokens of the model's input.
        sentinel_ids: ids of the sentinels in order.
        eos_token_id: id of `</s>`.
        noise_density: share of the tokens that are masked.
        mean_span_length: mean length of a masked span, in tokens.
        seed: seed of the noise.
        resample_each_epoch: False keeps the noise of epoch 0; use it for evaluation.

    Raises:
        ValueError: there are too few sentinels for this length, or fewer tokens than one segment.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        input_length: int,
        sentinel_ids: Sequence[int],
        eos_token_id: int,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        seed: int = 0,
        resample_each_epoch: bool = True,
    ) -> None:
        self.lengths: SpanCorruptionLengths = span_corruption_lengths(input_length, noise_density, mean_span_length)
        check_sentinels(sentinel_ids, self.lengths.num_spans, self.lengths.segment_length)
        self.blocks: TokenBlocks = TokenBlocks(tokens, self.lengths.segment_length)
        self.sentinel_ids: list[int] = list(sentinel_ids)
        self.eos_token_id = eos_token_id
        self.noise_density = noise_density
        self.mean_span_length = mean_span_length
        self.seed = seed
        self.resample_each_epoch = resample_each_epoch
        self.epoch: int = 0

    def __len__(self) -> int:
        return len(self.blocks)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the noise; has no effect if `resample_each_epoch` is False."""
        if self.resample_each_epoch:
            self.epoch = epoch

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Several samples as one stack: `input_ids` (B, S) and `labels` (B, L)."""
        segments = self.blocks.rows(indices)
        input_ids, labels = corrupt_spans(
            segments,
            sentinel_ids=self.sentinel_ids,
            eos_token_id=self.eos_token_id,
            keys=sample_keys(self.seed, self.epoch, self.blocks.positive(indices)),
            noise_density=self.noise_density,
            mean_span_length=self.mean_span_length,
        )
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Samples of one batch; the DataLoader calls this instead of `__getitem__` for each."""
        batch = self.batch(indices)
        return [
            {"input_ids": inputs, "labels": labels}
            for inputs, labels in zip(batch["input_ids"].unbind(0), batch["labels"].unbind(0))
        ]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]


class SpanCorruptionCollator:
    """Stacks samples and adds the inputs of the decoder.

    Models derive these from the labels, but a Trainer with label smoothing removes the labels from the batch.

    Args:
        model: encoder-decoder that shifts the labels.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(samples)
        batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch

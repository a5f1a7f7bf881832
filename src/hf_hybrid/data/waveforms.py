"""Raw waveforms for classification: a data set from rows of samples, and batches padded by a feature extractor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from ..processing.audio_processing import WaveformFeatureExtractor

if TYPE_CHECKING:
    from datasets import Dataset

PCM_SCALE = 32768.0  # of signed 16-bit samples


def to_waveform(samples: Any) -> np.ndarray:
    """Samples as (L,) float32; integers are taken as signed 16-bit samples and scaled to [-1, 1).

    Raises:
        ValueError: the waveform is empty, has several channels, is not finite, or exceeds 16 bits.
    """
    values = np.asarray(samples)
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iuf":
        raise ValueError(
            f"a waveform is a sequence of numbers, one channel; got shape {values.shape} of {values.dtype}"
        )
    if values.dtype.kind in "iu":
        if values.min() < -PCM_SCALE or values.max() >= PCM_SCALE:
            raise ValueError(f"integers are read as 16-bit samples; got {values.min()} to {values.max()}")
        return (values / PCM_SCALE).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a sample is not finite")
    return values.astype(np.float32)


def read_waveforms(
    rows: Dataset, column: str, *, sampling_rate: int | None = None, max_samples: int | None = None, what: str = "data"
) -> tuple[list[np.ndarray], int | None]:
    """The waveforms of all rows and their common sampling rate.

    Args:
        rows: rows with a column of samples, or of mappings with `array` and `sampling_rate`; the rate may also be in a
            column `sampling_rate`.
        column: name of the column of waveforms.
        sampling_rate: sampling rate that all must have, in Hz; None for that of the first row.
        max_samples: number of samples to which longer waveforms are truncated.
        what: name of the rows in error messages.

    Raises:
        ValueError: a row is not a waveform or has another rate; the message names the first such row.
    """
    waveforms: list[np.ndarray] = []
    has_rate = "sampling_rate" in rows.column_names
    for number, row in enumerate(rows.with_format("numpy")):
        value, rate = row[column], row["sampling_rate"] if has_rate else None
        if isinstance(value, dict):
            rate = value.get("sampling_rate", rate)
            value = value.get("array")
        if rate is not None and sampling_rate is not None and int(rate) != sampling_rate:
            raise ValueError(
                f"Row {number} of the {what} has a sampling rate of {int(rate)} Hz instead of {sampling_rate}: resample it."
            )
        sampling_rate = int(rate) if rate is not None else sampling_rate
        try:
            waveforms.append(to_waveform(value)[:max_samples])
        except ValueError as error:
            raise ValueError(f"Row {number} of the {what} cannot be used: {error}.") from None
    return waveforms, sampling_rate


class WaveformDataset(TorchDataset):
    """Waveforms of any lengths with labels: `input_values` (L,) float32 and `labels`."""

    def __init__(self, waveforms: Sequence[np.ndarray], labels: Sequence[int]) -> None:
        self.waveforms = waveforms
        self.labels = labels

    def __len__(self) -> int:
        return len(self.waveforms)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_values": self.waveforms[index], "labels": self.labels[index]}


def standardization(waveforms: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean and standard deviation over all samples, as arguments of the feature extractor."""
    count = sum(waveform.size for waveform in waveforms)
    mean = sum(float(waveform.sum(dtype=np.float64)) for waveform in waveforms) / count
    squares = sum(float(((waveform - mean) ** 2).sum(dtype=np.float64)) for waveform in waveforms)
    return {"mean": mean, "std": max((squares / count) ** 0.5, 1e-8)}


class WaveformCollator:
    """Pads a batch at the right: `input_values` (B, L), `attention_mask` (B, L) and `labels` (B,).

    Args:
        extractor: feature extractor that scales and pads.
    """

    def __init__(self, extractor: WaveformFeatureExtractor) -> None:
        self.extractor = extractor

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.extractor(
            [row["input_values"] for row in features],
            sampling_rate=self.extractor.sampling_rate,
            padding=True,
            return_tensors="pt",
        )
        return {**batch, "labels": torch.tensor([int(row["labels"]) for row in features])}

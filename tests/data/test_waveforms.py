"""Raw waveforms: scaling, padding, sampling rates, and rows that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from hf_hybrid.data.waveforms import WaveformCollator, WaveformDataset, read_waveforms, standardization, to_waveform
from hf_hybrid.processing.audio_processing import WaveformFeatureExtractor


def test_whole_numbers_are_sixteen_bits():
    assert to_waveform([-32768, 0, 16384]).tolist() == [-1.0, 0.0, 0.5]
    assert to_waveform(np.array([0.25, -2.0])).tolist() == [0.25, -2.0] and to_waveform([1]).dtype == np.float32


@pytest.mark.parametrize("rows", [
    {"samples": [[1, 2, 3], [4]], "sampling_rate": [8000, 8000]},
    {"samples": [{"array": [1, 2, 3], "sampling_rate": 8000}, {"array": [4], "sampling_rate": 8000}]},
])  # fmt: skip
def test_forms_of_rows(rows):
    waveforms, rate = read_waveforms(Dataset.from_dict(rows), "samples", max_samples=2)
    assert rate == 8000 and [len(waveform) for waveform in waveforms] == [2, 1]
    with pytest.raises(ValueError, match="Row 0 of the x has a sampling rate of 8000 Hz instead of 16000"):
        read_waveforms(Dataset.from_dict(rows), "samples", sampling_rate=16000, what="x")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "one channel"),
        ([[1.0], [2.0]], "one channel"),
        ([70000], "16-bit samples; got 70000"),
        ([float("inf")], "not finite"),
    ],
)
def test_unusable_waveforms(samples, message):
    with pytest.raises(ValueError, match=f"Row 0 of the data cannot be used: .*{message}"):
        read_waveforms(Dataset.from_dict({"samples": [samples]}), "samples")


def test_batches_are_padded_at_the_right():
    data = WaveformDataset([np.array([1.0, 3.0], np.float32), np.array([0.0, 1.0, 2.0, 3.0], np.float32)], [1, 0])
    batch = WaveformCollator(WaveformFeatureExtractor(sampling_rate=8000))([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and batch["labels"].tolist() == [1, 0]
    values = batch["input_values"]
    assert values[0].tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0], abs=1e-4)
    assert values[1].mean() == pytest.approx(0.0, abs=1e-6) and values.dtype.is_floating_point
    scale = standardization(data.waveforms)
    assert scale == {"mean": pytest.approx(10 / 6), "std": pytest.approx(np.std([1, 3, 0, 1, 2, 3]))}
    common = WaveformCollator(WaveformFeatureExtractor(sampling_rate=8000, **scale))([data[0]])
    expected = [(value - scale["mean"]) / scale["std"] for value in (1.0, 3.0)]
    assert common["input_values"][0].tolist() == pytest.approx(expected, abs=1e-4)

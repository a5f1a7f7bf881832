"""Waveforms as sequences of samples, for every architecture with an audio head."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature


class WaveformFeatureExtractor(SequenceFeatureExtractor):
    """Standardised, padded samples: `input_values` (B, L) and `attention_mask` (B, L).

    Args:
        sampling_rate: samples per second that the model was trained with.
        mean, std: statistics of the training data; None standardises every waveform by its own statistics.
        padding_value: value of the samples after the end of a waveform.
    """

    model_input_names: ClassVar[list[str]] = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        mean: float | None = None,
        std: float | None = None,
        return_attention_mask: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        if sampling_rate < 1:
            raise ValueError(f"`sampling_rate` must be a positive number of samples per second; got {sampling_rate}.")
        if (mean is None) != (std is None) or (std is not None and std <= 0):
            raise ValueError(
                f"`mean` and `std` must both be given, with a positive `std`, or both be None; got {mean}, {std}."
            )
        self.mean = mean
        self.std = std
        self.return_attention_mask = return_attention_mask

    def _standardise(self, waveform: Any) -> np.ndarray:
        values = np.asarray(waveform, dtype=np.float32)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(
                f"A waveform must be mono, one sample after the other, and not empty; got shape {values.shape}. Average the channels."
            )
        mean = values.mean() if self.mean is None else self.mean
        std = values.std() if self.std is None else self.std
        return (values - mean) / (std + 1e-5)

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Processes one waveform (samples,) or a list of them.

        Args:
            sampling_rate: sampling rate of the waveforms in Hz, which must be that of the feature extractor.

        Raises:
            ValueError: the sampling rate differs, or a waveform is empty or has several channels.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` is {sampling_rate}, but the model was trained with {self.sampling_rate} samples per second: "
                "resample the waveform."
            )
        is_batch = isinstance(raw_speech, (list, tuple)) and (not raw_speech or np.ndim(raw_speech[0]) > 0)
        is_batch = is_batch or (isinstance(raw_speech, np.ndarray) and raw_speech.ndim == 2)
        waveforms = [self._standardise(waveform) for waveform in (raw_speech if is_batch else [raw_speech])]
        if not waveforms:
            raise ValueError("`raw_speech` is empty: pass at least one waveform.")
        return self.pad(
            BatchFeature({"input_values": waveforms}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=self.return_attention_mask
            if return_attention_mask is None
            else return_attention_mask,
            return_tensors=return_tensors,
        )


__all__ = ["WaveformFeatureExtractor"]

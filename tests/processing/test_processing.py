"""Image processor and feature extractor: values, saving, pipelines, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import Case
from transformers import AutoFeatureExtractor, pipeline

from hf_hybrid.auto import image_processor_class
from hf_hybrid.processing.audio_processing import WaveformFeatureExtractor
from hf_hybrid.processing.image_processing import PixelSequenceImageProcessor

IMAGE = Case("mega", "AutoModelForImageClassification", "default")
AUDIO = Case("mega", "AutoModelForAudioClassification", "default")


class TestImages:
    def test_values(self) -> None:
        image = np.array([[0, 255], [51, 102]], dtype=np.uint8)
        values = PixelSequenceImageProcessor()(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(values, torch.tensor([[[[-1.0, 1.0], [-0.6, -0.2]]]]))
        floats = PixelSequenceImageProcessor(image_mean=0.0, image_std=1.0)(image / 255, return_tensors="pt")
        torch.testing.assert_close(floats["pixel_values"], (values + 1) / 2)

    def test_colours_and_layouts_become_grey(self) -> None:
        colours = torch.rand(3, 5, 7)
        process = PixelSequenceImageProcessor(image_mean=0.0, image_std=1.0)
        expected = 0.299 * colours[0] + 0.587 * colours[1] + 0.114 * colours[2]
        for form in (colours, colours.permute(1, 2, 0), [colours], colours.unsqueeze(0).numpy()):
            values = process(form, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(values, expected[None, None])

    def test_resizing(self) -> None:
        process = PixelSequenceImageProcessor(image_size=8)
        images = [torch.rand(1, 16, 16), np.zeros((5, 9, 3), dtype=np.uint8)]
        assert process(images, return_tensors="pt")["pixel_values"].shape == (2, 1, 8, 8)
        with pytest.raises(ValueError, match="must have the same size.*Set `image_size`"):
            PixelSequenceImageProcessor()(images)

    def test_pillow(self) -> None:
        image = pytest.importorskip("PIL.Image").new("RGB", (6, 4), (255, 255, 255))
        values = PixelSequenceImageProcessor()(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(values, torch.ones(1, 1, 4, 6))

    def test_what_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`image_size` must be a positive"):
            PixelSequenceImageProcessor(image_size=0)
        with pytest.raises(ValueError, match="`image_std` must be positive"):
            PixelSequenceImageProcessor(image_std=0)
        with pytest.raises(ValueError, match=r"An image must have shape.*\(7,\)"):
            PixelSequenceImageProcessor()([np.zeros(7)])
        with pytest.raises(ValueError, match="`images` is empty"):
            PixelSequenceImageProcessor()([])

    def test_saved_and_found_by_the_auto_class(self, tmp_path: Path) -> None:
        IMAGE.model(image_size=8).save_pretrained(tmp_path)
        process = PixelSequenceImageProcessor(image_size=8, image_mean=0.48, image_std=0.24)
        process.save_pretrained(tmp_path)
        loaded = image_processor_class().from_pretrained(tmp_path)
        assert type(loaded) is PixelSequenceImageProcessor
        assert (loaded.image_size, loaded.image_mean, loaded.image_std) == (8, 0.48, 0.24)
        image = torch.rand(16, 16)
        np.testing.assert_array_equal(loaded(image)["pixel_values"], process(image)["pixel_values"])

    def test_pipeline(self, tmp_path: Path) -> None:
        picture = pytest.importorskip("PIL.Image").new("L", (9, 9), 90)
        model = IMAGE.model(image_size=8, num_labels=3)
        classify = pipeline(
            "image-classification", model=model, image_processor=PixelSequenceImageProcessor(image_size=8)
        )
        scores = classify([picture, picture], batch_size=2)
        assert len(scores) == 2 and len(scores[0]) == 3


class TestWaveforms:
    def test_values_and_padding(self) -> None:
        extract = WaveformFeatureExtractor(sampling_rate=8000, mean=1.0, std=2.0)
        batch = extract([np.array([1.0, 3.0, 5.0]), [3.0]], sampling_rate=8000, return_tensors="pt")
        expected = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
        torch.testing.assert_close(batch["input_values"], expected, rtol=1e-4, atol=1e-4)
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]

    def test_every_recording_by_its_own_statistics(self) -> None:
        values = WaveformFeatureExtractor()(np.random.default_rng(0).normal(3, 5, 400), return_tensors="pt")[
            "input_values"
        ]
        assert values.shape == (1, 400)
        assert abs(float(values.mean())) < 1e-4 and abs(float(values.std()) - 1) < 1e-2

    def test_what_is_refused(self) -> None:
        extract = WaveformFeatureExtractor(sampling_rate=8000)
        with pytest.raises(
            ValueError, match="`sampling_rate` is 16000, but the model was trained with 8000.*resample"
        ):
            extract(np.zeros(9), sampling_rate=16000)
        with pytest.raises(ValueError, match=r"must be mono.*\(9, 2\)"):
            extract([np.zeros((9, 2))])
        with pytest.raises(ValueError, match="not empty"):
            extract([np.zeros(0)])
        with pytest.raises(ValueError, match="`mean` and `std` must both be given"):
            WaveformFeatureExtractor(mean=0.0)
        with pytest.raises(ValueError, match="`sampling_rate` must be a positive"):
            WaveformFeatureExtractor(sampling_rate=0)

    def test_saved_and_found_by_the_auto_class(self, tmp_path: Path) -> None:
        AUDIO.model().save_pretrained(tmp_path)
        WaveformFeatureExtractor(sampling_rate=8000, mean=0.1, std=0.3).save_pretrained(tmp_path)
        loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
        assert type(loaded) is WaveformFeatureExtractor
        assert (loaded.sampling_rate, loaded.mean, loaded.std) == (8000, 0.1, 0.3)

    def test_pipeline(self) -> None:
        model = AUDIO.model(num_labels=3)
        classify = pipeline(
            "audio-classification", model=model, feature_extractor=WaveformFeatureExtractor(sampling_rate=8000)
        )
        scores = classify({"raw": np.sin(np.arange(60.0)).astype(np.float32), "sampling_rate": 8000})
        assert len(scores) == 3

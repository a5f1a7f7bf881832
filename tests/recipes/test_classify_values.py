"""Classification of images and of waveforms, end to end with every architecture that has the head."""

from __future__ import annotations

import json

import numpy as np
import pytest
from factories import TINY_OVERRIDES
from PIL import Image
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    pipeline,
)

from hf_hybrid.auto import ARCHITECTURES, image_processor_class
from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import classify_audio, classify_image, evaluate, train_lra


def arches(head: str) -> list:
    """Architectures that have the head; all but the first are wide."""
    found = [item.model_type for item in ARCHITECTURES if head in item.heads]
    return found[:1] + [pytest.param(name, marks=pytest.mark.wide) for name in found[1:]]


def images_row(folder, number: int) -> str:
    return (folder / "train.jsonl").read_text().splitlines()[number]


def write_split(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def images(tmp_path):
    rows = [{"pixels": [200 * (i % 2)] * 8 + list(range(8)), "label": i % 2} for i in range(16)]
    write_split(tmp_path / "images", "train", rows)
    write_split(tmp_path / "images", "validation", rows[:6])
    return tmp_path / "images"


@pytest.fixture
def sounds(tmp_path):
    draw = np.random.default_rng(0)
    rows = [
        {"samples": draw.integers(-900, 900, 20 + i).tolist(), "sampling_rate": 8000, "digit": i % 3, "speaker": "x"}
        for i in range(12)
    ]
    write_split(tmp_path / "sounds", "train", rows)
    write_split(tmp_path / "sounds", "validation", rows[:5])
    return tmp_path / "sounds"


@pytest.fixture
def training(options) -> dict:
    return {**options, "save_strategy": "no", "eval_strategy": "no", "per_device_train_batch_size": 8}


@pytest.mark.parametrize("arch", arches("AutoModelForImageClassification"))
def test_images_are_told_apart(training, images, tmp_path, arch):
    base = {**training, "data": [str(images)], "arch": arch, "config_overrides": TINY_OVERRIDES[arch]}
    metrics = classify_image.main({**base, "max_steps": 40, "learning_rate": 1e-2})
    assert metrics["eval_accuracy"] == 1.0 and metrics["pixels"] == 16
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    assert model_card_problems(card) == [] and "pipeline_tag: image-classification" in card
    assert AutoModelForImageClassification.from_pretrained(run).config.input_type == "values"
    again = {"kind": "image", "model_name_or_path": str(run), "output_dir": str(tmp_path / "eval"), "use_cpu": True}
    measured = evaluate.main({**again, "data": [str(images)]})
    assert measured["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5, abs=1e-7)
    picture = Image.fromarray(np.array(json.loads(images_row(images, 1))["pixels"], np.uint8).reshape(4, 4))
    classify = pipeline(
        "image-classification", model=str(run), image_processor=image_processor_class().from_pretrained(run)
    )
    assert classify(picture)[0]["label"] == "1"
    lra = {**base, "task": "image", "pixel_values": True, "max_steps": 1, "output_dir": str(tmp_path / "lra")}
    assert train_lra.main(lra)["longest_sequence"] == 16


@pytest.mark.parametrize("arch", arches("AutoModelForAudioClassification"))
def test_waveforms_are_classified(training, sounds, tmp_path, arch):
    base = {**training, "data": [str(sounds)], "arch": arch, "config_overrides": TINY_OVERRIDES[arch]}
    metrics = classify_audio.main({**base, "max_steps": 2})
    assert metrics["sampling_rate"] == 8000 and metrics["longest_sequence"] == 31
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    assert model_card_problems(card) == [] and "pipeline_tag: audio-classification" in card
    assert AutoModelForAudioClassification.from_pretrained(run).config.num_labels == 3
    assert AutoFeatureExtractor.from_pretrained(run).sampling_rate == 8000
    again = {"kind": "audio", "model_name_or_path": str(run), "output_dir": str(tmp_path / "eval"), "use_cpu": True}
    measured = evaluate.main({**again, "validation_data": [str(sounds)]})
    assert measured["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    classify = pipeline("audio-classification", model=str(run), feature_extractor=str(run))
    assert len(classify(np.zeros(50, np.float32) + 0.1, top_k=3)) == 3
    base["standardize"] = "data"
    short = classify_audio.main({**base, "max_steps": 1, "max_seconds": 0.001, "output_dir": str(tmp_path / "short")})
    assert short["longest_sequence"] == 8


@pytest.mark.parametrize("arch", arches("AutoModelForAudioClassification"))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": 16000}, "Row 0 of the training data has a sampling rate of 8000 Hz instead of 16000"),
        ({"audio_column": "sound"}, "no column 'sound'"),
        ({"label_column": "word"}, "no column 'word'"),
        ({"standardize": "all"}, "`standardize` must be 'recording' or 'data'"),
    ],
)
def test_bad_sounds_are_explained(training, sounds, tmp_path, arch, changes, message):
    base = {**training, "data": [str(sounds)], "arch": arch, "config_overrides": TINY_OVERRIDES[arch], "max_steps": 1}
    with pytest.raises(ValueError, match=message):
        classify_audio.main({**base, **changes})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arch", arches("AutoModelForImageClassification"))
def test_bad_images_are_explained(training, images, arch):
    base = {**training, "data": [str(images)], "arch": arch, "config_overrides": TINY_OVERRIDES[arch], "max_steps": 1}
    write_split(images, "validation", [{"pixels": [1, 2], "label": 0}])
    with pytest.raises(ValueError, match="Training images have 16 pixels, validation images 2"):
        classify_image.main(base)
    with pytest.raises(ValueError, match="`pixel_std` must be positive"):
        classify_image.main({**base, "pixel_std": 0})


@pytest.mark.parametrize("recipe", [classify_image, classify_audio])
def test_other_architectures_are_refused(training, images, recipe):
    with pytest.raises(ValueError, match="has no head for AutoModelFor(Image|Audio)Classification"):
        recipe.main({**training, "data": [str(images)], "arch": "spade"})

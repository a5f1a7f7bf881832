"""Stand-ins for the data of published experiments: small, generated or taken from the Python installation, of the same form.

They show that an experiment runs; figures on them cannot be compared with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...data.corpus import embedded_classification_examples, embedded_summarization_pairs, embedded_text_corpus
from ...tokenization.byte_tokenizer import byte_tokenizer

_TEXT_BYTES = 400_000  # of Python sources to read texts from
_CLASSES = 10


def write_stand_in(data_format: str, folder: Path, rows: int = 256, length: int = 1024) -> Path:
    """Writes `train` and `validation` files that the recipe of an experiment reads, unless they are there.

    Args:
        data_format: see `Experiment`.
        folder: where to write.
        rows: number of training rows; of texts there may be fewer.
        length: pixels of an image, or samples of a waveform.
    """
    if (folder / "train.jsonl").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((("train", rows), ("validation", max(4, rows // 8)))):
        found = _MAKERS[data_format](split, count, length, np.random.default_rng(number))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return folder


def write_byte_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer whose tokens are bytes."""
    byte_tokenizer().save_pretrained(folder)
    return folder


def _text(split: str, count: int, length: int, draw: np.random.Generator) -> list[dict]:
    return [{"text": text} for text in embedded_text_corpus(split, max_source_bytes=_TEXT_BYTES)[:count]]


def _bytes(split: str, count: int, length: int, draw: np.random.Generator) -> list[dict]:
    """Texts of two classes."""
    found = embedded_classification_examples(split, max_source_bytes=5 * _TEXT_BYTES)
    names = sorted({row["label"] for row in found})[:2]
    return [{"text": row["sentence"], "label": names.index(row["label"])} for row in found if row["label"] in names][
        :count
    ]


def _pairs(split: str, count: int, length: int, draw: np.random.Generator) -> list[dict]:
    """Texts to translate into one another."""
    found = embedded_summarization_pairs(split, max_source_bytes=_TEXT_BYTES)[:count]
    return [{"translation": {"en": row["document"][:400], "de": row["summary"]}} for row in found]


def _documents(split: str, count: int, length: int, draw: np.random.Generator) -> list[dict]:
    """Pairs of pieces of texts, of the same text or of two."""
    texts = [text for text in embedded_text_corpus(max_source_bytes=_TEXT_BYTES) if len(text) > 400]
    rows = []
    for number in range(count):
        first, second = draw.choice(len(texts), 2, replace=False)
        other = texts[first] if number % 2 else texts[second]
        rows.append({"text1": texts[first][:2000], "text2": other[len(other) // 2 :][:2000], "label": number % 2})
    return rows


def _pixels(split: str, count: int, length: int, draw: np.random.Generator) -> list[dict]:
    """Square images of stripes in noise; the class is their direction."""
    side = int(length**0.5)
    across, down = np.meshgrid(np.arange(side), np.arange(side))
    rows = []
    for number in range(count):
        angle = np.pi * (number % _CLASSES) / _CLASSES
        wave = np.sin(0.8 * (across * np.cos(angle) + down * np.sin(angle)) + draw.uniform(0, 2 * np.pi))
        image = np.clip(128 + 60 * wave + 30 * draw.standard_normal((side, side)), 0, 255)
        rows.append({"pixels": image.astype(int).ravel().tolist(), "label": number % _CLASSES})
    return rows


def _waveforms(split: str, count: int, length: int, draw: np.random.Generator) -> list[dict]:
    """Tones in noise at 16 kHz; the class is their pitch."""
    time = np.arange(length) / 16_000
    rows = []
    for number in range(count):
        pitch = 200.0 * 1.35 ** (number % _CLASSES)
        wave = np.sin(2 * np.pi * pitch * time + draw.uniform(0, 2 * np.pi)) + 0.3 * draw.standard_normal(length)
        rows.append(
            {"samples": (8000 * wave).astype(int).tolist(), "sampling_rate": 16_000, "label": number % _CLASSES}
        )
    return rows


_MAKERS: dict[str, Callable[[str, int, int, np.random.Generator], list[dict]]] = {
    "text": _text,
    "bytes": _bytes,
    "pairs": _pairs,
    "documents": _documents,
    "pixels": _pixels,
    "waveforms": _waveforms,
}

"""Readers for the files in which the tasks of the Long Range Arena (arXiv 2011.04006) are distributed.

    listops     basic_train.tsv, basic_val.tsv, basic_test.tsv: header `Source`, `Target`
    text        aclImdb: {train,test}/{pos,neg}/*.txt
    retrieval   new_aan_pairs.{train,eval,test}.tsv: label, two identifiers, two texts; no header, no quotes
    image       cifar-10-batches-bin: data_batch_{1..5}.bin, test_batch.bin (the binary version; the Python version is a pickle)
    pathfinder  metadata/*.npy (lines of text, or arrays of strings) and imgs/*/*.png

Each reader returns columns by name, with the names in `hf_hybrid.data.lra`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .records import BadRecord, read_lines, read_records, settle

Columns = dict[str, Any]

_LISTOPS_FILES = {"train": "train", "validation": "val", "test": "test"}
_RETRIEVAL_FILES = {"train": "train", "validation": "eval", "test": "test"}
_CIFAR_VALIDATION = 5_000  # the last images of the training set
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SPLITS = {
    "train": (0.0, 0.8),
    "validation": (0.8, 0.9),
    "test": (0.9, 1.0),
}  # shares of Pathfinder, in the order of its files


def read_original(
    task: str, source: str | Path, split: str, *, encoding: str | None = None, on_bad_record: str = "error"
) -> Columns | None:
    """Columns of one split of a distributed folder or file; None if the path does not have the format of the task.

    Args:
        task: "listops", "text", "retrieval", "image" or "pathfinder".
        source: folder, or for the `.tsv` tasks also a single file, which is read whole.
        split: "train", "validation" or "test".
        encoding: encoding of texts; None = UTF-8.
        on_bad_record: "error", or "skip" to leave out and log damaged lines and texts.

    Raises:
        ValueError: a file is damaged, or the split is missing.
    """
    path = Path(source).expanduser()
    if not path.exists() or split not in _SPLITS:
        return None
    if task in _TEXT_READERS:
        return _TEXT_READERS[task](path, split, encoding, on_bad_record)
    return _READERS[task](path, split)


def _tsv_of_split(path: Path, split: str, names: dict[str, str], separator: str) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".tsv" else None
    wanted = names.get(split, split)
    files = sorted(path.glob(f"*{separator}{wanted}.tsv"))
    if not files and any(list(path.glob(f"*{separator}{name}.tsv")) for name in names.values()):
        raise ValueError(f"{path} has no file *{separator}{wanted}.tsv for the split {split!r}.")
    return files[0] if files else None


def _read_listops(path: Path, split: str, encoding: str | None, on_bad_record: str) -> Columns | None:
    file = _tsv_of_split(path, split, _LISTOPS_FILES, "_")
    if file is None:
        return None
    (_, header_line), *lines = read_lines(file, encoding, on_bad_record) or [(1, "")]
    header = header_line.rstrip("\r").split("\t")
    if not {"Source", "Target"} <= set(header):
        return None
    source_at, target_at = header.index("Source"), header.index("Target")
    sources, targets, problems = [], [], []
    for number, line in lines:
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(header) or not fields[target_at].isdigit():
            problems.append(BadRecord(file, number, f"not the columns {', '.join(header)}"))
            continue
        sources.append(fields[source_at])
        targets.append(int(fields[target_at]))
    settle(problems, on_bad_record)
    return {"source": sources, "target": targets}


def _read_retrieval(path: Path, split: str, encoding: str | None, on_bad_record: str) -> Columns | None:
    file = _tsv_of_split(path, split, _RETRIEVAL_FILES, ".")
    if file is None:
        return None
    columns: Columns = {"text1": [], "text2": [], "label": []}
    problems = []
    for number, line in read_lines(file, encoding, on_bad_record):
        fields = line.split("\t")
        if len(fields) != 5 or fields[0] not in ("0", "1", "0.0", "1.0"):
            if number == 1 and path.is_file():
                return None  # a table with a header
            problems.append(BadRecord(file, number, "not a label (0 or 1), two names and two texts"))
            continue
        columns["label"].append(int(float(fields[0])))
        columns["text1"].append(fields[3])
        columns["text2"].append(fields[4])
    settle(problems, on_bad_record)
    return columns


def _read_reviews(path: Path, split: str, encoding: str | None, on_bad_record: str) -> Columns | None:
    folder = path / split
    if not (path / "train" / "pos").is_dir():
        return None
    if not (folder / "pos").is_dir():
        raise ValueError(
            f"{path} has no folder {split}/pos. The reviews come as train and test: choose `validation_split test`, or hold out a "
            "`validation_fraction` of the training rows."
        )
    columns: Columns = {"text": [], "label": []}
    problems = []
    for label, name in enumerate(("neg", "pos")):
        for file in sorted((folder / name).glob("*.txt")):
            for record in read_records(file, "text", "", encoding):
                if isinstance(record, BadRecord):
                    problems.append(record)
                else:
                    columns["text"].append(record.text.replace("\r\n", "\n"))
                    columns["label"].append(label)
    settle(problems, on_bad_record)
    return columns


def to_grey(rgb: np.ndarray) -> np.ndarray:
    """Luma of images (..., 3) uint8, computed and truncated to integers as in the Long Range Arena: (...) uint8."""
    luma = rgb.astype(np.float32) @ np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)
    return np.floor(luma * (255.5 / 255.0)).astype(np.uint8)


def _read_cifar(path: Path, split: str) -> Columns | None:
    if not (path / "data_batch_1.bin").is_file():
        return None
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{number}.bin" for number in range(1, 6)]
    parts = []
    for name in names:
        data = np.fromfile(path / name, dtype=np.uint8) if (path / name).is_file() else np.zeros(0, np.uint8)
        if data.size == 0 or data.size % 3073:
            raise ValueError(f"{path / name} is missing or incomplete: it must consist of records of 3,073 bytes.")
        parts.append(data.reshape(-1, 3073))
    records = np.concatenate(parts)
    if split != "test":
        held_out = min(_CIFAR_VALIDATION, len(records) // 10)
        records = records[:-held_out] if split == "train" else records[-held_out:]
    pixels = to_grey(records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1))
    return {"pixels": pixels, "label": records[:, 0].astype(np.int64), "class_names": _CIFAR_CLASSES}


def _read_pathfinder(path: Path, split: str) -> Columns | None:
    folder = path / "metadata"
    if not folder.is_dir():
        variants = (
            sorted(child.name for child in path.iterdir() if (child / "metadata").is_dir()) if path.is_dir() else []
        )
        if variants:
            raise ValueError(
                f"{path} contains several difficulties; pass one of {', '.join(str(path / v) for v in variants)}."
            )
        return None
    entries = [entry for file in sorted(folder.iterdir(), key=_by_number) for entry in _metadata(file)]
    low, high = (round(share * len(entries)) for share in _SPLITS[split])
    pixels, labels = [], []
    for place, label in entries[low:high]:
        image = _read_grey_image(path / place)
        if image is not None:
            pixels.append(image.ravel())
            labels.append(label)
    if len({row.size for row in pixels}) > 1:
        raise ValueError(f"The images of {path} have different sizes.")
    return {"pixels": np.stack(pixels) if pixels else np.zeros((0, 1), np.uint8), "label": np.array(labels, np.int64)}


def _by_number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits else -1, path.name)


def _metadata(file: Path) -> list[tuple[str, int]]:
    """Pairs of image path and label: the first, second and fourth field of each line."""
    with file.open("rb") as stream:
        is_array = stream.read(6) == b"\x93NUMPY"
    try:
        if is_array:
            rows = [[str(value) for value in row] for row in np.load(file, allow_pickle=False)]
        else:
            rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(f"{row[0]}/{row[1]}", int(row[3])) for row in rows]
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"The metadata file {file} cannot be read: {error}.") from error


def _read_grey_image(path: Path) -> np.ndarray | None:
    """(R, R) uint8; None for an empty file, of which the distributed folders contain a few."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('Reading images needs Pillow: pip install "hf_hybrid[train]".') from error
    try:
        if path.stat().st_size == 0:
            return None
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except OSError as error:
        raise ValueError(f"The image {path} cannot be read: {error}.") from error


_TEXT_READERS: dict[str, Callable[[Path, str, str | None, str], Columns | None]] = {
    "listops": _read_listops,
    "text": _read_reviews,
    "retrieval": _read_retrieval,
}
_READERS: dict[str, Callable[[Path, str], Columns | None]] = {
    "image": _read_cifar,
    "pathfinder": _read_pathfinder,
}

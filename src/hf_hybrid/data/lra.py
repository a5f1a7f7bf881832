"""The tasks of the Long Range Arena (arXiv 2011.04006): their rows, their tokens, and data sets for a Trainer.

Every task is the classification of one long sequence, or of two (retrieval). Rows come from the files in which the
tasks are distributed (`lra_files`), from any table with the usual columns, or from the generators of ListOps and
Pathfinder, and always have the columns of `TASKS`:

    task         columns          tokens                              longest   classes
    listops      source           operators, digits                     2,000        10
    text         text             bytes                                 4,000   of the data
    retrieval    text1, text2     bytes                             2 x 4,000         2
    image        pixels           grey values, row by row              1,024   of the data
    pathfinder   pixels           grey values, row by row      1,024 - 16,384         2

Token 0 is padding in all tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch.utils.data import Dataset as TorchDataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..tokenization.byte_tokenizer import byte_tokenizer
from ..tokenization.special_tokens import PAD_TOKEN, UNK_TOKEN, wrap_backend
from .loading import load_table
from .lra_files import read_original, to_grey
from .lra_listops import END, TOKENS
from .records import origin_of, remember_origin
from .truncation import TruncatingTokenizer

if TYPE_CHECKING:
    from datasets import Dataset

GREY_VALUES = 256


@dataclass(frozen=True)
class LraTask:
    """One task.

    Args:
        name: name of the task.
        columns: columns of a row, without `label`.
        max_length: maximum number of tokens of a sequence, to which longer ones are truncated; None for pixels.
        class_names: names of the classes; None if the data determines them.
    """

    name: str
    columns: tuple[str, ...]
    max_length: int | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def is_pixels(self) -> bool:
        """True for images, whose sequences all have the same length."""
        return self.columns == ("pixels",)


TASKS = {
    task.name: task
    for task in (
        LraTask("listops", ("source",), 2000, tuple("0123456789")),
        LraTask("text", ("text",), 4000),
        LraTask("retrieval", ("text1", "text2"), 4000, ("unrelated", "related")),
        LraTask("image", ("pixels",)),
        LraTask("pathfinder", ("pixels",), None, ("disconnected", "connected")),
    )
}

# Names of the columns in tables of other origin.
_COLUMN_NAMES = {
    "source": ("source", "Source"),
    "text": ("text", "sentence", "review", "document"),
    "text1": ("text1", "sentence1", "document1", "question"),
    "text2": ("text2", "sentence2", "document2", "sentence"),
    "pixels": ("pixels", "image", "img"),
    "label": ("label", "target", "Target", "labels"),
}


def lra_task(name: str) -> LraTask:
    """A task by its name.

    Raises:
        ValueError: unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}; got {name!r}.")
    return TASKS[name]


# ------------------------------------------------------------------------------------------------------------ rows


def load_lra_table(
    task: LraTask,
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    config_name: str | None = None,
    **reading: Any,
) -> Dataset:
    """Rows of one split with the columns of the task and `label`.

    Args:
        task: the task, which determines formats and columns.
        source: folders or files in the distributed format of the task, or anything that `load_table` reads.
        split: "train", "validation" or "test".
        config_name: configuration of a Hub data set.
        **reading: `encoding` and `on_bad_record` of `load_table`.

    Raises:
        ValueError: there is nothing to read, a file is damaged, or a column is missing.
    """
    from datasets import concatenate_datasets

    sources = [source] if isinstance(source, (str, Path)) else list(source)
    parts = []
    for item in sources:
        columns = read_original(task.name, item, split, **reading)
        if columns is None:
            parts.append(_usual_columns(load_table(item, split, config_name=config_name, **reading), task, str(item)))
        else:
            parts.append(lra_rows(task, columns))
    if not parts:
        raise ValueError("`source` is an empty list; pass at least one file, folder or data set name.")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def lra_rows(task: LraTask, columns: Mapping[str, Any]) -> Dataset:
    """A data set from the columns of a reader or a generator; `target` is accepted for `label`."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    labels = columns["label"] if "label" in columns else columns["target"]
    names = columns.get("class_names", task.class_names)
    features: dict[str, Any] = {"label": Value("int64") if names is None else ClassLabel(names=list(names))}
    content: dict[str, Any] = {"label": list(map(int, labels))}
    for name in task.columns:
        features[name] = List(Value("uint8")) if name == "pixels" else Value("string")
        content[name] = columns[name]
    return Dataset.from_dict(content, features=Features(features))


def _usual_columns(table: Any, task: LraTask, name: str) -> Dataset:
    chosen = {}
    for column in (*task.columns, "label"):
        found = next((usual for usual in _COLUMN_NAMES[column] if usual in table.column_names), None)
        if found is None:
            raise ValueError(
                f"{name} has no column {column!r} for the task {task.name} (also accepted: "
                f"{', '.join(_COLUMN_NAMES[column][1:])}); its columns are {', '.join(table.column_names)}."
            )
        chosen[found] = column
    origin = origin_of(table)
    table = table.select_columns(list(chosen))
    table = table.rename_columns({old: new for old, new in chosen.items() if old != new})
    table = table.cast_column("label", _class_label(task)) if _counts_classes(table, task) else table
    return remember_origin(table, origin)


def _class_label(task: LraTask) -> Any:
    from datasets import ClassLabel

    return ClassLabel(names=list(task.class_names or ()))


def _counts_classes(table: Any, task: LraTask) -> bool:
    """Whether the labels are indices of the known classes."""
    return task.class_names is not None and getattr(table.features["label"], "dtype", "").startswith(("int", "uint"))


def pixel_array(rows: Dataset, name: str = "data") -> np.ndarray:
    """The pixels of all rows, (N, L) uint8; images are converted to grey and flattened row by row.

    Raises:
        ValueError: the images differ in size, values do not fit in a byte, or the column contains no pixels.
    """
    sequences: list[np.ndarray] = []
    for number, value in enumerate(rows.with_format("numpy")["pixels"] if _holds_lists(rows) else rows["pixels"]):
        pixels = np.asarray(value)
        if pixels.ndim == 3 and pixels.shape[-1] >= 3:
            pixels = to_grey(pixels[..., :3])
        if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(f"Row {number} of the {name} has no pixels: integers from 0 to 255 are accepted.")
        if sequences and pixels.size != sequences[0].size:
            raise ValueError(
                f"Row {number} of the {name} has {pixels.size} pixels, the rows before have {sequences[0].size}: all images must "
                "have the same size."
            )
        sequences.append(pixels.astype(np.uint8).ravel())
    return np.stack(sequences)


def _holds_lists(rows: Dataset) -> bool:
    return hasattr(rows.features["pixels"], "feature")


# ---------------------------------------------------------------------------------------------------------- tokens


def listops_tokenizer() -> PreTrainedTokenizerBase:
    """One token per operator, digit and `]`; parentheses are dropped and `X` is read as `]`, as in the published files."""
    backend = Tokenizer(
        models.WordLevel(
            {token: index for index, token in enumerate((PAD_TOKEN, UNK_TOKEN, *TOKENS))}, unk_token=UNK_TOKEN
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"[()]"), " "), normalizers.Replace(Regex(r"(?<![A-Z])X(?![A-Z])"), END)]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap_backend(backend, num_sentinels=0, eos=False)


def lra_tokenizer(task: LraTask) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a task; None for pixels."""
    if task.is_pixels:
        return None
    return listops_tokenizer() if task.name == "listops" else byte_tokenizer()


def encode_rows(
    rows: Dataset,
    task: LraTask,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    two_inputs: bool = False,
    what: str = "data",
) -> Dataset:
    """Token ids of text rows, without labels; rows that are cut are counted.

    Args:
        rows: rows with the columns of the task.
        task: a text task.
        tokenizer: see `lra_tokenizer`.
        max_length: maximum number of tokens per text; None for that of the task.
        two_inputs: return the second text of a pair as `pair_input_ids` and `pair_attention_mask`; otherwise a pair is
            one sequence, `A </s> B </s>`.
        what: name of the rows in error messages.

    Raises:
        ValueError: a row is not text, or contains tokens unknown to the task.
    """
    length = max_length or task.max_length or 0
    first, second = task.columns[0], task.columns[1] if len(task.columns) > 1 else None
    is_joint = second is not None and not two_inputs
    tokenize = TruncatingTokenizer(tokenizer, {"max_length": 2 * length if is_joint else length})

    def encode(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        others = None if second is None else batch[second]
        return tokenize.rows_of("max_length", batch[first], others, two_inputs=two_inputs and second is not None)

    encoded = tokenize.map_rows(rows, encode, what, batch_size=200)
    if task.name == "listops":
        _refuse_unknown(encoded, rows, tokenizer, what)
    return encoded


def _refuse_unknown(encoded: Dataset, rows: Dataset, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    for number, ids in enumerate(encoded["input_ids"]):
        if tokenizer.unk_token_id in ids or not ids:
            raise ValueError(
                f"Row {number} of the {what} is not a ListOps expression: {rows[number]['source'][:60]!r}. Accepted tokens are "
                f"{' '.join(TOKENS)}."
            )


# ------------------------------------------------------------------------------------------------------- data sets


class PixelSequences(TorchDataset):
    """Images as sequences of pixels, with labels.

    Args:
        pixels: (N, L) uint8.
        labels: (N,) integers.
        as_values: return `pixel_values`, (L,) float32 with (pixel / 255 - mean) / std, instead of `input_ids`, (L,)
            int64 with pixel + 1 (0 is padding).
        mean, std: statistics of `pixel_values`.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: Sequence[int],
        *,
        as_values: bool = False,
        mean: float = 0.5,
        std: float = 0.5,
    ) -> None:
        self.pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        self.as_values = as_values
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Samples of one batch; the DataLoader calls this instead of `__getitem__` for each."""
        chosen = torch.as_tensor(indices)
        if self.as_values:
            name, inputs = "pixel_values", (self.pixels[chosen].float() / 255.0 - self.mean) / self.std
        else:
            name, inputs = "input_ids", self.pixels[chosen].long() + 1
        return [{name: row, "labels": label} for row, label in zip(inputs, self.labels[chosen])]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]


class PairCollator:
    """Pads the two texts of each row separately, to `input_ids` and `pair_input_ids` with their masks.

    Args:
        tokenizer: tokenizer that pads.
        pad_to_multiple_of: number that both padded lengths are multiples of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int = 8) -> None:
        self.pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "pair_"
        second = [
            {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
            for row in features
        ]
        first = [{name: value for name, value in row.items() if not name.startswith(prefix)} for row in features]
        padded = self.pad(second)
        return {**self.pad(first), **{f"{prefix}{name}": value for name, value in padded.items()}}

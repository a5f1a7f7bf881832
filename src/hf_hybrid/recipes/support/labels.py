"""Labels of classifiers: which kind they are, their classes and their metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import EvalPrediction, PreTrainedConfig

from ... import metrics
from ...data.records import place_of, shortened
from ...training.best_metric import NamedMetrics
from .finetuning_data import require_columns

if TYPE_CHECKING:
    from datasets import Dataset

LABEL_PROBLEMS = ("regression", "single_label_classification")  # of `problem_type`; one label for each row
_LARGEST = 2**53  # above it floating-point numbers do not hold every integer


@dataclass
class Labels:
    """Kind of the labels: names of classes, or numbers (`names` is None)."""

    column: str
    names: list[str] | None
    ids: dict[Any, int] | None = None  # raw value -> class
    kind: str | None = None  # of all raw values, as `_kind` calls it

    @property
    def is_regression(self) -> bool:
        """True when the labels are numbers to predict."""
        return self.names is None

    def encode(self, rows: Dataset, what: str) -> list[int] | list[float]:
        """Labels in the form that the model takes.

        Raises:
            ValueError: a label is missing or unknown; the message names the row.
        """
        values = rows[self.column][:]
        encoded: list[Any] = []
        for number, value in enumerate(values):
            try:
                encoded.append(self._number(value))
            except (KeyError, ValueError, TypeError):
                raise self._unknown(rows, values, number, what) from None
        return encoded

    def _number(self, value: Any) -> Any:
        if value is None or (self.kind is not None and _kind(value) != self.kind):
            raise ValueError
        return self.ids[value] if self.ids is not None else _small_number(value)

    def _unknown(self, rows: Dataset, values: Sequence[Any], number: int, what: str) -> ValueError:
        accepted = f"finite numbers below {_LARGEST} in size"
        if self.ids is not None:
            accepted = ", ".join(map(repr, self.ids))
            # One word makes text of all cells of a .csv column: it is the word that is wrong.
            known = {*self.ids, *map(str, self.ids)}
            number = next((index for index, value in enumerate(values) if not _is_among(value, known)), number)
        return ValueError(
            f"{place_of(rows, number, what)} has the label {shortened(values[number])} in the column {self.column!r}; accepted are "
            f"{accepted}."
        )


def _is_among(value: Any, known: set[Any]) -> bool:
    return not isinstance(value, (list, dict)) and (value in known or str(value) in known)


def _small_number(value: Any) -> float:
    """A number to predict: finite, and small enough for a squared error. Integers that no reader holds come as such numbers too."""
    number = float(value)
    if not abs(number) < _LARGEST:
        raise ValueError
    return number


def find_labels(rows: Dataset, column: str, problem_type: str | None = None) -> Labels:
    """Infers the kind of the labels and the classes from the training rows.

    Args:
        rows: training rows.
        column: name of the column.
        problem_type: one of `LABEL_PROBLEMS`; None = numbers to predict if they are decimal, else classes.

    Raises:
        ValueError: the column is missing, mixes types, holds a single class, or decimal numbers that may be meant as classes.
    """
    from datasets import ClassLabel

    require_columns(rows, [column], "training data")
    feature = rows.features[column]
    values = rows[column][:]
    present = [value for value in values if value is not None]
    if not present:
        raise ValueError(f"The column {column!r} of the training data contains no label.")
    if problem_type == "regression":
        return Labels(column, None)
    if isinstance(feature, ClassLabel):
        known = set(range(feature.num_classes))
        if set(present) <= known:  # others are named, with their line, when the labels are encoded
            _check_several(set(present), column, feature.int2str)
        numbers = {number: number for number in range(feature.num_classes)}
        return Labels(column, list(feature.names), numbers, kind="a number")
    _check_one_kind(rows, values, column)
    if any(isinstance(value, float) for value in present):
        if problem_type is None:
            _check_meant_as_numbers(rows, values, column)
            return Labels(column, None)
        present = _whole_numbers(rows, values, column)
    classes = sorted(set(present))
    if isinstance(classes[0], int):  # also booleans
        smallest, largest = int(classes[0]), int(classes[-1])
        if smallest < 0:
            raise ValueError(
                f"The column {column!r} of the training data contains the label {smallest}; classes are 0, 1, 2 ... "
                "Rows marked -1 are unlabelled: choose another split or drop them."
            )
        _check_several(classes, column)
        if largest >= max(2 * len(classes), 2):
            raise ValueError(
                f"The labels in {column!r} go up to {largest}, but only {len(classes)} different labels occur; number "
                "the classes 0, 1, 2 ..., or use names, or decimal numbers for regression."
            )
        classes = list(range(largest + 1))
    _check_several(classes, column)
    ids = {name: number for number, name in enumerate(classes)}
    return Labels(column, [str(name) for name in classes], ids, kind=_kind(present[0]))


def _check_meant_as_numbers(rows: Dataset, values: Sequence[Any], column: str) -> None:
    """Rejects decimal numbers most of which are the whole numbers 0, 1 ... of classes, as of 0 and 1 with a single 0.5."""
    numbers = [float(value) for value in values if value is not None]
    whole = [number for number in numbers if number.is_integer()]
    classes = sorted(set(whole))
    if len(classes) < 2 or classes != [*range(len(classes))] or 2 * len(whole) <= len(numbers):
        return
    names = ", ".join(str(int(number)) for number in classes[:3]) + (" ..." if len(classes) > 3 else "")
    advice = f"`problem_type='regression'` predicts them as numbers, {LABEL_PROBLEMS[1]!r} as classes"
    fraction = _first_fraction(values)
    if fraction is None:
        raise ValueError(
            f"The labels in {column!r} are the whole numbers {names}, but written as decimal numbers: {advice}."
        )
    place = place_of(rows, fraction, "training data")
    raise ValueError(
        f"{place} has the label {shortened(values[fraction])} in the column {column!r}, but most labels are the whole numbers {names}: "
        f"correct it if they are classes; {advice}."
    )


def _first_fraction(values: Sequence[Any]) -> int | None:
    """The first row whose number is not whole."""
    return next((row for row, value in enumerate(values) if value is not None and not float(value).is_integer()), None)


def _whole_numbers(rows: Dataset, values: Sequence[Any], column: str) -> list[int]:
    """The classes that decimal numbers stand for.

    Raises:
        ValueError: one is not whole; the message names the row.
    """
    fraction = _first_fraction(values)
    if fraction is not None:
        raise ValueError(
            f"{place_of(rows, fraction, 'training data')} has the label {shortened(values[fraction])} in the column {column!r}; classes "
            "are whole numbers, names or booleans."
        )
    return [int(value) for value in values if value is not None]


def _check_several(classes: Collection[Any], column: str, name_of: Callable[[Any], Any] = lambda value: value) -> None:
    if len(classes) == 1:
        only = name_of(next(iter(classes)))
        raise ValueError(f"All training rows have the label {only!r} in {column!r}: there is nothing to learn.")


def _kind(value: Any) -> str:
    for kind, types in (("true or false", bool), ("a number", (int, float)), ("text", str)):
        if isinstance(value, types):  # type: ignore[arg-type]
            return kind
    return f"a {type(value).__name__}"


def _is_decimal(text: str) -> bool:
    return re.fullmatch(r"\s*[-+]?\d*\.\d+\s*", text) is not None


def _check_one_kind(rows: Dataset, values: Sequence[Any], column: str) -> None:
    """Rejects labels of several types, lists, and decimal numbers among words, as "0.5" and "nan" in a .csv file."""
    first: dict[str, int] = {}
    for number, value in enumerate(values):
        if value is None:
            continue
        kind = _kind(value)
        if kind not in ("true or false", "a number", "text"):
            place = place_of(rows, number, "training data")
            raise ValueError(
                f"{place} has {kind} in the column {column!r}: {shortened(value)}. A label is a number, a name or true or false."
            )
        if kind == "text" and _is_decimal(value):
            kind = "a decimal number"
        first.setdefault(kind, number)
    if len(first) > 1:
        found = "; ".join(
            f"{place_of(rows, number, 'training data')} has {kind}: {shortened(values[number])}"
            for kind, number in sorted(first.items(), key=lambda item: item[1])
        )
        raise ValueError(f"The labels in {column!r} are of several kinds. {found}.")


def labels_of_model(config: PreTrainedConfig, column: str) -> Labels:
    """The labels a fine-tuned checkpoint predicts."""
    if config.num_labels == 1:
        return Labels(column, None)
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    ids: dict[Any, int] = {number: number for number in range(len(names))}
    return Labels(column, names, {**ids, **{name: number for number, name in enumerate(names)}})


def classification_head(labels: Labels) -> dict[str, Any]:
    """Fields of the configuration for a head that predicts these labels."""
    if labels.names is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: number for number, name in enumerate(labels.names)},
    }


def make_classification_metrics(names: Sequence[str], labels: Labels) -> NamedMetrics:
    """`compute_metrics` for the Trainer.

    Raises:
        ValueError: unknown name.
    """
    modules = [metrics.load(name) for name in names]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = logits.reshape(len(logits)) if labels.is_regression else logits.argmax(-1)
        results: dict[str, float] = {}
        for name, module in zip(names, modules):
            options = {"average": "macro"} if name == "f1" and len(labels.names or []) > 2 else {}
            results.update(module.compute(predictions=predicted, references=prediction.label_ids, **options))
        return results

    def metric_names() -> Iterable[str]:
        logits = np.eye(2, 1 if labels.is_regression else max(len(labels.names or []), 2))
        return compute(EvalPrediction(predictions=logits, label_ids=np.arange(2)))

    return NamedMetrics(compute, metric_names)


def only_logits(outputs: Any, labels: Any) -> Any:
    """`preprocess_logits_for_metrics` for the Trainer: drops hidden states and caches, which need not be gathered."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def majority_accuracy(train: Dataset, validation: Mapping[str, Dataset], column: str) -> float:
    """Accuracy on all validation rows of always predicting the most frequent label of the training rows."""
    majority = Counter(train[column]).most_common(1)[0][0]
    held_out = [value for rows in validation.values() for value in rows[column]]
    return held_out.count(majority) / len(held_out)

"""Why files cannot become one table: columns that are missing in some, or that hold numbers in one place and text in another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .records import Origin, Record, shortened


def disagreement(origin: Origin, records: Sequence[tuple[Path, Iterator[Record]]], builder: str) -> str | None:
    """The first column in which files, or the rows of a file, do not fit together: one sentence; None if there is none.

    Args:
        origin: says which line of which file is a row.
        records: the records of each file, with the header of a .csv file.
        builder: "csv", whose cells get their type from all of the file, or "json".
    """
    columns: dict[str, tuple[str, Any, Path, int]] = {}  # kind, value, file, number of the row
    expected: tuple[Path, set[str]] | None = None
    for path, rows in records:
        kinds = _kinds_of_cells(rows) if builder == "csv" else _kinds_of_values(rows)
        names = set()
        for column, kind, value, row in kinds:
            names.add(column)
            if kind is None:
                continue
            first = columns.setdefault(column, (kind, value, path, row))
            if first[0] != kind:
                return (
                    f"The column {column!r} holds {first[0]} in {_place(origin, first[2], first[3])} ({shortened(first[1])}), but {kind} in "
                    f"{_place(origin, path, row)} ({shortened(value)})"
                )
        if expected is None:
            expected = path, names
        elif names != expected[1]:
            column = min(names ^ expected[1])
            lacks, has = (path, expected[0]) if column in expected[1] else (expected[0], path)
            return f"{lacks} has no column {column!r}, which {has} has"
    return None


def _place(origin: Origin, path: Path, row: int) -> str:
    return f"{path}, " + next((place for number, place in enumerate(origin.read(path)) if number == row), f"row {row}")


def _kinds_of_values(rows: Iterator[Record]) -> Iterator[tuple[str, str | None, Any, int]]:
    """Column, kind, value and row of every value of a .json file; kinds of missing values are None."""
    names = ((bool, "true or false"), ((int, float), "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    for number, record in enumerate(rows):
        for column, value in record.content.items():
            yield column, next((name for types, name in names if isinstance(value, types)), None), value, number  # type: ignore[arg-type]


def _kinds_of_cells(rows: Iterator[Record]) -> Iterator[tuple[str, str | None, Any, int]]:
    """The kind of each column of a .csv file, with a cell that shows it: numbers, if all its cells are."""
    header = next(rows, None)
    found: dict[str, tuple[str | None, Any, int]] = dict.fromkeys(header.content if header else (), (None, None, 0))
    for number, record in enumerate(rows):
        for column, cell in zip(found, record.content):
            kind = "a number" if _is_number(cell) else "text"
            if cell and found[column][0] != "text" and found[column][0] != kind:
                found[column] = kind, cell, number
    yield from ((column, *shown) for column, shown in found.items())


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True

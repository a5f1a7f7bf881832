"""Records of local files: which are corrupt, where, what to do with them, and which line of a file became a row of a data set."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

DEFAULT_ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
ON_BAD_RECORD = ("error", "skip")

_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_DEPTH = 60  # of a JSON record; Arrow ends at 64 levels, and its parser ends the process at some thousand
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SHOWN = 5


@dataclass(frozen=True)
class BadRecord:
    """A corrupt record: its file, its first line (None: not known) and what is wrong there.

    Attributes:
        ends_file: nothing of the file can be read without it, as without the header of a .csv.
    """

    path: Path
    line: int | None
    problem: str
    ends_file: bool = False

    def __str__(self) -> str:
        return f"{self.path}{'' if self.line is None else f', line {self.line}'}: {self.problem}"


@dataclass(frozen=True)
class Record:
    """A readable record: its lines as they stand in the file, the number of the first, and what they say.

    Attributes:
        content: the object of a JSON record, the cells of a row of a .csv; None of a text.
    """

    line: int
    text: str
    content: Any = None


def check_reading_options(encoding: str | None, on_bad_record: str) -> None:
    """Rejects unknown encodings and unknown ways to treat corrupt records."""
    if on_bad_record not in ON_BAD_RECORD:
        raise ValueError(f"`on_bad_record` must be one of {', '.join(ON_BAD_RECORD)}; got {on_bad_record!r}.")
    if encoding is not None:
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # also refuses codecs that make no text, such as base64
        except LookupError:
            raise ValueError(
                f"`encoding` {encoding!r} is unknown; known are utf-8, latin-1, cp1252, utf-16 ..."
            ) from None


def list_problems(problems: Sequence[BadRecord]) -> str:
    """The first problems, one a line, and the number of the others."""
    more = len(problems) - _SHOWN
    return "\n".join(map(str, problems[:_SHOWN])) + (f"\n... and {more} more." if more > 0 else "")


_LEFT_OUT: ContextVar[set[BadRecord] | None] = ContextVar("left_out", default=None)


@contextmanager
def counting_left_out() -> Iterator[set[BadRecord]]:
    """Collects the corrupt records that readers leave out meanwhile, each once."""
    found: set[BadRecord] = set()
    token = _LEFT_OUT.set(found)
    try:
        yield found
    finally:
        _LEFT_OUT.reset(token)


def settle(problems: Sequence[BadRecord], on_bad_record: str, error: Exception | None = None) -> None:
    """Refuses corrupt records, or leaves them out: then they are logged, and counted by `counting_left_out`.

    Args:
        problems: the corrupt records of some files.
        on_bad_record: "error" or "skip".
        error: what a reader said to them.

    Raises:
        ValueError: there are some that may not or cannot be left out.
    """
    if not problems:
        return
    skips, is_fatal = on_bad_record == "skip", any(problem.ends_file for problem in problems)
    if is_fatal or not skips:
        advice = "\nCorrect the file, or leave such records out with --on_bad_record skip."
        raise ValueError(list_problems(problems) + ("" if is_fatal or skips else advice)) from error
    logger.warning("%d corrupt records are left out:\n%s", len(problems), "\n".join(map(str, problems)))
    collected = _LEFT_OUT.get()
    if collected is not None:
        collected.update(problems)


def read_lines(path: Path, encoding: str | None, on_bad_record: str) -> list[tuple[int, str]]:
    """The numbered lines of a text file without the final line feed, also compressed by gzip.

    Raises:
        ValueError: a line is not of this encoding, and is not to be left out; or the compression is damaged.
    """
    found, problems = [], []
    try:
        with _open(path) as file:
            for number, line in _lines(path, file, encoding):
                if isinstance(line, BadRecord):
                    problems.append(line)
                else:
                    found.append((number, line.removesuffix("\n")))
    except (OSError, EOFError) as error:
        problems.append(BadRecord(path, None, str(error), ends_file=True))
    settle(problems, on_bad_record)
    return found


def read_records(path: Path, builder: str, separator: str, encoding: str | None) -> Iterator[Record | BadRecord]:
    """Reads the records of a file one by one; those of a .csv begin with its header.

    Args:
        path: file, also compressed by gzip.
        builder: "csv", "json" or "text".
        separator: between the cells of a "csv" file.
        encoding: of the text; None = UTF-8.
    """
    try:
        with _open(path) as file:
            if builder == "text" or (builder == "json" and _is_array(file)):
                yield from _whole_file(path, file.read(), builder, encoding)
            elif builder == "json":
                yield from _json_lines(path, _lines(path, file, encoding))
            elif builder == "csv":
                yield from _csv_rows(path, _lines(path, file, encoding), separator)
    except (OSError, EOFError) as error:  # a damaged gzip file
        yield BadRecord(path, None, str(error), ends_file=True)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def is_array_file(path: Path) -> bool:
    """Whether a JSON file is one array of records instead of a record per line."""
    with _open(path) as file:
        return _is_array(file)


def shortened(value: Any) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_array(file: BinaryIO) -> bool:
    start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _decode(raw: bytes, encoding: str | None) -> str:
    """Decoded text.

    Raises:
        ValueError: the bytes are not of this encoding; names the byte and the remedy.
    """
    try:
        return raw.decode(encoding or DEFAULT_ENCODING)
    except UnicodeDecodeError as error:
        for mark, name in _BYTE_ORDER_MARKS.items():
            if raw.startswith(mark):
                raise ValueError(f"not {encoding or 'UTF-8'} but {name}: pass --encoding {name}") from None
        byte, position = error.object[error.start], error.start
        advice = "pass --encoding latin-1 (or the encoding it has)" if encoding is None else "pass another --encoding"
        raise ValueError(
            f"byte 0x{byte:02x} at position {position} of the line: not {encoding or 'UTF-8'}: {advice}"
        ) from None


def _lines(path: Path, file: BinaryIO, encoding: str | None) -> Iterator[tuple[int, str | BadRecord]]:
    """Numbered lines, with their ends."""
    if encoding is not None and codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):
        try:
            yield from enumerate(io.TextIOWrapper(file, encoding=encoding, newline=""), 1)
        except UnicodeDecodeError as error:
            yield 0, BadRecord(path, None, f"not {encoding} ({error.reason}): pass another --encoding")
        return
    for number, raw in enumerate(file, 1):
        try:
            yield number, _decode(raw, encoding)
        except ValueError as error:
            yield number, BadRecord(path, number, str(error))


def _whole_file(path: Path, raw: bytes, builder: str, encoding: str | None) -> Iterator[Record | BadRecord]:
    try:
        text = _decode(raw, encoding)
    except ValueError as error:
        ends_file = builder != "text"
        for number, line in enumerate(raw.splitlines(keepends=True), 1):
            try:
                _decode(line, encoding)
            except ValueError as in_line:
                yield BadRecord(path, number, str(in_line), ends_file)
                return
        yield BadRecord(path, None, str(error), ends_file)
        return
    if builder == "text":
        yield Record(1, text)
        return
    try:
        rows = _parse(text)
    except json.JSONDecodeError as error:
        problem = f"no valid JSON: {error.msg} (character {error.colno})"
        yield BadRecord(path, error.lineno, problem, ends_file=True)
        return
    except RecursionError:
        yield BadRecord(path, None, _TOO_DEEP, ends_file=True)
        return
    for number, row in enumerate(rows, 1):
        if fault := _problem_of(row):
            yield BadRecord(path, None, f"record {number}: {fault}")
        else:
            yield Record(number, json.dumps(row), row)


_TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep"


class _Twice(dict):
    """An object in which a key occurs twice."""

    key = ""


class _Overflow(float):
    """A number beyond all numbers of 64 bits."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice, names = _Twice(found), [name for name, _ in pairs]
    twice.key = next(name for name in names if names.count(name) > 1)
    return twice


def _real(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _Overflow(number)


def _parse(text: str) -> Any:
    """The value of a JSON text; `_problem_of` says what of it cannot be a record."""
    return json.loads(text, object_pairs_hook=_object, parse_float=_real)


def _problem_of(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a record must be an object with the columns as keys; got {type(row).__name__}"
    if isinstance(row, _Twice):
        return f"the column {row.key!r} occurs twice"
    for column, value in row.items():
        if fault := _fault_in(column, 1) or _fault_in(value, 2):
            return f"column {column!r}: {fault}"
    return None


def _fault_in(value: Any, depth: int) -> str | None:
    """What is wrong with a value of a JSON record, or with one inside of it."""
    if isinstance(value, str):
        found = _SURROGATE.search(value)
        if found is None:
            return None
        return f"half of a surrogate pair (\\u{ord(found[0]):x}) at character {found.start() + 1}, which is no text"
    if isinstance(value, _Overflow):
        return "a number that is too large for 64 bits"
    if not isinstance(value, (list, dict)):
        return None
    if depth > _MAX_DEPTH:
        return _TOO_DEEP
    if isinstance(value, _Twice):
        return f"the key {value.key!r} occurs twice"
    items = value if isinstance(value, list) else [*value, *value.values()]
    return next((fault for item in items if (fault := _fault_in(item, depth + 1))), None)


def _json_lines(path: Path, lines: Iterator[tuple[int, str | BadRecord]]) -> Iterator[Record | BadRecord]:
    for number, line in lines:
        if isinstance(line, BadRecord):
            yield line
        elif line.strip():
            row: Any = None
            try:
                row = _parse(line)
                problem: str | None = _problem_of(row)
            except json.JSONDecodeError as error:
                problem = f"no valid JSON: {error.msg} (character {error.colno})"
            except RecursionError:
                problem = _TOO_DEEP
            yield BadRecord(path, number, problem) if problem else Record(number, line, row)


@contextmanager
def _any_cell_size() -> Iterator[None]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_rows(
    path: Path, lines: Iterator[tuple[int, str | BadRecord]], separator: str
) -> Iterator[Record | BadRecord]:
    undecodable: list[BadRecord] = []
    pending: list[str] = []
    last = 0
    header: list[str] | None = None

    def fed() -> Iterator[str]:
        nonlocal last
        for number, line in lines:
            last = number
            if not isinstance(line, BadRecord):
                pending.append(line)
                yield line
            elif header is None:
                undecodable.append(replace(line, ends_file=True))
                return
            else:
                undecodable.append(line)

    with _any_cell_size():
        rows = csv.reader(fed(), delimiter=separator)
        while (cells := _next_cells(rows)) is not None:
            yield from undecodable
            undecodable.clear()
            text, first = "".join(pending), last - len(pending) + 1
            pending.clear()
            if isinstance(cells, str):
                yield BadRecord(path, first, cells, ends_file=header is None)
            elif cells and header is None:
                header = cells
                twice = next((name for name in cells if cells.count(name) > 1), None)
                problem = f"the column {twice!r} occurs twice"
                yield Record(first, text, cells) if twice is None else BadRecord(path, first, problem, ends_file=True)
            elif cells and header is not None and len(cells) != len(header):
                hint = "; a quotation mark may not be closed" if text.count("\n") > 1 else ""
                counts = f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}, but the header names {len(header)} columns"
                yield BadRecord(path, first, counts + hint)
            elif cells:
                yield Record(first, text, cells)
    yield from undecodable


def _next_cells(rows: Iterator[list[str]]) -> list[str] | str | None:
    """The next row, what is wrong with it, or None at the end."""
    try:
        return next(rows, None)
    except csv.Error as error:
        return str(error)


def is_decodable(path: Path, encoding: str | None) -> bool:
    """Whether the bytes of a file are text; some readers find out only when a value is used."""
    decoder = codecs.getincrementaldecoder(encoding or DEFAULT_ENCODING)()
    try:
        with _open(path) as file:
            while part := file.read(1 << 20):
                decoder.decode(part)
            decoder.decode(b"", final=True)
    except (UnicodeDecodeError, OSError, EOFError):
        return False
    return True


def is_deep(path: Path) -> bool:
    """Whether a record of a JSON file is nested too deeply; the parser of Arrow does not survive some thousand levels."""
    try:
        with _open(path) as file:
            if _is_array(file):
                return _depth(file.read()) > _MAX_DEPTH + 1
            return any(_depth(line) > _MAX_DEPTH for line in file)
    except (OSError, EOFError):
        return True  # the reader of records says what is wrong


def _depth(text: bytes) -> int:
    if text.count(b"[") + text.count(b"{") <= _MAX_DEPTH:
        return 0
    deepest = depth = 0
    for match in _BRACKETS.finditer(text):
        character = match[0][:1]
        if character in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in b"]}":
            depth -= 1
    return deepest


# ------------------------------------------------------------------------------------------ places of rows


@dataclass(frozen=True)
class Origin:
    """Where the rows of a data set come from: files one after another, or chosen rows of them."""

    files: tuple[Path, ...]
    read: Any  # (path) -> iterator over the records of the file, without a header; None: no lines
    chosen: Sequence[int] | None = None


_ORIGINS: WeakKeyDictionary[Any, Origin] = WeakKeyDictionary()


def remember_origin(rows: Dataset, origin: Origin | None, chosen: Sequence[int] | None = None) -> Dataset:
    """Notes where rows come from; `chosen` are the numbers of those that were kept, among all rows of the files."""
    if origin is not None:
        _ORIGINS[rows] = Origin(origin.files, origin.read, origin.chosen if chosen is None else chosen)
    return rows


def origin_of(rows: Dataset) -> Origin | None:
    """Where rows come from; None where it is not known, as for a data set of the Hub."""
    return _ORIGINS.get(rows)


def place_of(rows: Dataset, number: int, what: str) -> str:
    """A row as the subject of a sentence: file and line where they are known, else its number among `what`."""
    origin = origin_of(rows)
    unknown = f"Row {number} of the {what}"
    if origin is None:
        return unknown
    left = number if origin.chosen is None else int(origin.chosen[number])
    for path in origin.files:
        last = 0
        for last, record in enumerate(origin.read(path), 1):
            if last > left:
                return f"{path}, {record}"
        left -= last
    return unknown

"""Text from local files, local data-set folders and the Hub, as `datasets` objects.

Local sources: `.txt` and `.md` (one document per file), `.json`, `.jsonl`, `.csv`, `.tsv` (also with `.gz`), `.parquet`, and folders of
such files, where the files of a split are named `<split>.*` or `<split>-*` or are in a subfolder `<split>/`. The same files and
folders in an object store are named by their URL (`s3://bucket/corpus/`), which fsspec and its plug-ins open. Anything else
that is not an existing path is taken as the name of a Hub data set.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from .disagreements import disagreement
from .records import (
    DEFAULT_ENCODING,
    BadRecord,
    Origin,
    Record,
    check_reading_options,
    is_array_file,
    is_decodable,
    is_deep,
    list_problems,
    place_of,
    read_records,
    remember_origin,
    settle,
    shortened,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


AnyPath = TypeVar("AnyPath", bound=PurePath)


class MissingSplitError(ValueError):
    """A folder or data set has no such split."""


_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test")


def _import_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Reading data needs the `datasets` library: pip install "hf_hybrid[train]".') from error
    return datasets


def _is_url(source: str | Path) -> bool:
    return "://" in str(source)


def is_single_file(source: str | Path) -> bool:
    """Whether a source is one file, which has no splits."""
    if _is_url(source):
        return _suffix(PurePosixPath(str(source))) in _BUILDERS
    return Path(source).expanduser().is_file()


def _suffix(path: PurePath) -> str:
    """Suffix that determines the format, without a trailing `.gz`, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _split_files(folder: Path, split: str) -> list[Path]:
    """Data files of one split of a folder, in the order of their names."""
    return _files_of_split(folder, [path for path in folder.rglob("*") if path.is_file()], split)


def _files_of_split(folder: AnyPath, content: Iterable[AnyPath], split: str) -> list[AnyPath]:
    """Of the files in a folder those with data of a split."""
    files = sorted(path for path in content if _suffix(path) in _BUILDERS)
    if not files:
        raise MissingSplitError(
            f"The folder {folder} contains no data files; accepted are {', '.join(_BUILDERS)} (also with .gz)."
        )

    def split_of(path: PurePath) -> str | None:
        inside = path.relative_to(folder)
        for part in (inside.parts[0] if len(inside.parts) > 1 else "", path.name):
            for name in _SPLIT_NAMES:
                if part == name or part.startswith((f"{name}.", f"{name}-", f"{name}_")):
                    return name
        return None

    chosen = [path for path in files if split_of(path) == split or path.name.startswith((f"{split}.", f"{split}-"))]
    if not chosen and split == "train" and not any(split_of(path) for path in files):
        return [path for path in files if path.name.lower() not in ("readme.md", "license.md", "license.txt")] or files
    if not chosen:
        found = sorted({name for path in files if (name := split_of(path))})
        raise MissingSplitError(
            f"The folder {folder} has no files of the split {split!r}; found splits: {', '.join(found) or 'none'}. "
            f"Call them `{split}.*`, or pass files in place of the folder."
        )
    by_format: dict[str, list[AnyPath]] = {}
    for path in chosen:
        by_format.setdefault(_BUILDERS[_suffix(path)], []).append(path)
    data = [paths for builder, paths in by_format.items() if builder != "text"]
    if len(by_format) > 1 and len(data) != 1:
        raise ValueError(
            f"The split {split!r} of {folder} mixes formats ({', '.join(sorted(by_format))}); pass the files explicitly."
        )
    return data[0] if data else chosen


def load_table(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    config_name: str | None = None,
    streaming: bool = False,
    encoding: str | None = None,
    on_bad_record: str = "error",
) -> Dataset | IterableDataset:
    """Loads one split with all its columns.

    Args:
        source: a file, several files of the same format, a folder, the URL of a file or folder, or the name of a Hub data set.
        split: split of a folder or Hub data set; a file given by its path is read whole.
        config_name: configuration of a Hub data set ("wikitext-103-raw-v1").
        streaming: return an `IterableDataset` that reads on demand. Local files are read through once before, for corrupt records.
        encoding: encoding of local text; None = UTF-8, with or without a byte order mark.
        on_bad_record: "error", or "skip" to leave out and log the corrupt records of local files.

    Raises:
        ValueError: a record is corrupt (the message names file and line), a file is missing or empty, the format or the split is unknown, or the data cannot be read.
    """
    datasets = _import_datasets()
    check_reading_options(encoding, on_bad_record)
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if not sources:
        raise ValueError("`source` is an empty list; pass at least one file, folder or data set name.")
    if any(_is_url(item) for item in sources):
        return _load_urls(datasets, [str(item) for item in sources], split, streaming, encoding, on_bad_record)
    paths = [Path(item).expanduser() for item in sources]
    if len(sources) == 1 and not paths[0].exists():
        return _load_from_hub(datasets, str(sources[0]), split, config_name, streaming)
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"No such file or folder: {', '.join(missing)}.")

    parts, origins = [], []
    for path in paths:
        files = _split_files(path, split) if path.is_dir() else [path]
        reader = _Reader(files, encoding, on_bad_record)
        parts.append(reader.load(datasets, streaming))
        origins.append(reader.origin())
    if len(parts) == 1:
        return parts[0] if streaming else remember_origin(parts[0], origins[0])
    names = [part.column_names for part in parts]
    if any(name is None for name in names):
        return datasets.concatenate_datasets(parts)
    common = [column for column in names[0] if all(column in other for other in names[1:])]
    if not common:
        raise ValueError(f"The sources {', '.join(map(str, sources))} have no column in common: {names}.")
    joined = datasets.concatenate_datasets(_alike(datasets, [part.select_columns(common) for part in parts], sources))
    return joined if streaming else remember_origin(joined, _joined(origins))


def _alike(datasets, parts: list, sources: Sequence[str | Path]) -> list:
    """Tables of the same columns, with texts of one type: readers differ.

    Raises:
        ValueError: a column has other values in one source than in another.
    """
    first = parts[0].features
    for number, part in enumerate(parts[1:], 1):
        if first is None or part.features is None:
            continue
        for column, feature in part.features.items():
            types = [getattr(item, "dtype", None) for item in (first[column], feature)]
            if types == ["string", "large_string"] or types == ["large_string", "string"]:
                parts[number] = parts[number].cast_column(column, first[column])
            elif feature != first[column] and "null" not in types:
                raise ValueError(
                    f"The column {column!r} is of the type {first[column]} in {sources[0]}, but {feature} in {sources[number]}: pass files whose "
                    "columns hold the same kind of values."
                )
    return parts


def _builder_options(builder: str, separator: str, encoding: str | None) -> dict[str, Any]:
    """Options of a builder of `datasets`."""
    options: dict[str, Any] = {}
    if builder != "parquet":
        options["encoding"] = encoding or DEFAULT_ENCODING
    if builder == "text":
        options["sample_by"] = "document"
    elif builder == "csv":  # the words None, NA and null are text; an empty cell is missing
        options |= {"sep": separator, "keep_default_na": False, "na_values": [""]}
    elif builder == "json" and encoding is None:
        del options["encoding"]  # its reader knows the mark
    return options


def _joined(origins: Sequence[Origin]) -> Origin:
    readers = {path: origin.read for origin in origins for path in origin.files}
    return Origin(tuple(path for origin in origins for path in origin.files), lambda path: readers[path](path))


class _Reader:
    """Files of one format, which one builder of `datasets` reads.

    Raises:
        ValueError: the formats are unknown or mixed, or a file is empty.
    """

    def __init__(self, files: list[Path], encoding: str | None, on_bad_record: str) -> None:
        builders = {_BUILDERS.get(_suffix(path)) for path in files}
        if None in builders:
            unknown = next(path for path in files if _suffix(path) not in _BUILDERS)
            raise ValueError(f"Unknown file format of {unknown}; accepted are {', '.join(_BUILDERS)} (also with .gz).")
        if empty := [str(path) for path in files if path.stat().st_size == 0]:
            raise ValueError(f"Empty file: {', '.join(empty)}.")
        if len({".csv", ".tsv"} & {_suffix(path) for path in files}) == 2:
            raise ValueError(
                f"The files {', '.join(map(str, files))} mix commas (.csv) and tabs (.tsv); pass them as separate sources."
            )
        self.files = files
        self.builder = str(next(iter(builders)))
        self.separator = "\t" if _suffix(files[0]) == ".tsv" else ","
        self.encoding = encoding
        self.on_bad_record = on_bad_record

    def load(self, datasets, streaming: bool):
        """The rows of all files."""
        if streaming and self.builder != "parquet":
            return self._stream(datasets)
        if self._must_look_through():
            problems = self.problems()
            settle(problems, self.on_bad_record)
            if problems:
                return self._load_readable(datasets, problems)
            self._refuse_empty(None)
        try:
            return self._build(datasets, self.files, streaming)
        except Exception as error:  # every builder raises its own exceptions
            settle([] if self.builder == "parquet" else self.problems(), self.on_bad_record, error)
            self._refuse_empty(error)
            if self.builder == "csv":  # it takes the types of a file from its first 10,000 rows
                with contextlib.suppress(Exception):
                    return self._build(datasets, self.files, streaming, at_once=True)
            if (reason := self._disagreement()) is not None:
                raise ValueError(
                    f"{reason}: rows of a table have the same columns, and a column one kind of values."
                ) from error
            raise ValueError(
                f"Could not read {self._names()} as {self.builder}: {_first_cause(error)}. Check that the file is complete and "
                "that its suffix matches its format."
            ) from error

    def _disagreement(self) -> str | None:
        if self.builder not in ("csv", "json"):
            return None
        rows = [(path, (row for row in self.records(path) if isinstance(row, Record))) for path in self.files]
        return disagreement(self.origin(), rows, self.builder)

    def _must_look_through(self) -> bool:
        """Whether corrupt records are to be looked for before the builder reads, or it would pass over them."""
        if self.builder == "csv":  # rows with too few cells are filled up
            return True
        if self.builder == "json":
            # Bytes that are no text are found when a value is used; an array is read by another parser, which passes over much.
            return self._skips or any(
                not is_decodable(path, self.encoding) or is_deep(path) or is_array_file(path) for path in self.files
            )
        return self._skips and self.builder == "text"

    @property
    def _skips(self) -> bool:
        return self.on_bad_record == "skip"

    def _stream(self, datasets):
        """The rows of all files on demand, after one look at all of them."""
        problems: list[BadRecord] = []
        columns: dict[str, None] = {}
        rows = 0
        for path in self.files:
            readable = 0
            for record in self.records(path):
                if isinstance(record, BadRecord):
                    problems.append(record)
                    continue
                readable += 1
                if self.builder == "json" or (self.builder == "csv" and readable == 1):
                    columns |= dict.fromkeys(record.content)
            rows += max(readable - (self.builder == "csv"), 0)
        settle(problems, self.on_bad_record)
        if rows == 0:
            self._refuse_empty(None)
            raise ValueError(f"No record of {self._names()} can be read:\n{list_problems(problems)}")
        source = {
            "paths": [str(path) for path in self.files],  # the shards of the stream
            "builder": self.builder,
            "separator": self.separator,
            "encoding": self.encoding,
            "on_bad_record": self.on_bad_record,
            "columns": tuple(columns),
        }
        return datasets.IterableDataset.from_generator(_rows_of, gen_kwargs=source)

    def records(self, path: Path) -> Iterator[Record | BadRecord]:
        """All records of a file."""
        return read_records(path, self.builder, self.separator, self.encoding)

    def problems(self) -> list[BadRecord]:
        """The corrupt records of all files."""
        return [record for path in self.files for record in self.records(path) if isinstance(record, BadRecord)]

    def origin(self) -> Origin:
        """Says which line of which file is a row."""
        return Origin(tuple(self.files), self._places)

    def _names(self) -> str:
        return ", ".join(map(str, self.files))

    def _places(self, path: Path) -> Iterator[str]:
        if self.builder == "parquet":
            import pyarrow.parquet

            yield from (f"row {number + 1}" for number in range(pyarrow.parquet.read_metadata(path).num_rows))
            return
        readable = (record for record in self.records(path) if isinstance(record, Record))
        if self.builder == "csv":
            next(readable, None)  # the header
        is_array = self.builder == "json" and is_array_file(path)
        yield from (f"record {record.line}" if is_array else f"line {record.line}" for record in readable)

    def _refuse_empty(self, error: Exception | None) -> None:
        if self.builder in ("csv", "json") and (error is None or "no data" in str(error)):
            header = int(self.builder == "csv")
            rows = sum(1 for path in self.files for _ in self.records(path)) - header * len(self.files)
            if rows <= 0:
                raise ValueError(f"{self._names()} has {'a header but ' if header else ''}no rows.") from error

    def _build(self, datasets, files: list[Path], streaming: bool, *, at_once: bool = False):
        options = _builder_options(self.builder, self.separator, self.encoding)
        if at_once:  # the types of a .csv file are those of all its rows
            options |= {"chunksize": sys.maxsize, "engine": "python"}
        return datasets.load_dataset(
            self.builder,
            data_files={"train": [str(path) for path in files]},
            split="train",
            streaming=streaming,
            **options,
        )

    def _load_readable(self, datasets, problems: list[BadRecord]):
        """The rows of copies without the corrupt records."""
        folder = Path(tempfile.mkdtemp())
        copies = []
        try:
            for number, path in enumerate(self.files):
                readable = [record.text for record in self.records(path) if isinstance(record, Record)]
                if len(readable) <= (self.builder == "csv"):
                    continue  # nothing but a header is left
                copies.append(folder / f"{number:06d}{_suffix(path)}")
                is_text = self.builder == "text"
                with copies[-1].open("w", encoding=self.encoding or "utf-8", newline="") as file:
                    file.writelines(text if is_text or text.endswith("\n") else f"{text}\n" for text in readable)
            if not copies:
                raise ValueError(f"No record of {self._names()} can be read:\n{list_problems(problems)}")
            return self._build(datasets, copies, streaming=False)
        finally:
            shutil.rmtree(folder)


def _rows_of(
    paths: Sequence[str],
    builder: str,
    separator: str,
    encoding: str | None,
    on_bad_record: str,
    columns: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """The rows of files as a stream; corrupt records were named or counted when it was opened."""
    for path in paths:
        header: list[str] | None = None
        for record in read_records(Path(path), builder, separator, encoding):
            if isinstance(record, BadRecord):
                if on_bad_record == "error" or record.ends_file:  # the file has changed since
                    settle([record], "error")
            elif builder == "text":
                yield {"text": record.text.replace("\r\n", "\n").replace("\r", "\n")}
            elif builder == "json":
                yield {column: record.content.get(column) for column in columns}
            elif header is None:
                header = record.content
            else:  # an empty cell is missing
                cells = dict(zip(header, record.content))
                yield {column: cells.get(column) or None for column in columns}


def _first_cause(error: BaseException) -> str:
    """What the innermost exception says: builders wrap it into a sentence without content."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error) or type(error).__name__


def _load_from_hub(datasets, name: str, split: str, config_name: str | None, streaming: bool):
    if name.startswith((".", "/", "~")) or Path(name).suffix in (*_BUILDERS, ".gz"):
        raise ValueError(f"No such file or folder: {name}.")
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # network, unknown name, unknown configuration, unknown split
        raise ValueError(
            f"{name!r} is neither an existing file or folder nor a Hub data set that can be loaded (split {split!r}, "
            f"configuration {config_name!r}): {error}"
        ) from error


def _load_urls(
    datasets, sources: Sequence[str], split: str, streaming: bool, encoding: str | None, on_bad_record: str
) -> Dataset | IterableDataset:
    """One split of files and folders of object stores, read once and without a look at their records before.

    Raises:
        ValueError: corrupt records should be skipped, formats differ or are unknown, or a file cannot be read.
    """
    if on_bad_record == "skip":
        raise ValueError(
            f"`on_bad_record` is 'skip', which needs files that can be read twice; copy {sources[0]} to a local folder."
        )
    files = [url for source in sources for url in _urls_of_split(source, split)]
    builders = {_BUILDERS.get(_suffix(PurePosixPath(url))) for url in files}
    separators = {"\t" if _suffix(PurePosixPath(url)) == ".tsv" else "," for url in files}
    if len(builders) > 1 or None in builders or len(separators) > 1:
        raise ValueError(
            f"The files {', '.join(files)} have several formats or an unknown one; accepted is one of {', '.join(_BUILDERS)} "
            "(also with .gz)."
        )
    builder = str(builders.pop())
    options = _builder_options(builder, separators.pop(), encoding)
    try:
        data = datasets.load_dataset(
            builder, data_files={"train": files}, split="train", streaming=streaming, **options
        )
        if streaming:  # else a missing file is found in the middle of a run
            next(iter(data), None)
        return data
    except Exception as error:  # every file system and every builder raises its own exceptions
        raise ValueError(
            f"Could not read {', '.join(files)} as {builder}: {_first_cause(error)}. Check the URL, the rights of this process, and "
            "that the package of this file system is installed."
        ) from error


def _urls_of_split(source: str, split: str) -> list[str]:
    if is_single_file(source) or not _is_url(source):
        return [source]
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(source)
        content = [PurePosixPath(path) for path in filesystem.find(root)]
    except Exception as error:
        raise ValueError(f"The folder {source} cannot be listed: {_first_cause(error)}.") from error
    found = _files_of_split(PurePosixPath(filesystem._strip_protocol(root)), content, split)
    return [filesystem.unstrip_protocol(str(path)) for path in found]


def load_text_source(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    text_column: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    documents_of: Callable[[list[dict[str, str]]], list[str]] | None = None,
    encoding: str | None = None,
    on_bad_record: str = "error",
) -> Dataset | IterableDataset:
    """Loads documents: a data set whose only column is `text`.

    Args:
        source: as in `load_table`; the sources of a list may differ in their other columns.
        split: as in `load_table`.
        text_column: column that holds the text; None = `text`, or the only column of strings.
        config_name: as in `load_table`.
        streaming: as in `load_table`.
        documents_of: makes texts of a conversation, a list of messages; then `text_column` holds conversations, None = `messages`.

        encoding, on_bad_record: as in `load_table`.

    Raises:
        ValueError: as in `load_table`; or there is no such column, or no row.
    """
    datasets = _import_datasets()
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    parts = []
    for item in sources:
        table = load_table(
            item, split, config_name=config_name, streaming=streaming, encoding=encoding, on_bad_record=on_bad_record
        )
        if documents_of is not None:
            parts.append(_only_conversations(table, text_column or "messages", str(item), documents_of))
        else:
            parts.append(_only_text(table, text_column, str(item)))
    if not parts:
        raise ValueError("`source` is an empty list; pass at least one file, folder or data set name.")
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _only_conversations(table, column: str, name: str, documents_of: Callable[[list[dict[str, str]]], list[str]]):
    columns = table.column_names or list(next(iter(table), {}))
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r} of conversations; its columns are {', '.join(columns)}.")

    def read(batch: dict[str, list]) -> dict[str, list[str]]:
        return {"text": [text for messages in batch[column] for text in documents_of(messages)]}

    datasets = _import_datasets()
    return table.map(
        read, batched=True, remove_columns=columns, features=datasets.Features({"text": datasets.Value("string")})
    )


def _first_values(stream) -> dict[str, Any]:
    """The first value of each column of a stream that is not missing, among its first rows."""
    first: dict[str, Any] = {}
    for row in itertools.islice(stream, 100):
        for column, value in row.items():
            if first.get(column) is None:
                first[column] = value
    return first


def _only_text(table, text_column: str | None, name: str):
    columns = table.column_names
    datasets = _import_datasets()
    if columns is None:  # a stream with unknown features: read its first rows
        first = _first_values(table)
        if not first:
            raise ValueError(f"{name} has no rows.")
        columns = list(first)
        strings = [column for column in columns if isinstance(first[column], str)]
    else:
        features = table.features
        strings = [
            c for c in columns if features is None or getattr(features[c], "dtype", "") in ("string", "large_string")
        ]
    if text_column is None:
        text_column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
        if text_column is None:
            raise ValueError(
                f"{name} has no column `text`; name the column to read with `text_column`. Its columns of strings: "
                f"{', '.join(strings) or 'none'}."
            )
    if text_column not in columns:
        raise ValueError(
            f"{name} has no column {text_column!r} (`text_column`); its columns are {', '.join(columns)}."
        )
    if text_column not in strings:
        others = f"columns that do: {', '.join(strings) or 'none'}"
        if not hasattr(table, "num_rows"):
            raise ValueError(f"The column {text_column!r} of {name} does not contain strings; {others}.")
        first_other = next(
            (n for n, value in enumerate(table[text_column]) if not isinstance(value, (str, type(None)))), 0
        )
        place = place_of(table, first_other, name)
        raise ValueError(
            f"The column {text_column!r} of {name} does not contain strings; {others}. {place}: "
            f"{shortened(table[first_other][text_column])}."
        )
    if hasattr(table, "num_rows") and table.num_rows == 0:
        raise ValueError(f"{name} has no rows.")
    table = table.select_columns([text_column])
    if text_column != "text":
        table = table.rename_column(text_column, "text")
    if table.features is None or table.features["text"].dtype == "string":
        return table
    return table.cast_column("text", datasets.Value("string"))  # readers differ: `large_string` from .csv

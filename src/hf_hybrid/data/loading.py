"""Text from local files, local data-set folders and the Hub, as `datasets` objects.

Local sources: `.txt` and `.md` (one document per file), `.json`, `.jsonl`, `.csv`, `.tsv` (also with `.gz`), `.parquet`, and folders of
such files, where the files of a split are named `<split>.*` or `<split>-*` or are in a subfolder `<split>/`. Anything
that is not an existing path is taken as the name of a Hub data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

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


def _suffix(path: Path) -> str:
    """Suffix that determines the format, without a trailing `.gz`, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _split_files(folder: Path, split: str) -> list[Path]:
    """Data files of one split of a folder, in the order of their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _suffix(path) in _BUILDERS)
    if not files:
        raise ValueError(
            f"The folder {folder} contains no data files; accepted are {', '.join(_BUILDERS)} (also with .gz)."
        )

    def split_of(path: Path) -> str | None:
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
        raise ValueError(
            f"The folder {folder} has no files of the split {split!r}; found splits: {', '.join(found) or 'none'}."
        )
    by_format: dict[str, list[Path]] = {}
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
) -> Dataset | IterableDataset:
    """Loads one split with all its columns.

    Args:
        source: a file, several files of the same format, a folder, or the name of a Hub data set.
        split: split of a folder or Hub data set; a file given by its path is read whole.
        config_name: configuration of a Hub data set ("wikitext-103-raw-v1").
        streaming: return an `IterableDataset` that reads on demand.

    Raises:
        ValueError: a file is missing or empty, the format or the split is unknown, or the data cannot be read.
    """
    datasets = _import_datasets()
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if not sources:
        raise ValueError("`source` is an empty list; pass at least one file, folder or data set name.")
    paths = [Path(item).expanduser() for item in sources]
    if len(sources) == 1 and not paths[0].exists():
        return _load_from_hub(datasets, str(sources[0]), split, config_name, streaming)
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"No such file or folder: {', '.join(missing)}.")

    parts = []
    for path in paths:
        files = _split_files(path, split) if path.is_dir() else [path]
        parts.append(_load_files(datasets, files, streaming))
    if len(parts) == 1:
        return parts[0]
    names = [part.column_names for part in parts]
    if any(name is None for name in names):
        return datasets.concatenate_datasets(parts)
    common = [column for column in names[0] if all(column in other for other in names[1:])]
    if not common:
        raise ValueError(f"The sources {', '.join(map(str, sources))} have no column in common: {names}.")
    return datasets.concatenate_datasets([part.select_columns(common) for part in parts])


def _load_files(datasets, files: list[Path], streaming: bool):
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
    (builder,) = builders
    options: dict[str, object] = {}
    if builder == "text":
        options["sample_by"] = "document"
    elif builder == "csv" and _suffix(files[0]) == ".tsv":
        options["sep"] = "\t"
    try:
        return datasets.load_dataset(
            builder, data_files={"train": [str(path) for path in files]}, split="train", streaming=streaming, **options
        )
    except Exception as error:  # every builder raises its own exceptions
        raise ValueError(
            f"Could not read {', '.join(map(str, files))} as {builder}: {error}. Check that the file is complete and that its "
            "suffix matches its format."
        ) from error


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


def load_text_source(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    text_column: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    documents_of: Callable[[list[dict[str, str]]], list[str]] | None = None,
) -> Dataset | IterableDataset:
    """Loads documents: a data set whose only column is `text`.

    Args:
        source: as in `load_table`; the sources of a list may differ in their other columns.
        split: as in `load_table`.
        text_column: column that holds the text; None = `text`, or the only column of strings.
        config_name: as in `load_table`.
        streaming: as in `load_table`.
        documents_of: makes texts of a conversation, a list of messages; then `text_column` holds conversations, None = `messages`.

    Raises:
        ValueError: as in `load_table`; or there is no such column, or no row.
    """
    datasets = _import_datasets()
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    parts = []
    for item in sources:
        table = load_table(item, split, config_name=config_name, streaming=streaming)
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


def _only_text(table, text_column: str | None, name: str):
    columns = table.column_names
    datasets = _import_datasets()
    if columns is None:  # a stream with unknown features: read its first row
        first = next(iter(table), None)
        if first is None:
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
        raise ValueError(
            f"The column {text_column!r} of {name} does not contain strings; columns that do: "
            f"{', '.join(strings) or 'none'}."
        )
    if hasattr(table, "num_rows") and table.num_rows == 0:
        raise ValueError(f"{name} has no rows.")
    table = table.select_columns([text_column])
    if text_column != "text":
        table = table.rename_column(text_column, "text")
    if table.features is None or table.features["text"].dtype == "string":
        return table
    return table.cast_column("text", datasets.Value("string"))  # readers differ: `large_string` from .csv

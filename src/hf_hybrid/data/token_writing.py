"""Writes folders of tokens (`token_shards.py`), with several processes.

The documents of a split are divided into shards by their number and size alone, so that neither the number of processes nor a break
changes what is written. Finished shards stay in a folder beside the one to write until all are there; a call with the same
arguments continues with the others. The folder itself appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..new_folder import check_new_folder
from .parallel import map_blocks
from .token_corpus import document_batches, encode_documents
from .token_shards import COLUMN, FORMAT, MANIFEST_FILE, tokenizer_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20  # of text, about
_BATCH_TOKENS = 2**22  # of a record batch
_PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class _Split:
    """Documents of a split, where their shards go, and which of them belong to each."""

    documents: Dataset
    folder: str
    ranges: tuple[tuple[int, int], ...]
    dtype: str

    def file_name(self, index: int) -> str:
        return f"data-{index:05d}-of-{len(self.ranges):05d}.arrow"


def partial_folder(path: str | Path) -> Path:
    """Where the finished shards of a folder that is not complete are kept."""
    path = Path(path)
    return path.with_name(f".{path.name}.partial")


def write_token_folder(
    path: str | Path,
    splits: Mapping[str, Sequence[Dataset]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sources: Mapping[str, Any],
    num_processes: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> dict[str, Any]:
    """Tokenizes documents into a folder.

    Args:
        path: folder to write; it must not exist, or be empty.
        splits: for each split, data sets with a column `text`. Empty documents are left out.
        tokenizer: a fast tokenizer with an end-of-sequence token.
        sources: what the documents are, in JSON types; kept in the manifest. A partial folder of other sources is not continued.
        num_processes: processes that tokenize. They are spawned: a script needs the `if __name__ == "__main__":` guard.
        shard_bytes: bytes of text per shard, about.
        progress: show a progress bar.

    Returns:
        The manifest.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        ValueError: a split has no text, or the partial folder belongs to other documents or another tokenizer.
    """
    check_new_folder(path, "output_dir")
    target = Path(path)
    unfinished = partial_folder(target)
    scratch = unfinished / "folder"
    fingerprint = tokenizer_fingerprint(tokenizer)
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "int32"
    jobs = {}
    for name, datasets in splits.items():
        documents = _joined(datasets)
        ranges = _ranges(documents, shard_bytes)
        jobs[name] = _Split(documents, str(scratch / name), ranges, dtype)
    ranges_of = {name: job.ranges for name, job in jobs.items()}
    _begin(unfinished, scratch, {"tokenizer": fingerprint, "sources": dict(sources), "ranges": ranges_of})
    written_with = {"name": str(tokenizer.name_or_path), **fingerprint}
    manifest: dict[str, Any] = {"format": FORMAT, "tokenizer": written_with, "sources": dict(sources), "splits": {}}
    for name, job in jobs.items():
        manifest["splits"][name] = _write_split(job, name, tokenizer, num_processes, progress)
    (scratch / "dataset_dict.json").write_text(json.dumps({"splits": list(jobs)}) + "\n")
    (scratch / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for record in scratch.glob("*/*.arrow.json"):
        record.unlink()
    if target.exists():
        target.rmdir()
    scratch.replace(target)
    shutil.rmtree(unfinished)
    return manifest


def _joined(datasets: Sequence[Dataset]) -> Dataset:
    from datasets import concatenate_datasets

    return datasets[0] if len(datasets) == 1 else concatenate_datasets(list(datasets))


def _ranges(documents: Dataset, shard_bytes: int) -> tuple[tuple[int, int], ...]:
    rows = len(documents)
    size = documents.data.nbytes * rows // max(1, len(documents.data))
    count = max(1, min(rows, -(-size // shard_bytes)))
    bounds = [rows * number // count for number in range(count + 1)]
    return tuple(zip(bounds[:-1], bounds[1:]))


def _begin(unfinished: Path, scratch: Path, plan: Mapping[str, Any]) -> None:
    """Makes the partial folder, or takes it over if it belongs to the same plan."""
    text = json.dumps(plan, indent=2, sort_keys=True) + "\n"
    plan_file = unfinished / _PLAN_FILE
    if plan_file.is_file() and plan_file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{unfinished} holds shards of other documents or of another tokenizer, left by a call that did not finish. Repeat that "
            "call to complete them, or remove the folder."
        )
    for name in plan["ranges"]:
        (scratch / name).mkdir(parents=True, exist_ok=True)
    plan_file.write_text(text, encoding="utf-8")


def _write_split(
    job: _Split, name: str, tokenizer: PreTrainedTokenizerBase, num_processes: int, progress: bool
) -> dict[str, Any]:
    folder = Path(job.folder)
    kept = sum((folder / f"{job.file_name(index)}.json").is_file() for index in range(len(job.ranges)))
    if kept:
        logger.info("%s: %d of %d shards were finished before.", name, kept, len(job.ranges))
    done = map_blocks(
        partial(_write_shards, job, tokenizer),
        range(len(job.ranges)),
        block=1,
        num_processes=num_processes,
        progress=progress,
        description=f"Tokenizing ({name})",
        unit=" shards",
    )
    shards = [shard for block in done for shard in block]
    total = {what: sum(shard[what] for shard in shards) for what in ("documents", "bytes", "tokens")}
    if total["tokens"] == 0:
        shutil.rmtree(folder.parents[1])
        raise ValueError(f"The split {name!r} contains no text: there are no documents, or all of them are empty.")
    _describe(folder, job, [shard["file"] for shard in shards])
    return {**total, "shards": [{key: shard[key] for key in ("file", "size", "sha256", "tokens")} for shard in shards]}


def _describe(folder: Path, job: _Split, files: Sequence[str]) -> None:
    """What `datasets.load_from_disk` reads beside the shards; their own records are in the manifest by now."""
    from datasets import DatasetInfo

    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": hashlib.sha256("".join(files).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    DatasetInfo(features=_features(job.dtype)).write_to_directory(str(folder))


def _features(dtype: str):
    from datasets import Features, Sequence, Value

    return Features({COLUMN: Sequence(Value(dtype))})


def _write_shards(job: _Split, tokenizer: PreTrainedTokenizerBase, indices: range) -> list[dict[str, Any]]:
    """Writes the shards that are not finished yet, and returns the records of all."""
    found = []
    for index in indices:
        path = Path(job.folder) / job.file_name(index)
        record_file = path.with_name(f"{path.name}.json")
        if not record_file.is_file():
            record = _write_shard(job, tokenizer, job.ranges[index], path)
            unfinished = record_file.with_name(f".{record_file.name}")
            unfinished.write_text(json.dumps(record) + "\n")
            unfinished.replace(record_file)
        found.append(json.loads(record_file.read_text()))
    return found


def _write_shard(job: _Split, tokenizer: PreTrainedTokenizerBase, rows: tuple[int, int], path: Path) -> dict[str, Any]:
    from datasets.arrow_writer import ArrowWriter

    counts = {"documents": 0, "bytes": 0, "tokens": 0}
    with ArrowWriter(path=str(path), features=_features(job.dtype)) as writer:
        for table in _tables(job, tokenizer, rows, counts):
            writer.write_table(table)
        writer.finalize()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"file": path.name, "size": path.stat().st_size, "sha256": digest, **counts}


def _tables(
    job: _Split, tokenizer: PreTrainedTokenizerBase, rows: tuple[int, int], counts: dict[str, int]
) -> Iterator[Any]:
    """Record batches of documents, each with the end-of-sequence id behind it."""
    import pyarrow

    eos = [tokenizer.eos_token_id]
    pending: list[list[int]] = []

    def table() -> Any:
        lengths = [0, *map(len, pending)]
        values = np.fromiter((token for ids in pending for token in ids), dtype=job.dtype, count=sum(lengths))
        offsets = pyarrow.array(np.cumsum(lengths), type=pyarrow.int32())
        pending.clear()
        return pyarrow.table({COLUMN: pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values))})

    size = 0
    texts = (row["text"] for row in job.documents.select(range(*rows)) if row["text"] and row["text"].strip())
    for batch in document_batches(texts):
        for text, ids in zip(batch, encode_documents(tokenizer, batch)):
            if not ids:
                continue
            pending.append(ids + eos)
            size += len(pending[-1])
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            counts["tokens"] += len(pending[-1])
        if size >= _BATCH_TOKENS:
            yield table()
            size = 0
    if pending:
        yield table()

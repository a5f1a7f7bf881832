"""Tokenized text as a folder of Arrow shards: written once (`token_writing.py`), memory-mapped by every process that trains on it.

Such a folder is a `DatasetDict` on disk, which `datasets.load_from_disk` opens too. A row is a document, `input_ids` with `</s>` at
the end. `tokens.json` describes it: the tokenizer, the sources, and for each split its documents, bytes of text, tokens and
shards with their sizes and digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .token_corpus import end_of_document

MANIFEST_FILE = "tokens.json"
COLUMN = "input_ids"
FORMAT = 1
# What a tokenizer does to a text without special tokens; templates, truncation, padding and decoding have no part in it.
_TOKENIZING = ("added_tokens", "model", "normalizer", "pre_tokenizer")


def _import_pyarrow():
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ImportError('Reading data needs the `datasets` library: pip install "hf_hybrid[train]".') from error
    return pyarrow


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the ids of a text: the number of ids, that of `</s>`, and a digest of vocabulary and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules = {name: rules.get(name) for name in _TOKENIZING}
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    return {"vocab_size": len(tokenizer), "eos_token_id": end_of_document(tokenizer), "sha256": digest}


class TokenShards:
    """The documents of several Arrow files as one array of token ids that stays on disk. Pickled, it is a list of paths.

    Args:
        files: paths of Arrow files in the stream format, in their order.

    Raises:
        ValueError: a file is damaged or holds something else.
    """

    ndim = 1

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = [str(path) for path in files]
        self._open()

    def _open(self) -> None:
        chunks = [chunk for path in self.files for chunk in _chunks_of(path)]
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        kinds = {chunk.dtype for chunk in self._chunks}
        if len(kinds) > 1:
            raise ValueError(f"The shards hold token ids of several types ({', '.join(sorted(map(str, kinds)))}).")
        self.dtype = kinds.pop() if kinds else np.dtype(np.uint16)
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int]:
        """`(size,)`."""
        return (self.size,)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int | slice) -> Any:
        """A token, or a copy of a range of tokens."""
        if not isinstance(place, slice):
            index = range(self.size)[place]
            return self._range(index, index + 1)[0]
        start, stop, step = place.indices(self.size)
        return self._range(start, stop)[::step] if step > 0 else self._range(stop + 1, start + 1)[::-1][::-step]

    def _range(self, start: int, stop: int) -> np.ndarray:
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self._starts[number])
            parts.append(self._chunks[number][offset : offset + stop - start])
            start += len(parts[-1])
            number += 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Ranges of equal length: (B,) first positions to (B, length) int64, a copy."""
        found = np.empty((len(starts), length), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            found[row] = self._range(start, start + length)
        return found

    def positions_of(self, token: int) -> np.ndarray:
        """Positions of a token, (N,) int64, read part by part."""
        found = [np.flatnonzero(chunk == token) + start for chunk, start in zip(self._chunks, self._starts)]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.files = state["files"]
        self._open()


def _chunks_of(path: str) -> Iterator[np.ndarray]:
    """The token ids of each record batch of a file, as views of the mapped file."""
    pyarrow = _import_pyarrow()
    try:
        for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(path)):
            yield batch.column(COLUMN).flatten().to_numpy(zero_copy_only=True)
    except (pyarrow.ArrowException, KeyError, AttributeError, OSError) as error:
        raise ValueError(
            f"{path} is not a shard of tokens, or damaged ({error}); write the folder again with `hf-hybrid tokenize`."
        ) from error


def is_token_folder(path: str | Path) -> bool:
    """Whether the path is a folder of tokens."""
    return (Path(path).expanduser() / MANIFEST_FILE).is_file()


class TokenFolder:
    """A folder of tokens.

    Attributes:
        path: the folder.
        manifest: contents of `tokens.json`.

    Raises:
        ValueError: the description is missing or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / MANIFEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} is not a folder of tokens ({error}); write one with `hf-hybrid tokenize`."
            ) from error
        version = self.manifest.get("format") if isinstance(self.manifest, dict) else None
        if version != FORMAT:
            raise ValueError(
                f"{self.path / MANIFEST_FILE} has the format {version!r}; this version reads {FORMAT}. Write the folder again with "
                "`hf-hybrid tokenize`."
            )

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Names of the splits, and of each its documents, bytes, tokens and shards."""
        return self.manifest["splits"]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks that the tokens are those that a tokenizer would produce.

        Raises:
            ValueError: the tokenizer is another one; the message says in what.
        """
        written, given = self.manifest["tokenizer"], tokenizer_fingerprint(tokenizer)
        if given == {name: written[name] for name in given}:
            return
        names = {"vocab_size": "{} ids", "eos_token_id": "`</s>` with the id {}"}
        differing = [
            f"{text.format(written[name])}, not {given[name]}"
            for name, text in names.items()
            if written[name] != given[name]
        ]
        raise ValueError(
            f"The tokens of {self.path} were written with another tokenizer ({written['name']}): it has "
            f"{' and '.join(differing) or 'another vocabulary or other rules, and as many ids'}. Pass that one as `tokenizer`, or "
            "tokenize the text again."
        )

    def open(self, split: str) -> TokenShards:
        """The tokens of a split.

        Raises:
            ValueError: there is no such split; or a shard is missing, or has another size than when it was written.
        """
        if split not in self.splits:
            raise ValueError(f"{self.path} has no split {split!r}; its splits are {', '.join(self.splits)}.")
        files = []
        for shard in self.splits[split]["shards"]:
            path = self.path / split / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["size"]:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {shard['size']:,}"
                raise ValueError(
                    f"The shard {path} {found}; copy the folder again, or write it with `hf-hybrid tokenize`."
                )
            files.append(path)
        tokens = TokenShards(files)
        if tokens.size != self.splits[split]["tokens"]:
            raise ValueError(
                f"The split {split!r} of {self.path} has {tokens.size:,} tokens; {MANIFEST_FILE} says "
                f"{self.splits[split]['tokens']:,}. Write the folder again with `hf-hybrid tokenize`."
            )
        return tokens

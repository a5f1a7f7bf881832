"""A corpus as one array of token ids: documents tokenised in batches, each followed by `</s>`, in memory or in a file.

A token file consists of raw little-endian integers (`tokens.bin`) and a small description (`tokens.bin.json`). It is
memory-mapped, so its size does not matter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 1_000


def document_batches(
    documents: Iterable[str | dict], *, characters: int = _BATCH_CHARACTERS, limit: int = _BATCH_DOCUMENTS
) -> Iterator[list[str]]:
    """Groups documents into batches with about the same number of characters.

    Args:
        documents: strings, or rows with a column `text` (as `load_text_source` returns them).
        characters: number of characters at which a batch is complete.
        limit: maximum number of documents in a batch.

    Raises:
        ValueError: a document is neither.
    """
    batch: list[str] = []
    size = 0
    for document in documents:
        text = document.get("text", "") if isinstance(document, dict) else document
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"Documents must be strings, or rows with a column `text`; got {type(document).__name__}."
            )
        batch.append(text)
        size += len(text)
        if size >= characters or len(batch) >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens; special tokens spelled out in a text are read as ordinary characters."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        verbose=False,
    )
    return encoded["input_ids"]


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of `</s>`.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "`tokenizer` has no end-of-sequence token, which ends every document; set `tokenizer.eos_token`."
        )
    return tokenizer.eos_token_id


def tokenize_corpus(
    documents: Iterable[str | dict],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path | None = None,
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Tokenises all documents into one stream.

    Args:
        documents: strings, or rows with a column `text`, e.g. a data set of `load_text_source`, streamed or not.
        tokenizer: a fast tokenizer with an end-of-sequence token.
        path: file to write, which is returned as a memory map; None keeps everything in memory.
        max_tokens: number of tokens to stop after.
        progress: show a progress bar.

    Returns:
        (N,) array of uint16 if the vocabulary fits, else of int32.

    Raises:
        ValueError: there is no text, or the tokenizer has no end-of-sequence token. No file is left behind.
    """
    eos = end_of_document(tokenizer)
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<i4")
    pieces = _token_pieces(documents, tokenizer, eos, dtype, max_tokens, progress)
    if path is None:
        parts = list(pieces)
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
        _require_tokens(len(tokens))
        return tokens
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        count = 0
        with scratch.open("wb") as file:
            for piece in pieces:
                piece.tofile(file)
                count += len(piece)
        _require_tokens(count)
        description = {"dtype": dtype.str, "tokens": count, "vocab_size": len(tokenizer), "eos_token_id": eos}
        _description_file(path).write_text(json.dumps(description, indent=2) + "\n")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return load_token_file(path)


def _require_tokens(count: int) -> None:
    if count == 0:
        raise ValueError("The corpus contains no text: there are no documents, or all of them are empty.")


def _token_pieces(documents, tokenizer, eos: int, dtype: np.dtype, max_tokens: int | None, progress: bool):
    count = 0
    total = len(documents) if hasattr(documents, "__len__") else None
    with tqdm(
        total=total, desc="Tokenising", unit=" documents", disable=None if progress else True, mininterval=1.0
    ) as bar:
        for texts in document_batches(documents):
            bar.update(len(texts))
            for ids in encode_documents(tokenizer, texts):
                if not ids:
                    continue
                piece = np.empty(len(ids) + 1, dtype)
                piece[:-1] = ids
                piece[-1] = eos
                if max_tokens is not None and count + len(piece) >= max_tokens:
                    yield piece[: max_tokens - count]
                    return
                count += len(piece)
                yield piece
            bar.set_postfix(tokens=f"{count:,}", refresh=False)


def _description_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def load_token_file(path: str | Path) -> np.memmap:
    """Opens a file written by `tokenize_corpus` as a memory map.

    Raises:
        ValueError: the file or its description is missing, or they do not agree in size.
    """
    path = Path(path)
    if not path.is_file() or not _description_file(path).is_file():
        raise ValueError(f"{path} and {_description_file(path)} must both exist; write them with `tokenize_corpus`.")
    description = json.loads(_description_file(path).read_text())
    dtype = np.dtype(description["dtype"])
    expected = description["tokens"] * dtype.itemsize
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes but its description says {expected}; write it again."
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(description["tokens"],))

"""Text of the laboratory: tokens to train on, held-out inputs, and what counting words reaches on them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_hybrid.data.corpus import embedded_text_corpus
from hf_hybrid.data.packing import CausalBlockDataset
from hf_hybrid.data.span_corruption import SpanCorruptionDataset
from hf_hybrid.data.token_corpus import load_token_file, tokenize_corpus
from hf_hybrid.recipes.support.pretraining_data import PretrainingDataArguments, limited, load_documents
from hf_hybrid.tokenization.sentencepiece_tokenizer import train_sentencepiece_tokenizer
from hf_hybrid.tokenization.special_tokens import padded_vocab_size, sentinel_ids
from hf_hybrid.training.text_tokens import special_ids

from .settings import RANDOM_DOCUMENTS, SPAN_CORRUPTION, Settings

DOCSTRINGS = "docstrings"  # name of the text that every installation carries
NUM_SENTINELS = 256  # enough for inputs of 4,096 tokens
HELD_OUT_NOISE = {"noise_density": 0.15, "mean_span_length": 3.0}
_DISCOUNT = 0.75
_MIN_REPEATED_CHARACTERS = 40  # shorter lines, such as headings, are no repetition


@dataclass(frozen=True)
class Text:
    """Tokenized text.

    Attributes:
        tokenizer: its tokenizer.
        train, held_out: (N,) ids of documents, each followed by `</s>`.
    """

    tokenizer: PreTrainedTokenizerBase
    train: np.ndarray
    held_out: np.ndarray

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding matrix."""
        return padded_vocab_size(self.tokenizer)

    @property
    def special_ids(self) -> list[int]:
        """Ids that are not text: sentinels, `</s>` and padding."""
        return special_ids(self.tokenizer)


def read_documents(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents.

    Args:
        sources: files, folders or Hub data sets as the recipes read them, and "docstrings".
    """
    train: list[str] = []
    held_out: list[str] = []
    for source in sources:
        if source == DOCSTRINGS:
            train += embedded_text_corpus("train")
            held_out += embedded_text_corpus("validation")
        else:
            for documents, split in zip((train, held_out), load_documents(PretrainingDataArguments([source]))):
                documents += [row["text"] for dataset in split for row in dataset]
    return train, held_out


def without_repeated_lines(documents: Sequence[str]) -> list[str]:
    """The documents without lines of at least 40 characters that stand in an earlier line, of whatever document."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        lines = []
        for line in document.split("\n"):
            content = line.strip()
            if len(content) < _MIN_REPEATED_CHARACTERS or content not in seen:
                lines.append(line)
                seen.add(content)
        kept.append("\n".join(lines))
    return kept


def prepare_text(sources: Sequence[str], vocab_size: int, cache: Path, *, deduplicated: bool = False) -> Text:
    """Trains a tokenizer on the training text and tokenizes everything; both are kept in `cache`.

    Args:
        sources: see `read_documents`.
        vocab_size: pieces of the tokenizer, without its sentinels.
        cache: folder; text, once read there under the same sources, is not read again.
        deduplicated: train on the text `without_repeated_lines`, in the pieces of the whole text.
    """
    key = json.dumps([[Path(source).name for source in sources], vocab_size, NUM_SENTINELS])
    folder = cache / f"text-{vocab_size}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if not folder.exists():
        train, held_out = read_documents(sources)
        scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        tokenizer = train_sentencepiece_tokenizer(
            train, vocab_size=vocab_size, num_sentinels=NUM_SENTINELS, max_sentences=100_000, num_threads=1
        )
        tokenizer.save_pretrained(scratch)
        tokenize_corpus(train, tokenizer, scratch / "train.bin")
        tokenize_corpus(held_out, tokenizer, scratch / "held_out.bin")
        scratch.rename(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = folder / ("unique.bin" if deduplicated else "train.bin")
    if not train.exists():
        tokenize_corpus(without_repeated_lines(read_documents(sources)[0]), tokenizer, train)
    return Text(tokenizer, load_token_file(train), load_token_file(folder / "held_out.bin"))


def shuffled_documents(tokens: np.ndarray, eos_token_id: int, seed: int) -> np.ndarray:
    """The documents, each with its `</s>`, in a random order."""
    documents = np.split(np.asarray(tokens), np.flatnonzero(tokens == eos_token_id) + 1)
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate([documents[index] for index in order])


class NoiseMixture(Dataset):
    """Span corruption with several noises: every batch has that of its first row.

    Args:
        datasets: the same text, each with one noise.
    """

    def __init__(self, datasets: Sequence[SpanCorruptionDataset]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return min(len(dataset) for dataset in self.datasets)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of each."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return self.datasets[indices[0] % len(self.datasets)].__getitems__(indices)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]


def datasets_of(
    text: Text, settings: Settings, objective: str, rows: int, *, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Inputs to train on, and `rows` held-out inputs, the same for every seed and every noise of training."""
    tokens = text.train
    if settings.order == RANDOM_DOCUMENTS:
        tokens = shuffled_documents(tokens, text.tokenizer.eos_token_id, seed)
    if objective != SPAN_CORRUPTION:
        held_out = CausalBlockDataset(text.held_out, settings.length)
        return CausalBlockDataset(tokens, settings.length), limited(held_out, rows)
    options = {
        "input_length": settings.length,
        "sentinel_ids": sentinel_ids(text.tokenizer),
        "eos_token_id": text.tokenizer.eos_token_id,
    }
    noises = settings.noise_mixture or ((settings.noise_density, settings.mean_span_length),)
    trains = [
        SpanCorruptionDataset(tokens, seed=seed, noise_density=density, mean_span_length=span, **options)
        for density, span in noises
    ]
    train = NoiseMixture(trains) if settings.noise_mixture else trains[0]
    held_out = SpanCorruptionDataset(text.held_out, resample_each_epoch=False, **HELD_OUT_NOISE, **options)
    return train, limited(held_out, rows)


def hidden_tokens(row: dict, sentinels: Sequence[int], special_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (token before it in the text, token) of the text tokens that a model must predict in one held-out input."""
    inputs, labels = row["input_ids"].tolist(), row["labels"].tolist()
    special = set(special_ids)
    if inputs == labels:  # next token; the first is not predicted
        return [(before, token) for before, token in zip(inputs, inputs[1:]) if token not in special]
    known = set(sentinels)
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in labels:
        if token in known:
            current = spans.setdefault(token, [])
        elif token not in special:
            current.append(token)
    pairs: list[tuple[int, int]] = []
    before = inputs[0]
    for token in inputs:
        for hidden in spans.get(token, ()):
            pairs.append((before, hidden))
            before = hidden
        if token not in known:
            before = token
    return pairs


@dataclass(frozen=True)
class WordCounts:
    """What needs no model, in nats per text token of the held-out inputs.

    Attributes:
        unigram: entropy of these tokens, which no guess that ignores the context can undercut.
        bigram: cross-entropy given the token before, from counts of the training text with absolute discounting.
        most_frequent: share of the most frequent of these tokens.
        tokens: number of these tokens.
        bytes_per_token: mean number of bytes of these tokens.
    """

    unigram: float
    bigram: float
    most_frequent: float
    tokens: int
    bytes_per_token: float


def word_counts(pairs: Sequence[tuple[int, int]], train: np.ndarray, byte_lengths: np.ndarray) -> WordCounts:
    """Entropies of held-out tokens.

    Args:
        pairs: (token before, token) of every held-out text token.
        train: (N,) training tokens.
        byte_lengths: (V,) bytes of each token.
    """
    before, token = np.asarray(pairs, dtype=np.int64).T
    shares = np.array(list(Counter(token.tolist()).values())) / len(token)
    vocab_size = len(byte_lengths)
    train = train.astype(np.int64)
    single = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    keys, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    totals = np.bincount(train[:-1], minlength=vocab_size)
    kinds = np.bincount(keys // vocab_size, minlength=vocab_size)
    wanted = before * vocab_size + token
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    pair_counts = np.where(keys[place] == wanted, counts[place], 0)
    total = np.maximum(totals[before], 1)
    double = np.maximum(pair_counts - _DISCOUNT, 0) / total + _DISCOUNT * kinds[before] / total * single[token]
    double = np.where(totals[before] > 0, double, single[token])
    return WordCounts(
        unigram=float(-(shares * np.log(shares)).sum()),
        bigram=float(-np.log(double).mean()),
        most_frequent=float(shares.max()),
        tokens=len(token),
        bytes_per_token=float(byte_lengths[token].mean()),
    )


def byte_lengths(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """Bytes of each token, (V,): a space for the mark of a word, one for a byte that has no piece."""
    lengths = np.zeros(vocab_size, dtype=np.int64)
    for piece, index in tokenizer.get_vocab().items():
        is_byte = piece.startswith("<0x") and piece.endswith(">")
        lengths[index] = 1 if is_byte else len(piece.replace("\u2581", " ").encode())
    return lengths

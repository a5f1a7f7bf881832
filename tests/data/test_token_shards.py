"""Tokens on disk: written in parallel, continued after a break, and read like an array in memory."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_hybrid.data import token_writing
from hf_hybrid.data.packing import CausalBlockDataset, TokenBlocks
from hf_hybrid.data.segments import DocumentSegments, document_bounds
from hf_hybrid.data.token_corpus import tokenize_corpus
from hf_hybrid.data.token_shards import TokenFolder, TokenShards, is_token_folder, tokenizer_fingerprint
from hf_hybrid.data.token_writing import partial_folder, write_token_folder
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer
from hf_hybrid.tokenization.sentencepiece_tokenizer import train_sentencepiece_tokenizer

SHARD_BYTES = 10_000


@pytest.fixture
def texts(documents) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [*documents[:9], "", None, "  ", *documents[9:]]})


def write(path: Path, texts: datasets.Dataset, tokenizer, **options) -> TokenFolder:
    parts = {"train": [texts.select(range(15)), texts.select(range(15, 20))], "validation": [texts.select([20, 21])]}
    write_token_folder(path, parts, tokenizer, sources={"data": ["texts"]}, shard_bytes=SHARD_BYTES, **options)
    return TokenFolder(path)


@pytest.fixture
def folder(tmp_path, texts, tokenizer) -> TokenFolder:
    return write(tmp_path / "tokens", texts, tokenizer)


def test_shards_hold_the_tokens_of_the_corpus(folder, documents, tokenizer, tmp_path):
    tokens = folder.open("train")
    expected = tokenize_corpus(documents[:17], tokenizer, progress=False)
    assert tokens.dtype == expected.dtype and tokens.size == len(tokens) == len(expected)
    assert np.array_equal(tokens[:], expected)
    train = folder.splits["train"]
    assert len(train["shards"]) > 3 and train["documents"] == 17
    assert train["bytes"] == sum(len(text.encode()) for text in documents[:17])
    loaded = datasets.load_from_disk(str(folder.path))
    assert list(loaded) == ["train", "validation"]
    rows = loaded["train"]["input_ids"]
    assert [token for row in rows for token in row] == expected.tolist()
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert not list(folder.path.glob("*/*.arrow.json"))


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(folder, texts, tokenizer, tmp_path):
    other = write(tmp_path / "others", texts, tokenizer, num_processes=2)
    assert other.splits == folder.splits


def test_they_are_read_like_an_array(folder, tokenizer):
    tokens = pickle.loads(pickle.dumps(folder.open("train")))
    array = tokens[:]
    rng = np.random.default_rng(0)
    for start, stop, step in rng.integers(-len(array), len(array), (40, 3)):
        place = slice(int(start), int(stop), int(step) or None)
        assert np.array_equal(tokens[place], array[place])
    assert tokens[-1] == array[-1]
    for length in (1, 7, 64, 5000):
        blocks, expected = TokenBlocks(tokens, length), TokenBlocks(array, length)
        assert len(blocks) == len(expected)
        indices = rng.integers(-len(blocks), len(blocks), 9)
        assert np.array_equal(blocks.rows(indices), expected.rows(indices))
        assert np.array_equal(blocks.rows(slice(1, None, 3)), expected.rows(slice(1, None, 3)))
    eos = tokenizer.eos_token_id
    assert document_bounds(tokens, eos) == document_bounds(array, eos)
    segments = [DocumentSegments(source, eos, length=50, num_rows=3) for source in (tokens, array)]
    for first, second in zip(*segments):
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_workers_map_the_files_themselves(folder):
    blocks = CausalBlockDataset(folder.open("train"), 64)
    assert len(pickle.dumps(blocks)) < 5000
    loader = torch.utils.data.DataLoader(blocks, batch_size=4, num_workers=2)
    rows = torch.cat([batch["input_ids"] for batch in loader])
    assert torch.equal(rows, torch.from_numpy(blocks.blocks.rows(slice(None))))


def test_a_stopped_call_is_continued(folder, texts, tokenizer, tmp_path, monkeypatch):
    whole, path = folder, tmp_path / "stopped"
    encode, calls = token_writing.encode_documents, []

    def stop_in_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(token_writing, "encode_documents", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(path, texts, tokenizer)
    assert not path.exists() and not is_token_folder(path)
    finished = {file: file.stat().st_mtime_ns for file in partial_folder(path).rglob("*.arrow.json")}
    assert len(finished) == 2
    with pytest.raises(ValueError, match="another tokenizer.*remove the folder"):
        write(path, texts, byte_tokenizer())
    assert write(path, texts, tokenizer).splits == whole.splits
    assert len(calls) == 3 + len(whole.splits["train"]["shards"]) - 2 + len(whole.splits["validation"]["shards"])
    assert not partial_folder(path).exists()


def test_existing_folders_and_empty_texts(folder, texts, tokenizer, tmp_path):
    with pytest.raises(FileExistsError, match="`output_dir`.*not an empty folder"):
        write(folder.path, texts, tokenizer)
    empty = datasets.Dataset.from_dict({"text": ["", "  "]})
    with pytest.raises(ValueError, match="'train' contains no text"):
        write_token_folder(tmp_path / "empty", {"train": [empty]}, tokenizer, sources={})
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_damaged_folders_are_named(folder):
    with pytest.raises(ValueError, match="no split 'test'.*train, validation"):
        folder.open("test")
    shard = folder.path / "train" / folder.splits["train"]["shards"][1]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=f"{shard.name} has .* bytes instead of"):
        folder.open("train")
    shard.write_bytes(b"\0" * len(content))
    with pytest.raises(ValueError, match="not a shard of tokens, or damaged"):
        folder.open("train")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        folder.open("train")
    manifest = folder.path / "tokens.json"
    manifest.write_text(json.dumps({**folder.manifest, "format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        TokenFolder(folder.path)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="not a folder of tokens"):
        TokenFolder(folder.path)


def test_tokens_know_their_tokenizer(folder, documents, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved", model_max_length=99)
    loaded.chat_template = "{{ messages }}"
    loaded(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves traces in the backend
    folder.check_tokenizer(loaded)
    with pytest.raises(ValueError, match="it has 464 ids, not 259.*`tokenizer`"):
        folder.check_tokenizer(byte_tokenizer())
    similar = train_sentencepiece_tokenizer(documents[::-2], vocab_size=400, num_sentinels=64, num_threads=1)
    assert tokenizer_fingerprint(similar)["vocab_size"] == 464
    with pytest.raises(ValueError, match="another vocabulary or other rules, and as many ids"):
        folder.check_tokenizer(similar)


def test_large_vocabularies_need_more_bytes(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 70_000)
    assert write(tmp_path / "wide", texts, tokenizer).open("train").dtype == np.int32


def test_no_documents_is_an_empty_array():
    assert len(TokenShards([])) == 0 and TokenShards([])[:].size == 0

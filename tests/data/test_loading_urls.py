"""Text in object stores, of which a file system in memory stands for all."""

from __future__ import annotations

import gzip
import json

import fsspec
import pytest

from hf_hybrid.data.loading import MissingSplitError, is_single_file, load_table, load_text_source
from hf_hybrid.recipes.support.pretraining_data import PretrainingDataArguments, load_text
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer

ROWS = [{"text": "first document", "label": 0}, {"text": "second\ndocument", "label": 1}]


@pytest.fixture
def store(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path_factory.mktemp("downloads"))
    monkeypatch.setattr(
        datasets.config, "HF_HUB_OFFLINE", False
    )  # which forbids any download, this one in memory included
    files = fsspec.filesystem("memory")
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    files.pipe_file("/bucket/rows.jsonl", lines)
    files.pipe_file("/bucket/rows.jsonl.gz", gzip.compress(lines))
    files.pipe_file("/bucket/text/train/b.txt", b"one\n\ntwo")
    files.pipe_file("/bucket/text/train/a.md", b"three " * 30)
    files.pipe_file("/bucket/text/validation/c.txt", b"held out " * 20)
    files.pipe_file("/bucket/table.csv", b"text,label\na,1\n")
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file(store, name, streaming):
    assert list(load_text_source(f"{store}/{name}", streaming=streaming)) == [{"text": row["text"]} for row in ROWS]
    table = load_table([f"{store}/{name}", f"{store}/{name}"], streaming=streaming)
    assert list(table) == ROWS + ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_and_its_splits(store, streaming):
    train = load_text_source(f"{store}/text/", streaming=streaming)
    assert [row["text"] for row in train] == ["three " * 30, "one\n\ntwo"]
    held_out = load_text_source(f"{store}/text", "validation", streaming=streaming)
    assert [row["text"] for row in held_out] == ["held out " * 20]
    with pytest.raises(MissingSplitError, match="no files of the split 'test'; found splits: train, validation"):
        load_text_source(f"{store}/text", "test", streaming=streaming)


def test_local_files_by_url(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert load_table(f"file://{tmp_path}/rows.jsonl")["label"][:] == [0, 1]


def test_recipes_read_them(store):
    arguments = PretrainingDataArguments(data=[f"{store}/text"])
    text = load_text(arguments, byte_tokenizer())
    assert text.train.num_documents == 2 and text.validation.num_documents == 1
    stream = PretrainingDataArguments(data=[f"{store}/text"], streaming=True)
    assert len(list(load_text(stream, byte_tokenizer()).train)) == 2
    one_file = PretrainingDataArguments(
        data=[f"{store}/rows.jsonl"]
    )  # has no validation split, and is not asked for one
    assert load_text(one_file, byte_tokenizer()).validation.num_documents == 1


def test_what_cannot_be_read_is_named(store):
    for source, options, message in [
        (f"{store}/missing.jsonl", {}, "Could not read memory://bucket/missing.jsonl as json"),
        (f"{store}/missing.jsonl", {"streaming": True}, "Could not read"),
        (f"{store}/nothing", {}, "contains no data files"),
        ("unknown://bucket/text.txt", {}, "Could not read .*[Pp]rotocol"),
        ("unknown://bucket/", {}, "cannot be listed"),
        (f"{store}/rows.jsonl", {"on_bad_record": "skip"}, "`on_bad_record` is 'skip'"),
        ([f"{store}/rows.jsonl", f"{store}/table.csv"], {}, "have several formats"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_table(source, **options)
    assert is_single_file(f"{store}/a.parquet") and not is_single_file(f"{store}/a")

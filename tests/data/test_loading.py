"""Reading text and tables from local files and folders; every kind of missing or unusable data."""

from __future__ import annotations

import gzip
import json

import pytest

from hf_hybrid.data.loading import load_table, load_text_source

ROWS = [{"text": "first document", "label": 0}, {"text": "second\ndocument", "label": 1}]


@pytest.fixture
def files(tmp_path):
    """One file of each format with the same two rows."""
    import pandas

    frame = pandas.DataFrame(ROWS)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "rows.parquet")
    lines = "\n".join(map(json.dumps, ROWS))
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    return tmp_path


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.parquet", "rows.json", "rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_formats(files, name, streaming):
    data = load_text_source(files / name, streaming=streaming)
    assert list(data) == [{"text": row["text"]} for row in ROWS]
    if not streaming:
        assert load_table(files / name).column_names == ["text", "label"]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_files_are_whole_documents(tmp_path, streaming):
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.md").write_text("# three")
    data = load_text_source(tmp_path, streaming=streaming)
    assert [row["text"].strip() for row in data] == ["# three", "one\n\ntwo"]
    several = load_text_source([tmp_path / "b.txt", str(tmp_path / "a.md")], streaming=streaming)
    assert [row["text"].strip() for row in several] == ["one\n\ntwo", "# three"]


def test_splits_of_a_folder(tmp_path):
    for name, text in [("train.jsonl", "t0"), ("train-1.jsonl", "t1"), ("validation.jsonl", "v")]:
        (tmp_path / name).write_text(json.dumps({"text": text}))
    (tmp_path / "README.md").write_text("about")
    assert [row["text"] for row in load_text_source(tmp_path, "train")] == ["t1", "t0"]
    assert [row["text"] for row in load_text_source(tmp_path, "validation")] == ["v"]
    with pytest.raises(
        ValueError,
        match=r"no files of the split 'test'; found splits: train, validation. Call them `test.\*`, or pass files",
    ):
        load_text_source(tmp_path, "test")


def test_sources_with_different_columns_are_joined(files, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"id": "x", "text": "third"}))
    data = load_text_source([files / "rows.csv", tmp_path / "other.jsonl"])
    assert [row["text"] for row in data] == ["first document", "second\ndocument", "third"]


def test_text_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"body": "b", "size": 1}))
    assert list(load_text_source(path)) == [{"text": "b"}]
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"body": "b", "title": "t", "size": 1}))
    assert list(load_text_source(path, text_column="title", streaming=True)) == [{"text": "t"}]
    with pytest.raises(ValueError, match="no column `text`; name .* body, title"):
        load_text_source(path)
    with pytest.raises(ValueError, match="no column 'text'.*`text_column`.*body, title, size"):
        load_text_source(path, text_column="text")
    with pytest.raises(ValueError, match="'size' .* does not contain strings"):
        load_text_source(path, text_column="size")


def test_missing_empty_and_broken(tmp_path):
    with pytest.raises(ValueError, match="No such file or folder: .*nowhere.txt"):
        load_text_source(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="No such file or folder"):
        load_table([tmp_path / "a.csv", tmp_path / "b.csv"])
    with pytest.raises(ValueError, match="contains no data file"):
        load_text_source(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="Empty file"):
        load_text_source(tmp_path / "empty.jsonl")
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="Unknown file format"):
        load_text_source(tmp_path / "image.png")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="Could not read"):
        load_text_source(tmp_path / "broken.parquet")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "train.csv").write_text("text,label\na,0\n")
    (tmp_path / "mixed" / "train-more.tsv").write_text("text\tlabel\nb\t1\n")
    with pytest.raises(ValueError, match=r"commas \(.csv\) and tabs \(.tsv\)"):
        load_table(tmp_path / "mixed")
    with pytest.raises(ValueError, match="empty list"):
        load_text_source([])
    with pytest.raises(ValueError, match="neither an existing file or folder nor a Hub data set"):
        load_text_source("no-such-owner/no-such-dataset")

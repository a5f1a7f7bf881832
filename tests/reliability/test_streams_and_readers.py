"""What if a file is damaged or oddly encoded that is streamed, or read by a recipe that does not train."""

from __future__ import annotations

import json
import pydoc_data.topics
import re
from pathlib import Path

import datasets
import pytest
from test_data_files import CORRUPT, HANDLED, UNREADABLE, lines

from hf_hybrid.data.blimp import read_minimal_pairs
from hf_hybrid.data.loading import load_table, load_text_source
from hf_hybrid.data.lra import load_lra_table, lra_task
from hf_hybrid.data.records import counting_left_out
from hf_hybrid.data.streaming import CausalBlockStream
from hf_hybrid.recipes import evaluate, lm_eval, pretrain_clm, train_tokenizer
from hf_hybrid.recipes.generate import GenerateArguments, read_inputs
from hf_hybrid.recipes.inspect_activations import InspectArguments, _texts
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("fault", [*CORRUPT, *UNREADABLE])
def test_corrupt_files_are_named_before_a_stream_begins(fault, tmp_path):
    if fault == "no parquet":
        pytest.skip("parquet files have no records that can be damaged alone; their reader names the file")
    name, content, message = {**CORRUPT, **UNREADABLE}[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text_source(tmp_path / name, streaming=True)


@pytest.mark.parametrize("fault", [name for name in CORRUPT if name != "open quote"])
def test_a_stream_leaves_out_what_a_table_leaves_out(fault, tmp_path, caplog):
    name, content, message = CORRUPT[fault]
    (tmp_path / name).write_bytes(content)
    with counting_left_out() as left_out:
        stream = load_text_source(tmp_path / name, on_bad_record="skip", streaming=True)
        table = load_text_source(tmp_path / name, on_bad_record="skip")
    assert [row["text"] for row in stream] == table["text"][:]
    assert [row["text"] for row in stream] == table["text"][:], "every time"
    assert len(left_out) == 1, "each once, however often it is read"
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("case", [name for name in HANDLED if "MB" not in name])
def test_a_stream_reads_what_a_table_reads(case, tmp_path):
    name, content, expected = HANDLED[case]
    (tmp_path / name).write_bytes(content)
    assert [row["text"] for row in load_text_source(tmp_path / name, streaming=True)] == expected


def test_columns_of_a_stream(tmp_path):
    """Records may lack columns, files may differ in them, values may be missing, gzip and encodings are read."""
    (tmp_path / "a.jsonl").write_text('{"title": "t", "text": null}\n{"text": "a", "n": 1}\n')
    (tmp_path / "b.csv").write_bytes("text,n\ncaf\u00e9,\n,2\n".encode("latin-1"))
    rows = list(load_table(tmp_path / "a.jsonl", streaming=True))
    assert rows == [{"title": "t", "text": None, "n": None}, {"title": None, "text": "a", "n": 1}]
    assert [row["text"] for row in load_text_source(tmp_path / "a.jsonl", streaming=True)] == [None, "a"]
    rows = list(load_table(tmp_path / "b.csv", streaming=True, encoding="latin-1"))
    assert rows == [{"text": "caf\u00e9", "n": None}, {"text": None, "n": "2"}]


def test_a_stream_of_several_files_continues_where_it_stopped(tmp_path):
    for number in range(3):
        texts = [f"text {number} {row} " * 6 for row in range(5)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{\n")
    documents = load_text_source(tmp_path, streaming=True, on_bad_record="skip")
    assert documents.num_shards == 3

    def blocks():
        return CausalBlockStream(documents, byte_tokenizer(), block_length=32)

    whole = [row["input_ids"].tolist() for row in blocks()]
    begun = blocks()
    reader = iter(begun)
    first = [next(reader)["input_ids"].tolist() for _ in range(7)]
    rest = blocks()
    rest.load_state_dict(begun.state_dict())
    assert first + [row["input_ids"].tolist() for row in rest] == whole and len(whole) > 15


# -------------------------------------------------------------------------------------------------- counts in records

RUN = {
    "arch": "bst", "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "block_length": 16, "report_to": "none",
    "config_overrides": "hidden_size=16,num_attention_heads=2,head_dim=8,intermediate_size=16,num_hidden_layers=1,block_size=8,ssm_state_size=8",
    "save_strategy": "no", "eval_strategy": "no", "per_device_train_batch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_records_that_were_left_out_are_counted(streaming, tmp_path):
    topics = list(pydoc_data.topics.topics.values())
    texts = [json.dumps({"text": topics[row][:400]}) for row in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join([*texts[:6], "{", *texts[6:], "[]"]))
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    options = {**RUN, "data": str(tmp_path / "a.jsonl"), "tokenizer": str(tmp_path / "bytes"), "on_bad_record": "skip"}
    options |= {"streaming": streaming, "held_out_documents": 2, "validation_fraction": 0.2}
    metrics = pretrain_clm.main({**options, "output_dir": str(tmp_path / "run")})
    assert metrics["skipped_records"] == 2
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped_records"] == 2
    if streaming:
        return
    again = {key: options[key] for key in ("data", "on_bad_record", "block_length", "use_cpu", "validation_fraction")}
    again |= {"kind": "clm", "model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "eval")}
    assert evaluate.main(again)["skipped_records"] == 2
    made = {"data": str(tmp_path / "a.jsonl"), "vocab_size": 340, "output_dir": str(tmp_path / "tokenizer")}
    assert train_tokenizer.main({**made, "on_bad_record": "skip"})["skipped_records"] == 2


# ------------------------------------------------------------------------------------------------------ other readers


def inputs_of(reader: str, path: Path, **reading) -> list[str]:
    if reader == "generate":
        return read_inputs(GenerateArguments("model", input_file=str(path), **reading))
    if reader == "inspect, data":
        return _texts(InspectArguments("model", "out", data=[str(path)], split="train", **reading), "text")
    return _texts(InspectArguments("model", "out", input_file=str(path), **reading), "text")


READERS = ["generate", "inspect", "inspect, data"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_inputs_of_recipes_that_do_not_train(reader, name, tmp_path):
    if reader == "inspect, data" and name == "a.txt":
        pytest.skip("a text file among the data is one document")
    content = {
        "a.jsonl": ('{"text":"caf\u00e9"}\n', b"{", "no valid JSON"),
        "a.csv": ("text,label\ncaf\u00e9,1\n", b"b", "1 cell, but"),
        "a.txt": ("caf\u00e9\n", b"\xff", "byte 0xff at position 0 of the line: not UTF-8"),
    }
    good, bad, problem = content[name]
    path = tmp_path / name
    path.write_bytes(good.encode("latin-1"))
    assert inputs_of(reader, path, encoding="latin-1") == ["caf\u00e9"]
    path.write_bytes(good.encode() + bad + b"\n")
    number = good.count("\n") + 1
    with pytest.raises(ValueError, match=rf"{name}, line {number}: {problem}.*"):
        inputs_of(reader, path)
    assert inputs_of(reader, path, on_bad_record="skip") == ["caf\u00e9"]


@pytest.mark.parametrize("in_folder", [False, True])
def test_minimal_pairs(in_folder, tmp_path):
    good = json.dumps({"sentence_good": "a", "sentence_bad": "b", "UID": "x"}).encode()
    path = tmp_path / "pairs" / "validation.jsonl"
    path.parent.mkdir()
    path.write_bytes(lines(good, b"{", good))
    source = str(path.parent if in_folder else path)
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 2: no valid JSON"):
        read_minimal_pairs(source)
    assert len(read_minimal_pairs(source, on_bad_record="skip")["x"]) == 2
    path.write_bytes(lines(good, b'{"sentence_good": "a", "sentence_bad": ""}'))
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 2: a sentence is missing"):
        read_minimal_pairs(source)
    path.write_bytes(lines(b'{"sentence_good": "caf\xe9", "sentence_bad": "b"}'))
    assert read_minimal_pairs(source, encoding="latin-1")["all"][0]["sentence_good"] == "caf\u00e9"


def test_minimal_pairs_of_the_harness(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra `eval`")
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(b'{"sentence_good": "caf\xe9", "sentence_bad": "b"}', b"{"))
    monkeypatch.setattr(lm_eval, "_run_harness", lambda words: None)
    options = ["--blimp_data", str(path), "--blimp_encoding", "latin-1"]
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2"):
        lm_eval.main(options)
    assert lm_eval.main([*options, "--blimp_on_bad_record", "skip"]) == {}


LRA_FILES = {
    "listops": ("basic_train.tsv", lines(b"Source\tTarget", b"( [MAX 1 2 ] )\t2", b"( 1"), "not the columns Source, Target", 3),
    "retrieval": ("new_aan_pairs.train.tsv", lines(b"1\tx\ty\ta\tb", b"1\tx"), "not a label", 2),
    "text": ("train/pos/2.txt", b"caf\xe9", "byte 0xe9 at position 3", 1),
}  # fmt: skip


@pytest.mark.parametrize("task", LRA_FILES)
def test_distributed_files_of_the_long_range_arena(task, tmp_path):
    name, content, problem, number = LRA_FILES[task]
    if task == "text":
        for folder in ("train/pos", "train/neg"):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "1.txt").write_text("fine\r\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{Path(name).name}, line {number}: {problem}"):
        load_lra_table(lra_task(task), tmp_path)
    rows = load_lra_table(lra_task(task), tmp_path, on_bad_record="skip")
    assert len(rows) == (2 if task == "text" else 1)
    if task == "text":
        rows = load_lra_table(lra_task(task), tmp_path, encoding="latin-1")
        assert sorted(rows["text"]) == ["caf\u00e9", "fine\n", "fine\n"]

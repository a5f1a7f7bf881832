"""What if a data file is damaged, oddly encoded or empty: every fault against every recipe that reads files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForSeq2SeqLM

from hf_hybrid.configuration.configuration_spade import SpadeConfig
from hf_hybrid.data.corpus import embedded_text_corpus
from hf_hybrid.data.loading import load_table, load_text_source
from hf_hybrid.recipes import (
    classify_audio,
    classify_image,
    finetune_glue,
    finetune_summarization,
    finetune_translation,
    pretrain_clm,
    pretrain_mlm,
    pretrain_span_corruption,
    train_lra,
    train_tokenizer,
)
from hf_hybrid.tokenization.sentencepiece_tokenizer import train_sentencepiece_tokenizer

ROW = {
    "text": "some words",
    "label": 1,
    "summary": "words",
    "en": "words",
    "de": "Worte",
    "audio": [0.0],
    "image": [0],
}
GOOD = json.dumps(ROW).encode()
TINY = "hidden_size=16,num_attention_heads=2,intermediate_size=32,num_hidden_layers=1"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_sentencepiece_tokenizer(embedded_text_corpus()[:100], vocab_size=480, num_sentinels=16)
    config = SpadeConfig(
        vocab_size=512, hidden_size=16, head_dim=8, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, decoder_layers=1,
        window_size=9, ssm_state_size=4, max_target_positions=256,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


NEW = {"tokenizer": None, "arch": "spade_lm", "config_overrides": TINY}
TUNED = {"model_name_or_path": None}
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "train_tokenizer": (train_tokenizer, {"vocab_size": 300}),
    "pretrain_clm": (pretrain_clm, {**NEW, "block_length": 32}),
    "pretrain_mlm": (pretrain_mlm, {**NEW, "arch": "mega", "config_overrides": "", "block_length": 32}),
    "pretrain_span_corruption": (pretrain_span_corruption, {"tokenizer": None, "config_overrides": TINY + ",head_dim=8", "input_length": 32}),
    "finetune_glue": (finetune_glue, {**TUNED, "text_columns": "text"}),
    "finetune_summarization": (finetune_summarization, TUNED),
    "finetune_translation": (finetune_translation, {**TUNED, "source_lang": "en", "target_lang": "de"}),
    "classify_audio": (classify_audio, {"arch": "longvq", "sampling_rate": 8000}),
    "classify_image": (classify_image, {"arch": "mega"}),
    "train_lra": (train_lra, {"task": "text", "arch": "mega"}),
}  # fmt: skip


def run(name: str, data: Path, folder: Path, checkpoint: Path, **changes: Any) -> Any:
    """Run a recipe on the CPU for a step."""
    recipe, options = RECIPES[name]
    options = {key: str(checkpoint) if value is None else value for key, value in options.items()}
    options |= {"data": str(data), "output_dir": str(folder / "run")}
    if name != "train_tokenizer":
        options |= {"validation_fraction": 0.4, "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    return recipe.main({**options, **changes})


def lines(*rows: bytes) -> bytes:
    return b"\n".join(rows) + b"\n"


# name of the file, its bytes, what the message says
CORRUPT = {
    "no JSON": ("a.jsonl", lines(*[GOOD] * 4, b'{"text": "x", "label"', GOOD), r"a\.jsonl, line 5: no valid JSON"),
    "latin-1 in JSON": ("a.jsonl", lines(GOOD, b'{"text":"caf\xe9"}'), r"line 2: byte 0xe9 at position 12.*not UTF-8: pass --encoding latin-1"),
    "latin-1 in csv": ("a.csv", lines(b"text,label", b"a,1", b"caf\xe9,1"), r"a\.csv, line 3: byte 0xe9 at position 3.*not UTF-8"),
    "no object": ("a.jsonl", lines(GOOD, b"[1, 2]"), r"a\.jsonl, line 2: a record must be an object"),
    "surrogate": ("a.jsonl", lines(GOOD, b'{"text":"a\\ud800"}'), r"line 2: column 'text': half of a surrogate pair \(\\ud800\)"),
    "nested surrogate": ("a.jsonl", lines(GOOD, b'{"text":"a","t":{"en":["b\\ud800"]}}'), r"line 2: column 't': half of a surrogate pair"),
    "name twice": ("a.jsonl", lines(GOOD, b'{"text":"a","text":"b"}'), r"a\.jsonl, line 2: the column 'text' occurs twice"),
    "key twice": ("a.jsonl", lines(GOOD, b'{"text":"a","m":{"a":1,"a":2}}'), r"a\.jsonl, line 2: column 'm': the key 'a' occurs twice"),
    "too large": ("a.jsonl", lines(GOOD, b'{"text":"a","label":1e400}'), r"line 2: column 'label': a number that is too large"),
    "too deep": ("a.jsonl", lines(GOOD, b'{"text":"a","m":' + b"[" * 20_000 + b"]" * 20_000 + b"}"), r"line 2: nested more than 60 levels"),
    "deep objects": ("a.jsonl", lines(GOOD, b'{"text":"a","m":' + b'{"a":' * 70 + b"1" + b"}" * 71), r"line 2: column 'm': nested more than 60"),
    "in an array": ("a.json", b"[" + GOOD + b',{"text":"a\\ud800"}]', r"a\.json: record 2: column 'text': half of a surrogate pair"),
    "too large in an array": ("a.json", b"[" + GOOD + b',{"text":"a","label":-1e999}]', r"a\.json: record 2: column 'label': a number"),
    "raw NUL": ("a.jsonl", lines(GOOD, b'{"text":"a\0b"}'), r"line 2: no valid JSON: Invalid control character"),
    "long row": ("a.csv", lines(b"text,label", b"a,1", b"b,2,3", b"c,1"), r"a\.csv, line 3: 3 cells, but the header names 2"),
    "short row": ("a.csv", lines(b"text,label", b"a,1", b"b", b"c,1"), r"a\.csv, line 3: 1 cell, but the header names 2"),
    "open quote": ("a.csv", lines(b"text,label", b'"a,1', b"b,2"), r"a\.csv, line 2: .*quotation mark may not be closed"),
    "tabs": ("a.tsv", lines(b"text\tlabel", b"a\t1", b"b"), r"a\.tsv, line 3: 1 cell"),
}  # fmt: skip
UNREADABLE = {
    "truncated array": ("a.json", b'[{"text":"a","label":1},\n{"text":"b"', r"a\.json, line 2: no valid JSON"),
    "utf-16": ("a.csv", "text,label\na,1\n".encode("utf-16"), r"a\.csv, line 1: not UTF-8 but utf-16: pass --encoding utf-16"),
    "same names": ("a.csv", lines(b"text,text", b"a,1"), r"a\.csv, line 1: the column 'text' occurs twice"),
    "header only": ("a.csv", lines(b"text,label"), r"a\.csv has a header but no rows"),
    "blank lines": ("a.jsonl", b"\n\n", r"a\.jsonl has no rows"),
    "deep array": ("a.json", b"[" * 20_000 + b"]" * 20_000, r"a\.json: nested more than 60 levels deep"),
    "empty array": ("a.json", b"[]", r"a\.json has no rows"),
    "empty": ("a.jsonl", b"", r"Empty file: .*a\.jsonl"),
    "no gzip": ("a.jsonl.gz", b"not compressed", r"a\.jsonl\.gz: Not a gzipped file"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(GOOD * 500)[:60], r"a\.jsonl\.gz: Compressed file ended"),
    "no parquet": ("a.parquet", b"PAR1xxxx", r"Could not read .*a\.parquet as parquet: .*magic bytes"),
}  # fmt: skip
FAULTS = {**CORRUPT, **UNREADABLE}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("load", [load_table, load_text_source])
def test_corrupt_files_are_named(load, fault, tmp_path):
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fault", ["no JSON", "latin-1 in csv", "short row", "header only", "no parquet"])
def test_every_recipe_names_corrupt_files(recipe, fault, tmp_path, checkpoint):
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / name, tmp_path, checkpoint)
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize("fault", CORRUPT)
def test_corrupt_records_can_be_left_out(fault, tmp_path, caplog):
    name, content, message = CORRUPT[fault]
    (tmp_path / name).write_bytes(content)
    if fault == "open quote":  # swallows the rest of the file
        with pytest.raises(ValueError, match=r"No record of .* can be read:\n.*line 2"):
            load_table(tmp_path / name, on_bad_record="skip")
        return
    rows = load_table(tmp_path / name, on_bad_record="skip")
    whole = load_table(tmp_path / name, on_bad_record="skip")["text"][:]
    assert whole == rows["text"][:] and set(whole) <= {"some words", "a", "c"} and len(whole) >= 1
    assert "1 corrupt records are left out" in caplog.text
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("fault", UNREADABLE)
def test_nothing_is_left_out_of_an_unreadable_file(fault, tmp_path):
    name, content, message = UNREADABLE[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_table(tmp_path / name, on_bad_record="skip")


def test_a_damaged_validation_file_is_not_taken_for_a_missing_one(tmp_path, checkpoint):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(lines(*[GOOD] * 9))
    (tmp_path / "data" / "validation.jsonl").write_bytes(lines(GOOD, b"{"))
    for recipe in ("pretrain_clm", "finetune_glue", "finetune_summarization"):
        with pytest.raises(ValueError, match=r"validation\.jsonl, line 2"):
            run(recipe, tmp_path / "data", tmp_path, checkpoint)


HANDLED = {
    "BOM, text": ("a.txt", b"\xef\xbb\xbfhello", ["hello"]),
    "BOM, csv": ("a.csv", b"\xef\xbb\xbftext,label\na,1\n", ["a"]),
    "BOM, JSON": ("a.jsonl", b"\xef\xbb\xbf" + b'{"text":"a"}\n', ["a"]),
    "CRLF, csv": ("a.csv", b"text,label\r\na,1\r\n", ["a"]),
    "CRLF, JSON": ("a.jsonl", b'{"text":"a"}\r\n{"text":"b"}\r\n', ["a", "b"]),
    "CRLF, text": ("a.txt", b"a\r\nb", ["a\nb"]),
    "NUL, text": ("a.txt", b"a\0b", ["a\0b"]),
    "NUL, JSON": ("a.jsonl", b'{"text":"a\\u0000b"}\n', ["a\0b"]),
    "words of csv": ("a.csv", b"text,label\nNone,1\nNA,2\nnull,3\nnan,4\n", ["None", "NA", "null", "nan"]),
    "brackets in a text": ("a.jsonl", json.dumps({"text": '[{\\"' * 100}).encode(), ['[{\\"' * 100]),
    "60 levels": ("a.jsonl", b'{"text":"a","m":' + b"[" * 59 + b"]" * 59 + b"}", ["a"]),
    "words after 10,000 numbers": ("a.csv", b"text,label\n" + b"7,1\n" * 10_001 + b"a,1\n", ["7"] * 10_001 + ["a"]),
    "10 MB document": ("a.txt", b"word " * 2_000_000, ["word " * 2_000_000]),
    "line of 50 MB, JSON": ("a.jsonl", json.dumps({"text": "word " * 10_000_000}).encode(), ["word " * 10_000_000]),
    "line of 50 MB, csv": ("a.csv", b"text,label\n" + b"word " * 10_000_000 + b",1\n", ["word " * 10_000_000]),
}  # fmt: skip


@pytest.mark.parametrize("case", HANDLED)
def test_unusual_files_are_read(case, tmp_path):
    name, content, expected = HANDLED[case]
    (tmp_path / name).write_bytes(content)
    assert load_text_source(tmp_path / name)["text"][:] == expected


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_encodings(encoding, name, tmp_path):
    content = {"a.txt": "café", "a.csv": "text,label\ncafé,1\n", "a.jsonl": '{"text":"café"}\n{"text":"café"}\n'}[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert set(load_text_source(tmp_path / name, encoding=encoding)["text"]) == {"café"}
    with pytest.raises(ValueError, match="pass --encoding"):
        load_text_source(tmp_path / name)


def test_reading_options_are_checked(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="`encoding` 'latin-99' is unknown"):
        load_table(tmp_path / "a.txt", encoding="latin-99")
    with pytest.raises(ValueError, match="`encoding` 'base64' is unknown"):
        load_table(tmp_path / "a.txt", encoding="base64")
    with pytest.raises(ValueError, match="`on_bad_record` must be one of error, skip; got 'ignore'"):
        load_table(tmp_path / "a.txt", on_bad_record="ignore")


DISAGREEING = {
    "kinds in .csv": ({"a.csv": "text,label\na,\nb,1\n", "b.csv": "text,label\na,1\n\nb,yes\n"}, r"'label' holds a number in .*a\.csv, line 3 \('1'\), but text in .*b\.csv, line 4 \('yes'\)"),
    "kinds in .jsonl": ({"a.jsonl": '{"text":"a","label":1}\n', "b.jsonl": '\n{"text":"a","label":"x"}\n'}, r"'label' holds a number in .*a\.jsonl, line 1 \(1\), but text in .*b\.jsonl, line 2 \('x'\)"),
    "columns of .csv": ({"a.csv": "text,label\na,1\n", "b.csv": "text,other\na,1\n"}, r"b\.csv has no column 'label', which .*a\.csv has"),
    "columns of .jsonl": ({"a.jsonl": '{"text":"a"}\n', "b.jsonl": '{"text":"a","label":1}\n'}, r"a\.jsonl has no column 'label', which .*b\.jsonl has"),
}  # fmt: skip


@pytest.mark.parametrize("case", DISAGREEING)
def test_files_of_a_folder_that_do_not_fit_together(case, tmp_path):
    files, message = DISAGREEING[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_table(tmp_path)


def test_a_late_change_of_kind_is_named(tmp_path):
    """Types are inferred in pieces of 10 MB."""
    rows = [json.dumps({"text": "x" * 10_000, "label": 1})] * 1_200 + [json.dumps({"text": "x", "label": "yes"})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(
        ValueError, match=r"'label' holds a number in .*line 1 \(1\), but text in .*line 1201 \('yes'\)"
    ):
        load_table(tmp_path / "a.jsonl")


def test_sources_of_different_formats_are_joined(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    (tmp_path / "b.jsonl").write_text('{"text":"b","label":0}\n')
    (tmp_path / "c.jsonl").write_text('{"text":"b","label":"x"}\n')
    for order in (["a.csv", "b.jsonl"], ["b.jsonl", "a.csv"]):
        assert {*load_table([tmp_path / name for name in order])["text"]} == {"a", "b"}
    with pytest.raises(
        ValueError, match=r"'label' is of the type .*int64.* in .*a\.csv, but .*string.* in .*c\.jsonl"
    ):
        load_table([tmp_path / "a.csv", tmp_path / "c.jsonl"])

"""The tokenizer recipe, called as a function and as commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from hf_hybrid.data.corpus import language_reference
from hf_hybrid.recipes.train_tokenizer import TrainTokenizerArguments, main
from hf_hybrid.tokenization.special_tokens import sentinel_ids

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_train_tokenizer.py"


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, page in enumerate(language_reference()[:12]):
        (folder / f"{index}.txt").write_text(page)
    return folder


def test_command_line_trains_and_saves(text_folder, tmp_path):
    output = tmp_path / "new" / "tokenizer"
    command = [
        "--data",
        str(text_folder),
        "--vocab_size",
        "400",
        "--num_sentinels",
        "50",
        "--output_dir",
        str(output),
    ]
    subprocess.run(
        [sys.executable, SCRIPT, *command],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == 450 and sentinel_ids(tokenizer)[:2] == [449, 448]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["documents"] == 12 and metrics["padded_vocab_size"] == 512
    assert json.loads((output / "training_arguments.json").read_text())["vocab_size"] == 400
    reference = sentencepiece.SentencePieceProcessor(model_file=str(output / "sentencepiece.model"))
    for line in language_reference()[20].splitlines():
        assert tokenizer(line, add_special_tokens=False).input_ids == reference.encode(line)
    with pytest.raises(ValueError, match="not an empty folder"):
        main(command)
    assert [path.name for path in output.parent.iterdir()] == ["tokenizer"]


def test_several_sources_streaming_and_limit(text_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"body": page, "id": 1}) for page in language_reference()[:12]))
    output = tmp_path / "tokenizer"
    output.mkdir()  # an empty folder is welcome
    metrics = main(
        TrainTokenizerArguments(
            data=[str(rows)],
            output_dir=str(output),
            vocab_size=400,
            text_column="body",
            streaming=True,
            max_documents=8,
            normalization="nfkc_cf",
        )
    )
    assert metrics["documents"] == 8 and metrics["vocab_size"] == 1424
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("CLASS").input_ids == tokenizer("class").input_ids


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["--help-all"])
    text = capsys.readouterr().out
    for option in ("--data", "--vocab_size", "--num_sentinels", "--output_dir", "--streaming"):
        assert option in text


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("missing.txt", None, [], "No such file"),
        ("empty.txt", "", [], "Empty file"),
        ("blank.txt", "  \n\n ", [], "no text"),
        ("short.txt", "a few words", [], "could not train a vocabulary of 400"),
        ("rows.jsonl", '{"a": "x", "b": "y"}', [], "no column `text`"),
        ("rows.jsonl", '{"text": "x"}', ["--text_column", "body"], "no column 'body'"),
        ("good.txt", "a few words", ["--normalization", "nfd"], "accepted are nfkc"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, name, content, options, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        main(["--data", str(path), "--vocab_size", "400", "--output_dir", str(tmp_path / "out"), *options])
    assert sorted(tmp_path.iterdir()) == before

"""The tasks of the Long Range Arena as data sets: tables, tokens, pixels and pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from hf_hybrid.data.lra import (
    TASKS,
    PairCollator,
    PixelSequences,
    encode_rows,
    listops_tokenizer,
    load_lra_table,
    lra_rows,
    lra_task,
    lra_tokenizer,
    pixel_array,
)
from hf_hybrid.data.lra_listops import SHORT as SHORT_LISTS
from hf_hybrid.data.lra_listops import TOKENS, generate_listops


def write_table(folder, rows, split="train"):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_listops_tokens():
    tokenizer = listops_tokenizer()
    assert len(tokenizer) == 17 and tokenizer.pad_token_id == 0
    ids = tokenizer("[MAX 4 [SM 7 8 ] 1 ]")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[MAX", "4", "[SM", "7", "8", "]", "1", "]"]
    assert tokenizer("( ( ( [MAX 4 ) ( [SM ( 7 8 X ) ) 1 ] )")["input_ids"] == ids
    assert sorted(tokenizer(" ".join(TOKENS))["input_ids"]) == list(range(2, 17))


def test_the_tokenizer_is_saved_and_loaded(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = listops_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    text = "[MED 1 [MIN 2 3 ] ]"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_generated_rows_become_a_data_set():
    columns = generate_listops(6, settings=SHORT_LISTS)
    rows = lra_rows(TASKS["listops"], columns)
    assert rows.features["label"].names == list("0123456789") and rows["label"] == columns["target"]
    encoded = encode_rows(rows, TASKS["listops"], listops_tokenizer())
    assert encoded["length"] == columns["length"] and encoded.column_names[0] == "input_ids"
    assert max(map(len, encode_rows(rows, TASKS["listops"], listops_tokenizer(), max_length=40)["input_ids"])) == 40
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 6)
    images = lra_rows(TASKS["pathfinder"], {"pixels": pixels, "label": np.array([1, 0])})
    assert np.array_equal(pixel_array(images), pixels) and images.features["label"].names[1] == "connected"


@pytest.mark.parametrize(
    ("task", "rows", "expected"),
    [
        ("listops", {"source": "1", "target": 1, "length": 1}, {"source": "1", "label": 1}),
        ("text", {"id": "x", "text": "a", "label": 1}, {"text": "a", "label": 1}),
        ("text", {"sentence": "a", "label": 0}, {"text": "a", "label": 0}),
        ("retrieval", {"sentence1": "a", "sentence2": "b", "label": 1}, {"text1": "a", "text2": "b", "label": 1}),
        ("image", {"pixels": [1, 2], "label": 7, "idx": 3}, {"pixels": [1, 2], "label": 7}),
        ("pathfinder", {"pixels": [1, 2], "label": 1}, {"pixels": [1, 2], "label": 1}),
    ],
)
def test_tables_with_the_usual_columns(tmp_path, task, rows, expected):
    folder = write_table(tmp_path / "data", [rows])
    table = load_lra_table(lra_task(task), [folder], "train")
    assert table[0] == expected
    assert len(load_lra_table(lra_task(task), [folder, folder], "train")) == 2


def test_distributed_files_are_found(tmp_path):
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n( [MAX 1 ) 2 ]\t2\n")
    rows = load_lra_table(TASKS["listops"], tmp_path)
    assert rows[0] == {"label": 2, "source": "( [MAX 1 ) 2 ]"}
    assert len(encode_rows(rows, TASKS["listops"], listops_tokenizer())["input_ids"][0]) == 4


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("listops", {"text": "1", "label": 1}, "no column 'source' for the task listops"),
        ("retrieval", {"text1": "1", "label": 1}, "no column 'text2'"),
    ],
)
def test_unusable_tables(tmp_path, task, row, message):
    with pytest.raises(ValueError, match=message):
        load_lra_table(lra_task(task), write_table(tmp_path / "data", [row]))[0]


def test_unknown_tasks_and_empty_sources():
    with pytest.raises(ValueError, match="listops, text, retrieval, image, pathfinder; got 'cifar'"):
        lra_task("cifar")
    with pytest.raises(ValueError, match="empty list"):
        load_lra_table(TASKS["text"], [])


def test_strange_tokens_are_refused():
    rows = Dataset.from_dict({"source": ["[MAX 1 2 ]", "[MAX 1 12 ]"], "label": [2, 2]})
    with pytest.raises(ValueError, match="Row 1 of the data is not a ListOps expression: '.MAX 1 12"):
        encode_rows(rows, TASKS["listops"], listops_tokenizer())


def test_bytes_of_texts_and_pairs():
    task = TASKS["retrieval"]
    tokenizer = lra_tokenizer(task)
    rows = Dataset.from_dict({"text1": ["abé", "x" * 50], "text2": ["c", "y" * 5], "label": [0, 1]})
    joint = encode_rows(rows, task, tokenizer, max_length=10)
    assert joint["input_ids"][0] == [b + 3 for b in "abé".encode()] + [1] + [ord("c") + 3, 1]
    assert len(joint["input_ids"][1]) == 20 and joint["length"] == [7, 20]
    two = encode_rows(rows, task, tokenizer, max_length=10, two_inputs=True)
    assert two["input_ids"][0] == [b + 3 for b in "abé".encode()] + [1]
    assert two["pair_input_ids"][0] == [ord("c") + 3, 1] and len(two["input_ids"][1]) == 10
    batch = PairCollator(tokenizer)([{**row, "labels": 1} for row in two.remove_columns("length")])
    assert batch["input_ids"].shape == (2, 16) and batch["pair_input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [5, 10]
    assert batch["pair_attention_mask"].sum(1).tolist() == [2, 6] and batch["labels"].tolist() == [1, 1]
    assert lra_tokenizer(TASKS["image"]) is None


def test_pixels_as_tokens_and_as_values():
    pixels = np.array([[0, 255, 3], [4, 5, 6]], dtype=np.uint8)
    tokens = PixelSequences(pixels, [1, 0])
    assert len(tokens) == 2 and tokens[0]["input_ids"].tolist() == [1, 256, 4] and tokens[0]["labels"] == 1
    values = PixelSequences(pixels, [1, 0], as_values=True, mean=0.5, std=0.25)
    batch = next(iter(DataLoader(values, batch_size=2)))
    expected = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch["pixel_values"], expected)


def test_pictures_become_grey_pixels():
    colour = np.zeros((2, 3, 3), np.uint8)
    colour[..., 1] = 100
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    features = Features({"pixels": ImageFeature(), "label": Value("int64")})
    rows = Dataset.from_dict({"pixels": [Image.fromarray(colour), Image.fromarray(grey)], "label": [0, 1]}, features)
    assert pixel_array(rows).tolist() == [[58] * 6, [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ([[1, 2], [1, 2, 3]], "Row 1 of the data has 3 pixels, the rows before have 2"),
        ([[1, 2], [1, 300]], "Row 1 of the data has no pixels"),
        ([[0.5, 1.0]], "Row 0 of the data has no pixels"),
        ([[]], "Row 0 of the data has no pixels"),
    ],
)
def test_bad_pixels(pixels, message):
    with pytest.raises(ValueError, match=message):
        pixel_array(Dataset.from_dict({"pixels": pixels}))

"""Reading the files in which the tasks of the Long Range Arena are distributed, and what is wrong with damaged ones."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hf_hybrid.data.lra_files import read_original, to_grey


def test_listops(tmp_path):
    rows = {"train": "( ( [MAX 1 ) 2 ] )\t2\n[MIN 3 4 ]\t3", "val": "5\t5", "test": "6\t6"}
    for name, content in rows.items():
        (tmp_path / f"basic_{name}.tsv").write_text(f"Source\tTarget\n{content}\n")
    expected = {"source": ["( ( [MAX 1 ) 2 ] )", "[MIN 3 4 ]"], "target": [2, 3]}
    assert read_original("listops", tmp_path, "train") == expected
    assert read_original("listops", tmp_path / "basic_train.tsv", "validation") == expected
    assert read_original("listops", tmp_path, "validation") == {"source": ["5"], "target": [5]}
    (tmp_path / "basic_test.tsv").write_text("Source\tTarget\n1\t1\nno target\n")
    with pytest.raises(ValueError, match="basic_test.tsv, line 3"):
        read_original("listops", tmp_path, "test")
    (tmp_path / "basic_val.tsv").unlink()
    with pytest.raises(ValueError, match=r"no file \*_val.tsv for the split 'validation'"):
        read_original("listops", tmp_path, "validation")


def test_retrieval(tmp_path):
    for name in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text(
            f'1.0\ta\tb\t"{name} one"\ttwo\n0.0\tc\td\tthree\tfour "\n'
        )
    expected = {"text1": ['"eval one"', "three"], "text2": ["two", 'four "'], "label": [1, 0]}
    assert read_original("retrieval", tmp_path, "validation") == expected
    (tmp_path / "new_aan_pairs.test.tsv").write_text("1.0\ta\tb\tone\ttwo\nx\n")
    with pytest.raises(ValueError, match="line 2: not a label"):
        read_original("retrieval", tmp_path, "test")
    (tmp_path / "table.tsv").write_text("text1\ttext2\tlabel\na\tb\t1\n")
    assert read_original("retrieval", tmp_path / "table.tsv", "train") is None


def test_reviews(tmp_path):
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "1_7.txt").write_text(f"{label} é", encoding="utf-8")
    (tmp_path / "train" / "unsup").mkdir()
    assert read_original("text", tmp_path, "test") == {"text": ["neg é", "pos é"], "label": [0, 1]}
    with pytest.raises(ValueError, match="validation_split test"):
        read_original("text", tmp_path, "validation")


def cifar_records(count: int, first: int) -> np.ndarray:
    records = np.zeros((count, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(first, first + count) % 10
    records[:, 1:1025] = 200  # red
    records[:, 1 + 1024 * 2 :] = np.arange(1024) % 256  # blue
    return records


def test_cifar(tmp_path):
    for number in range(1, 6):
        cifar_records(4, number).tofile(tmp_path / f"data_batch_{number}.bin")
    cifar_records(3, 7).tofile(tmp_path / "test_batch.bin")
    train, validation, test = (read_original("image", tmp_path, name) for name in ("train", "validation", "test"))
    assert [len(part["label"]) for part in (train, validation, test)] == [18, 2, 3]
    assert train["label"][:5].tolist() == [1, 2, 3, 4, 2] and test["label"].tolist() == [7, 8, 9]
    assert train["class_names"][0] == "airplane"
    expected = np.floor((0.2989 * 200 + 0.114 * (np.arange(1024) % 256)) * 255.5 / 255)
    assert np.abs(test["pixels"][0] - expected).max() <= 1 and test["pixels"].shape == (3, 1024)
    (tmp_path / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="data_batch_3.bin is missing or incomplete"):
        read_original("image", tmp_path, "train")


def test_grey_covers_the_range():
    assert to_grey(np.zeros((2, 2, 3), np.uint8)).tolist() == [[0, 0], [0, 0]]
    assert to_grey(np.full((1, 3), 255, np.uint8)).tolist() == [255]


@pytest.mark.parametrize("as_array", [False, True])
def test_pathfinder(tmp_path, as_array):
    root = tmp_path / "curv_contour_length_14"
    (root / "metadata").mkdir(parents=True)
    for batch in (0, 1, 2, 10):  # 10 comes after 2
        (root / "imgs" / str(batch)).mkdir(parents=True)
        rows = []
        for number in range(5):
            path = root / "imgs" / str(batch) / f"sample_{number}.png"
            if (batch, number) == (1, 3):
                path.touch()  # a few distributed images are empty
            else:
                Image.fromarray(np.full((4, 4), 20 * batch + number, np.uint8)).save(path)
            rows.append([f"imgs/{batch}", path.name, str(number), str(number % 2), "1.0", "14"])
        if as_array:
            with (root / "metadata" / f"{batch}.npy").open("wb") as file:
                np.save(file, np.array(rows))
        else:
            (root / "metadata" / f"{batch}.npy").write_text("\n".join(map(" ".join, rows)) + "\n")
    train, validation, test = (read_original("pathfinder", root, name) for name in ("train", "validation", "test"))
    assert train["pixels"].shape == (15, 16)  # 16 of 20, one of them empty
    assert train["pixels"][:, 0].tolist() == [*range(5), 20, 21, 22, 24, *range(40, 45), 200]
    assert validation["pixels"][:, 0].tolist() == [201, 202] and test["pixels"][:, 0].tolist() == [203, 204]
    assert test["label"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="several difficulties.*curv_contour_length_14"):
        read_original("pathfinder", tmp_path, "train")
    (root / "imgs" / "10" / "sample_4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="sample_4.png cannot be read"):
        read_original("pathfinder", root, "test")
    (root / "metadata" / "10.npy").write_text("imgs/10 sample_0.png 0\n")
    with pytest.raises(ValueError, match="10.npy cannot be read"):
        read_original("pathfinder", root, "test")


@pytest.mark.parametrize("task", ["listops", "text", "retrieval", "image", "pathfinder"])
def test_other_folders_and_files_are_left_to_the_general_reader(tmp_path, task):
    (tmp_path / "train.jsonl").write_text("{}")
    assert read_original(task, tmp_path, "train") is None
    assert read_original(task, tmp_path / "train.jsonl", "train") is None
    assert read_original(task, tmp_path / "nowhere", "train") is None

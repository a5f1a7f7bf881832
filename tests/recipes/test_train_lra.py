"""The tasks of the Long Range Arena, end to end with every architecture that has a sequence-classification head."""

from __future__ import annotations

import json

import numpy as np
import pytest
from factories import TINY_OVERRIDES
from PIL import Image
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from hf_hybrid.auto import ARCHITECTURES
from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import evaluate, generate_lra
from hf_hybrid.recipes.train_lra import main

ARCHES = [item.model_type for item in ARCHITECTURES if "AutoModelForSequenceClassification" in item.heads]
SHORT = {"max_depth": 4, "max_args": 3, "longer_than": 3, "shorter_than": 30, "num_train": 24, "num_validation": 12}


def write_split(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def rows_of(task: str, count: int) -> list[dict]:
    if task == "text":
        return [{"text": ("good " if i % 2 else "bad ") * (1 + i % 3), "label": i % 2} for i in range(count)]
    if task == "retrieval":
        return [{"text1": "a" * (1 + i % 4), "text2": "ab" * (1 + i % 3), "label": i % 2} for i in range(count)]
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16)).tolist()
    return [{"pixels": row, "label": i % (2 if task == "pathfinder" else 3)} for i, row in enumerate(pixels)]


@pytest.fixture
def training(options) -> dict:
    return {**options, "save_strategy": "no", "eval_strategy": "no"}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("task", ["listops", "text", "retrieval", "image", "pathfinder"])
def test_every_architecture_trains_on_every_task(training, tmp_path, task, arch):
    base = {**training, "task": task, "arch": arch, "config_overrides": TINY_OVERRIDES[arch], "max_steps": 2}
    if task == "listops":
        base |= SHORT
    else:
        for split, count in (("train", 8), ("validation", 5)):
            write_split(tmp_path / "data", split, rows_of(task, count))
        base["data"] = [str(tmp_path / "data")]
    metrics = main(base)
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["task"] == task and metrics["steps"] == 2
    run = tmp_path / "run"
    assert model_card_problems((run / "README.md").read_text()) == []
    model = AutoModelForSequenceClassification.from_pretrained(run)
    classes = {"listops": 10, "image": 3}.get(task, 2)
    assert model.config.model_type == arch and model.config.num_labels == classes
    expected = {"listops": 17, "text": 259, "retrieval": 259}.get(task, 257)
    assert model.config.vocab_size == expected
    if task == "retrieval" and hasattr(model.config, "dual_encoder"):
        assert model.config.dual_encoder


def test_a_rule_is_learnt_and_found_again(training, tmp_path):
    base = {
        **training,
        "task": "text",
        "arch": "spade",
        "config_overrides": TINY_OVERRIDES["spade"] + ",hidden_dropout=0.0",
    }
    for split, count in (("train", 32), ("validation", 12)):
        write_split(tmp_path / "data", split, rows_of("text", count))
    changes = {"data": [str(tmp_path / "data")], "max_steps": 40, "learning_rate": 1e-2}
    metrics = main({**base, **changes, "per_device_train_batch_size": 8})
    assert metrics["eval_accuracy"] == 1.0 and metrics["majority_accuracy"] == 0.5
    run = tmp_path / "run"
    classify = pipeline("text-classification", model=str(run), tokenizer=AutoTokenizer.from_pretrained(run))
    assert [row["label"] for row in classify(["good good ", "bad "])] == ["1", "0"]
    again = {"kind": "lra", "task": "text", "model_name_or_path": str(run), "output_dir": str(tmp_path / "eval")}
    measured = evaluate.main({**again, "validation_data": [str(tmp_path / "data")], "use_cpu": True})
    assert measured["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_generated_files_give_what_is_generated_on_the_way(training, tmp_path):
    summary = generate_lra.main({**SHORT, "task": "listops", "output_dir": str(tmp_path / "lists"), "num_test": 5})
    assert {name: row["rows"] for name, row in summary.items()} == {"validation": 12, "test": 5, "train": 24}
    base = {
        **training,
        "task": "listops",
        "arch": "spade",
        "config_overrides": TINY_OVERRIDES["spade"],
        "max_steps": 2,
    }
    read = main({**base, "data": [str(tmp_path / "lists")], "output_dir": str(tmp_path / "a")})
    made = main({**base, **SHORT, "num_test": 5, "output_dir": str(tmp_path / "b")})
    assert read["eval_loss"] == made["eval_loss"] and read["eval_samples"] == 12
    with pytest.raises(FileExistsError, match="not empty"):
        generate_lra.main({**SHORT, "task": "listops", "output_dir": str(tmp_path / "lists")})


def write_distributed(folder, task: str) -> None:
    """A few rows in the files in which the tasks are distributed."""
    draw = np.random.default_rng(0)
    if task == "listops":
        for name in ("train", "val", "test"):
            rows = [f"( [MAX {i} ) {9 - i} ]\t{max(i, 9 - i)}" for i in range(10)]
            (folder / f"basic_{name}.tsv").write_text("\n".join(["Source\tTarget", *rows]) + "\n")
    elif task == "text":
        for split, label, number in [(s, n, i) for s in ("train", "test") for n in ("pos", "neg") for i in range(3)]:
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            (folder / split / label / f"{number}_5.txt").write_text(label * (number + 1))
    elif task == "retrieval":
        for name in ("train", "eval", "test"):
            rows = [f"{i % 2}.0\tx\ty\tfirst {i}\tsecond" for i in range(6)]
            (folder / f"new_aan_pairs.{name}.tsv").write_text("\n".join(rows) + "\n")
    elif task == "image":
        for number in range(1, 6):
            records = draw.integers(0, 10, (4, 3073), dtype=np.uint8)
            records.tofile(folder / f"data_batch_{number}.bin")
    else:
        for part in ("metadata", "imgs/0"):
            (folder / part).mkdir(parents=True)
        rows = [f"imgs/0 sample_{i}.png {i} {i % 2} 1.0" for i in range(20)]
        (folder / "metadata" / "0.npy").write_text("\n".join(rows) + "\n")
        for i in range(20):
            pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "imgs" / "0" / f"sample_{i}.png")


@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [("listops", 10, 10), ("text", 6, 6), ("retrieval", 6, 6), ("image", 18, 2), ("pathfinder", 16, 2)],
)
def test_distributed_files_are_read(training, tmp_path, task, train, validation):
    (tmp_path / "data").mkdir()
    write_distributed(tmp_path / "data", task)
    base = {
        **training,
        "task": task,
        "arch": "spade_lm",
        "config_overrides": TINY_OVERRIDES["spade_lm"],
        "max_steps": 1,
    }
    changes = {"validation_split": "test"} if task == "text" else {}
    metrics = main({**base, **changes, "data": [str(tmp_path / "data")]})
    assert (metrics["train_samples"], metrics["eval_samples"]) == (train, validation)


def test_pathfinder_is_generated(training):
    small = {"difficulty": "easy", "num_train": 4, "num_validation": 3, "max_steps": 1}
    base = {**training, "task": "pathfinder", "arch": "spade_lm", "config_overrides": TINY_OVERRIDES["spade_lm"]}
    metrics = main({**base, **small})
    assert metrics["longest_sequence"] == 1024 and metrics["train_samples"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "cifar"}, "`task` must be one of listops"),
        ({"task": "text"}, "`data` is required for the task 'text'"),
        ({"pixel_values": True}, "`pixel_values` is for the tasks image and pathfinder"),
        ({"arch": None}, "Pass either `arch`"),
        ({"config_name": "spade"}, "`config_name` is the former name of `arch`, which is given too"),
        ({"arch": "t5gemma2_encoder_of_nowhere"}, "cannot be loaded"),
        ({"arch": "mamba", "config_overrides": None}, "has no head for AutoModelForSequenceClassification.*spade"),
        ({"num_train": 0}, "`num_train` and `num_validation` must be positive"),
        ({"max_depth": 1}, "No tree has more"),
        ({"config_overrides": "d_modell=3"}, "d_modell"),
    ],
)
def test_bad_options_are_explained(training, tmp_path, changes, message):
    base = {**training, **SHORT, "task": "listops", "arch": "spade", "config_overrides": TINY_OVERRIDES["spade"]}
    with pytest.raises(ValueError, match=message):
        main({**base, **changes})
    assert not (tmp_path / "run").exists()


def test_bad_labels_are_explained(training, tmp_path):
    base = {**training, "task": "text", "arch": "spade", "config_overrides": TINY_OVERRIDES["spade"]}
    rows = [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.0}]
    for split in ("train", "validation"):
        write_split(tmp_path / "data", split, rows)
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1 has the label 0.5 .*classes are whole numbers"):
        main({**base, "data": [str(tmp_path / "data")]})
    write_split(tmp_path / "data", "train", [{"source": "1", "target": 12}])
    write_split(tmp_path / "data", "validation", [{"source": "1", "target": 1}])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1 has the label 12"):
        main({**base, "task": "listops", "data": [str(tmp_path / "data")]})

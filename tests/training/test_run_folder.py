"""Output folders: refusal, records, damaged checkpoints, atomic writing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import T5Config, T5ForConditionalGeneration

from hf_hybrid.training.run_folder import RunFolder, check_checkpoint, describe_environment, to_json, write_json


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    folder = tmp_path / "run" / "checkpoint-3"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "scheduler.pt").write_bytes(b"x")
    return folder


def test_a_new_or_empty_folder_is_accepted(tmp_path):
    assert RunFolder(tmp_path / "new").resume_checkpoint is None
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty")


def test_a_folder_with_content_is_refused(tmp_path):
    (tmp_path / "results.txt").write_text("important")
    with pytest.raises(FileExistsError, match="not empty.*resume_from_checkpoint"):
        RunFolder(tmp_path)


def test_other_processes_do_not_judge_what_the_main_one_wrote(tmp_path, monkeypatch):
    (tmp_path / "arguments.json").write_text("{}")
    monkeypatch.setenv("RANK", "1")
    RunFolder(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        RunFolder(tmp_path / "file")


@pytest.mark.parametrize("resume", ["last", "true", True])
def test_the_newest_checkpoint_is_found(checkpoint, resume):
    assert RunFolder(checkpoint.parent, resume).resume_checkpoint == checkpoint


def test_resuming_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint-<step>"):
        RunFolder(tmp_path, "last")
    with pytest.raises(ValueError, match="is not a folder"):
        RunFolder(tmp_path, str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\x00" * 40, "model.safetensors is corrupt"),
        ("config.json", b'{"hidden_size": ', "config.json is corrupt"),
        ("trainer_state.json", None, "trainer_state.json is missing"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
    ],
)
def test_damaged_checkpoints_are_named(checkpoint, name, content, message):
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(checkpoint, resumable=True)


def test_truncated_weights_are_refused(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        check_checkpoint(checkpoint)


def test_records_are_written(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.recording({"learning_rate": 1e-3}):
        pass
    folder.write_metrics({"eval_loss": np.float32(0.5), "nothing": float("nan")})
    assert json.loads((tmp_path / "run/arguments.json").read_text()) == {"learning_rate": 1e-3}
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == {"eval_loss": 0.5, "nothing": None}
    assert json.loads((tmp_path / "run/environment.json").read_text())["versions"]["torch"]


def test_a_failed_run_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RuntimeError), folder.recording({}):
        raise RuntimeError("no memory")
    assert not (tmp_path / "run").exists()


def test_a_failed_resume_keeps_checkpoints_and_records(checkpoint):
    write_json(checkpoint.parent / "arguments.json", {"seed": 1})
    folder = RunFolder(checkpoint.parent, "last")
    with pytest.raises(RuntimeError), folder.recording({"seed": 1, "learning_rate": 1.0}):
        raise RuntimeError("no memory")
    assert checkpoint.is_dir() and json.loads((checkpoint.parent / "arguments.json").read_text()) == {"seed": 1}


def test_changed_options_are_recorded_with_their_step(checkpoint, caplog):
    """Of continuations that led to no checkpoint nothing remains."""
    run = checkpoint.parent
    write_json(checkpoint / "trainer_state.json", {"global_step": 3})
    before = {"learning_rate": 2.0, "weight_decay": 0.1, "max_steps": 3, "output_dir": "a", "hub_model_id": "a/b"}
    write_json(run / "arguments.json", before)
    abandoned = {"step": 3, "changed": {"learning_rate": [1.0, 2.0]}}
    earlier = {"step": 1, "changed": {"weight_decay": [0.0, 0.1]}}
    write_json(run / "environment.json", {"world_size": 1, "resumed": [earlier, abandoned]})
    folder = RunFolder(run, "last")
    options = {"learning_rate": 4.0, "weight_decay": 0.1, "max_steps": 9, "output_dir": "b", "hub_model_id": "a/c"}
    with folder.recording(options):
        folder.commit_records()
    assert (
        "From step 3 on, `learning_rate` is 4.0; it was 1.0." in caplog.text
        and "max_steps" not in caplog.text
        and "hub_" not in caplog.text
    )
    written = json.loads((run / "environment.json").read_text())["resumed"]
    assert [(entry["step"], entry["changed"]) for entry in written] == [
        (1, {"weight_decay": [0.0, 0.1]}),
        (3, {"learning_rate": [1.0, 4.0]}),
    ]


def test_environment_names_versions_and_command():
    environment = describe_environment()
    assert {"command", "git_revision", "versions", "processor", "world_size"} <= environment.keys()


def test_json_of_unusual_values():
    value = {"path": Path("a"), "tuple": (1, 2), "nan": float("inf"), "array": np.arange(2), 3: None}
    assert to_json(value) == {"path": "a", "tuple": [1, 2], "nan": None, "array": "[0 1]", "3": None}

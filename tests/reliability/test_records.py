"""What a resumed run says of itself is true: its losses, its settings, its options, and what it read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from recipe_runs import LONGVQ, RECIPES, SEQBOAT, as_killed, main_of, options_of, records_of, same_weights
from transformers import TrainerCallback

from hf_hybrid.recipes import pretrain_clm
from hf_hybrid.training.fingerprints import changed_files, fingerprints
from hf_hybrid.training.resuming import TOTALS_FILE, RunTotals
from hf_hybrid.training.run_folder import RunFolder
from hf_hybrid.training.trainer import HybridTrainer

# The state of what is logged between two checkpoints differs with the architecture: routers, codebooks, carried states.
RUNS = [
    pytest.param("pretrain_mlm", {"arch": "seqboat", "config_overrides": SEQBOAT}, id="seqboat"),
    pytest.param("pretrain_mlm", {"arch": "longvq", "config_overrides": LONGVQ}, id="longvq", marks=pytest.mark.slow),
    *(pytest.param(recipe, {}, id=recipe, marks=pytest.mark.slow) for recipe in RECIPES),
]


@pytest.mark.parametrize(("recipe", "changes"), RUNS)
def test_records_are_those_of_an_uninterrupted_run(toy, tmp_path, recipe, changes):
    """Loss curve, mean training loss, metrics, options; the logs lie between the checkpoints."""
    options = {**options_of(recipe, toy, tmp_path), **changes, "save_total_limit": 9}
    straight = tmp_path / "straight"
    main_of(recipe)({**options, "output_dir": str(straight)})
    resumed = as_killed(straight, 2, tmp_path / "resumed")
    main_of(recipe)({**options, "output_dir": str(resumed), "resume_from_checkpoint": "last"})
    assert same_weights(straight, resumed)
    assert records_of(straight) == records_of(resumed)
    main_of(recipe)(
        {**options, "output_dir": str(resumed), "resume_from_checkpoint": "last"}
    )  # nothing is left to train
    found = json.loads((resumed / "metrics.json").read_text())
    assert found["train_runtime"] > RunTotals.read(resumed / "checkpoint-6").seconds - 1e-3
    assert records_of(straight) == records_of(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("recipe", ["pretrain_clm", "pretrain_mlm", "pretrain_span_corruption"])
def test_another_number_of_workers_reads_the_same_rows(toy, tmp_path, recipe, streaming):
    options = {**options_of(recipe, toy, tmp_path), "streaming": streaming, "save_total_limit": 9}
    options |= {"segment_length": None, "block_length": 32} if recipe == "pretrain_clm" else {}
    options |= {"held_out_documents": 3} if streaming else {}
    main_of(recipe)({**options, "output_dir": str(tmp_path / "straight")})
    resumed = as_killed(tmp_path / "straight", 2, tmp_path / "resumed")
    continued = {**options, "dataloader_num_workers": 2, "resume_from_checkpoint": "last"}
    main_of(recipe)({**continued, "output_dir": str(resumed)})
    assert same_weights(tmp_path / "straight", resumed)


def settings_seen(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Fills with the settings in force at every step: group -> learning rate, base rate, weight decay, betas."""
    seen: list[dict] = []

    class Sees(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            names = ("lr", "initial_lr", "weight_decay", "betas")
            seen.append({group["name"]: [group[name] for name in names] for group in optimizer.param_groups})

    began = HybridTrainer.__init__

    def begins(self, *args, **kwargs):
        began(self, *args, **kwargs)
        self.add_callback(Sees())

    monkeypatch.setattr(HybridTrainer, "__init__", begins)
    return seen


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw_torch_fused", marks=pytest.mark.slow)])
def test_new_settings_are_in_force_and_recorded(toy, finished, tmp_path, monkeypatch, optimizer):
    """Learning rates, weight decay, schedule and betas after a resume are those of a run that began with them."""
    run = tmp_path / "run"
    optim = {} if optimizer == "muon" else {"optim": optimizer}  # Muon is the default
    options = {**toy, "output_dir": str(run), **optim}
    if optimizer == "muon":
        as_killed(finished, 2, run)
    else:
        pretrain_clm.main({**options, "max_steps": 2})
    new = {
        "learning_rate": 0.004,
        "ssm_learning_rate": 0.003,
        "weight_decay": 0.3,
        "adam_beta2": 0.9,
        "warmup_steps": 0,
    }
    new |= {"lr_scheduler_type": "cosine", "muon_learning_rate": 0.05 if optimizer == "muon" else None}
    seen = settings_seen(monkeypatch)
    pretrain_clm.main({**options, **new, "resume_from_checkpoint": "last"})
    resumed = seen.copy()
    seen.clear()
    pretrain_clm.main({**options, **new, "output_dir": str(tmp_path / "new")})
    assert len(resumed) == 2 and resumed == seen[2:]
    recorded = json.loads((run / "arguments.json").read_text())
    assert {name: recorded[name] for name in new} == new
    (entry,) = json.loads((run / "environment.json").read_text())["resumed"]
    assert entry["step"] == 2 and entry["changed"]["weight_decay"] == [0.1, 0.3]
    assert "weight_decay 0.1 -> 0.3 (step 2)" in (run / "README.md").read_text()


REFUSED = [
    ({"optim": "sgd"}, r"`optim` was 'adamw_torch\w*'.*is 'sgd'.*model_name_or_path"),
    ({"optim": "adamw_torch_fused"}, r"`muon_learning_rate` was 0.0\d+ .*is None now"),
    ({"seed": 7}, "`seed` was 42"),
    ({"config_overrides": "hidden_size=32,num_hidden_layers=1"}, "`config_overrides` was"),
    ({"segment_length": 8}, "`segment_length` was 16"),
    ({"gradient_accumulation_steps": 2}, "takes 2 rows; the continuation would take 4"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "`lr_scheduler_type` was"),
    ({"validation_data": "{data}"}, "`validation_data` was None"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_a_continuation_cannot_take_over_is_refused(toy, finished, tmp_path, changes, message):
    """And the records stay as they were."""
    run = as_killed(finished, 4, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.glob("*.json")}
    changes = {name: toy["data"] if value == "{data}" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        pretrain_clm.main({**toy, **changes, "output_dir": str(run), "resume_from_checkpoint": "last"})
    assert {path.name: path.read_bytes() for path in run.glob("*.json")} == before


def test_a_resume_that_fails_leaves_the_records(toy, finished, tmp_path, monkeypatch):
    """Also if it fails in its third step, with other options than the run had: they took no effect on any checkpoint."""
    run = as_killed(finished, 2, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.glob("*.json")}
    step, called = HybridTrainer.training_step, []

    def fails(self, *args, **kwargs):
        called.append(1)
        if len(called) == 3:
            raise MemoryError("no room")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(HybridTrainer, "training_step", fails)
    options = {**toy, "output_dir": str(run), "max_steps": 6, "save_steps": 3, "resume_from_checkpoint": "last"}
    called[:] = [1]  # in its second step: there is no new checkpoint yet
    with pytest.raises(MemoryError):
        pretrain_clm.main({**options, "save_steps": 5, "learning_rate": 1.0})
    assert {path.name: path.read_bytes() for path in run.glob("*.json")} == before
    called.clear()
    with pytest.raises(MemoryError):
        pretrain_clm.main({**options, "learning_rate": 1e-4})
    assert (run / "checkpoint-3").is_dir()  # was trained with them
    assert json.loads((run / "arguments.json").read_text())["learning_rate"] == 1e-4


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_records_that_cannot_be_compared_are_said(toy, finished, tmp_path, caplog, damage):
    """Else other options and other data would be taken over in silence."""
    run = as_killed(finished, 4, tmp_path / "run")
    for name in ("arguments.json", "fingerprints.json"):
        (run / name).unlink() if damage == "missing" else (run / name).write_text('{"data": ')
    pretrain_clm.main({**toy, "output_dir": str(run), "resume_from_checkpoint": "last"})
    for name, consequence in (
        ("arguments.json", "options of this run"),
        ("fingerprints.json", "data, tokenizer and initial model"),
    ):
        assert f"{run / name} is {damage}: " in caplog.text and f"{consequence} " in caplog.text
    assert json.loads((run / "arguments.json").read_text())["max_steps"] == toy["max_steps"]


def test_a_checkpoint_of_another_program_has_no_sums(toy, finished, tmp_path, caplog):
    run = as_killed(finished, 2, tmp_path / "run")
    for name in (TOTALS_FILE, "checkpoint_manifest.json"):
        (run / "checkpoint-2" / name).unlink()
    pretrain_clm.main({**toy, "output_dir": str(run), "resume_from_checkpoint": "last"})
    assert f"holds no {TOTALS_FILE}" in caplog.text


def test_the_time_of_all_sessions_counts_against_the_limit(toy, finished, tmp_path):
    """A run that ended by its time is as finished as one that ended by its steps."""
    run = as_killed(finished, 2, tmp_path / "run")
    (run / "checkpoint-2" / "checkpoint_manifest.json").unlink()
    totals = RunTotals.read(run / "checkpoint-2")
    totals.seconds = 59.9 * 60
    totals.write(run / "checkpoint-2")
    options = {**toy, "output_dir": str(run), "resume_from_checkpoint": "last", "lr_scheduler_type": "linear"}
    peak = json.loads((run / "arguments.json").read_text())[
        "muon_learning_rate"
    ]  # that of the first group, which is logged
    pretrain_clm.main({**options, "max_minutes": 60, "logging_steps": 1})
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates and max(rates) < 0.5 * peak  # the schedule stands where the time stands, not the step
    totals = RunTotals.read(run / "checkpoint-4")
    assert totals.seconds > 59.9 * 60
    metrics = pretrain_clm.main({**options, "max_minutes": 59, "max_steps": 9})
    assert metrics["steps"] == 4 and metrics["train_runtime"] > 59.9 * 60


def same_size(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES = [
    ("data", "3.txt has other contents", lambda folder: same_size(folder / "3.txt")),
    ("data", "3.txt is gone", lambda folder: (folder / "3.txt").unlink()),
    ("data", "99.txt was added", lambda folder: (folder / "99.txt").write_text("more")),
    ("tokenizer", "tokenizer.json has other contents", lambda folder: same_size(folder / "tokenizer.json")),
]


def test_changed_contents_are_refused(toy, finished, tmp_path):
    """The same contents at another place are not."""
    run = as_killed(finished, 4, tmp_path / "run")
    for number, (option, message, change) in enumerate(CHANGES):
        moved = tmp_path / f"moved-{number}"
        shutil.copytree(toy[option], moved)
        options = {**toy, option: str(moved), "output_dir": str(run), "resume_from_checkpoint": "last"}
        if number == 0:
            pretrain_clm.main(options)
        RunFolder(run, "last").check_sources(options)
        change(moved)
        reason = f"`{option}` is not what it was.*{message}.*model_name_or_path=.*checkpoint-4"
        with pytest.raises(ValueError, match=reason):
            pretrain_clm.main(options)


def test_a_changed_base_model_is_refused(tmp_path):
    """What a run writes beside the weights, such as its card, is no part of the model."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.safetensors", "config.json", "metrics.json", "README.md"):
        (model / name).write_bytes(b"{  }")
    options = {"model_name_or_path": str(model)}
    known = fingerprints(options)
    for name in ("metrics.json", "README.md", "model.safetensors"):
        same_size(model / name)
    found = fingerprints(options, known=known)
    (phrase,) = changed_files(known["model_name_or_path"], found["model_name_or_path"])
    assert phrase.startswith("model.safetensors has other contents")


def test_large_sources_are_read_in_part(tmp_path, monkeypatch):
    """And files that were not touched are not read again."""
    from hf_hybrid.training import fingerprints as module

    monkeypatch.setattr(module, "_READ_WHOLE", 100)
    monkeypatch.setattr(module, "_BLOCK", 4)
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 4)
    first = fingerprints({"data": [str(path)]})["data"]
    assert first[0]["text.txt"]["blocks"] == module._BLOCKS
    for place in (0, 1023):  # the ends are among the blocks
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        second = fingerprints({"data": [str(path)]})["data"]
        assert changed_files(first, second) == ["text.txt has other contents (1,024 bytes, was 1,024)"]
        first = second
    status = path.stat()
    path.write_bytes(b"x" * 1024)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprints({"data": [str(path)]}, known={"data": first})["data"] == first


def test_the_run_itself_is_no_data(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for name in ("run/model.txt", ".hidden/b.txt", "_cache/c.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (found,) = fingerprints({"data": str(tmp_path)}, without=tmp_path / "run")["data"]
    assert list(found) == ["a.txt"]


def test_the_schedule_of_an_optimizer_with_other_state_is_refused():
    from hf_hybrid.training.resuming import apply_settings, optimizer_settings

    weight = torch.nn.Parameter(torch.ones(2))
    adam, sgd = torch.optim.AdamW([weight]), torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ValueError, match="state of another optimizer"):
        apply_settings(sgd, None, optimizer_settings(adam))

"""What leaves this machine says nothing of it: names of folders, user and host, commands, the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_hybrid.published import (
    clean_folder,
    clean_json,
    clean_text,
    is_checkpoint_file,
    is_model_file,
    is_space_file,
    write_published,
)

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    "name",
    "config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json tokenizer.json README.md "
    "tokenizer_config.json adapter_config.json adapted_config.json adapter_model.safetensors preprocessor_config.json metrics.json "
    "modeling_mega.py sentencepiece.model chat_template.jinja additional_chat_templates/tool.jinja SHA256SUMS loss_curve.png".split(),
)
def test_what_belongs_to_a_model(name: str) -> None:
    assert is_model_file(name)


@pytest.mark.parametrize(
    "name",
    "arguments.json environment.json training_args.bin optimizer.pt rng_state.pth trainer_state.json predictions.jsonl .env "
    "runs/Nov28_host/events.out.tfevents.1.host.2 checkpoint-2/model.safetensors _saving/config.json official_config.json "
    "carried_state_0.safetensors pytorch_model.bin .run.lock training_arguments.json .secret_config.json".split(),
)
def test_what_stays(name: str) -> None:
    assert not is_model_file(name)


def test_what_belongs_to_a_space() -> None:
    names = "app.py README.md requirements.txt hf_hybrid/app/page.py hf_hybrid/py.typed model/config.json model/model.safetensors"
    assert all(map(is_space_file, names.split()))
    others = "notes.txt .env other/app.py hf_hybrid/__pycache__/cli.pyc hf_hybrid/.cache/a.py hf_hybrid/key.pem model/arguments.json app.log"
    assert not any(map(is_space_file, others.split()))


def test_a_checkpoint_goes_without_its_arguments_and_logs() -> None:
    names = (
        "optimizer.pt rng_state_1.pth trainer_state.json carried_state_0.safetensors optimizer_0/__0_0.distcp".split()
    )
    assert all(map(is_checkpoint_file, names))
    assert not any(map(is_checkpoint_file, ("training_args.bin", "runs/events.out.tfevents.1.host", ".cache/x")))


def test_paths_in_texts(tmp_path: Path) -> None:
    here = str(tmp_path)
    texts = {
        f"Data: {here}/corpus, {here}/b.txt; 1/2 and/or 3": "Data: corpus, b.txt; 1/2 and/or 3",
        f"`{here}`": f"`{tmp_path.name}`",
        f"{tmp_path.parent}/{tmp_path.name}.": f"{tmp_path.name}.",
        "see ~/models/base": "see base",
        "https://huggingface.co/tmp/home/x": "https://huggingface.co/tmp/home/x",
        "a /usr/bin/env line, /absent/path/of/others, a/b": "a /usr/bin/env line, /absent/path/of/others, a/b",
    }
    for text, expected in texts.items():
        assert clean_text(text, [here]) == expected


def test_paths_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    value = {
        "name_or_path": "/gone/from/here/model",
        "base_model_name_or_path": "runs/base",
        "vocab_file": "C:\\Users\\me\\vocab.txt",
        "source": {"best_model_checkpoint": f"{tmp_path}/checkpoint-3", "hub_path": "me/model"},
        "note": [f"from {tmp_path}/x.txt", 3, None],
        "separator": "/",
    }
    assert clean_json(value, [str(tmp_path)]) == {
        "name_or_path": "model",
        "base_model_name_or_path": "base",
        "vocab_file": "vocab.txt",
        "source": {"best_model_checkpoint": "checkpoint-3", "hub_path": "me/model"},
        "note": ["from x.txt", 3, None],
        "separator": "/",
    }


def test_a_folder_is_written_and_cleaned(tmp_path: Path) -> None:
    source, target = tmp_path / "run", tmp_path / "copy"
    (source / "runs").mkdir(parents=True)
    (source / "config.json").write_text(json.dumps({"name_or_path": str(source)}))
    (source / "tokenizer.json").write_text(json.dumps({"vocab": {f"{source}/x": 0}}))
    (source / "README.md").write_text(f"Trained in {source}.\n")
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "arguments.json").write_text("{}")
    (source / "runs" / "events").write_text("x")
    written = write_published(source, target)
    assert written.left == ["arguments.json", "runs/events"] and written.changed == ["README.md", "config.json"]
    assert (target / "README.md").read_text() == "Trained in run.\n"
    assert str(source) in (source / "README.md").read_text() and str(source) in (source / "config.json").read_text()
    assert os.path.samefile(source / "model.safetensors", target / "model.safetensors")
    assert (target / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text(), "a vocabulary is data"
    assert clean_folder(target) == []


def run_checks(tmp_path: Path, marker: str) -> None:
    """Runs `published_checks.py` as another user, in another home, with a secret in the environment."""
    places = {name: tmp_path / f"planted-{name}" for name in ("home", "work")}
    for place in places.values():
        place.mkdir()
    environment = os.environ | {
        "HOME": str(places["home"]), "USER": "planted-user", "LOGNAME": "planted-user", "PLANTED": "planted-secret",
        "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marker]
    config = HERE.parents[1] / "pyproject.toml"
    done = subprocess.run(
        [*command, "-c", str(config), f"--basetemp={places['work'] / 'tests'}", str(HERE / "published_checks.py")],
        cwd=places["work"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("marker", ["not wide", pytest.param("wide", marks=pytest.mark.wide)])
def test_nothing_of_this_machine_is_published(tmp_path: Path, marker: str) -> None:
    run_checks(tmp_path, marker)

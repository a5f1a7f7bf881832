"""Everything that pushes and exports, searched for what speaks of this machine; `test_published.py` runs this file.

It runs in a process of its own with a planted home, working folder, user, host and secret.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hub_server import TOKEN, USER, HubServer

assert "huggingface_hub" not in sys.modules, "run this file in a process of its own"
SERVER = HubServer()
os.environ |= {
    "HF_ENDPOINT": SERVER.url,
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
HOST = "planted-host"
socket.gethostname = lambda: HOST

import pydoc_data.topics

import numpy as np
import pytest
import torch
from datasets import Dataset
from factories import TINY_OVERRIDES, VARIANTS, Case
from huggingface_hub import snapshot_download
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import hf_hybrid
from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.configuration.configuration_spade import SpadeConfig
from hf_hybrid.hub import export_remote_code, push_folder, verify_export
from hf_hybrid.recipes import (
    export_model,
    merge_adapter,
    push_to_hub,
    train_tokenizer,
    training_recipe,
)
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer
from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.run_folder import RunFolder, check_checkpoint, write_json
from hf_hybrid.training.trainer import HybridTrainer

REPOSITORY = Path(__file__).resolve().parents[2]
# The user is called like this in no model, and neither is its host.
NEEDLES = {
    "home": os.environ["HOME"], "working folder": os.getcwd(), "user": os.environ["USER"], "host": HOST,
    "secret": os.environ["PLANTED"], "Python": sys.prefix, "sources": str(Path(hf_hybrid.__file__).parent),
    "repository": str(REPOSITORY), "token": TOKEN,
}  # fmt: skip


def members(name: str, contents: bytes) -> Iterator[tuple[str, bytes]]:
    """A file, and the files inside if it is an archive."""
    yield name, contents
    if contents[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(contents)) as archive:
            for inner in archive.namelist():
                yield f"{name}:{inner}", archive.read(inner)


def tells(files: Mapping[str, bytes], needles: Mapping[str, str] = NEEDLES) -> list[str]:
    """What files say of this machine, in names and contents."""
    found = []
    for name, contents in files.items():
        for inner, text in members(name, contents):
            for what, needle in needles.items():
                if needle.encode() in text or needle in inner:
                    place = text.find(needle.encode())
                    found.append(f"{inner} names the {what}: {text[max(0, place - 60) : place + 90]!r}")
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(name: str = "planted") -> dict[str, bytes]:
    """Every file of every commit of a repository."""
    commits = SERVER.repositories[f"{USER}/{name}"].commits
    return {f"{path}@{number}": text for number, (_, tree) in enumerate(commits) for path, text in tree.items()}


@pytest.fixture(autouse=True)
def empty_server() -> Iterator[None]:
    SERVER.repositories.clear()
    SERVER.objects.clear()
    yield


# ------------------------------------------------------------------------------------------------------------ recipes

WORK = Path("data")
ROWS: dict[str, list[dict[str, Any]]] = {
    "glue": [{"sentence": f"{('bad', 'good')[i % 2]} {i}", "label": i % 2} for i in range(8)],
    "summarization": [{"document": f"lists and keys {i}", "summary": "lists"} for i in range(8)],
    "translation": [{"translation": {"en": f"lists {i}", "de": "Listen"}} for i in range(8)],
    "lra": [{"text": ("good " if i % 2 else "bad ") * 3, "label": i % 2} for i in range(8)],
    "image": [{"pixels": [200 * (i % 2)] * 8 + list(range(8)), "label": i % 2} for i in range(8)],
    "audio": [
        {"samples": np.arange(20 + i).tolist(), "sampling_rate": 8000, "digit": i % 2, "speaker": "x"}
        for i in range(8)
    ],
}


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """A tokenizer, an encoder-decoder and data, all in the working folder, by absolute and by relative names."""
    corpus = WORK / "corpus"
    corpus.mkdir(parents=True)
    for index, name in enumerate(sorted(pydoc_data.topics.topics)[:8]):
        (corpus / f"{index}.txt").write_text(pydoc_data.topics.topics[name][:2000], encoding="utf-8")
    train_tokenizer.main(
        {"data": str(corpus.resolve()), "vocab_size": 400, "num_sentinels": 8, "output_dir": "data/tokenizer"}
    )
    config = SpadeConfig(
        vocab_size=448, hidden_size=16, head_dim=8, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
        decoder_layers=1, window_size=9, ssm_state_size=4, max_target_positions=64,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained("data/base")
    AutoTokenizer.from_pretrained("data/tokenizer").save_pretrained("data/base")
    for kind, rows in ROWS.items():
        for split in ("train", "validation"):
            write = Path("data") / kind / f"{split}.jsonl"
            write.parent.mkdir(exist_ok=True)
            write.write_text("".join(json_line(row) for row in rows))
    return {"base": str(Path("data/base").resolve()), "tokenizer": "data/tokenizer", "corpus": str(corpus.resolve())}


def json_line(row: Any) -> str:
    import json

    return json.dumps(row) + "\n"


def options_of(task: str, made: Mapping[str, str], **changes: Any) -> dict[str, Any]:
    """A run of two steps of a recipe, pushed while and after it trains."""
    options: dict[str, Any] = {
        "output_dir": f"runs/{task}", "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2, "max_steps": 2,
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "push_to_hub": True, "hub_model_id": "planted",
        "hub_always_push": True, "report_to": "none",
    }  # fmt: skip
    arch = {"clm": "bst", "mlm": "mega", "synthetic": "longvq", "lra": "mega", "image": "mega", "audio": "mega"}.get(
        task
    )
    if task in ("clm", "mlm", "span_corruption"):
        options |= {"data": made["corpus"], "tokenizer": made["tokenizer"], "validation_fraction": 0.2}
        options |= {"input_length": 64} if task == "span_corruption" else {"block_length": 32} if task == "mlm" else {}
        options |= {"config_overrides": TINY_OVERRIDES["spade"]} if task == "span_corruption" else {}
    elif task != "synthetic":
        options["data"] = str((WORK / task).resolve())
    if task in ("glue", "summarization", "translation"):
        options["model_name_or_path"] = made["base"]
        options["max_length" if task == "glue" else "max_source_length"] = 24
    if task in ("summarization", "translation"):
        options["max_target_length"] = 8
    if task == "translation":
        options |= {"source_lang": "en", "target_lang": "de"}
    if task == "lra":
        options["task"] = "text"
    if task == "synthetic":
        options |= {"task": "copying", "num_tokens": 3, "gap": 2, "num_train": 20, "num_validation": 4}
    if arch is not None:
        options |= {"arch": arch, "config_overrides": TINY_OVERRIDES[arch]}
    return options | changes


RUNS = [
    ("clm", {"hub_strategy": "all_checkpoints", "segment_length": 16}),
    ("glue", {"hub_strategy": "checkpoint", "lora_rank": 2}),
    ("summarization", {"hub_strategy": "every_save"}),
    ("image", {"hub_strategy": "end"}),
    ("mlm", {"hub_strategy": "all_checkpoints"}),
    ("span_corruption", {"hub_strategy": "checkpoint"}),
    ("synthetic", {"hub_strategy": "checkpoint"}),
    ("translation", {"hub_strategy": "checkpoint", "lora_rank": 2}),
    ("lra", {"hub_strategy": "all_checkpoints"}),
    ("audio", {"hub_strategy": "every_save"}),
    (
        "glue",
        {"hub_strategy": "all_checkpoints", "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1},
    ),
]


@pytest.mark.parametrize(
    ("task", "changes"), RUNS[:2] + [pytest.param(*run, marks=pytest.mark.wide) for run in RUNS[2:]]
)
def test_a_run_that_is_pushed(task: str, changes: dict[str, Any], made: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    if task == "image":  # what other programs of a run leave in its folder
        changes = changes | {"report_to": "tensorboard"} if has_tensorboard() else changes
    training_recipe(task).train(options_of(task, made, **changes, output_dir=str(run)))
    assert tells(pushed()) == []
    files = SERVER.files(f"{USER}/planted")
    weights = "adapter_model.safetensors" if "lora_rank" in changes else "model.safetensors"
    assert {weights, "README.md", "metrics.json", "loss_curve.png"} <= files.keys()
    assert files[weights] == (run / weights).read_bytes()
    assert not {name for name in files if name.endswith((".bin", "arguments.json", "environment.json"))}
    assert not (run / "_publishing").exists()
    # The environment stays out of the records that do not leave, too.
    secrets = {what: NEEDLES[what] for what in ("secret", "token")}
    assert tells(files_in(run), secrets) == []
    place = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-1"}.get(changes["hub_strategy"])
    assert {name.split("/")[0] for name in files if "/" in name} == ({"last-checkpoint"} if place == "last-checkpoint" else {"checkpoint-1", "checkpoint-2"} if place else set())  # fmt: skip
    if place is None:
        return
    checkpoint = Path(snapshot_download(f"{USER}/planted", local_dir=tmp_path / "pulled")) / place
    check_checkpoint(checkpoint, resumable=True)
    if place == "checkpoint-1":  # it continues the run elsewhere, bitwise
        again = {
            "push_to_hub": False,
            "resume_from_checkpoint": str(checkpoint),
            "output_dir": str(tmp_path / "again"),
        }
        training_recipe(task).train(options_of(task, made, **changes | again))
        assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()


def has_tensorboard() -> bool:
    from transformers.integrations import is_tensorboard_available

    return bool(is_tensorboard_available())


def test_a_trainer_without_a_recipe(tmp_path: Path) -> None:
    ids = torch.randint(3, 300, (8, 16)).tolist()
    model = Case("spade_lm", "AutoModelForCausalLM", next(iter(VARIANTS["spade_lm"]))).model(vocab_size=320)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    trainer = HybridTrainer(
        model,
        HybridTrainingArguments(
            str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2, use_cpu=True, push_to_hub=True,
            hub_model_id="planted", report_to="none", disable_tqdm=True, hub_always_push=True, run_name=str(tmp_path),
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub(tags="test")
    assert trainer.push_to_hub(blocking=False).result().oid
    assert tells(pushed()) == []
    assert any(b"- test\n" in text for name, text in pushed().items() if name.startswith("README.md"))


# ------------------------------------------------------------------------------------------------------------ exports


@pytest.fixture(scope="module")
def adapter(made: dict[str, str]) -> Path:
    options = options_of("glue", made, lora_rank=2, push_to_hub=False, output_dir="runs/adapter")
    training_recipe("glue").train(options)
    return Path("runs/adapter").resolve()


@pytest.mark.parametrize("remote_code", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_the_recipe_that_shares(adapter: Path, tmp_path: Path, remote_code: bool) -> None:
    """A merged adapter: the folder that is written and the one that is pushed."""
    merged = tmp_path / "merged"
    merge_adapter.main({"model_name_or_path": str(adapter), "output_dir": str(merged)})
    (merged / "README.md").write_text((adapter / "README.md").read_text() + f"\nTrained in {merged}, see ~/notes.\n")
    options = {"model_name_or_path": str(merged), "output_dir": str(tmp_path / "out"), "repo_id": "planted"}
    push_to_hub.main(options | {"remote_code": remote_code})
    assert tells(files_in(tmp_path / "out")) == [] and tells(pushed()) == []
    assert b"Trained in merged, see notes." in SERVER.files(f"{USER}/planted")["README.md"]
    if remote_code:
        verify_export(tmp_path / "out")
        verify_export(snapshot_download(f"{USER}/planted", local_dir=tmp_path / "pulled"))


def test_a_folder_with_records_is_pushed_without_them(adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge_adapter.main({"model_name_or_path": str(adapter), "output_dir": str(merged)})
    assert (merged / "arguments.json").is_file()
    push_folder(merged, "planted")
    assert tells(pushed()) == [] and "arguments.json" not in SERVER.files(f"{USER}/planted")


@pytest.mark.parametrize(
    "kind", ["program", *(pytest.param(kind, marks=pytest.mark.wide) for kind in ("decoding_step", "onnx"))]
)
def test_exported_programs(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="the extra `export`")
        pytest.importorskip("onnxruntime", reason="the extra `export`")
    config = MegaConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, intermediate_size=16, nffn_hidden_size=16,
        shared_representation_size=8, is_decoder=kind == "decoding_step", bidirectional=kind != "decoding_step",
    )  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    head = AutoModelForCausalLM if kind == "decoding_step" else AutoModelForSequenceClassification
    head.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    export_model.main(
        {"model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "format": kind}
    )
    assert tells(files_in(tmp_path / "out")) == []


def test_an_export_with_a_tokenizer_that_was_loaded_from_a_folder(made: dict[str, str], tmp_path: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(made["base"])
    tokenizer = AutoTokenizer.from_pretrained(made["base"])
    tokenizer.init_kwargs["name_or_path"] = made["base"]  # as some tokenizers write it
    tokenizer.init_kwargs["source_path"] = made["base"]
    export_remote_code(model, tmp_path / "out", tokenizer)
    assert tells(files_in(tmp_path / "out")) == []


def test_the_environment_is_never_recorded(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").recording({"data": "x"}):
        write_json(tmp_path / "run" / "metrics.json", {})
    assert tells(files_in(tmp_path / "run"), {"secret": NEEDLES["secret"], "token": TOKEN}) == []

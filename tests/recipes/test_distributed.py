"""Two processes under torchrun or `accelerate launch` train the same model as one, and only the first writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_hybrid.recipes import pretrain_clm, pretrain_mlm, pretrain_span_corruption, train_lra, train_synthetic

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY_MEGA = (
    "hidden_size=16,num_hidden_layers=1,intermediate_size=16,shared_representation_size=8,nffn_hidden_size=16,dropout_prob=0,"
    "hidden_dropout_prob=0,attention_probs_dropout_prob=0,nffn_activation_dropout_prob=0"
)
TINY_BST = (
    "context_variant=mf,hidden_size=16,num_hidden_layers=2,num_attention_heads=2,head_dim=8,intermediate_size=16,ssm_state_size=8,"
    "num_context_states=4,hidden_dropout=0,attention_dropout=0,final_dropout=0"
)

TINY_LONGVQ = (
    "hidden_size=16,num_hidden_layers=2,value_size=16,shared_representation_size=8,intermediate_size=16,window_size=4,chunk_size=4,"
    "codebook_size=8,codebook_init=random,dead_code_threshold=0,commitment_loss_weight=0.1,hidden_dropout=0"
)


AT_THE_END = """
import atexit, os, pathlib, runpy, sys
import torch.distributed as dist
folder, script, *sys.argv[1:] = sys.argv[1:]
state = pathlib.Path(folder) / f"group{os.environ['RANK']}"
atexit.register(lambda: state.write_text("open" if dist.is_initialized() else "closed"))
runpy.run_path(script, run_name="__main__")
"""


def command_line(options: dict) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def launch(launcher: str, script: str, options: dict, *words: str) -> None:
    """Run a script on two processes, with `words` before the options; `launcher` is "torchrun" or "accelerate".

    Both must close their process group: with an open one an exit now and then aborts, and the launcher then kills the
    other process, whatever it still writes.

    With `--cpu` accelerate would leave starting the processes to MPI; `--multi_gpu` starts them itself, and the script's
    `--use_cpu` keeps them on the CPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    starter = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"],
        "accelerate": [
            "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
            "--dynamo_backend=no", f"--main_process_port={port}",
        ],
    }[launcher]  # fmt: skip
    folder = Path(options["output_dir"]).parent
    wrapper = folder / "at_the_end.py"
    wrapper.write_text(AT_THE_END)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        *starter,
        str(wrapper),
        str(folder),
        str(SCRIPTS / script),
        *words,
        *command_line(options),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(folder / f"group{rank}").read_text() for rank in range(2)] == ["closed", "closed"]


def same_weights(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_pretraining_on_two_processes(launcher, tmp_path, checkpoint, corpus):
    options = {
        "model_name_or_path": checkpoint, "data": corpus, "input_length": 32, "max_validation_segments": 16, "validation_fraction": 0.2,
        "max_steps": 6, "learning_rate": 1e-3, "use_cpu": True, "logging_steps": 1, "eval_strategy": "no",
        "optim": "adamw_torch",  # products of Muon in bfloat16 make differences of order 2**-8 of those of order 2**-24
    }  # fmt: skip
    pretrain_span_corruption.main(command_line({**options, "output_dir": tmp_path / "one"}))
    halves = {"per_device_train_batch_size": 4, "output_dir": tmp_path / "two"}
    launch(launcher, "run_pretrain_span_corruption.py", {**options, **halves})
    same_weights(tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["input_tokens_seen"] == one["input_tokens_seen"] == 6 * 8 * 32
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_summaries_on_two_processes(tmp_path, checkpoint):
    rows = [{"document": "a list of keys " * (i + 1), "summary": f"list {i}"} for i in range(7)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "model_name_or_path": checkpoint, "data": tmp_path / "train.jsonl", "max_target_length": 8,
        "validation_data": tmp_path / "validation.jsonl", "max_steps": 2, "use_cpu": True, "save_strategy": "no",
        "per_device_eval_batch_size": 2, "max_minutes": 30,
    }  # fmt: skip
    launch("torchrun", "run_finetune_summarization.py", {**options, "output_dir": tmp_path / "two"})
    predictions = (tmp_path / "two" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["references"] for line in predictions] == [[row["summary"]] for row in rows]


@pytest.mark.slow
def test_masked_language_modelling_on_two_processes(tmp_path, tokenizer_folder, corpus):
    options = {
        "arch": "mega", "config_overrides": TINY_MEGA, "tokenizer": tokenizer_folder, "data": corpus, "block_length": 32,
        "max_validation_segments": 6, "max_steps": 4, "learning_rate": 1e-3, "use_cpu": True, "eval_strategy": "no",
        "optim": "adamw_torch",  # as above
    }  # fmt: skip
    batch = {"per_device_train_batch_size": 8}
    pretrain_mlm.main(command_line({**options, **batch, "output_dir": tmp_path / "one"}))
    batch = {"per_device_train_batch_size": 4}
    launch("torchrun", "run_pretrain_mlm.py", {**options, **batch, "output_dir": tmp_path / "two"})
    same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_classification_on_two_processes(tmp_path):
    options = {
        "task": "listops", "arch": "mega", "config_overrides": TINY_MEGA, "max_depth": 4, "max_args": 3, "longer_than": 3,
        "shorter_than": 30, "num_train": 32, "num_validation": 9, "max_steps": 4, "learning_rate": 1e-3, "use_cpu": True,
        "save_strategy": "no", "eval_strategy": "no", "train_sampling_strategy": "random",
    }  # fmt: skip
    batch = {"per_device_train_batch_size": 8}
    one = train_lra.main(command_line({**options, **batch, "output_dir": tmp_path / "one"}))
    batch = {"per_device_train_batch_size": 4}
    launch("torchrun", "run_train_lra.py", {**options, **batch, "output_dir": tmp_path / "two"})
    same_weights(tmp_path / "one", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["eval_accuracy"] == pytest.approx(one["eval_accuracy"]) and two["eval_samples"] == 9
    data = {
        name: options[name]
        for name in ("task", "max_depth", "max_args", "longer_than", "shorter_than", "num_validation")
    }
    checkpoint = {"model_name_or_path": tmp_path / "two", "use_cpu": True, "output_dir": tmp_path / "again"}
    launch("torchrun", "run_evaluate.py", {**data, **checkpoint}, "lra")
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["eval_accuracy"] == pytest.approx(two["eval_accuracy"])


@pytest.mark.slow
def test_codebooks_on_two_processes(tmp_path):
    """Weights and codebooks are those of one process, the last update included; nothing is revived, as that is random."""
    options = {
        "task": "induction", "length": 24, "arch": "longvq", "config_overrides": TINY_LONGVQ, "num_train": 64, "max_steps": 6,
        "num_validation": 4, "learning_rate": 1e-3, "use_cpu": True, "save_strategy": "no", "eval_strategy": "no",
    }  # fmt: skip
    batch = {"per_device_train_batch_size": 8}
    train_synthetic.main(command_line({**options, **batch, "output_dir": tmp_path / "one"}))
    batch = {"per_device_train_batch_size": 4}
    launch("torchrun", "run_train_synthetic.py", {**options, **batch, "output_dir": tmp_path / "two"})
    same_weights(tmp_path / "one", tmp_path / "two")
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    assert [int(value) for name, value in tensors.items() if name.endswith("num_updates")] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["block_length", "segment_length"])
def test_block_states_on_two_processes(reading, tmp_path, tokenizer_folder, corpus):
    """Texts of one block, in which no filter has an effect: all gradients arrive all the same. And a carried state."""
    block_size = {"block_length": 32, "segment_length": 12}[reading]
    options = {
        "arch": "bst", "config_overrides": f"{TINY_BST},block_size={block_size}", "tokenizer": tokenizer_folder,
        "data": corpus, reading: 32, "validation_fraction": 0.2, "max_steps": 5, "learning_rate": 1e-3, "use_cpu": True,
        "eval_strategy": "no", "save_strategy": "no",
    }  # fmt: skip
    batch = {"per_device_train_batch_size": 8}
    one = pretrain_clm.main(command_line({**options, **batch, "output_dir": tmp_path / "one"}))
    batch = {"per_device_train_batch_size": 4}
    launch("torchrun", "run_pretrain_clm.py", {**options, **batch, "output_dir": tmp_path / "two"})
    same_weights(tmp_path / "one", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)


TINY_LM = (
    "hidden_size=16,num_attention_heads=2,intermediate_size=32,num_hidden_layers=2,window_size=5,ssm_state_size=4,"
    "hidden_dropout=0,attention_dropout=0,activation_dropout=0"
)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["spade_lm", "bst"])
def test_texts_in_pieces(arch, tmp_path, tokenizer_folder, corpus):
    """Both processes hold half of every text: weights, losses and counted tokens are those of one process."""
    overrides = {"spade_lm": TINY_LM, "bst": f"{TINY_BST},block_size=4"}[arch]
    options = {
        "arch": arch, "config_overrides": overrides, "tokenizer": tokenizer_folder, "data": corpus, "block_length": 32,
        "validation_fraction": 0.2, "max_steps": 5, "learning_rate": 1e-3, "use_cpu": True, "eval_strategy": "no",
        "save_strategy": "no", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    one = pretrain_clm.main(command_line({**options, "output_dir": tmp_path / "one"}))
    pieces = {"context_parallel_size": 2, "output_dir": tmp_path / "two"}
    launch("torchrun", "run_pretrain_clm.py", {**options, **pieces})
    same_weights(tmp_path / "one", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert two["input_tokens_seen"] == one["input_tokens_seen"]

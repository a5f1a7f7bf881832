"""Two launchers, as on two machines, on ports of one: they train together what one launcher trains alone."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
SPADE = (
    "hidden_size=16,num_attention_heads=2,intermediate_size=32,num_hidden_layers=2,window_size=5,ssm_state_size=4,hidden_dropout=0,"
    "attention_dropout=0,activation_dropout=0"
)


def start(options: dict[str, Any], *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(["-m", "torch.distributed.run", *launcher] if launcher else [])]
    command += [str(ROOT / "scripts" / "run_pretrain_clm.py")]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen[str]) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp_size", [1, 2])
def test_two_nodes_train_what_one_trains(fsdp_size: int, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(pydoc_data.topics.topics["assignment"])
    options = {
        "config_overrides": SPADE, "tokenizer": tmp_path / "tokenizer", "data": tmp_path / "text.txt", "block_length": 32,
        "max_validation_segments": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "eval_strategy": "no",
        "optim": "adamw_torch", "validation_fraction": 0.1,
    }  # fmt: skip
    finish(start(options | {"per_device_train_batch_size": 4, "output_dir": tmp_path / "one"}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As docs/guides/scaling.md says it, with one process on each node.
    node = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}")
    together = options | {"per_device_train_batch_size": 2, "fsdp_size": fsdp_size, "output_dir": tmp_path / "two"}
    finish(*(start(together, *node, f"--node_rank={rank}") for rank in (0, 1)))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert environment["world_size"] == 2 and (tmp_path / "two" / "checkpoint-4").is_dir()

"""The examples in `configs/distributed`, read by the programs they are for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "configs" / "distributed"
KINDS = {"ddp": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP"}


def test_every_example_is_tested() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {f"{name}.yaml" for name in KINDS} | {
        "deepspeed_zero2.json", "deepspeed_zero3.json", "transformers_fsdp2.json", "transformers_tp.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads(name: str) -> None:
    """With the parser of `accelerate launch`, every key known."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    found = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert str(getattr(found.distributed_type, "value", found.distributed_type)) == KINDS[name]
    assert found.num_processes == 8 * found.num_machines
    options = {action.dest for action in launch_command_parser()._actions}
    assert found.fsdp_config.keys() <= options, "unknown options of FSDP"
    if name == "fsdp2":
        assert found.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("name", ["transformers_fsdp2", "transformers_tp"])
def test_transformers_reads(name: str) -> None:
    from transformers.distributed import DistributedConfig

    fields = json.loads((FOLDER / f"{name}.json").read_text())
    found = DistributedConfig(**fields)
    assert {key: getattr(found, key) for key in fields} == fields


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_example(stage: int) -> None:
    """DeepSpeed is no dependency: only the sections that the Trainer of Transformers fills in are checked."""
    fields = json.loads((FOLDER / f"deepspeed_zero{stage}.json").read_text())
    assert fields["zero_optimization"]["stage"] == stage
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert fields[name] == "auto"

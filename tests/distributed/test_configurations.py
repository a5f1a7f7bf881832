"""The examples in `configs/distributed`, read by the programs they are for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from factories import all_variants, one_each

from hf_hybrid.training.shards_trainer import refuse_cast_states

from .test_context_parallel import run

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
    """Accelerate reads it; the Trainer of Transformers fills in the sizes."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    found = HfDeepSpeedConfig(str(FOLDER / f"deepspeed_zero{stage}.json"))
    assert (found.is_zero2(), found.is_zero3()) == (stage == 2, stage == 3) and not found.is_offload()
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
    ):
        assert found.get_value(name) == "auto"
    if stage == 3:  # checkpoints hold whole weights
        assert found.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")


def test_half_precision_of_deepspeed_is_refused() -> None:
    """It casts parameters past the layers that would keep float32."""
    for case in one_each(all_variants()):
        model = case.model()
        refuse_cast_states(model, SimpleNamespace(bf16=False, fp16=False))
        for option in ("bf16", "fp16"):
            with pytest.raises(
                ValueError, match=f"`{option}=True` cannot be used with DeepSpeed.*torch_autocast.*fsdp_size"
            ):
                refuse_cast_states(model, SimpleNamespace(**{option: True}))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_what_one_process_trains(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes: weights, text, and checkpoints that are refused when resumed. DeepSpeed is no dependency."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run("deepspeed_runs", tmp_path, stage)

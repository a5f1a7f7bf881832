"""Runs whose model is sharded over two and four processes, resumed on one, two and four, against a run of one process.

python -m tests.distributed.resumed_shards FOLDER MODEL_TYPE ...
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import default_data_collator

from hf_hybrid.training.arguments import HybridTrainingArguments
from hf_hybrid.training.run_folder import check_checkpoint
from hf_hybrid.training.trainer import HybridTrainer

from ..modeling.factories import Case
from .alike import run_alike

CASES = {
    "spade_lm": Case("spade_lm", "AutoModelForCausalLM", "default"),
    "spade": Case("spade", "AutoModelForSeq2SeqLM", "default"),
    "mega": Case("mega", "AutoModelForCausalLM", "default"),
    "seqboat": Case("seqboat", "AutoModelForCausalLM", "default"),
    "bst": Case("bst", "AutoModelForCausalLM", "mf"),
    "longvq": Case("longvq", "AutoModelForCausalLM", "default"),
}
# Their weights Transformers cannot write in shards: safetensors refuses two names of a tensor.
TIED = ("spade_lm", "seqboat")
# The kernel length of state spaces, counters of codebooks; PyTorch 2.13 joins shards of real numbers only.
WITH_INTEGERS = ("spade", "longvq")
STEPS, SAVED, ROWS = 4, 2, 4


def build(kind: str) -> torch.nn.Module:
    return CASES[kind].model(tie_word_embeddings=kind in TIED)


def train(kind: str, folder: Path, run: str, resumed: str | None = None, shards: int = 1) -> torch.nn.Module:
    processes = dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 40, (12,), generator=generator).tolist() for _ in range(ROWS * STEPS)]
    model = build(kind)
    place = folder / kind / run
    checkpoint = None
    if resumed is not None:
        checkpoint = str(place / f"checkpoint-{SAVED}")
        if dist.get_rank() == 0:
            shutil.copytree(folder / kind / resumed / f"checkpoint-{SAVED}", checkpoint)
            check_checkpoint(checkpoint, resumable=True)
        dist.barrier()
        torch.nn.init.zeros_(next(model.parameters()))  # the weights are those of the checkpoint
    arguments = HybridTrainingArguments(
        output_dir=str(place), use_cpu=True, max_steps=STEPS, save_steps=SAVED, learning_rate=1e-2, ssm_learning_rate=5e-3, seed=3,
        per_device_train_batch_size=ROWS // processes, train_sampling_strategy="sequential", report_to="none", disable_tqdm=True,
        weight_decay=0.1, logging_steps=1, fsdp_size=shards,
        adam_epsilon=1e-3,  # gradients that are zeros but for rounding (keys have a common offset) would be steps of full size
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    if kind == "spade":
        data = [{"input_ids": row, "labels": row[:7]} for row in rows]
    trainer = HybridTrainer(model, arguments, train_dataset=data, data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=checkpoint)
    shown = [name for name, parameter in trainer.model.named_parameters() if hasattr(parameter, "full_tensor")]
    assert bool(shown) == (shards > 1), f"{kind}: shards of {shown}"
    trainer.save_model(str(place))
    return trainer.model


def write(kind: str, model: Any, place: Path) -> None:
    """Shards of the weights on disk, and the text that the sharded model writes."""
    model.save_pretrained(place, distributed_checkpoint=True)
    ids = text(kind, model)
    if dist.get_rank() == 0:
        torch.save(ids, place / "text.pt")
    dist.barrier()


def text(kind: str, model: Any) -> torch.Tensor:
    torch.manual_seed(2)
    prompt: dict[str, Any] = {"input_ids": CASES[kind].inputs()["input_ids"], "max_new_tokens": 4, "do_sample": False}
    return model.eval().generate(**prompt)


def straight(kind: str, folder: Path) -> None:
    train(kind, folder, "1")


def shard(kind: str, folder: Path) -> None:
    processes = dist.get_world_size()
    model = train(kind, folder, str(processes), shards=processes)
    ids = text(kind, model)
    whole = type(model).from_pretrained(folder / kind / str(processes))
    assert torch.equal(ids, text(kind, whole)), f"{kind}: other text"
    if kind not in TIED:
        write(kind, model, folder / kind / f"shards{processes}")


def resume_shards(kind: str, folder: Path) -> None:
    """On the other number of processes, and the shards of the weights loaded there."""
    from transformers.distributed import DistributedConfig

    processes = dist.get_world_size()
    other = {2: 4, 4: 2}[processes]
    train(kind, folder, f"{other}to{processes}", str(other), shards=processes)
    if kind in TIED:
        return
    kind_of = type(build(kind))
    place = folder / kind / f"shards{other}"
    model = kind_of.from_pretrained(place, distributed_config=DistributedConfig(fsdp_size=processes))
    assert torch.equal(text(kind, model), torch.load(place / "text.pt")), f"{kind}: other text"


def resume_whole(kind: str, folder: Path) -> None:
    """On one process, or on two that hold copies; and the shards of the weights joined."""
    from transformers.distributed.checkpoint import consolidate_distributed_checkpoint

    processes = dist.get_world_size()
    train(kind, folder, f"4to{processes}whole", "4")
    if dist.get_rank() == 0 and kind not in TIED + WITH_INTEGERS:
        place = folder / kind / f"joined{processes}"
        consolidate_distributed_checkpoint(folder / kind / "shards4", place)
        plain = build(kind)
        plain.config.save_pretrained(place)
        plain.generation_config.save_pretrained(place)
        model = type(plain).from_pretrained(place)
        assert torch.equal(text(kind, model), torch.load(folder / kind / "shards4" / "text.pt")), f"{kind}: other text"


def compare(kind: str, folder: Path) -> None:
    expected = load_file(folder / kind / "1" / "model.safetensors")
    for run in ("2", "4", "4to2", "2to4", "4to1whole", "4to2whole"):
        found = load_file(folder / kind / run / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{kind}, {run}, {name}")


if __name__ == "__main__":
    place, *kinds = sys.argv[1:]
    for check, number in (
        (straight, 1),
        (shard, 2),
        (shard, 4),
        (resume_shards, 2),
        (resume_shards, 4),
        (resume_whole, 1),
        (resume_whole, 2),
    ):
        run_alike(check, kinds, place, number)
    for name in kinds:
        compare(name, Path(place))
    sys.stdout.write("all alike\n")

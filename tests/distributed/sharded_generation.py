"""Text that models sharded by FSDP2 over two processes write, against the same models in one piece.

python -m tests.distributed.sharded_generation FOLDER [hand] [accelerate] [transformers] [trainer]
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import DataCollatorForSeq2Seq

from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer
from hf_hybrid.training.arguments import HybridSeq2SeqTrainingArguments
from hf_hybrid.training.trainer import HybridSeq2SeqTrainer

from ..modeling.factories import Case, random_ids
from ..modeling.sharded_models import shard_layers
from .alike import WORLD, run_alike

SEQ2SEQ = "AutoModelForSeq2SeqLM"
UNTIED = {"tie_word_embeddings": False}
CASES: list[tuple[Case, dict[str, Any]]] = [
    (Case("spade", SEQ2SEQ, "default"), {}),
    (Case("spade", SEQ2SEQ, "default"), UNTIED),
    (Case("spade", SEQ2SEQ, "local_decoder_chunk"), {}),
    (Case("spade", SEQ2SEQ, "official"), {}),
    (Case("mega", SEQ2SEQ, "default"), {}),
    (Case("mega", SEQ2SEQ, "laplace_simple"), UNTIED),
    (Case("mega", SEQ2SEQ, "default"), {"share_encoder_decoder_embeddings": False}),
    (Case("spade_lm", "AutoModelForCausalLM", "default"), {}),
    (Case("mega", "AutoModelForCausalLM", "default"), {}),
    (Case("seqboat", "AutoModelForCausalLM", "default"), {}),
    (Case("bst", "AutoModelForCausalLM", "mf"), {}),
    (Case("longvq", "AutoModelForCausalLM", "default"), {}),
]  # fmt: skip


def by_hand(model: Any, place: Path) -> nn.Module:
    """PyTorch's `fully_shard`, layer by layer; it trains and generates."""
    sharded = copy.deepcopy(model)
    shard_layers(sharded)
    return sharded


def by_accelerate(model: Any, place: Path) -> nn.Module:
    """What `accelerate launch` does with FSDP2; its own launcher shards on accelerators only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(
        state=state, mixed_precision="no", device=torch.device("cpu"), is_main_process=dist.get_rank() == 0
    )
    return fsdp2_prepare_model(accelerator, copy.deepcopy(model))


def by_transformers(model: Any, place: Path) -> nn.Module:
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        model.save_pretrained(place)
    dist.barrier()
    config = DistributedConfig(fsdp_size=WORLD)
    return type(model).from_pretrained(place, dtype=torch.float64, distributed_config=config)


WAYS = {"hand": by_hand, "accelerate": by_accelerate, "transformers": by_transformers}


def texts(model: Any, lengths: tuple[int, ...], **options: Any) -> list[torch.Tensor]:
    """Greedily, with beams that share a source, and sampled; the processes have texts of other lengths."""
    found = []
    for number, more in enumerate(({}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True})):
        torch.manual_seed(10 * number + dist.get_rank())
        ids = random_ids(2, 9 + 3 * dist.get_rank())
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        steps = lengths[dist.get_rank()]
        found.append(
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, **more, **options
            )
        )
    return found


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model.train()(**inputs).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is None:
                continue
            if not hasattr(parameter, "full_tensor"):  # the mean over the processes, as FSDP2 has it
                dist.all_reduce(parameter.grad)
                parameter.grad /= WORLD
            parameter.sub_(0.05 * parameter.grad)
    model.zero_grad()
    model.eval()


def check(part: tuple[str, Case, dict[str, Any]], folder: Path) -> None:
    """Before the first forward pass, and after a training step; one process ends its texts long before the other."""
    way, case, settings = part
    model = case.model(**settings).double()
    sharded = WAYS[way](model, folder / "-".join([case.model_type, case.variant, *settings])).eval()
    for lengths in ((5, 2), (1, 4)):
        expected = texts(model, lengths)
        found = texts(sharded, lengths, synced_gpus=True)
        assert all(map(torch.equal, found, expected)), f"{case}: {found} instead of {expected}"
        torch.manual_seed(dist.get_rank())
        inputs = case.inputs()
        inputs |= case.labels(inputs)
        step(model, inputs)
        step(sharded, inputs)


def check_trainer(case: Case, folder: Path) -> None:
    """`HybridSeq2SeqTrainer` with `fsdp_size`: the predictions of its evaluation are those of the weights that it saves, whole."""
    tokenizer = byte_tokenizer()
    model = case.model(vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id)
    model.generation_config.max_length = 12
    rows = [tokenizer(f"source {'long ' * number}", text_target=f"target {number}") for number in range(5)]
    arguments = HybridSeq2SeqTrainingArguments(
        output_dir=str(folder / case.model_type), use_cpu=True, max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no",
        per_device_train_batch_size=1, per_device_eval_batch_size=2, fsdp_size=WORLD, predict_with_generate=True, disable_tqdm=True,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    seen = []
    trainer = HybridSeq2SeqTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {"rows": len(prediction.predictions)},
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 2, f"{len(seen)} evaluations"
    assert trainer.evaluate()["eval_rows"] == 5
    trainer.save_model(str(folder / case.model_type))
    dist.barrier()
    whole = type(model).from_pretrained(folder / case.model_type).eval()
    for row, found in zip(rows, seen[-1]):
        text = whole.generate(input_ids=torch.tensor([row["input_ids"]]), max_length=12)[0].tolist()
        found = found.tolist()
        assert found[: len(text)] == text and {*found[len(text) :]} <= {-100, tokenizer.pad_token_id}, (
            f"{case}: {found}, not {text}"
        )


def check_part(part: tuple[Any, ...], folder: Path) -> None:
    if part[0] == "trainer":
        check_trainer(part[1], folder)
    else:
        check(part, folder)


if __name__ == "__main__":
    trained = [("trainer", case) for case, settings in CASES if case.auto_name == SEQ2SEQ and not settings]
    every: dict[str, list[Any]] = {way: [(way, *case) for case in CASES] for way in WAYS} | {"trainer": trained}
    # Accelerate 1.15 shards a table of embeddings with three names, or with two that are not those of inputs and outputs, twice.
    tied = [case for case, settings in CASES if settings != UNTIED and case.is_seq2seq and case.model_type == "mega"]
    every["accelerate"] = [part for part in every["accelerate"] if part[1] not in tied or part[2] == UNTIED]
    run_alike(check_part, [part for name in sys.argv[2:] or every for part in every[name]], sys.argv[1])

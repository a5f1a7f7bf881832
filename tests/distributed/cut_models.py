"""Models whose matrices or layers are cut over two processes by Transformers' plans, against the same models in one piece.

python -m tests.distributed.cut_models FOLDER [refused] [stages] [matrices]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..modeling.factories import Case, random_ids
from .alike import WORLD, run_alike

CLOSE = {"rtol": 1e-7, "atol": 1e-9}  # float64
CASES = [
    Case("spade", "AutoModelForSeq2SeqLM", "default"),
    Case("spade", "AutoModelForSeq2SeqLM", "local_decoder"),
    Case("spade_lm", "AutoModelForCausalLM", "default"),
    Case("spade_lm", "AutoModelForCausalLM", "official"),
    Case("spade_lm", "AutoModelForCausalLM", "normformer"),
    Case("mega", "AutoModelForCausalLM", "default"),
    Case("mega", "AutoModelForMaskedLM", "chunk_laplace"),
    Case("mega", "AutoModelForSeq2SeqLM", "laplace_simple"),
    Case("seqboat", "AutoModelForCausalLM", "unlimited_t5"),
    Case("bst", "AutoModelForCausalLM", "default"),
    Case("bst", "AutoModelForCausalLM", "mh_sliding"),
    Case("longvq", "AutoModelForCausalLM", "default"),
]
STAGES = [
    Case("spade_lm", "AutoModelForCausalLM", "default"),
    Case("spade_lm", "AutoModelForCausalLM", "chunk_gated"),
    Case("spade_lm", "AutoModelForCausalLM", "rotary_add"),
    Case("mega", "AutoModelForCausalLM", "default"),
    Case("mega", "AutoModelForCausalLM", "chunk_softmax_simple"),
    Case("seqboat", "AutoModelForCausalLM", "default"),
    Case("seqboat", "AutoModelForCausalLM", "laplace_rank"),
    Case("seqboat", "AutoModelForCausalLM", "unlimited_t5"),
    Case("bst", "AutoModelForCausalLM", "mf"),
    Case("longvq", "AutoModelForCausalLM", "default"),
    Case("longvq", "AutoModelForCausalLM", "heads_s4d"),
]
REFUSED = [
    (Case("spade", "AutoModelForSeq2SeqLM", "default"), "causal language model"),
    (Case("mega", "AutoModelForMaskedLM", "default"), "causal language model"),
    (Case("bst", "AutoModelForSequenceClassification", "default"), "causal language model"),
    (Case("mega", "AutoModelForCausalLM", "chunk_relu2_adaptive"), "adaptive_cutoffs=None"),
    (Case("spade_lm", "AutoModelForCausalLM", "official"), "adaptive_cutoffs=None"),
]


def stored(case: Case, folder: Path) -> tuple[nn.Module, Path]:
    """The model in one piece, and its checkpoint."""
    model = case.model().double()
    place = folder / f"{case.model_type}-{case.auto_name}-{case.variant}"
    if dist.get_rank() == 0:
        model.save_pretrained(place)
    dist.barrier()
    return model, place


def load(model: nn.Module, place: Path, **sizes: Any) -> nn.Module:
    from transformers.distributed import DistributedConfig

    return type(model).from_pretrained(place, dtype=torch.float64, distributed_config=DistributedConfig(**sizes))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_matrices(case: Case, folder: Path) -> None:
    """Loss and gradients, and text that the cut model writes."""
    model, place = stored(case, folder)
    cut = load(model, place, tp_size=WORLD, tp_plan="auto")
    shards = [name for name, parameter in cut.named_parameters() if hasattr(parameter, "full_tensor")]
    assert any("layers.1." in name for name in shards) and len(shards) >= 8, f"{case}: only {shards} are cut"
    torch.manual_seed(2)
    inputs = case.inputs()
    if model.can_generate():
        prompt = {"input_ids": inputs["input_ids"], "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(cut.generate(**prompt), model.generate(**prompt)), f"{case}: other text"
    inputs |= case.labels(inputs)
    expected, actual = (net.train()(**inputs).loss for net in (model, cut))
    torch.testing.assert_close(actual, expected, **CLOSE)
    expected.backward()
    actual.backward()
    for name, parameter in model.named_parameters():
        found = cut.get_parameter(name).grad
        assert (found is None) == (parameter.grad is None), f"{case}: {name}"
        if found is not None:
            torch.testing.assert_close(
                whole(found), parameter.grad, msg=lambda text, name=name: f"{name}: {text}", **CLOSE
            )


def check_layers(case: Case, folder: Path) -> None:
    """Pipeline stages compute the logits of the whole model and write its text; none of them holds what only others need."""
    model, place = stored(case, folder / "stages")
    model.eval()
    stages = load(model, place, pp_size=WORLD).eval()
    held = sum(parameter.numel() for parameter in stages.parameters())
    assert held < sum(parameter.numel() for parameter in model.parameters()), f"{case}: a stage holds everything"
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :3] = 0
    for tensor in (ids, mask):
        dist.broadcast(tensor, 0)
    with torch.no_grad():
        torch.testing.assert_close(stages(ids).logits, model(ids).logits, **CLOSE)
        found, expected = (net(ids, attention_mask=mask).logits[mask.bool()] for net in (stages, model))
        torch.testing.assert_close(found, expected, **CLOSE)
        prompt = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(stages.generate(**prompt), model.generate(**prompt)), f"{case}: other text"


def check_refusals(folder: Path) -> None:
    """What cannot be cut into stages is refused by name."""
    for case, words in REFUSED:
        model, place = stored(case, folder / "refused")
        try:
            load(model, place, pp_size=WORLD)
        except ValueError as error:
            assert f"{type(model).__name__} cannot be cut into pipeline stages" in str(error) and words in str(error)
        else:
            raise AssertionError(f"{case} was not refused")


def check(part: Any, folder: Path) -> None:
    """Matrices of a model, its stages (`("stages", case)`), or (None) what is refused."""
    if part is None:
        check_refusals(folder)
    elif isinstance(part, tuple):
        check_layers(part[1], folder)
    else:
        check_matrices(part, folder)


if __name__ == "__main__":
    parts = {"refused": [None], "stages": [("stages", case) for case in STAGES], "matrices": CASES}
    chosen = sys.argv[2:] or list(parts)
    run_alike(check, [part for name in chosen for part in parts[name]], sys.argv[1])

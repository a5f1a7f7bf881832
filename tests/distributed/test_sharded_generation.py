"""`generate` of models that FSDP2 shards, and which models can be cut into stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from factories import Case, all_heads, all_variants, parametrize
from torch.distributed.fsdp import FSDPModule, fully_shard

from .test_context_parallel import run

SEQ2SEQ = all_variants("AutoModelForSeq2SeqLM")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone: its shards are whole, but are tensors of a mesh until a call gathers them."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@parametrize(SEQ2SEQ)
def test_the_first_call_of_a_sharded_encoder_decoder_may_be_generate(case: Case, group: None) -> None:
    """It calls the encoder, before and without the model whose shards FSDP2 gathers."""
    torch.manual_seed(0)
    model, ids = case.model(), case.inputs()["input_ids"]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = [model.generate(input_ids=ids, num_beams=beams, **options) for beams in (1, 2)]
    for module in [*model.modules()]:
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model)
    assert isinstance(model, FSDPModule)
    for beams, text in zip((1, 2), expected):
        assert torch.equal(model.generate(input_ids=ids, num_beams=beams, **options), text)


@parametrize(all_heads() + all_heads(other_inputs=True))
def test_stages_are_made_of_causal_language_models_alone(case: Case) -> None:
    """Before anything is built; the error names the class, the setting and what to use instead."""
    if case.auto_name == "AutoModelForCausalLM":
        assert case.model_class.runs_in_stages and case.config().base_model_pp_plan
        return
    with pytest.raises(
        ValueError, match=rf"^{case.model_class.__name__} cannot be cut.*`pp_size=2`.*`tp_size` or `fsdp_size`"
    ):
        case.model_class.prepare_distribute_model({"pp_size": 2})


@pytest.mark.slow
@pytest.mark.parametrize("way", ["hand", "accelerate", "transformers", "trainer"])
def test_two_processes_write_what_one_writes(way: str, tmp_path: Path) -> None:
    """Greedily, with beams and sampled, before and after a training step; and as predictions of `HybridSeq2SeqTrainer`."""
    run("sharded_generation", tmp_path, way)

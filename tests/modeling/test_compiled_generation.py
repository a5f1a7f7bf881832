"""`generate(compile_config=...)`: one graph for texts of any length, that of a device may replay it, and the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import KINDS, Case, all_variants, random_ids
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from transformers import CompileConfig

from hf_hybrid.ops.branches import forced_branch

GENERATIVE = all_variants("AutoModelForSeq2SeqLM") + all_variants("AutoModelForCausalLM")
CASES = [case for case in GENERATIVE if case.variant in KINDS.get(case.model_type, (case.variant,))]


def check_graphs(case: Case, model: torch.nn.Module) -> None:
    """Over several windows and chunks, with a padded row, and again with another prompt."""
    changed: list[tuple[set[int], set[int]]] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        assert not any(isinstance(value, (int, torch.SymInt)) for value in inputs)  # no size is left open
        seen: Any = TracingContext.get().fw_metadata
        changed.append((set(seen.mutated_inp_runtime_indices), set(seen.static_input_indices)))
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(backend=aot_autograd(fw_compiler=compiler), fullgraph=True, mode=None)
    for length in (7, 4):
        ids = random_ids(2, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
        expected = model.generate(ids, **options)
        with forced_branch("accelerator"):
            found = model.generate(ids, **options, compile_config=config)
        assert torch.equal(found.sequences, expected.sequences)
        for logits, wanted in zip(found.logits, expected.logits):
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"] and not counters["graph_break"]
    # What a graph of CUDA asks: inputs that it changes stay where they are.
    assert len(changed) == 1 and changed[0][0] and changed[0][0] <= changed[0][1]


def test_a_compiled_step_is_one_graph() -> None:
    case = Case("spade_lm", "AutoModelForCausalLM", "default")
    check_graphs(case, case.shallow_model())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model_type}-{case.auto_name[9:]}-{case.variant}")
def test_every_compiled_step_is_one_graph(case: Case) -> None:
    check_graphs(case, case.model())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: f"{case.model_type}-{case.auto_name[9:]}-{case.variant}")
def test_inductor_compiles_a_step(case: Case) -> None:
    """As on accelerators, apart from the graphs of the device."""
    torch._dynamo.reset()
    model, ids = case.shallow_model(), random_ids(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **options)
    found = model.generate(ids, **options, compile_config=CompileConfig(fullgraph=True))
    for logits, wanted in zip(found.logits, expected.logits):
        torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)

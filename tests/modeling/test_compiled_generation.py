"""`generate(compile_config=...)`: the same text as without, from graphs whose number does not grow with it; else refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from factories import Case, all_variants, random_ids
from torch._dynamo.utils import counters
from transformers import CompileConfig

CONSTANT = [
    ("spade_lm", "default"),
    ("bst", "default"),
    ("mega", "chunk_laplace"),
    ("seqboat", "default"),
    ("longvq", "default"),
]
OTHERS = [
    case
    for case in all_variants("AutoModelForCausalLM")
    if (case.model_type, case.variant) not in CONSTANT
    and case.model_type in {name for name, _ in CONSTANT}
    and case.model().base_model.build_cache().kept_tokens is not None
]
CASES = [Case(name, "AutoModelForCausalLM", variant) for name, variant in CONSTANT]


def settings(backend: str = "eager") -> CompileConfig:
    return CompileConfig(backend=backend, fullgraph=True, mode=None)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=lambda case: f"{case.model_type}-{case.variant}")
def test_a_compiled_step_writes_the_same_text(case: Case) -> None:
    """Over several windows and chunks, with a padded row, again with another prompt, and with beams."""
    torch._dynamo.reset()
    counters.clear()
    model = case.model()
    for length in (7, 3):
        ids = random_ids(2, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        options = {
            "max_new_tokens": 12,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "attention_mask": mask,
        }
        options |= {"return_dict_in_generate": True, "output_logits": True}
        expected = model.generate(ids, **options)
        found = model.generate(ids, **options, compile_config=settings())
        assert torch.equal(found.sequences, expected.sequences)
        for logits, wanted in zip(found.logits, expected.logits):
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 3
    options = {"max_new_tokens": 6, "num_beams": 2, "eos_token_id": None, "pad_token_id": 0}
    ids = random_ids(2, 4)
    assert torch.equal(model.generate(ids, **options, compile_config=settings()), model.generate(ids, **options))


def test_the_step_of_spade_lm_and_its_copies() -> None:
    case = CASES[0]
    model, ids = case.model(), random_ids(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    compiled = model.generate(ids, **options, compile_config=settings("aot_eager"))
    assert torch.equal(compiled, model.generate(ids, **options))
    step = model._compiled_step
    assert model.get_compiled_call(settings("aot_eager")) is step
    other = copy.deepcopy(model)  # its step is not that of the original
    assert other.get_compiled_call(settings("aot_eager")) is not step
    assert model.get_compiled_call(settings()) is not step


def test_what_cannot_be_compiled_is_refused() -> None:
    ids = random_ids(1, 4)
    for name, auto_class, variant, options, message in [
        (
            "mega",
            "AutoModelForCausalLM",
            "default",
            {},
            "needs a state of constant size, but MegaForCausalLM keeps every token",
        ),
        (
            "spade",
            "AutoModelForSeq2SeqLM",
            "default",
            {},
            "SpadeForConditionalGeneration generates here from an encoder",
        ),
        ("bst", "AutoModelForCausalLM", "default", {"use_cache": False}, "without a cache"),
        (
            "bst",
            "AutoModelForCausalLM",
            "default",
            {"output_hidden_states": True},
            "`output_hidden_states` is not available",
        ),
    ]:
        model = Case(name, auto_class, variant).model()
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=2, compile_config=settings(), **options)

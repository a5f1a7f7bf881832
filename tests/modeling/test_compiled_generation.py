"""`generate(compile_config=...)`: the same text as without, from graphs whose number does not grow with it; else refused by name."""

from __future__ import annotations

import pytest
import torch
from factories import Case, random_ids
from torch._dynamo.utils import counters
from transformers import CompileConfig

CONSTANT = [
    ("spade_lm", "default"),
    ("bst", "default"),
    ("mega", "chunk_laplace"),
    ("seqboat", "default"),
    ("longvq", "default"),
]
CASES = [Case(name, "AutoModelForCausalLM", variant) for name, variant in CONSTANT]


def settings(backend: str = "eager") -> CompileConfig:
    return CompileConfig(backend=backend, fullgraph=True, mode=None)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model_type}-{case.variant}")
def test_a_compiled_step_writes_the_same_text(case: Case) -> None:
    """Over several windows and chunks, with a padded row, again with another prompt, and with beams."""
    torch._dynamo.reset()
    counters.clear()
    model = case.model()
    for length in (7, 3) if case.model_type == "spade_lm" else (7,):
        ids = random_ids(2, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        options = {
            "max_new_tokens": 9,
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
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    if case.model_type != "spade_lm":
        return
    options = {"max_new_tokens": 6, "num_beams": 2, "eos_token_id": None, "pad_token_id": 0}
    ids = random_ids(2, 4)
    assert torch.equal(model.generate(ids, **options, compile_config=settings()), model.generate(ids, **options))


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
    ]:
        model = Case(name, auto_class, variant).model()
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=2, compile_config=settings(), **options)

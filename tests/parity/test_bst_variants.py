"""Every combination of options of the Block-State Transformer against a second, slow implementation of its definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from bst_reference import language_model
from check import read_vectors
from factories import Case, random_ids

VECTORS = Path(__file__).parent / "vectors" / "bst"
COMBINATIONS = list(
    itertools.product(("sh", "mh", "mf"), ("s4d", "s4", "unstructured"), ("block", "sliding_window"), (True, False))
)


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_reference_reproduces_the_stored_vectors(path: Path) -> None:
    config, tensors = read_vectors(path)
    parameters = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("param.")}
    inputs = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("input.")}
    found = language_model(config, parameters, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], tensors["output.logits"][real], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("variant", "ssm_type", "local_attention", "qk_norm"), COMBINATIONS)
@torch.no_grad()
def test_every_combination_of_options(variant: str, ssm_type: str, local_attention: str, qk_norm: bool) -> None:
    """Rows with padding in front, behind and inside; one pass, and token by token."""
    model = (
        Case("bst", "AutoModelForCausalLM", "default")
        .model(
            context_variant=variant,
            ssm_type=ssm_type,
            local_attention=local_attention,
            qk_norm=qk_norm,
            num_hidden_layers=3,
            bst_layers=[0, -1],
            tie_word_embeddings=qk_norm,
        )
        .double()
    )
    for name, parameter in model.named_parameters():
        if name.endswith("qk_scale"):
            parameter[0].neg_()  # only its size counts
    ids, mask = random_ids(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[1, :5] = mask[2, 10:] = mask[2, 3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = language_model(model.config.to_dict(), model.state_dict(), inputs)[mask.bool()]
    torch.testing.assert_close(model(**inputs).logits[mask.bool()], expected, rtol=0, atol=1e-10)
    past, steps = None, []
    for position in range(ids.shape[1]):
        seen = mask[:, : position + 1]
        outputs = model(ids[:, position : position + 1], seen, past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1)[mask.bool()], expected, rtol=0, atol=1e-10)

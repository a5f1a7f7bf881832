"""Pairs of texts in SPADE: encoded separately, compared token by token."""

from __future__ import annotations

import pytest
import torch
from factories import Case, perturb, random_ids

PAIRS = Case("spade", "AutoModelForSequenceClassification", "default")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return perturb(PAIRS.model(dual_encoder=True).double()).eval()


def padded(ids: torch.Tensor, count: int, side: str) -> dict[str, torch.Tensor]:
    padding = ids.new_zeros(ids.shape[0], count)
    masks = [torch.ones_like(ids), padding]
    parts = [ids, padding]
    if side == "left":
        parts, masks = parts[::-1], masks[::-1]
    return {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_text_changes_nothing(model, side):
    first, second = random_ids(3, 9), random_ids(3, 13)
    expected = model(first, pair_input_ids=second).logits
    others = {f"pair_{name}": value for name, value in padded(second, 4, side).items()}
    torch.testing.assert_close(model(**padded(first, 3, side), **others).logits, expected, **EXACT)
    alone = model(first[:1], pair_input_ids=second[:1]).logits
    torch.testing.assert_close(alone, expected[:1], **EXACT)


def test_a_text_matches_itself_best(model):
    """All four similarities of a text with itself are one, the largest value of a cosine."""
    features = []
    model.classifier.out_proj.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
    ids = random_ids(4, 11)
    model(ids, pair_input_ids=ids)
    model(ids, pair_input_ids=random_ids(4, 11))
    scale = model.classifier.scale
    torch.testing.assert_close(features[0], torch.full_like(features[0], scale), rtol=1e-6, atol=0)
    assert (features[1] < scale).all() and (features[1] >= -scale).all()


def test_both_texts_and_every_module_learn(model):
    model.train()
    labels = torch.tensor([0, 1])
    outputs = model(random_ids(2, 9), pair_input_ids=random_ids(2, 7), labels=labels)
    assert outputs.hidden_states is None and outputs.logits.shape == (2, 2)
    outputs.loss.backward()
    used = {name: p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in model.named_parameters()}
    assert all(used.values()), [name for name, value in used.items() if not value]
    states = model(random_ids(2, 9), pair_input_ids=random_ids(2, 7), output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1


def test_pairs_in_bfloat16_and_saved(model, tmp_path):
    first, second = random_ids(2, 9), random_ids(2, 13)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.dual_encoder
    torch.testing.assert_close(again(first, pair_input_ids=second).logits, model(first, pair_input_ids=second).logits)
    rounded = again.bfloat16()(first, pair_input_ids=second).logits
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), model(first, pair_input_ids=second).logits, rtol=0.1, atol=0.3)


def test_single_texts_and_pairs_are_told_apart(model):
    with pytest.raises(ValueError, match="classifies pairs"):
        model(random_ids(2, 9))
    with pytest.raises(ValueError, match="classifies single texts"):
        PAIRS.model()(random_ids(2, 9), pair_input_ids=random_ids(2, 9))
    with pytest.raises(ValueError, match="3 rows but `input_ids` has 2"):
        model(random_ids(2, 9), pair_input_ids=random_ids(3, 4))

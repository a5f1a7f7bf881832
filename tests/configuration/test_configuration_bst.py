"""BstConfig: derived values, and refused ones."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_hybrid.configuration import configuration_bst
from hf_hybrid.configuration.configuration_bst import BstConfig


def refused(**fields) -> str:
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        BstConfig(**fields)
    error: BaseException = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


@pytest.mark.parametrize(
    ("depth", "layers", "expected"),
    [(12, None, [0, 6, 8]), (4, None, [0, 2]), (1, None, [0]), (6, [-1, 0], [0, 5]), (3, [], [])],
)
def test_layers_with_context(depth: int, layers: list[int] | None, expected: list[int]) -> None:
    assert BstConfig(num_hidden_layers=depth, bst_layers=layers).bst_layers == expected


def test_round_trip(tmp_path: Path) -> None:
    config = BstConfig(num_hidden_layers=5, bst_layers=[-1], context_variant="mf", logits_scaling=3, head_dim=96)
    config.save_pretrained(tmp_path)
    assert BstConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    filters = {name: BstConfig(context_variant=name).num_filters for name in ("sh", "mh", "mf")}
    assert filters == {"sh": 1, "mh": 8, "mf": 32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ssm_state_size": 7}, "`ssm_state_size` must be even and at least 2 .*got 7"),
        ({"ssm_state_size": 0}, "`ssm_state_size` must be even.*got 0"),
        ({"ssm_filter_emb_dim": 5}, "`ssm_filter_emb_dim` must be even"),
        ({"ssm_filter_length": 1}, "`ssm_filter_length` must be at least 2"),
        ({"bst_layers": [12]}, r"`bst_layers` .* 0 to 11.*got \[12\], where 12 is out of range"),
        ({"bst_layers": [-13, 0]}, "-13 is out of range"),
        ({"bst_layers": [3, -9]}, "named twice"),
        ({"block_size": 0}, "`block_size` must be at least 1; got 0"),
        ({"num_context_states": 0}, "`num_context_states` must be at least 1"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1"),
        ({"hidden_dropout": 1.0}, r"`hidden_dropout` .*\[0, 1\); got 1.0"),
        ({"logits_scaling": 0}, "`logits_scaling` must be greater than 0"),
        ({"ssm_dt_min": 0.2}, "`ssm_dt_min` and `ssm_dt_max`"),
        ({"relative_attention_num_buckets": 1}, "`relative_attention_num_buckets` must be at least 2"),
        ({"relative_attention_max_distance": 16}, "larger than half"),
        ({"pad_token_id": 40000}, "`pad_token_id` is 40000, outside the vocabulary"),
        ({"context_variant": "xx"}, "xx"),
        ({"ssm_type": "s5"}, "s5"),
        ({"local_attention": "chunk"}, "chunk"),
        ({"qk_norm": 1}, "qk_norm|bool"),
    ],
)
def test_refused_values(fields: dict, message: str) -> None:
    assert re.search(message, refused(**fields))


def test_more_filters_than_numbers_in_a_state_warn() -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(configuration_bst.__name__)
    logger.addHandler(handler)
    try:
        BstConfig(context_variant="mf", num_context_states=16, ssm_state_size=16)
        BstConfig(context_variant="mf", num_context_states=32, ssm_state_size=16, ssm_type="unstructured")
        BstConfig(context_variant="mh", num_context_states=32, ssm_state_size=16)
        assert not messages
        BstConfig(context_variant="mf", num_context_states=32, ssm_state_size=16)
    finally:
        logger.removeHandler(handler)
    assert len(messages) == 1
    assert "`num_context_states` = 32" in messages[0] and "Raise `ssm_state_size`" in messages[0]

"""SeqBoatConfig: defaults, derived sizes, and refused values."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig


def refused(**fields) -> str:
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        SeqBoatConfig(**fields)
    error: BaseException = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def test_derived_sizes() -> None:
    config = SeqBoatConfig(hidden_size=48)
    assert config.value_dim == 96 and config.embedding_width == 48
    assert SeqBoatConfig(hidden_size=48, value_dim=10).value_dim == 10
    assert SeqBoatConfig(embedding_size=8, tie_word_embeddings=False).embedding_width == 8
    assert SeqBoatConfig(hidden_dropout=0.3).head_dropout == 0.3
    assert SeqBoatConfig(classifier_dropout=0.0).head_dropout == 0.0


def test_round_trip(tmp_path: Path) -> None:
    config = SeqBoatConfig(window_size=None, position_bias="t5", eos_token_id=[1, 5], router_act_bias=0.5)
    config.save_pretrained(tmp_path)
    assert SeqBoatConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"window_size": 0}, ["`window_size` must be at least 2", "None lets it see all", "got 0"]),
        ({"window_size": -1}, ["`window_size` must be at least 2", "got -1"]),
        ({"window_size": None, "position_bias": "rank"}, ["`position_bias='rank'` needs a `window_size`", "Set one"]),
        ({"qk_dim": 7}, ["needs an even `qk_dim`; got 7"]),
        ({"embedding_norm": True}, ["`embedding_norm=True` needs `norm_first=False`"]),
        ({"ema_truncation": 0}, ["`ema_truncation`", "None switches it off"]),
        ({"hidden_size": 0}, ["`hidden_size` must be at least 1; got 0"]),
        ({"hidden_dropout": 1.0}, ["`hidden_dropout` is a probability", "got 1.0"]),
        ({"router_init_temp_scale": 0}, ["`router_init_temp_scale` must be greater than 0; got 0"]),
        ({"embedding_size": 8}, ["`tie_word_embeddings=True` needs `embedding_size`", "got 8"]),
        ({"absolute_sinusoid": True, "hidden_size": 5}, ["needs an even `hidden_size`; got 5"]),
        ({"input_type": "values", "is_decoder": True}, ["`input_type='values'` is defined for encoders"]),
        ({"pad_token_id": 99, "vocab_size": 50}, ["`pad_token_id` is 99, outside the vocabulary of 50 tokens"]),
        ({"pair_features": True}, ["`pair_features=True` needs `dual_encoder=True`"]),
        ({"classifier_layers": -1}, ["`classifier_layers` must not be negative; got -1"]),
        ({"num_attention_heads": 2}, ["`num_attention_heads` is always 1 in SeqBoat; got 2"]),
        ({"intermediate_size": -4}, ["`intermediate_size` must be a width, or 0", "got -4"]),
        ({"dead_layer_min_rate": 0}, ["`dead_layer_min_rate` must lie in (0, 1]"]),
        ({"norm_eps": 0.0}, ["`norm_eps` must be greater than 0"]),
        ({"position_bias": "alibi"}, ["position_bias", "alibi"]),
        ({"window_size": 3.5}, ["window_size", "3.5"]),
    ],
)
def test_refused_values(fields: dict, parts: list[str]) -> None:
    message = refused(**fields)
    assert all(part in message for part in parts), message

"""MegaConfig: old files, derived sizes, the two halves of an encoder-decoder, and refused values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_hybrid.configuration.configuration_mega import MegaConfig

# `MegaConfig()` of Transformers 4.57.6, without what the base class adds.
DEFAULTS_OF_TRANSFORMERS_4 = {
    "vocab_size": 30522,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "ema_projection_size": 16,
    "bidirectional": True,
    "shared_representation_size": 64,
    "use_chunking": False,
    "chunk_size": -1,
    "truncation": None,
    "normalize_before_mega": True,
    "normalization_type": "scalenorm",
    "norm_affine": True,
    "activation": "silu",
    "attention_activation": "softmax",
    "dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "use_feature_dropout": False,
    "use_normalized_ffn": True,
    "nffn_hidden_size": 256,
    "normalize_before_ffn": True,
    "nffn_activation_dropout_prob": 0.1,
    "max_positions": 2048,
    "add_token_type_embeddings": False,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "ema_delta_alpha_range": 0.2,
    "ema_beta_range": 0.02,
    "ema_gamma_omega_range": 1.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "relative_positional_bias": "rotary",
    "classifier_dropout": None,
    "use_cache": True,
    "add_lm_hidden_dense_layer": True,
    "num_attention_heads": 1,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def refused(**fields) -> str:
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        MegaConfig(**fields)
    error: BaseException = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def test_defaults_are_those_of_transformers_4() -> None:
    config = MegaConfig.from_dict({"transformers_version": "4.57.6"})  # a file may leave out what was the default
    assert {name: getattr(config, name) for name in DEFAULTS_OF_TRANSFORMERS_4} == DEFAULTS_OF_TRANSFORMERS_4
    new = MegaConfig()
    changed = {name for name, value in DEFAULTS_OF_TRANSFORMERS_4.items() if getattr(new, name) != value}
    assert changed == {"add_lm_hidden_dense_layer"} and new.add_lm_hidden_dense_layer is False


@pytest.mark.parametrize("version", ["4.57.6", None])
def test_the_dense_layer_is_kept_when_a_configuration_is_saved_again(version: str | None, tmp_path: Path) -> None:
    config = MegaConfig.from_dict({} if version is None else {"transformers_version": version})
    config.save_pretrained(tmp_path)
    assert MegaConfig.from_pretrained(tmp_path).add_lm_hidden_dense_layer is (version is not None)


def test_old_rmsnorm_is_recognised_by_the_version_that_wrote_it(tmp_path: Path) -> None:
    old = MegaConfig(normalization_type="rmsnorm", transformers_version="4.57.6")
    assert old.rms_norm_legacy is True
    assert MegaConfig(normalization_type="rmsnorm").rms_norm_legacy is False
    assert MegaConfig(transformers_version="4.57.6").rms_norm_legacy is False
    for config in (old, MegaConfig(normalization_type="rmsnorm")):
        config.save_pretrained(tmp_path)
        assert MegaConfig.from_pretrained(tmp_path).rms_norm_legacy is config.rms_norm_legacy


@pytest.mark.parametrize(
    ("fields", "reach", "entries"),
    [
        ({"max_positions": 100}, 100, 199),
        ({"max_positions": 100, "chunk_size": 8}, 8, 199),  # the rule of Transformers 4.x, even without chunking
        ({"max_positions": 100, "chunk_size": 8, "use_chunking": True}, 8, 199),
        ({"max_positions": 100, "chunk_size": 8, "use_chunking": True, "rel_bias_table_size": 8}, 8, 15),
        ({"rel_bias_table_size": 12}, 12, 23),
    ],
)
def test_table_of_the_simple_bias(fields: dict, reach: int, entries: int) -> None:
    config = MegaConfig(relative_positional_bias="simple", **fields)
    assert (config.relative_bias_reach, config.relative_bias_entries) == (reach, entries)
    assert (config.cross_bias_reach, config.cross_bias_entries) == (reach, entries)


def test_halves_of_an_encoder_decoder() -> None:
    config = MegaConfig(
        is_encoder_decoder=True,
        num_hidden_layers=3,
        decoder_layers=2,
        use_chunking=True,
        chunk_size=8,
        decoder_chunk_size=-1,
        decoder_intermediate_size=40,
        max_positions=50,
        max_target_positions=70,
    )
    encoder, decoder = config.encoder_config(), config.decoder_config()
    assert config.encoder_layers == 3 and config.decoder_start_token_id == config.eos_token_id
    assert encoder.bidirectional and not encoder.is_decoder and not encoder.is_encoder_decoder
    assert (encoder.num_hidden_layers, encoder.attention_chunk, encoder.relative_bias_entries) == (3, 8, 15)
    assert decoder.is_decoder and decoder.add_cross_attention and not decoder.bidirectional
    assert (decoder.num_hidden_layers, decoder.intermediate_size, decoder.hidden_size) == (2, 40, config.hidden_size)
    assert (decoder.attention_chunk, decoder.relative_bias_reach, decoder.cross_bias_reach) == (None, 70, 70)
    for half in (encoder, decoder):
        half.validate_architecture()
    assert config.get_text_config(decoder=True).num_hidden_layers == 2
    assert config.get_text_config() is config
    assert MegaConfig(is_encoder_decoder=True).decoder_layers == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_chunking": True}, "`use_chunking=True` needs a positive `chunk_size`; got -1"),
        ({"chunk_size": 0}, "`chunk_size` must be a positive number of tokens, or -1"),
        (
            {"chunk_size": 64, "max_positions": 32, "use_chunking": True, "relative_positional_bias": "simple"},
            "`chunk_size` 64 does not fit.*`max_positions` = 32",
        ),
        (
            {"chunk_size": 64, "use_chunking": True, "relative_positional_bias": "simple", "rel_bias_table_size": 8},
            "`chunk_size` 64 exceeds the 8 tokens of `rel_bias_table_size`",
        ),
        ({"is_decoder": True}, "`is_decoder=True` needs `bidirectional=False`"),
        ({"add_cross_attention": True}, "`add_cross_attention=True` needs `is_decoder=True`"),
        ({"is_encoder_decoder": True, "is_decoder": True, "bidirectional": False}, "leave it False"),
        ({"truncation": 0}, "`truncation` must be at least 1; None switches it off"),
        ({"shared_representation_size": 7}, "needs an even `shared_representation_size`; got 7"),
        ({"normalize_embeddings": True}, "needs `normalize_before_mega=False`"),
        ({"num_attention_heads": 2}, "`num_attention_heads` is always 1"),
        ({"dropout_prob": 1.0}, r"`dropout_prob` is a probability and must lie in \[0, 1\)"),
        ({"attention_activation": "tanh"}, "attention_activation"),
        ({"normalization_type": "groupnorm"}, "normalization_type"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1"),
        ({"vocab_size": 2}, "`eos_token_id` is 2, outside the vocabulary of 2 tokens"),
        ({"input_type": "values", "is_decoder": True, "bidirectional": False}, "`input_type='values'` is defined for"),
        ({"dual_encoder": True}, "`dual_encoder=True` needs `classifier_type='lra'`"),
        ({"adaptive_cutoffs": [20, 10]}, "`adaptive_cutoffs` must be a rising list"),
        ({"adaptive_cutoffs": [20], "add_lm_hidden_dense_layer": True}, "`add_lm_hidden_dense_layer=False`"),
        ({"adaptive_input_size": 7}, "`adaptive_input_size` must equal `hidden_size`"),
        (
            {"is_encoder_decoder": True, "tie_word_embeddings": False, "share_encoder_decoder_embeddings": True},
            "`share_encoder_decoder_embeddings=True` needs",
        ),
        ({"num_classifier_layers": -1}, "`num_classifier_layers` must not be negative"),
    ],
)
def test_refused_values(fields: dict, message: str) -> None:
    assert re.search(message, refused(**fields))

"""Former spellings of fields, and stored files whose fields meant something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedConfig

from hf_hybrid.configuration.configuration_bst import BstConfig
from hf_hybrid.configuration.configuration_longvq import LongVQConfig
from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.configuration.configuration_spade import SpadeConfig, SpadeLMConfig

CONFIGURATIONS = (SpadeConfig, SpadeLMConfig, BstConfig, LongVQConfig, SeqBoatConfig, MegaConfig)
SPELLINGS = [(cls, old, new) for cls in CONFIGURATIONS for old, new in cls.attribute_map.items()]
# Values that differ from the defaults and go together with the other defaults.
VALUES = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 3, "head_dim": 96, "pooling": "first"}
COMPANIONS = {
    "hidden_size": {"num_attention_heads": 6},
    "num_attention_heads": {"hidden_size": 384},
    "head_dim": {"num_attention_heads": 8},
}


def another_value(config: PreTrainedConfig, name: str) -> object:
    """A valid value that is not the default."""
    default = getattr(config, name)
    if name in VALUES and VALUES[name] != default:
        return VALUES[name]
    if isinstance(default, bool):
        return not default
    return default // 2 if isinstance(default, int) else 0.25


@pytest.mark.parametrize(("cls", "old", "new"), SPELLINGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_former_spelling_is_read_and_the_new_one_written(cls: type, old: str, new: str, tmp_path: Path) -> None:
    value = another_value(cls(), new)
    companions = COMPANIONS.get(new, {}) if cls in (SpadeConfig, SpadeLMConfig) else {}
    config = cls(**companions, **{old: value})
    assert getattr(config, old) == getattr(config, new) == value
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert old not in written and written[new] == value
    written[old] = written.pop(new)
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is cls and getattr(loaded, new) == value
    assert loaded.to_diff_dict() == config.to_diff_dict()
    default = getattr(cls(), new)
    setattr(loaded, old, default)
    assert getattr(loaded, new) == default


def test_what_is_derived_from_a_field_follows_its_former_spelling() -> None:
    assert MegaConfig(encoder_layers=3, is_encoder_decoder=True).decoder_layers == 3


@pytest.mark.parametrize(
    ("cls", "stored", "expected"),
    [
        (SpadeConfig, {"attention_window": 4}, {"window_size": 5}),
        (SpadeConfig, {"attention_window": 4, "local_attention_type": "chunk"}, {"window_size": 4}),
        (SpadeConfig, {"decoder_attention_window": 3}, {"decoder_window_size": 4}),
        (SpadeConfig, {"decoder_attention_window": None}, {"decoder_window_size": None}),
        (SpadeConfig, {"norm_type": "layer_norm"}, {"norm_type": "layernorm"}),
        (SpadeConfig, {"max_position_embeddings": 1024}, {"max_target_positions": 1024}),
        (
            SpadeLMConfig,
            {"attention_window": 511, "norm_type": "rms_norm"},
            {"window_size": 512, "norm_type": "rmsnorm"},
        ),
        (
            LongVQConfig,
            {"dropout": 0.3, "hidden_dropout": 0.2, "is_causal": False},
            {"hidden_dropout": 0.3, "activation_dropout": 0.2, "is_decoder": False},
        ),
        (
            SeqBoatConfig,
            {"max_position_embeddings": 17, "window_size": 8, "prenorm": False, "value_dropout": 0.2},
            {"distance_table_size": 17, "window_size": 9, "norm_first": False, "activation_dropout": 0.2},
        ),
        (SeqBoatConfig, {"max_position_embeddings": 17, "window_size": None}, {"window_size": None}),
    ],
)
def test_stored_files_of_an_earlier_version(cls: type, stored: dict, expected: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**stored, "model_type": cls.model_type}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in expected} == expected
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("cls", "given", "expected"),
    [
        (SpadeConfig, {"attention_window": 4}, {"window_size": 5}),
        (SpadeConfig, {"attention_window": 4, "local_attention_type": "chunk"}, {"window_size": 4}),
        (SpadeConfig, {"decoder_attention_window": 3}, {"decoder_window_size": 4}),
        (SpadeConfig, {"max_position_embeddings": 64}, {"max_target_positions": 64}),
        (SpadeLMConfig, {"attention_window": 8, "d_model": 32, "num_heads": 2}, {"window_size": 9, "hidden_size": 32}),
        (LongVQConfig, {"dropout": 0.3}, {"hidden_dropout": 0.3, "activation_dropout": 0.0}),
        (
            SeqBoatConfig,
            {"max_position_embeddings": 17, "window_size": 8},
            {"distance_table_size": 17, "window_size": 9},
        ),
    ],
)
def test_a_field_that_meant_something_else_is_translated(cls: type, given: dict, expected: dict) -> None:
    config = cls(**given)
    assert {name: getattr(config, name) for name in expected} == expected
    assert not config.to_dict().keys() & cls.former_fields.keys()


def test_published_settings_with_a_former_field() -> None:
    assert SpadeConfig.official(attention_window=4).window_size == 5


def test_every_former_field_is_translated() -> None:
    for cls in CONFIGURATIONS:
        for former, name in cls.former_fields.items():
            assert name in cls.read_former_fields({former: 4}) and former not in cls.read_former_fields({former: 4})

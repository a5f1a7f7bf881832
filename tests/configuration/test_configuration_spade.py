"""Configurations: round trips, the standard names, and every rule that binds fields together."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig

from hf_hybrid.configuration.configuration_spade import SpadeConfig, SpadeLMConfig

BOTH = pytest.mark.parametrize("config_class", [SpadeConfig, SpadeLMConfig])
SMALL: dict[type, dict[str, Any]] = {
    SpadeConfig: {
        "hidden_size": 32,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "decoder_layers": 2,
    },
    SpadeLMConfig: {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3},
}


@BOTH
class TestRoundTrip:
    def test_file(self, config_class: type[PreTrainedConfig], tmp_path: Path) -> None:
        config = config_class(
            **SMALL[config_class], ssm_layers=[0, 2], hidden_dropout=0, id2label={0: "a", 1: "b", 2: "c"}
        )
        config.save_pretrained(tmp_path)
        for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert type(loaded) is config_class
            assert loaded.to_diff_dict() == config.to_diff_dict()
            assert loaded.ssm_layers == [0, 2] and loaded.num_labels == 3

    def test_string_dictionary_and_pickle(self, config_class: type[PreTrainedConfig]) -> None:
        config = config_class(**SMALL[config_class])
        assert json.loads(config.to_json_string())["model_type"] == config_class.model_type
        assert config_class.from_dict(config.to_dict()).to_dict() == config.to_dict()
        assert config_class.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()
        assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()

    def test_only_what_differs_is_written(self, config_class: type[PreTrainedConfig], tmp_path: Path) -> None:
        config_class().save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["model_type"] == config_class.model_type
        assert not {"max_length", "num_beams", "do_sample"} & written.keys()

    def test_official_settings(self, config_class: type[PreTrainedConfig], tmp_path: Path) -> None:
        config = config_class.official(intermediate_size=99)
        assert config.intermediate_size == 99 and config.ssm_type == "s4" and config.norm_type == "layernorm"
        config.save_pretrained(tmp_path)
        assert config_class.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()

    def test_standard_names(self, config_class: type[PreTrainedConfig]) -> None:
        config = config_class(**SMALL[config_class])
        assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (
            32,
            4,
            config.intermediate_size,
        )
        assert config.num_hidden_layers == 3
        config = config_class(
            **{("hidden_size" if k == "hidden_size" else k): v for k, v in SMALL[config_class].items()}
        )
        assert config.hidden_size == 32

    def test_lists_are_not_shared_between_instances(self, config_class: type[PreTrainedConfig]) -> None:
        first, second = config_class(), config_class()
        first.ssm_layers.append(1)
        assert second.ssm_layers == [0]


def test_depths_reach_generation() -> None:
    """`generate` reads the depth of the decoder from the text configuration."""
    config = SpadeConfig(**SMALL[SpadeConfig])
    assert config.get_text_config(decoder=True).num_hidden_layers == 2
    assert config.get_text_config(encoder=True).num_hidden_layers == 3


WRONG_IN_BOTH = [
    ({"ssm_state_size": 7}, "`ssm_state_size`.*even.*7"),
    ({"ssm_state_size": 0}, "`ssm_state_size`.*at least 2"),
    ({"ssm_num_copies": 5}, r"`ssm_num_copies` must divide `hidden_size` \(32\); got 5"),
    ({"ssm_dt_min": 0.2}, "`ssm_dt_min` and `ssm_dt_max`"),
    ({"ssm_dt_min": 0}, "`ssm_dt_min` and `ssm_dt_max`"),
    ({"ssm_stop_gradient": True}, "`ssm_trainable=True` would train nothing"),
    ({"ssm_type": "s4", "ssm_init": "lin"}, "`ssm_type='s4'` is defined for `ssm_init='legs'`"),
    ({"ssm_layers": [3]}, "`ssm_layers` names layer 3.*0 to 2"),
    ({"ssm_layers": [-1]}, "`ssm_layers` names layer -1"),
    ({"ssm_layers": [1, 1]}, "`ssm_layers` names a layer twice"),
    ({"hidden_dropout": 1.0}, r"`hidden_dropout`.*\[0, 1\)"),
    ({"attention_dropout": -0.1}, "`attention_dropout`"),
    ({"window_size": 0}, "`window_size` must be at least 1"),
    ({"ssm_max_length": 0}, "`ssm_max_length` must be at least 1"),
    ({"vocab_size": 0}, "`vocab_size` must be at least 1"),
    ({"intermediate_size": 0}, "`intermediate_size` must be at least 1"),
    ({"relative_attention_max_distance": 8}, "`relative_attention_max_distance` .*must exceed"),
    ({"relative_attention_num_buckets": 1}, "`relative_attention_num_buckets` must be at least 2"),
    ({"position_encoding": "rotary", "rotary_base": 0}, "`rotary_base` must be positive"),
    ({"norm_eps": -1e-6}, "`norm_eps`"),
    ({"feed_forward_proj": "swish"}, "`feed_forward_proj` must be one of 'relu'"),
    ({"pad_token_id": 40000}, "`pad_token_id` is 40000, outside the vocabulary"),
    ({"eos_token_id": -1}, "`eos_token_id` is -1"),
    ({"eos_token_id": [1, 40000]}, "`eos_token_id`.*40000"),
]


@BOTH
@pytest.mark.parametrize(
    ("fields", "message"), WRONG_IN_BOTH, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_rules_of_both(config_class: type[PreTrainedConfig], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        config_class(**(SMALL[config_class] | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 9}, r"`num_attention_heads` \* `head_dim` must equal `hidden_size`; got 4 \* 9 != 32"),
        ({"num_attention_heads": 32, "head_dim": 1, "position_encoding": "rotary"}, "'rotary'.*even"),
        ({"relative_attention_num_buckets": 2}, "`relative_attention_num_buckets` must be even and at least 4"),
        ({"relative_attention_num_buckets": 7}, "`relative_attention_num_buckets` must be even and at least 4"),
        ({"relative_attention_max_distance": 16, "decoder_window_size": 5}, "must exceed 16"),
        ({"decoder_ssm_layers": [0]}, "`decoder_ssm_layers` needs `decoder_window_size`"),
        ({"decoder_ssm_layers": [2], "decoder_window_size": 5}, "`decoder_ssm_layers` names layer 2"),
        (
            {"hidden_size": 6, "num_attention_heads": 2, "head_dim": 3},
            "even `head_dim`; got 3.*`max_target_positions`",
        ),
        ({"max_target_positions": 0}, "`max_target_positions` must be at least 1"),
        ({"decoder_layers": 0}, "`decoder_layers` must be at least 1"),
        ({"decoder_start_token_id": 99999}, "`decoder_start_token_id` is 99999"),
    ],
)
def test_rules_of_the_encoder_decoder(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SpadeConfig(**(SMALL[SpadeConfig] | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relative_attention_max_distance": 16}, "`relative_attention_max_distance` .16. must exceed 16"),
        ({"adaptive_cutoffs": [10], "adaptive_dropout": 1.5}, "`adaptive_dropout`"),
        ({"num_attention_heads": 5}, r"`num_attention_heads` must divide `hidden_size` \(32\); got 5"),
        ({"num_attention_heads": 32, "position_encoding": "rotary"}, "'rotary'.*even"),
        ({"scale_heads": True}, "`scale_heads` is not defined for layers with an SSM"),
        ({"adaptive_cutoffs": []}, "`adaptive_cutoffs` must be a rising list"),
        ({"adaptive_cutoffs": [200, 100]}, "`adaptive_cutoffs` must be a rising list"),
        ({"adaptive_cutoffs": [40000]}, "`adaptive_cutoffs` must be a rising list"),
        ({"adaptive_cutoffs": [10, 20, 30]}, "`adaptive_factor` .4. leaves no width"),
        ({"adaptive_cutoffs": [10], "tie_word_embeddings": False}, "needs `tie_word_embeddings=True`"),
        ({"adaptive_cutoffs": [10], "logits_scaling": 4.0}, "`logits_scaling`"),
    ],
)
def test_rules_of_the_language_model(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SpadeLMConfig(**(SMALL[SpadeLMConfig] | fields))


@BOTH
@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": "32"}, {"ssm_combine": "sum"}, {"ssm_layers": "0"}, {"norm_type": 1}, {"use_cache": "no"}],
)
def test_wrong_types(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        config_class(**(SMALL[config_class] | fields))
    config = config_class()
    with pytest.raises(StrictDataclassFieldValidationError):
        setattr(config, *next(iter(fields.items())))


@BOTH
def test_rules_are_checked_on_saving(config_class: type[PreTrainedConfig], tmp_path: Path) -> None:
    config = config_class()
    config.ssm_layers = [99]
    with pytest.raises(StrictDataclassClassValidationError, match="`ssm_layers` names layer 99"):
        config.save_pretrained(tmp_path)


@BOTH
def test_rules_are_checked_on_loading(config_class: type[PreTrainedConfig], tmp_path: Path) -> None:
    config_class(**SMALL[config_class]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ssm_state_size": 5}))
    with pytest.raises(StrictDataclassClassValidationError, match="`ssm_state_size`"):
        AutoConfig.from_pretrained(tmp_path)


@BOTH
def test_generation_settings_do_not_belong_here(config_class: type[PreTrainedConfig]) -> None:
    fields = config_class.__dataclass_fields__
    assert not {"max_length", "num_beams", "do_sample", "sliding_window", "layer_types"} & set(fields)

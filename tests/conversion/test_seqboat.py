"""Official SeqBoat checkpoints to ours and back: the same bytes, the same options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check import read_vectors

from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.conversion.common import same_bytes
from hf_hybrid.conversion.seqboat import (
    config_from_official,
    config_to_official,
    kind_of,
    model_class,
    recognises,
    state_dict_from_official,
    state_dict_to_official,
    vocabulary_size,
)

FOLDER = Path(__file__).parents[1] / "parity" / "vectors" / "seqboat"
FILES = sorted(path for path in FOLDER.glob("*.safetensors") if not path.stem.startswith("layer_"))
CLASSES = {
    "lm": "SeqBoatForCausalLM",
    "cls_image": "SeqBoatForImageClassification",
    "cls": "SeqBoatForSequenceClassification",
}


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Official options and parameters of a file."""
    options, tensors = read_vectors(path)
    options = {name: value for name, value in options.items() if name not in ("task", "vocab_size", "padding_idx")}
    return options, {name[6:]: value for name, value in tensors.items() if name.startswith("param.")}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_tensors_return_unchanged(path: Path) -> None:
    options, official = read(path)
    config = config_from_official(options, vocab_size=vocabulary_size(official))
    model = model_class(config)(config)
    assert type(model).__name__ == next(name for prefix, name in CLASSES.items() if path.stem.startswith(prefix))
    missing, unexpected = model.load_state_dict(state_dict_from_official(official, config), strict=False)
    assert not unexpected and set(missing) <= set(model._tied_weights_keys or {})
    back = state_dict_to_official(model.state_dict(), config)
    assert back.keys() == official.keys()
    for name, value in official.items():
        if not name.endswith(("inv_freq", "version")):
            assert same_bytes(back[name], value), name
        torch.testing.assert_close(back[name], value, rtol=1e-6, atol=3.0 if name.endswith("version") else 0.0)


def test_options_return_unchanged(path: Path) -> None:
    options, official = read(path)
    assert recognises(options) and kind_of(options) == ("lm" if path.stem.startswith("lm") else "lra")
    config = config_from_official(options, vocab_size=vocabulary_size(official))
    assert config_to_official(config, options) == options
    again = config_from_official(config_to_official(config), vocab_size=config.vocab_size)
    assert again.to_dict() == config.to_dict() | {"architectures": again.architectures}


def test_a_missing_or_superfluous_tensor_is_named(path: Path) -> None:
    options, official = read(path)
    config = config_from_official(options, vocab_size=vocabulary_size(official))
    name = next(name for name in official if name.endswith("move.delta"))
    with pytest.raises(ValueError, match=f"missing: `{name}`"):
        state_dict_from_official({key: value for key, value in official.items() if key != name}, config)
    with pytest.raises(ValueError, match="unexpected: `stranger`"):
        state_dict_from_official(official | {"stranger": torch.zeros(1)}, config)


def test_raw_speech_and_models_without_a_router() -> None:
    options = {"sentence_class_num": 10, "input_type": "speech", "init_temp_scale": 1.0, "sen_rep_type": "mp"}
    config = config_from_official(options | {"encoder_embed_dim": 12, "encoder_hidden_dim": 20, "always_act": True})
    assert config.absolute_sinusoid and model_class(config).__name__ == "SeqBoatForAudioClassification"
    official = state_dict_to_official(model_class(config)(config).state_dict(), config)
    assert not [name for name in official if "router" in name]
    unit = "encoder.encoder.layers.0.mega_layer"
    assert official[f"{unit}.hx_proj.weight"].shape == (12, 12) and f"{unit}.rel_pos_bias.rel_pos_bias" in official


def test_models_of_mega_are_not_taken_for_ours() -> None:
    assert not recognises({"sentence_class_num": 2, "encoder_embed_dim": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 3}, "not those of an official SeqBoat"),
        ({"decoder_z_dim": 8}, "`vocab_size` is needed"),
        ({"sentence_class_num": 2, "sen_rep_type": "max", "vocab_size": 9}, "`sen_rep_type='max'`"),
        ({"sentence_class_num": 2, "input_type": "video"}, "`input_type='video'`"),
        ({"decoder_z_dim": 8, "vocab_size": 9, "adaptive_input": True}, "`adaptive_input`"),
        ({"decoder_z_dim": 8, "vocab_size": 9, "rel_pos_bias": "alibi"}, "`rel_pos_bias='alibi'`"),
        ({"decoder_z_dim": 7, "vocab_size": 9, "rel_pos_bias": "rotary"}, "even `qk_dim`; got 7"),
    ],
)
def test_refused_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_official(options)


def test_configurations_without_an_official_form_are_refused() -> None:
    with pytest.raises(ValueError, match="`scale_embedding=True` has no counterpart in the official SeqBoat"):
        config_to_official(SeqBoatConfig())
    with pytest.raises(ValueError, match="`router_act_bias=0.5` has no counterpart"):
        config_to_official(SeqBoatConfig(is_decoder=True, router_act_bias=0.5))

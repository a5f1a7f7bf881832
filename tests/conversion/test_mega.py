"""Official Mega checkpoints to ours and back: the same bytes, the same options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check import read_vectors

from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.conversion.common import same_bytes
from hf_hybrid.conversion.mega import (
    config_from_official,
    config_to_official,
    kind_of,
    kind_of_config,
    model_class,
    state_dict_from_official,
    state_dict_to_official,
    vocabulary_size,
)

FILES = sorted((Path(__file__).parents[1] / "parity" / "vectors" / "mega").glob("off_*.safetensors"))
CLASSES = {
    "off_lm": "MegaForCausalLM",
    "off_lra_image": "MegaForImageClassification",
    "off_lra": "MegaForSequenceClassification",
    "off_mt": "MegaForConditionalGeneration",
    "off_sc_raw": "MegaForAudioClassification",
}


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Official options and parameters of a file."""
    config, tensors = read_vectors(path)
    options = dict(config["args"]) | {"model": config["model"]}
    return options, {name[6:]: value for name, value in tensors.items() if name.startswith("param.")}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_tensors_return_unchanged(path: Path) -> None:
    options, official = read(path)
    config = config_from_official(options, vocab_size=vocabulary_size(official))
    ours = state_dict_from_official(official, config)
    model = model_class(config)(config)
    assert type(model).__name__ == next(name for prefix, name in CLASSES.items() if path.stem.startswith(prefix))
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected and set(missing) <= set(model._tied_weights_keys or {})
    back = state_dict_to_official(model.state_dict(), config)
    assert back.keys() == official.keys()
    for name, value in official.items():
        if not name.endswith(("_float_tensor", "version")):
            assert same_bytes(back[name], value), name
        assert back[name].shape == value.shape, name


def test_options_return_unchanged(path: Path) -> None:
    options, official = read(path)
    config = config_from_official(options, vocab_size=vocabulary_size(official))
    assert kind_of(options) == kind_of_config(config)
    assert config_to_official(config, options) == options
    written = config_to_official(config)
    again = config_from_official(written, vocab_size=config.vocab_size)
    assert again.to_dict() == config.to_dict() | {"architectures": again.architectures}
    # the kind is recognised without the mark of the file, from the options that a fairseq checkpoint holds
    names = {name: value for name, value in options.items() if name != "model"}
    assert kind_of(names | {"arch": f"mega_{options['model']}"}) == options["model"]


def test_a_missing_or_superfluous_tensor_is_named(path: Path) -> None:
    options, official = read(path)
    config = config_from_official(options, vocab_size=vocabulary_size(official))
    name = next(name for name in official if name.endswith("move.delta"))
    with pytest.raises(ValueError, match=f"missing: `{name}`"):
        state_dict_from_official({key: value for key, value in official.items() if key != name}, config)
    with pytest.raises(ValueError, match="unexpected: `stranger`"):
        state_dict_from_official(official | {"stranger": torch.zeros(1)}, config)


def test_configurations_without_an_official_form_are_refused() -> None:
    config = MegaConfig(is_decoder=True, bidirectional=False)  # with a dense layer and a bias in the head
    with pytest.raises(ValueError, match="has no counterpart in the official Mega"):
        config_to_official(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 3}, "not those of an official Mega"),
        ({"decoder_z_dim": 8}, "`vocab_size` is needed"),
        ({"sentence_class_num": 2, "sen_rep_type": "max", "vocab_size": 9}, "`sen_rep_type='max'`"),
        (
            {"decoder_z_dim": 8, "vocab_size": 9, "decoder_input_dim": 3},
            "`decoder_input_dim=3` is not supported",
        ),
        (
            {"decoder_z_dim": 8, "vocab_size": 9, "adaptive_softmax_cutoff": "3,5"},
            "only supported together",
        ),
    ],
)
def test_refused_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_official(options)


def test_full_attention_and_unlimited_reach() -> None:
    """The published translation recipe passes a truncation of 0, which its code cannot run: here it means no truncation."""
    config = config_from_official({"decoder_z_dim": 8, "truncation_length": 0, "decoder_chunk_size": -1}, vocab_size=9)
    assert config.truncation is None and not config.use_chunking

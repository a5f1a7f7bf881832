"""The recipe that shows where a SeqBoat model attends."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.recipes import inspect_activations


@pytest.fixture(scope="module")
def seqboat_checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("seqboat")
    config = SeqBoatConfig(
        vocab_size=512, hidden_size=16, num_hidden_layers=2, qk_dim=8, window_size=4, is_decoder=True, pad_token_id=0, eos_token_id=1
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_statistics_and_pictures_are_written(seqboat_checkpoint, tmp_path):
    output = tmp_path / "out"
    texts = ["the list is sorted", "a key", "the values of a dictionary are views"]
    result = inspect_activations.main(
        {
            "model_name_or_path": str(seqboat_checkpoint),
            "prompts": texts,
            "output_dir": str(output),
            "batch_size": 2,
            "pictures": 2,
            "device": "cpu",
        }
    )
    written = {path.name for path in output.iterdir()}
    assert written == {"activations.json", "activations.csv", "activations.png", "text_0.png", "text_1.png"}
    layers = json.loads((output / "activations.json").read_text())
    assert layers == result["layers"] and [layer["sequences"] for layer in layers] == [3, 3]
    assert 0 <= result["mean_rate"] <= 1


def test_bad_options(seqboat_checkpoint, checkpoint, tmp_path):
    base = {"model_name_or_path": str(seqboat_checkpoint), "prompts": ["a"], "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="only those of SeqBoat"):
        inspect_activations.main(base | {"model_name_or_path": str(checkpoint)})
    with pytest.raises(ValueError, match="either as `prompts` or as `input_file`"):
        inspect_activations.main(base | {"prompts": None})
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        inspect_activations.main(base | {"output_dir": str(tmp_path)})

"""The recipe that shows where a SeqBoat model attends."""

from __future__ import annotations

import json

import pytest
from factories import TINY_OVERRIDES
from transformers import AutoModelForCausalLM

from hf_hybrid.configuration.configuration_seqboat import SeqBoatConfig
from hf_hybrid.recipes import classify_audio, classify_image, inspect_activations, train_lra


@pytest.fixture(scope="module")
def seqboat_checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("seqboat")
    config = SeqBoatConfig(
        vocab_size=512, hidden_size=16, num_hidden_layers=2, qk_dim=8, window_size=4, is_decoder=True, pad_token_id=0, eos_token_id=1
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def training(options) -> dict:
    """One step of a classifier of the least size."""
    few = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    return {**options, **few, "arch": "seqboat", "config_overrides": TINY_OVERRIDES["seqboat"]}


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
    with pytest.raises(ValueError, match="only SeqBoat models"):
        inspect_activations.main(base | {"model_name_or_path": str(checkpoint)})
    with pytest.raises(ValueError, match="either as `prompts`, as `input_file`, or as `data`"):
        inspect_activations.main(base | {"prompts": None})
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        inspect_activations.main(base | {"output_dir": str(tmp_path)})


def inspect(model_folder, output, **options):
    base = {"model_name_or_path": str(model_folder), "output_dir": str(output), "batch_size": 2, "pictures": 2}
    return inspect_activations.main(base | {"device": "cpu"} | options)


def pictures(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".png" and path.stem != "activations")


def write_rows(folder, rows) -> str:
    folder.mkdir()
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


class TestTrainedModels:
    """What the recipes leave behind is looked at with nothing but its folder and the data."""

    def test_texts_of_a_data_set(self, seqboat_checkpoint, tmp_path):
        text = "the list of the values of a dictionary is sorted by the key of its view "
        data = write_rows(tmp_path / "data", [{"text": text * 20}, {"text": "a key"}])
        result = inspect(seqboat_checkpoint, tmp_path / "cut", data=[data], max_length=16)
        assert result["layers"][0]["sequences"] == 2 and pictures(tmp_path / "cut") == ["text_0.png", "text_1.png"]
        options = {"data": [data], "max_length": 16, "split_long": True, "max_texts": 7}
        assert inspect(seqboat_checkpoint, tmp_path / "split", **options)["layers"][0]["sequences"] == 7
        with pytest.raises(ValueError, match="has no column 'words'"):
            inspect(seqboat_checkpoint, tmp_path / "no", data=[data], text_column="words")

    @pytest.mark.parametrize("column", ["source", "text1,text2"])
    def test_classifiers_of_texts(self, training, tmp_path, column):
        names = column.split(",")
        rows = [{**dict.fromkeys(names, "[MAX 3 [MIN 2 9 ] 4 ]"), "label": i % 2} for i in range(8)]
        data = write_rows(tmp_path / "data", rows)
        (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = "listops" if len(names) == 1 else "retrieval"
        train_lra.main({**training, "task": task, "data": [data]})
        result = inspect(tmp_path / "run", tmp_path / "out", data=[data])
        assert result["layers"][0]["sequences"] == 8 * len(names)
        assert pictures(tmp_path / "out") == ["text_0.png", "text_1.png"]

    def test_classifier_of_images(self, training, tmp_path):
        rows = [{"pixels": [20 * i] * 8 + list(range(8)), "label": i % 2} for i in range(6)]
        data = write_rows(tmp_path / "data", rows)
        (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        classify_image.main({**training, "data": [data]})
        result = inspect(tmp_path / "run", tmp_path / "out", data=[data], max_texts=5)
        assert result["layers"][0]["sequences"] == 5 and pictures(tmp_path / "out") == ["images.png"]
        with pytest.raises(ValueError, match="of kind image needs `data`"):
            inspect(tmp_path / "run", tmp_path / "no", prompts=["a"])
        with pytest.raises(ValueError, match="The images have 9 pixels, but the model reads 4 by 4"):
            other = write_rows(tmp_path / "other", [{"pixels": [0] * 9, "label": 0}])
            inspect(tmp_path / "run", tmp_path / "no", data=[other])
        tokens = {**training, "task": "image", "data": [data], "output_dir": str(tmp_path / "tokens")}
        train_lra.main(tokens)
        inspect(tmp_path / "tokens", tmp_path / "as-tokens", data=[data], kind="image")
        assert pictures(tmp_path / "as-tokens") == ["images.png"]

    def test_classifier_of_waveforms(self, training, tmp_path):
        rows = [{"samples": [i, 40, -7 * i] * (6 + i), "sampling_rate": 8000, "digit": i % 2} for i in range(6)]
        data = write_rows(tmp_path / "data", rows)
        (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        classify_audio.main({**training, "data": [data]})
        result = inspect(tmp_path / "run", tmp_path / "out", data=[data])
        assert result["layers"][0]["sequences"] == 6 and pictures(tmp_path / "out") == ["sound_0.png", "sound_1.png"]
        with pytest.raises(ValueError, match="reads real numbers, but `kind` is 'text'"):
            inspect(tmp_path / "run", tmp_path / "no", data=[data], kind="text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "video"}, "`kind` must be one of text, pairs, image, audio; got 'video'"),
        ({"batch_size": 0}, "`batch_size` must be positive; got 0"),
        ({"pictures": -1}, "`pictures` must not be negative; got -1"),
        ({"prompts": ["a"], "data": ["b"]}, "either as `prompts`, as `input_file`, or as `data`"),
        ({"kind": "audio", "data": ["b"], "prompts": None}, "the model reads tokens"),
    ],
)
def test_bad_options_are_explained(seqboat_checkpoint, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        inspect(seqboat_checkpoint, tmp_path / "out", **{"prompts": ["a"]} | options)
    assert not (tmp_path / "out").exists()

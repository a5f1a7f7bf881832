"""The conversion recipe: both official formats, both ways, from and to files."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from check import read_vectors
from official_spade import ADAPTIVE, ENCODER_DECODER, LANGUAGE_MODEL, VARIANTS, random_official
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_hybrid  # noqa: F401
from hf_hybrid.conversion.common import same_bytes
from hf_hybrid.recipes.convert_checkpoint import main


def write_encoder_decoder(folder: Path, options: dict) -> dict[str, torch.Tensor]:
    folder.mkdir()
    state = random_official(options)
    (folder / "config.json").write_text(json.dumps(options))
    torch.save(state, folder / "pytorch_model.bin")
    return state


def write_language_model(path: Path, options: dict, *, as_cfg: bool = False) -> dict[str, torch.Tensor]:
    state = random_official(options)
    contents: dict = {"model": state, "extra_state": {"epoch": 3}, "optimizer_history": [{"num_updates": 7}]}
    if as_cfg:
        contents |= {"args": None, "cfg": {"model": argparse.Namespace(**options), "task": {"data": "x"}}}
    else:
        contents["args"] = argparse.Namespace(**options)
    torch.save(contents, path)
    return state


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(same_bytes(actual[name], expected[name]) for name in expected)


def convert(source: Path, output: Path, **options: str) -> dict:
    return main({"model_name_or_path": str(source), "output_dir": str(output), **options})


@pytest.mark.parametrize("name", ["encdec", "encdec_untied_bias"])
def test_encoder_decoder_there_and_back(tmp_path, name):
    options = VARIANTS[name] | {"s4_lr": {"A": 0.0, "B": 0.0, "dt": None}, "task_specific": [1, 2]}
    official = write_encoder_decoder(tmp_path / "official", options)
    result = convert(tmp_path / "official", tmp_path / "ours")
    assert result["model_type"] == "spade"
    assert result["tensors"] == len(load_file(tmp_path / "ours" / "model.safetensors"))
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.generation_config.decoder_start_token_id == 2
    assert same_bytes(model.get_input_embeddings().weight.data, official["shared.weight"])
    assert model.config.ssm_stop_gradient and model.config.architectures == ["SpadeForConditionalGeneration"]
    convert(tmp_path / "ours", tmp_path / "back", direction="to_official")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == options
    assert_same(torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True), official)


@pytest.mark.parametrize("as_cfg", [False, True], ids=["args", "cfg"])
@pytest.mark.parametrize("name", ["lm_adaptive", "lm_normformer"])
def test_language_model_there_and_back(tmp_path, name, as_cfg):
    official = write_language_model(tmp_path / "checkpoint_best.pt", VARIANTS[name], as_cfg=as_cfg)
    assert convert(tmp_path / "checkpoint_best.pt", tmp_path / "ours")["model_type"] == "spade_lm"
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    convert(tmp_path / "ours", tmp_path / "back", direction="to_official")
    with torch.serialization.safe_globals([argparse.Namespace]):
        back = torch.load(tmp_path / "back" / "checkpoint.pt", weights_only=True)
    assert vars(back["args"]) == VARIANTS[name]
    assert_same(back["model"], official)


def test_trained_models_of_this_library_can_be_exported(tmp_path):
    write_encoder_decoder(tmp_path / "official", ENCODER_DECODER)
    convert(tmp_path / "official", tmp_path / "ours")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    convert(tmp_path / "tuned", tmp_path / "back", direction="to_official")  # without the recorded official options
    state = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert same_bytes(state["lm_head.weight"], model.get_input_embeddings().weight.data)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "msrlongt5"


def test_a_state_dict_alone_needs_its_configuration(tmp_path):
    write_encoder_decoder(tmp_path / "official", ENCODER_DECODER)
    weights = tmp_path / "official" / "pytorch_model.bin"
    with pytest.raises(ValueError, match="pass the official options as `config_file`"):
        convert(weights, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    convert(weights, tmp_path / "ours", config_file=str(tmp_path / "official" / "config.json"))
    assert (tmp_path / "ours" / "model.safetensors").is_file()


def test_sharded_safetensors_are_read(tmp_path):
    folder = tmp_path / "official"
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in random_official(ENCODER_DECODER).items()}
    (folder / "config.json").write_text(json.dumps(ENCODER_DECODER))
    shards = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert convert(folder, tmp_path / "ours")["parameters"] > 0
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors does not exist"):
        convert(folder, tmp_path / "again")


def test_a_full_folder_is_refused(tmp_path):
    write_encoder_decoder(tmp_path / "official", ENCODER_DECODER)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert(tmp_path / "official", tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "official", tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


class _Surprise:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "code", "list", "no_tensors", "half_safetensors"])
def test_damaged_checkpoints_end_in_a_clear_error_and_leave_nothing(tmp_path, capsys, damage):
    folder = tmp_path / "official"
    write_encoder_decoder(folder, ENCODER_DECODER)
    weights = folder / "pytorch_model.bin"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "noise":
        weights.write_bytes(b"\x80\x02noise" * 50)
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "code":
        weights.write_bytes(pickle.dumps({"shared.weight": _Surprise()}))
    elif damage == "list":
        torch.save([torch.ones(2)], weights)
    elif damage == "no_tensors":
        torch.save({"shared.weight": "text"}, weights)
    else:
        weights.unlink()
        save_file({"a": torch.ones(100)}, folder / "model.safetensors")
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read|must contain a dictionary|is not a tensor|is damaged"):
        convert(folder, tmp_path / "ours")
    assert "executed" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official"]


def test_other_wrong_sources(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        convert(tmp_path / "absent", tmp_path / "ours")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        convert(tmp_path / "bare", tmp_path / "ours")
    (tmp_path / "bare" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert(tmp_path / "bare", tmp_path / "ours")
    (tmp_path / "bare" / "config.json").write_text(json.dumps(ENCODER_DECODER))
    with pytest.raises(ValueError, match="contains no weights"):
        convert(tmp_path / "bare", tmp_path / "ours")
    with pytest.raises(ValueError, match="accepted are 'spade', 'spade_lm'"):
        convert(tmp_path / "bare", tmp_path / "ours", direction="to_official")
    (tmp_path / "weights.h5").write_text("x")
    with pytest.raises(ValueError, match="unknown suffix"):
        convert(tmp_path / "weights.h5", tmp_path / "ours")
    with pytest.raises(ValueError, match="`direction` must be one of"):
        convert(tmp_path / "bare", tmp_path / "ours", direction="sideways")
    assert not (tmp_path / "ours").exists()


def test_tensors_of_another_configuration_are_refused(tmp_path):
    state = write_encoder_decoder(tmp_path / "official", ENCODER_DECODER)
    (tmp_path / "official" / "config.json").write_text(json.dumps(ENCODER_DECODER | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"missing: `encoder\.block\.2"):
        convert(tmp_path / "official", tmp_path / "ours")
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "official" / "pytorch_model.bin")
    (tmp_path / "official" / "config.json").write_text(json.dumps(ENCODER_DECODER))
    with pytest.raises(ValueError, match="`lm_head.weight` and `shared.weight` are tied"):
        convert(tmp_path / "official", tmp_path / "ours")


def test_models_without_official_form_are_refused_by_field(tmp_path):
    config = hf_hybrid.SpadeLMConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, window_size=4
    )
    hf_hybrid.SpadeLMForCausalLM(config).save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="has no counterpart in the official SPADE"):
        convert(tmp_path / "new", tmp_path / "back", direction="to_official")
    assert not (tmp_path / "back").exists()


def test_unused_official_options_of_any_kind_are_tolerated(tmp_path):
    options = LANGUAGE_MODEL | ADAPTIVE | {"betas": (0.9, 0.98), "seed": 1, "nothing": None}
    write_language_model(tmp_path / "checkpoint.pt", options)
    convert(tmp_path / "checkpoint.pt", tmp_path / "ours")
    recorded = json.loads((tmp_path / "ours" / "official_config.json").read_text())
    assert recorded["betas"] == [0.9, 0.98] and recorded["seed"] == 1 and recorded["nothing"] is None


MEGA = sorted((Path(__file__).parents[1] / "parity" / "vectors" / "mega").glob("off_*.safetensors"))


@pytest.mark.parametrize("source", MEGA, ids=lambda path: path.stem)
def test_mega_there_and_back(tmp_path, source):
    """The official vectors as the fairseq checkpoints they come from."""
    stored, tensors = read_vectors(source)
    official = {name[6:]: value for name, value in tensors.items() if name.startswith("param.")}
    options = dict(stored["args"]) | {"arch": f"mega_{stored['model']}", "lr": [0.004]}
    contents = {"model": official, "args": argparse.Namespace(**options), "extra_state": {"epoch": 3}}
    torch.save(contents, tmp_path / "checkpoint_best.pt")
    result = convert(tmp_path / "checkpoint_best.pt", tmp_path / "ours")
    assert result["model_type"] == "mega"
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    model, info = getattr(hf_hybrid, config.architectures[0]).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    convert(tmp_path / "ours", tmp_path / "official", direction="to_official")
    again = torch.load(tmp_path / "official" / "checkpoint.pt", weights_only=False)
    assert vars(again["args"]) == options
    assert again["model"].keys() == official.keys()
    marks = ("_float_tensor", "version")
    assert_same(*({k: v for k, v in state.items() if not k.endswith(marks)} for state in (again["model"], official)))


SEQBOAT = sorted((Path(__file__).parents[1] / "parity" / "vectors" / "seqboat").glob("cls_[it]*.safetensors"))


@pytest.mark.parametrize("source", SEQBOAT, ids=lambda path: path.stem)
def test_seqboat_there_and_back(tmp_path, source):
    stored, tensors = read_vectors(source)
    official = {name[6:]: value for name, value in tensors.items() if name.startswith("param.")}
    contents = {"model": official, "args": argparse.Namespace(**stored)}
    torch.save(contents, tmp_path / "checkpoint_best.pt")
    result = convert(tmp_path / "checkpoint_best.pt", tmp_path / "ours")
    assert result["model_type"] == "seqboat"
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    model, info = getattr(hf_hybrid, config.architectures[0]).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    convert(tmp_path / "ours", tmp_path / "official", direction="to_official")
    again = torch.load(tmp_path / "official" / "checkpoint.pt", weights_only=False)
    assert vars(again["args"]) == stored and again["model"].keys() == official.keys()
    marks = ("inv_freq", "version")
    assert_same(*({k: v for k, v in state.items() if not k.endswith(marks)} for state in (again["model"], official)))

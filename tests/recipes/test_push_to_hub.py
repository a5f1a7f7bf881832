"""The recipe that shares a checkpoint, as far as no Hub is needed (`tests/hub` pushes)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from factories import Case
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_hybrid.hub import MANIFEST_FILE, verify_export
from hf_hybrid.processing.image_processing import PixelSequenceImageProcessor
from hf_hybrid.recipes import finetune_glue, finetune_summarization, generate, pretrain_span_corruption
from hf_hybrid.recipes.push_to_hub import main


def test_a_checkpoint_becomes_an_export(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "export"
    result = main(
        {"model_name_or_path": str(checkpoint), "output_dir": str(output), "license": "cc0-1.0", "language": ["en"]}
    )
    assert result["architecture"] == "SpadeForConditionalGeneration" and result["output_dir"] == str(output)
    assert result["digest"] == verify_export(output) and result["files"] == len(list(output.iterdir()))
    data = ModelCard.load(output / "README.md").data
    assert data.license == "cc0-1.0" and data.language == ["en"]
    first, second = (AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict() for folder in (checkpoint, output))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    text = "A short sentence."
    assert AutoTokenizer.from_pretrained(output)(text) == AutoTokenizer.from_pretrained(checkpoint)(text)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        main({"model_name_or_path": str(checkpoint), "output_dir": str(output)})


def test_an_export_without_code_and_from_an_export(checkpoint: Path, tmp_path: Path) -> None:
    main({"model_name_or_path": str(checkpoint), "output_dir": str(tmp_path / "first")})
    result = main(
        {"model_name_or_path": str(tmp_path / "first"), "output_dir": str(tmp_path / "second"), "remote_code": False}
    )
    names = {path.name for path in (tmp_path / "second").iterdir()}
    assert MANIFEST_FILE not in names and not any(name.endswith(".py") for name in names) and "digest" not in result
    assert "auto_map" not in json.loads((tmp_path / "second" / "config.json").read_text())


def test_weights_stored_in_bfloat16_load_in_float32(checkpoint: Path, tmp_path: Path) -> None:
    main({"model_name_or_path": str(checkpoint), "output_dir": str(tmp_path / "export"), "dtype": "bfloat16"})
    verify_export(tmp_path / "export")
    first, second = (AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (checkpoint, tmp_path / "export"))
    assert second.dtype == torch.float32
    states = {
        name
        for name, value in load_file(tmp_path / "export" / "model.safetensors").items()
        if value.dtype == torch.float32
    }
    assert 0 < len(states) < 20  # the state space itself is never rounded
    for (name, value), stored in zip(first.state_dict().items(), second.state_dict().values()):
        expected = value if name in states or not value.is_floating_point() else value.bfloat16().float()
        assert torch.equal(stored, expected), name


def test_image_models_keep_their_processor(tmp_path: Path) -> None:
    Case("mega", "AutoModelForImageClassification", "default").model().save_pretrained(tmp_path / "model")
    PixelSequenceImageProcessor(image_size=7).save_pretrained(tmp_path / "model")
    main({"model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "export")})
    settings = json.loads((tmp_path / "export" / "preprocessor_config.json").read_text())
    assert settings["auto_map"] == {"AutoImageProcessor": "image_processing.PixelSequenceImageProcessor"}
    assert settings["image_size"] == 7


def write_other_model(folder: Path) -> None:
    transformers.BertConfig(architectures=["BertModel"]).save_pretrained(folder)


def write_adapters(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def write_tampered_export(folder: Path) -> None:
    Case("spade_lm", "AutoModelForCausalLM", "default").model().save_pretrained(folder)
    (folder / MANIFEST_FILE).write_text("0" * 64 + "  config.json\n")


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda folder: None, {}, "not a checkpoint folder"),
        (write_other_model, {}, "model of the type 'bert'; accepted are spade"),
        (write_adapters, {}, "holds an adapter without its base checkpoint"),
        (write_tampered_export, {}, "config.json was changed"),
        (lambda folder: None, {"output_dir": None}, "Pass `repo_id` to push"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path, write, options, message) -> None:
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        main({"model_name_or_path": str(tmp_path / "source"), "output_dir": str(tmp_path / "export")} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"license": "mine"}, "license 'mine'"),
        ({"language": ["English"]}, "language 'English'"),
        ({"card": "absent.md"}, "`card` absent.md is not a file"),
    ],
)
def test_bad_cards_are_refused(checkpoint: Path, tmp_path: Path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        main({"model_name_or_path": str(checkpoint), "output_dir": str(tmp_path / "export")} | options)
    assert not any(tmp_path.iterdir())


def test_pushing_needs_a_token(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="needs an access token of the Hub"):
        main(
            {"model_name_or_path": str(checkpoint), "repo_id": "somebody/name", "output_dir": str(tmp_path / "export")}
        )
    assert not any(tmp_path.iterdir())


def test_no_recipe_runs_the_code_of_an_export_that_was_changed(checkpoint, tokenizer_folder, tmp_path):
    """The manifest is checked before the configuration is read: code runs as soon as a type is unknown."""
    folder = tmp_path / "export"
    main({"model_name_or_path": str(checkpoint), "output_dir": str(folder)})
    code, trace = folder / "configuration_spade.py", tmp_path / "it ran"
    code.write_text(code.read_text() + f"\nopen({str(trace)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unknown"}))
    reading = {"model_name_or_path": str(folder), "trust_remote_code": True}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a {n}", "summary": "b", "label": n % 2}) + "\n" for n in range(20)))
    training = {
        "data": rows,
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "tokenizer": str(tokenizer_folder),
    }
    for recipe, options in (
        (generate, {**reading, "prompts": ["a"]}),
        (generate, {**reading, "prompts": ["a"], "tokenizer": str(tokenizer_folder)}),
        (finetune_glue, {**reading, **training, "validation_fraction": 0.5}),
        (finetune_glue, {**reading, **training, "validation_fraction": 0.5, "from_scratch": True}),
        (finetune_summarization, {**reading, **training, "validation_fraction": 0.5, "from_scratch": True}),
        (pretrain_span_corruption, {**training, "arch": str(folder), "trust_remote_code": True}),
    ):
        with pytest.raises(ValueError, match="config.json was changed"):
            recipe.main(options)
    assert not trace.exists()

"""LoRA in every fine-tuning recipe: train, save, resume, evaluate, generate, merge, bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.configuration.configuration_spade import SpadeConfig
from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes import (
    classify_audio,
    classify_image,
    evaluate,
    finetune_glue,
    finetune_summarization,
    finetune_translation,
    generate,
    merge_adapter,
    train_lra,
)

pytest.importorskip("peft")

TEXTS = ["the list is good and sorted", "this dictionary is bad"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "glue": [{"sentence": f"{TEXTS[i % 3 % 2]} {i}", "label": i % 3} for i in range(12)],
    "summarization": [{"document": TEXTS[i % 2], "summary": TEXTS[i % 2].split()[1]} for i in range(8)],
    "translation": [{"translation": {"en": TEXTS[i % 2], "de": TEXTS[1 - i % 2]}} for i in range(8)],
    "lra": [{"text": ("good " if i % 2 else "bad ") * 3, "label": i % 2} for i in range(8)],
    "image": [{"pixels": [200 * (i % 2)] * 8 + list(range(8)), "label": i % 2} for i in range(8)],
    "audio": [
        {
            "samples": np.random.default_rng(i).integers(-900, 900, 20 + i).tolist(),
            "sampling_rate": 8000,
            "digit": i % 2,
        }
        for i in range(8)
    ],
}
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "glue": (finetune_glue, {"max_length": 24}),
    "summarization": (finetune_summarization, {"max_source_length": 24, "max_target_length": 8}),
    "translation": (
        finetune_translation,
        {"source_lang": "en", "target_lang": "de", "max_source_length": 24, "max_target_length": 16},
    ),
    "lra": (train_lra, {"task": "text", "max_length": 24}),
    "image": (classify_image, {}),
    "audio": (classify_audio, {}),
}


@pytest.fixture(scope="module")
def values_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of numbers: its backbone fits images and sounds."""
    config = MegaConfig(
        input_type="values", hidden_size=16, num_hidden_layers=1, intermediate_size=16, nffn_hidden_size=16,
        shared_representation_size=8, vocab_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("values")
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def lora(options: dict, checkpoint: Path, values_checkpoint: Path, tmp_path: Path):
    """Options of a run with LoRA, by kind of task."""

    def build(kind: str, **changes: Any) -> dict[str, Any]:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for split in ("train", "validation"):
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS[kind])))
        base = values_checkpoint if kind in ("image", "audio") else checkpoint
        fixed = {"data": [str(folder)], "model_name_or_path": str(base), "save_strategy": "no", "lora_rank": 2}
        return {**options, **RECIPES[kind][1], **fixed, "learning_rate": 1e-2, **changes}

    return build


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("glue", "summarization", "image") else pytest.mark.wide)
        for kind in RECIPES
    ],
)
def test_train_evaluate_and_merge(kind: str, lora: Any, tmp_path: Path) -> None:
    if kind == "audio":  # needs a feature extractor beside the checkpoint
        from hf_hybrid.processing.audio_processing import WaveformFeatureExtractor

        source = Path(lora(kind)["model_name_or_path"])
        base = tmp_path / "base"
        shutil.copytree(source, base)
        WaveformFeatureExtractor(sampling_rate=8000).save_pretrained(base)
    else:
        base = Path(lora(kind)["model_name_or_path"])
    arguments, run, before = lora(kind, model_name_or_path=str(base)), tmp_path / "run", digest(base)
    metrics = RECIPES[kind][0].main(arguments)
    assert digest(base) == before
    assert metrics["num_trainable_parameters"] < metrics["num_parameters"]
    names = {path.name for path in run.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "adapted_config.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    card = (run / "README.md").read_text()
    assert model_card_problems(card) == [] and "LoRA of rank 2" in card
    assert "load_adapted_model(" in card and f"adapter of the checkpoint `{base.name}`" in card

    dropped = (
        "lora_rank",
        "learning_rate",
        "max_steps",
        "save_strategy",
        "per_device_train_batch_size",
        "logging_steps",
    )
    again = {key: value for key, value in arguments.items() if key not in dropped} | {"kind": kind}
    first = evaluate.main({**again, "model_name_or_path": str(run), "output_dir": str(tmp_path / "evaluation")})
    assert first["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    done = merge_adapter.main({"model_name_or_path": str(run), "output_dir": str(tmp_path / "merged")})
    assert done["base_model"] == str(base)
    second = evaluate.main(
        {**again, "model_name_or_path": str(tmp_path / "merged"), "output_dir": str(tmp_path / "two")}
    )
    assert second["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_generation_from_an_adapter(lora: Any, tmp_path: Path) -> None:
    finetune_summarization.main(lora("summarization", generation_num_beams=2, max_steps=6))
    options = {"device": "cpu", "prompts": TEXTS, "max_new_tokens": 6}
    adapted = generate.main({**options, "model_name_or_path": str(tmp_path / "run")})
    merge_adapter.main({"model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "merged")})
    merged = generate.main({**options, "model_name_or_path": str(tmp_path / "merged")})
    assert adapted["generations"] == merged["generations"]
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings["num_beams"] == 2 and settings["max_length"] == 9


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(lora: Any, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "lora_modules_to_save": ["state"]}
    resumed = lora("glue", **options, max_steps=4, lr_scheduler_type="constant", warmup_steps=0)
    main, checkpoint = finetune_glue.main, tmp_path / "two"
    main({**resumed, "max_steps": 2, "output_dir": str(checkpoint)})
    main({**resumed, "output_dir": str(checkpoint), "resume_from_checkpoint": "last"})
    main({**resumed, "output_dir": str(tmp_path / "whole")})
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, tmp_path / "whole"))
    assert one.keys() == other.keys() and any(".ssm." in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)

    last = {**resumed, "output_dir": str(checkpoint), "resume_from_checkpoint": "last", "max_steps": 6}
    with pytest.raises(ValueError, match="`lora_rank` was 2 in this run and is 3 now"):
        main({**last, "lora_rank": 3})
    (checkpoint / "arguments.json").unlink()
    with pytest.raises(ValueError, match="another adapter than this run trains"):
        main({**last, "lora_rank": 3})
    with pytest.raises(ValueError, match="holds an adapter, but this run is without `lora_rank`"):
        main({**last, "lora_rank": None, "lora_modules_to_save": None})


def test_gradient_checkpointing_and_the_flag_with_a_dash(lora: Any, tmp_path: Path) -> None:
    options = lora("glue", gradient_checkpointing=True, max_steps=1, eval_strategy="no")
    del options["lora_rank"]
    words = ["--lora-rank", "3", "--lora_targets", "q_proj", "v_proj"]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    metrics = finetune_glue.main(words)
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert settings["r"] == 3 and sorted(settings["target_modules"]) == ["q_proj", "v_proj"]
    assert metrics["num_trainable_parameters"] < metrics["num_parameters"]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("glue", {"lora_rank": 0}, "`lora_rank` must be positive"),
        ("glue", {"lora_rank": None, "lora_alpha": 8}, "need `lora_rank`"),
        ("glue", {"from_scratch": True}, "adapts a pretrained checkpoint"),
        ("glue", {"lora_targets": ["query"]}, "names 'query'"),
        ("glue", {"lora_modules_to_save": ["ema_gate"]}, "names 'ema_gate'"),
        ("translation", {"model_name_or_path": None, "arch": "spade"}, "adapts a pretrained checkpoint"),
    ],
)
def test_bad_options(kind: str, changes: dict, message: str, lora: Any, tmp_path: Path) -> None:
    arguments = lora(kind, **changes)
    if kind == "translation":
        arguments |= {
            "tokenizer": lora(kind)["model_name_or_path"],
            "config_overrides": "num_hidden_layers=1,decoder_layers=1",
        }
    with pytest.raises(ValueError, match=message):
        RECIPES[kind][0].main(arguments)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def adapter(lora: Any, checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter of a sequence classifier, and the checkpoint below it."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    finetune_glue.main(lora("glue", model_name_or_path=str(base), max_steps=1, eval_strategy="no"))
    return tmp_path / "run", base


def test_adapters_whose_checkpoint_is_another_model(adapter: tuple[Path, Path], lora: Any, tmp_path: Path) -> None:
    folder, base = adapter
    options = {"kind": "glue", "model_name_or_path": str(folder), "output_dir": str(tmp_path / "evaluation")}
    again = {**options, "data": lora("glue")["data"], "max_length": 24, "use_cpu": True}
    with pytest.raises(ValueError, match="`lora_rank` is for training"):
        evaluate.main({**again, "lora_rank": 2})
    with pytest.raises(ValueError, match="is itself an adapter.*merge_adapter"):
        finetune_glue.main(lora("glue", model_name_or_path=str(folder), output_dir=str(tmp_path / "twice")))

    small = {"vocab_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1, "decoder_layers": 1}
    other = AutoModelForSeq2SeqLM.from_config(
        SpadeConfig(hidden_size=32, head_dim=8, intermediate_size=32, window_size=9, **small)
    )
    other.save_pretrained(base)
    with pytest.raises(ValueError, match="made for another model than"):
        evaluate.main(again)
    config = MegaConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1, intermediate_size=16, nffn_hidden_size=16)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    with pytest.raises(ValueError, match="for a spade, but .* holds a mega"):
        evaluate.main(again)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="belongs to the checkpoint .* Restore it"):
        evaluate.main(again)
    with pytest.raises(ValueError, match="belongs to the checkpoint"):
        merge_adapter.main({"model_name_or_path": str(folder), "output_dir": str(tmp_path / "merged")})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        evaluate.main(again)


def test_only_adapters_can_be_merged(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        merge_adapter.main({"model_name_or_path": str(checkpoint), "output_dir": str(tmp_path / "merged")})

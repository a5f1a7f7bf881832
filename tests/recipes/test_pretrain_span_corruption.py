"""Span-corruption pretraining, end to end on a toy corpus."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from factories import TINY_OVERRIDES
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes.pretrain_span_corruption import main

TINY_SPADE = (
    "hidden_size=16,head_dim=8,intermediate_size=32,num_attention_heads=2,num_hidden_layers=2,decoder_layers=1,window_size=9,ssm_state_size=4,"
    "max_target_positions=64"
)


@pytest.fixture
def pretraining(options, corpus, tokenizer_folder) -> dict:
    return {
        **options,
        "data": [str(corpus)],
        "tokenizer": str(tokenizer_folder),
        "config_overrides": TINY_SPADE,
        "input_length": 32,
        "eval_steps": 2,
        "max_validation_segments": 6,
    }


def test_everything_is_written(pretraining, tmp_path):
    metrics = main({**pretraining, "max_steps": 8, "learning_rate": 1e-2})
    run = tmp_path / "run"
    written = {path.name for path in run.iterdir()}
    assert written >= {
        "model.safetensors", "config.json", "tokenizer.json", "arguments.json", "environment.json", "metrics.json",
        "loss_curve.png", "README.md", "trainer_state.json", "checkpoint-8",
    }  # fmt: skip
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 8 and metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 1e8
    assert metrics["input_tokens_seen"] == 8 * 2 * 32
    assert json.loads((run / "arguments.json").read_text())["input_length"] == 32
    card = (run / "README.md").read_text()
    assert model_card_problems(card) == []
    assert "SpadeForConditionalGeneration" in card and "2212.08136" in card and str(tmp_path) not in card
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len([entry for entry in history if "eval_loss" in entry]) >= 4
    assert all(entry["tokens_per_second"] > 0 for entry in history if "loss" in entry)
    model = AutoModelForSeq2SeqLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size >= len(tokenizer)
    assert model.generate(**tokenizer("a <extra_id_0> b", return_tensors="pt"), max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_is_bitwise(pretraining, tmp_path, accumulation):
    base = {
        **pretraining,
        "config_overrides": TINY_SPADE + ",hidden_dropout=0.1,attention_dropout=0.1",
        "gradient_accumulation_steps": accumulation,
        "max_steps": 10,
        "save_steps": 6,
    }
    main(base)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run" / "checkpoint-6", resumed / "checkpoint-6")
    metrics = main({**base, "output_dir": str(resumed), "resume_from_checkpoint": "last"})
    straight, continued = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", resumed))
    assert metrics["input_tokens_seen"] == 10 * 2 * 32 * accumulation
    assert straight.keys() == continued.keys()
    assert all(torch.equal(straight[name], continued[name]) for name in straight)


def test_resuming_is_bitwise_across_epochs(pretraining, tmp_path, documents):
    text = tmp_path / "short.txt"
    text.write_text(documents[0][:900])
    base = {**pretraining, "data": [str(text)], "max_steps": 24, "save_steps": 16, "validation_fraction": 0.2}
    metrics = main(base)
    assert metrics["epoch"] > 2
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run" / "checkpoint-16", resumed / "checkpoint-16")
    main({**base, "output_dir": str(resumed), "resume_from_checkpoint": "last"})
    straight, continued = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", resumed))
    assert all(torch.equal(straight[name], continued[name]) for name in straight)


def test_continuing_from_a_checkpoint(pretraining, tmp_path):
    main(pretraining)
    again = {key: value for key, value in pretraining.items() if key not in ("config_overrides", "tokenizer")}
    metrics = main({**again, "output_dir": str(tmp_path / "more"), "model_name_or_path": str(tmp_path / "run")})
    assert metrics["steps"] == 3


def test_the_time_limit_stops_evaluates_and_saves(pretraining, tmp_path):
    metrics = main({**pretraining, "max_steps": 100_000, "max_minutes": 0.05})
    assert 0 < metrics["steps"] < 100_000
    assert "eval_loss" in metrics
    assert (tmp_path / "run" / f"checkpoint-{metrics['steps']}").is_dir()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    if len(rates) > 10:  # else the machine is too busy to say
        assert rates[-1] < 0.5 * max(rates)  # the schedule ended with the time


def test_options_from_a_file_with_overriding_flags(pretraining, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text(json.dumps({**pretraining, "learning_rate": "1e-4"}))  # JSON is YAML
    main([str(options), "--max_steps", "2"])
    recorded = json.loads((tmp_path / "run" / "arguments.json").read_text())
    assert (recorded["max_steps"], recorded["learning_rate"]) == (2, 1e-4)


def test_a_separate_validation_file(pretraining, tmp_path, corpus):
    metrics = main({**pretraining, "validation_data": str(corpus / "03.txt")})
    assert metrics["corpus"].startswith("24 documents")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer": None}, ValueError, "`tokenizer` is required"),
        ({"tokenizer": "/nowhere/tokenizer"}, ValueError, "cannot be loaded: no such folder exists"),
        ({"input_length": 1024}, ValueError, "57 masked spans.*only 32"),
        ({"input_length": 400, "mean_span_length": 20.0}, ValueError, "max_target_positions"),
        ({"data": ["/nowhere.txt"]}, ValueError, "No such file"),
        ({"config_overrides": "d_modle=4"}, ValueError, "d_modle"),
        ({"config_overrides": "hidden_size"}, ValueError, "name=value"),
        ({"config_overrides": TINY_SPADE + ",num_attention_heads=3"}, ValueError, "num_attention_heads"),
        ({"resume_from_checkpoint": "last"}, ValueError, "no checkpoint"),
        ({"max_minutes": -1}, ValueError, "max_minutes"),
        ({"validation_fraction": 2.0}, ValueError, "validation_fraction"),
    ],
)
def test_bad_options_end_in_a_clear_error(pretraining, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        main({**pretraining, **changes})
    run = tmp_path / "run"
    assert not run.exists() or not any(run.iterdir())


def test_a_tokenizer_without_sentinels_is_refused(pretraining, tmp_path, documents):
    from hf_hybrid.tokenization.sentencepiece_tokenizer import train_sentencepiece_tokenizer

    train_sentencepiece_tokenizer(documents[:4], vocab_size=400, num_sentinels=0).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="sentinel"):
        main({**pretraining, "tokenizer": str(tmp_path / "plain")})


def test_an_empty_file_and_a_missing_column_are_refused(pretraining, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="[Ee]mpty"):
        main({**pretraining, "data": [str(tmp_path / "empty.txt")]})
    (tmp_path / "rows.jsonl").write_text('{"a": "x", "b": "y"}\n{"a": "x", "b": "y"}\n')
    with pytest.raises(ValueError, match="no column `text`"):
        main({**pretraining, "data": [str(tmp_path / "rows.jsonl")]})


def test_a_full_folder_is_refused_before_any_work(pretraining, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        main({**pretraining, "data": ["/never/read"]})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_finished_run_that_is_resumed_trains_no_further(pretraining, tmp_path):
    """As after a kill in the last evaluation: nothing is trained, everything else is done again."""
    options = {**pretraining, "max_steps": 4, "save_steps": 2}
    first = main(options)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    again = main({**options, "resume_from_checkpoint": "last"})
    assert again["steps"] == first["steps"] == 4 and again["eval_loss"] == first["eval_loss"]
    assert again["train_loss"] == first["train_loss"]  # of the whole run
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)


@pytest.mark.parametrize("missing", ["trainer_state.json", "optimizer.pt", "model.safetensors"])
def test_half_a_checkpoint_does_not_stand_before_a_whole_one(pretraining, tmp_path, caplog, missing):
    options = {**pretraining, "max_steps": 4, "save_steps": 2}
    first = main(options)
    (tmp_path / "run" / "checkpoint-4" / missing).unlink()
    again = main({**options, "resume_from_checkpoint": "last"})
    assert f"{missing} is missing" in caplog.text and again["eval_loss"] == first["eval_loss"]
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-4.*{missing} is missing"):
        main({**options, "resume_from_checkpoint": "last"})


def test_a_corrupt_checkpoint_is_refused(pretraining, tmp_path):
    main(pretraining)
    weights = tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors is corrupt"):
        main({**pretraining, "resume_from_checkpoint": "last"})
    (tmp_path / "run" / "model.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="model.safetensors is corrupt"):
        main(
            {
                **pretraining,
                "config_overrides": None,
                "output_dir": str(tmp_path / "other"),
                "model_name_or_path": str(tmp_path / "run"),
            }
        )


@pytest.mark.parametrize("arch", ["spade", "mega"])
def test_label_smoothing_of_weight_zero_is_the_plain_loss(pretraining, tmp_path, arch):
    """The Trainer takes the labels away from the model, which then needs the inputs of its decoder from the batch."""
    base = {**pretraining, "arch": arch, "config_overrides": TINY_OVERRIDES[arch], "max_steps": 2}
    losses = {}
    for weight in (0.0, 1e-9, 0.3):
        changes = {"label_smoothing_factor": weight, "output_dir": str(tmp_path / f"smoothed-{weight}")}
        losses[weight] = main({**base, **changes})["eval_loss"]
    assert losses[1e-9] == pytest.approx(losses[0.0], abs=1e-5)
    assert losses[0.3] != losses[0.0]

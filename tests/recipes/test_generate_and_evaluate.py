"""Generation in batches, and evaluation of saved checkpoints with the numbers training reported."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from hf_hybrid.app.opening import open_checkpoint
from hf_hybrid.app.writing import Decoding, write
from hf_hybrid.configuration.configuration_mega import MegaConfig
from hf_hybrid.configuration.configuration_spade import SpadeLMConfig
from hf_hybrid.recipes import evaluate, finetune_glue, generate, pretrain_span_corruption, training_recipe
from hf_hybrid.recipes.support.finetuning_data import PREDICTIONS_FILE


@pytest.fixture(scope="module")
def causal_checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("lm")
    config = SpadeLMConfig(
        vocab_size=512, hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2, window_size=9, ssm_state_size=4,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["encoder-decoder", "causal"])
def test_a_batch_gives_what_single_prompts_give(kind, checkpoint, causal_checkpoint):
    folder = checkpoint if kind == "encoder-decoder" else causal_checkpoint
    prompts = ["the list is sorted", "a key", "the values of a dictionary are"]
    options = {"model_name_or_path": str(folder), "device": "cpu", "max_new_tokens": 6, "min_new_tokens": 6}
    together = generate.main({**options, "prompts": prompts, "batch_size": 3})
    alone = generate.main({**options, "prompts": prompts, "batch_size": 1})
    assert together["generations"] == alone["generations"]
    assert [row["input"] for row in together["generations"]] == prompts
    assert together["new_tokens_per_second"] > 0


def test_several_outputs_are_written_as_json_lines(checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"document": "a list"}\n{"document": "a key"}\n{"document": "x"}\n')
    output = tmp_path / "deep" / "out.jsonl"
    options = {"input_file": str(tmp_path / "in.jsonl"), "output_file": str(output), "num_return_sequences": 2}
    base = {"model_name_or_path": str(checkpoint), "device": "cpu", "max_new_tokens": 4, "batch_size": 2}
    generate.main({**base, **options, "num_beams": 3, "source_prefix": "sum: "})
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["input"] for row in rows] == ["sum: a list", "sum: a key", "sum: x"]
    assert all(len(row["outputs"]) == 2 for row in rows)
    with pytest.raises(FileExistsError, match="exists"):
        generate.main({**base, **options})


def test_sampling_is_reproducible(checkpoint, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("a list\n\nof keys\n")
    options = {"model_name_or_path": str(checkpoint), "device": "cpu", "do_sample": True, "max_new_tokens": 5}
    first = generate.main({**options, "input_file": str(tmp_path / "in.txt")})
    printed = capsys.readouterr().out
    assert [json.loads(line) for line in printed.splitlines()] == first["generations"]
    assert generate.main({**options, "input_file": str(tmp_path / "in.txt")})["generations"] == first["generations"]


def test_nobody_is_warned_of_the_length_that_training_has_stored(checkpoint, tmp_path, caplog):
    """`finetune summarization` saves `max_length`; the command and the page give `max_new_tokens`, which precedes it."""
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    model.generation_config.max_length = 3
    shutil.copytree(checkpoint, tmp_path / "run")
    model.save_pretrained(tmp_path / "run")
    logger = logging.getLogger("transformers.generation.utils")
    logger.addHandler(caplog.handler)
    try:
        options = {"model_name_or_path": str(tmp_path / "run"), "device": "cpu", "prompts": ["a list"]}
        made = generate.main({**options, "max_new_tokens": 6, "min_new_tokens": 6})
        list(write(open_checkpoint(str(tmp_path / "run"), device="cpu"), "a list", Decoding(max_new_tokens=6)))
    finally:
        logger.removeHandler(caplog.handler)
    assert made["generations"][0]["outputs"]
    assert not [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None}, "either as `prompts` or as `input_file`"),
        ({"max_new_tokens": 65}, "accepts 64"),
        ({"batch_size": 0}, "`batch_size` must be positive"),
        ({"prompts": None, "input_file": "/nowhere.txt"}, "No such file"),
        ({"model_name_or_path": "/nowhere"}, "cannot be loaded: no such folder exists"),
    ],
)
def test_bad_generation_options(checkpoint, changes, message):
    base = {"model_name_or_path": str(checkpoint), "device": "cpu", "prompts": ["a"], "max_new_tokens": 3}
    with pytest.raises(ValueError, match=message):
        generate.main({**base, **changes})


def test_ids_outside_the_vocabulary_are_refused(checkpoint, tmp_path, tokenizer):
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(256)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="512 ids but the model only 256"):
        generate.main({"model_name_or_path": str(tmp_path / "small"), "max_new_tokens": 4, "prompts": ["a"]})


def test_classification_scores_are_reproduced(options, checkpoint, tmp_path):
    rows = [{"sentence": ("bad key", "good list")[i % 2], "label": i % 2} for i in range(8)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"data": [str(tmp_path / "train.jsonl")], "validation_data": [str(tmp_path / "validation.jsonl")]}
    trained = finetune_glue.main({**options, **data, "model_name_or_path": str(checkpoint), "save_strategy": "no"})
    del data["data"]
    again = {"kind": "glue", "model_name_or_path": options["output_dir"], "output_dir": str(tmp_path / "eval")}
    measured = evaluate.main({**options, **data, **again})
    assert measured["eval_accuracy"] == trained["eval_accuracy"]
    assert measured["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    written = {path.name for path in (tmp_path / "eval").iterdir()}
    assert written == {"arguments.json", "environment.json", "metrics.json"}


def test_summaries_are_scored_with_other_beams(options, checkpoint, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"document": "a list", "summary": "list"}\n' * 4)
    words = [
        "summarization", "--model_name_or_path", str(checkpoint), "--validation_data", str(tmp_path / "rows.jsonl"),
        "--generation_num_beams", "2", "--max_target_length", "6", "--use_cpu", "--output_dir", str(tmp_path / "eval"),
    ]  # fmt: skip
    metrics = evaluate.main(words)
    assert metrics["eval_samples"] == 4 and "eval_rouge2" in metrics
    assert (tmp_path / "eval" / PREDICTIONS_FILE).is_file()


def test_pretraining_loss_is_reproduced(options, checkpoint, corpus, tmp_path):
    data = {"data": [str(corpus)], "input_length": 32, "max_validation_segments": 6}
    trained = pretrain_span_corruption.main({**options, **data, "model_name_or_path": str(checkpoint)})
    again = {"kind": "span_corruption", "model_name_or_path": options["output_dir"], "output_dir": str(tmp_path / "e")}
    measured = evaluate.main({**options, **data, **again})
    assert measured["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)


def test_causal_models_are_evaluated(options, causal_checkpoint, corpus):
    data = {"data": [str(corpus)], "block_length": 32, "max_validation_segments": 4}
    metrics = evaluate.main({**options, **data, "kind": "clm", "model_name_or_path": str(causal_checkpoint)})
    assert metrics["bits_per_byte"] > 0 and metrics["perplexity"] > 1


@pytest.mark.parametrize("kind", ["clm", "mlm", "span_corruption"])
def test_text_of_its_own_is_evaluated_whole(kind, options, checkpoint, causal_checkpoint, corpus, tokenizer, tmp_path):
    """`validation_data` alone is enough, as for the other tasks; nothing of it is held out."""
    folder = {"clm": causal_checkpoint, "span_corruption": checkpoint}.get(kind)
    if folder is None:
        folder = tmp_path / "masked"
        config = MegaConfig(
            vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, shared_representation_size=8, nffn_hidden_size=16
        )  # fmt: skip
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    length = "input_length" if kind == "span_corruption" else "block_length"
    words = [kind, "--model_name_or_path", str(folder), "--validation_data", str(corpus), f"--{length}", "32"]
    metrics = evaluate.main([*words, "--use_cpu", "--output_dir", str(tmp_path / "eval")])
    files = list(corpus.iterdir())
    size = sum(path.stat().st_size for path in files)
    assert metrics["eval_loss"] > 0
    assert metrics["corpus"].startswith(f"evaluated on {len(files):,} documents, {size:,} bytes")
    with pytest.raises(ValueError, match="`data` is required"):
        evaluate.main({**options, "kind": kind, "model_name_or_path": str(folder), length: 32})
    with pytest.raises(ValueError, match="`data` is required"):
        training_recipe(kind).train({**options, "tokenizer": str(folder), "validation_data": [str(corpus)]})


def test_bad_evaluation_options(options, checkpoint):
    tasks = "audio, image, glue, summarization, translation, clm, mlm, span_corruption, lra, synthetic"
    with pytest.raises(ValueError, match=f"one of {tasks}; got 'ner'"):
        evaluate.main(["ner"])
    with pytest.raises(ValueError, match="got None"):
        evaluate.main([])
    with pytest.raises(ValueError, match="`data` is required"):
        evaluate.main({**options, "kind": "glue", "model_name_or_path": str(checkpoint)})

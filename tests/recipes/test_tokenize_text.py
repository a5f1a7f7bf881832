"""Text tokenized once, and the runs that train on it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_hybrid.cli import main as command
from hf_hybrid.recipes import evaluate, pretrain_clm, pretrain_mlm, pretrain_span_corruption, tokenize_text
from hf_hybrid.recipes.support.options import parse_arguments
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer

TINY = "hidden_size=16,num_attention_heads=2,intermediate_size=32,num_hidden_layers=2,window_size=9,ssm_state_size=4"
TINY_MEGA = (
    "hidden_size=16,intermediate_size=32,num_hidden_layers=1,shared_representation_size=8,ema_projection_size=2"
)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory, corpus, tokenizer_folder):
    folder = tmp_path_factory.mktemp("tokenized") / "tokens"
    words = ["--data", str(corpus), "--tokenizer", str(tokenizer_folder), "--validation_fraction", "0.2"]
    assert command(["tokenize", *words, "--num_proc", "1", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def pretraining(options, corpus, tokenizer_folder) -> dict:
    texts = {"data": [str(corpus)], "tokenizer": str(tokenizer_folder), "validation_fraction": 0.2}
    model = {"config_overrides": TINY, "block_length": 32, "eval_strategy": "no", "max_validation_segments": 6}
    return {**options, **texts, **model}


def test_a_run_on_tokens_is_that_on_the_text(pretraining, tokens, tmp_path):
    on_text = pretrain_clm.main(pretraining)
    changed = {"data": [str(tokens)], "output_dir": str(tmp_path / "tokens-run"), "save_steps": 2}
    on_tokens = pretrain_clm.main({**pretraining, **changed})
    for name in ("eval_loss", "bits_per_byte", "corpus"):
        assert on_tokens[name] == on_text[name]
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("run", "tokens-run")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    recorded = json.loads((tmp_path / "tokens-run" / "fingerprints.json").read_text())
    assert list(recorded["data"][0]) == ["tokens.json"]  # not the shards, of which it has the digests
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "tokens-run" / "checkpoint-2", resumed / "checkpoint-2")
    pretrain_clm.main({**pretraining, **changed, "output_dir": str(resumed), "resume_from_checkpoint": "last"})
    assert all(
        torch.equal(value, weights[1][name]) for name, value in load_file(resumed / "model.safetensors").items()
    )
    options = {
        "kind": "clm",
        "model_name_or_path": str(resumed),
        "data": [str(tokens)],
        "block_length": 32,
        "use_cpu": True,
    }
    found = evaluate.main({**options, "max_validation_segments": 6, "output_dir": str(tmp_path / "evaluated")})
    assert found["eval_loss"] == pytest.approx(
        on_text["eval_loss"], rel=1e-6
    )  # other batches, whose means are rounded


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (pretrain_span_corruption, {"input_length": 32, "config_overrides": f"{TINY},head_dim=8,decoder_layers=1"}),
        (pretrain_mlm, {"config_overrides": TINY_MEGA}),
        (pretrain_clm, {"segment_length": 16}),
    ],
)
def test_every_objective_reads_tokens(recipe, changes, pretraining, tokens):
    options = {**pretraining, **changes, "data": [str(tokens)]}
    if "input_length" in changes:
        del options["block_length"]
    on_text = {**options, "data": pretraining["data"]}
    jobs = [recipe.build(*parse_arguments(recipe.RECIPE.arguments, each, None)).trainer for each in (options, on_text)]
    for name in ("train_dataset", "eval_dataset"):
        first, second = (getattr(job, name) for job in jobs)
        assert len(first) == len(second)
        assert all(torch.equal(first[0][key], second[0][key]) for key in second[0])


def test_what_cannot_be_read_is_named(pretraining, tokens, corpus, tokenizer_folder, tmp_path):
    byte_tokenizer(num_sentinels=4).save_pretrained(tmp_path / "bytes")
    for changes, message in [
        ({"tokenizer": str(tmp_path / "bytes")}, "written with another tokenizer.*512 ids, not 263"),
        ({"data": [str(tokens), str(corpus)]}, "`data` mixes tokens and text"),
        ({"streaming": True}, "`streaming` is for text"),
        ({"text_column": "body"}, "`text_column` is about text"),
        ({"conversations": True}, "`conversations` is set"),
        ({"data": [str(corpus)], "validation_data": [str(tokens)]}, "`validation_data` is a folder of tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            pretrain_clm.main({**pretraining, "data": [str(tokens)], **changes})
    options = {"data": [str(corpus)], "tokenizer": str(tokenizer_folder), "output_dir": str(tokens)}
    with pytest.raises(FileExistsError, match="not an empty folder"):
        tokenize_text.main(options)
    with pytest.raises(ValueError, match="`data` is a folder of tokens already"):
        tokenize_text.main({**options, "data": [str(tokens)]})
    with pytest.raises(ValueError, match="`num_proc` must be a positive"):
        tokenize_text.main({**options, "num_proc": 0})
    assert [path.name for path in tokens.parent.iterdir()] == ["tokens"]


def test_validation_text_may_be_given(pretraining, tokens, documents, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(documents[0])
    options = {**pretraining, "data": [str(tokens)], "validation_data": [str(held_out)]}
    groups = parse_arguments(pretrain_clm.RECIPE.arguments, options, None)
    job = pretrain_clm.build(*groups)
    assert "1 documents" in str(job.report.metrics["corpus"]) or len(job.trainer.eval_dataset) > 0


def test_conversations_are_tokenized_as_they_are_trained(pretraining, tokenizer_folder, tmp_path):
    rows = tmp_path / "talks.jsonl"
    talks = [
        [{"role": "user", "content": f"What is {number} plus one?"}, {"role": "assistant", "content": str(number + 1)}]
        for number in range(60)
    ]
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    options = {"data": [str(rows)], "conversations": True, "validation_fraction": 0.2}
    folder = tmp_path / "talks"
    tokenize_text.main({**options, "tokenizer": str(tokenizer_folder), "output_dir": str(folder), "num_proc": 1})
    blocks = []
    for data in (rows, folder):
        groups = parse_arguments(pretrain_clm.RECIPE.arguments, {**pretraining, **options, "data": [str(data)]}, None)
        blocks.append(pretrain_clm.build(*groups).trainer.train_dataset.blocks.rows(slice(None)))
    assert (blocks[0] == blocks[1]).all()

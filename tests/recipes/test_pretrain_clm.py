"""Causal language modelling, end to end on a toy corpus."""

from __future__ import annotations

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid.data.conversations import documents_of, prepare_chat_template
from hf_hybrid.hub import model_card_problems
from hf_hybrid.recipes.pretrain_clm import CausalDataArguments, build, main
from hf_hybrid.recipes.support.models import NewModelArguments
from hf_hybrid.recipes.support.options import parse_arguments
from hf_hybrid.training.arguments import PretrainingArguments

TINY_LM = (
    "hidden_size=16,num_attention_heads=2,intermediate_size=32,num_hidden_layers=2,window_size=9,ssm_state_size=4"
)


@pytest.fixture
def pretraining(options, corpus, tokenizer_folder) -> dict:
    return {
        **options,
        "data": [str(corpus)],
        "tokenizer": str(tokenizer_folder),
        "config_overrides": TINY_LM,
        "block_length": 32,
        "eval_strategy": "no",
        "max_validation_segments": 6,
    }


def test_perplexity_and_bits_per_byte_are_reported(pretraining, tmp_path):
    metrics = main(pretraining)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    expected = metrics["eval_loss"] / math.log(2) / metrics["bytes_per_token"]
    assert metrics["bits_per_byte"] == pytest.approx(expected)
    assert model_card_problems((tmp_path / "run" / "README.md").read_text()) == []
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == "spade_lm"


def test_documents_can_be_kept_apart(pretraining, tmp_path):
    """The evaluation loss is that of the documents in rows of their own."""
    held_out = tmp_path / "held_out.jsonl"
    texts = [f"The {number} smallest of many short texts. " * (number % 3 + 1) for number in range(40)]
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {**pretraining, "separate_documents": True, "validation_data": [str(held_out)]}
    options["per_device_eval_batch_size"] = options["max_validation_segments"]
    metrics = main(options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    groups = parse_arguments((CausalDataArguments, NewModelArguments, PretrainingArguments), options, None)
    trainer = build(*groups, evaluate_only=True).trainer
    losses, counts = [], []
    for sample in trainer.eval_dataset:
        ends = (sample["input_ids"] == trainer.processing_class.eos_token_id).nonzero().flatten() + 1
        documents = sample["input_ids"].tensor_split(ends)
        for document in (document for document in documents if len(document) > 1):
            with torch.no_grad():
                losses.append(model(document[None], labels=document[None]).loss.item())
            counts.append(len(document) - 1)
    assert len(counts) > len(trainer.eval_dataset)
    assert metrics["eval_loss"] == pytest.approx(np.average(losses, weights=counts), rel=1e-4)


def test_streaming_resumes_bitwise(pretraining, tmp_path):
    base = {**pretraining, "streaming": True, "held_out_documents": 3, "max_steps": 6, "save_steps": 4}
    base["config_overrides"] += ",hidden_dropout=0.1"
    main(base)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run" / "checkpoint-4", resumed / "checkpoint-4")
    main({**base, "output_dir": str(resumed), "resume_from_checkpoint": "last"})
    straight, continued = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", resumed))
    assert all(torch.equal(straight[name], continued[name]) for name in straight)


def test_streaming_needs_an_end(pretraining):
    with pytest.raises(ValueError, match="`streaming` needs `max_steps`"):
        main({**pretraining, "streaming": True, "max_steps": -1})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"streaming": False}, "`stream_shards` must be a positive number of shards of a stream"),
        ({"stream_shards": 0}, "got 0"),
        ({"dataloader_num_workers": 5}, "got 24 for 1 processes with 5 workers"),
        ({"validation_data": None}, "divides the 24 files of the data among the shards.*pass `validation_data`"),
    ],
)
def test_shards_that_do_not_fit_are_refused(pretraining, changed, message):
    options = {**pretraining, "streaming": True, "stream_shards": 24, "validation_data": pretraining["data"]}
    with pytest.raises(ValueError, match=message):
        main(options | changed)


def test_a_stream_that_is_held_out_whole_is_refused(pretraining):
    with pytest.raises(ValueError, match="held_out_documents"):
        main({**pretraining, "streaming": True})


def test_streaming_ends_with_the_time(pretraining, tmp_path):
    metrics = main({**pretraining, "streaming": True, "held_out_documents": 3, "max_steps": -1, "max_minutes": 0.03})
    assert metrics["steps"] >= 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["corpus"] == "streamed"


def test_another_architecture_trains_too(pretraining):
    overrides = (
        "hidden_size=16,num_attention_heads=2,num_key_value_heads=2,intermediate_size=32,num_hidden_layers=1,"
        "max_position_embeddings=64"
    )
    metrics = main({**pretraining, "arch": "llama", "config_overrides": overrides})
    assert metrics["steps"] == 3


def test_blocks_longer_than_the_position_table_are_refused(pretraining):
    overrides = "n_embd=16,n_head=2,n_layer=1,n_positions=16"
    with pytest.raises(ValueError, match="accepts 16.*Lower `block_length`"):
        main({**pretraining, "arch": "gpt2", "config_overrides": overrides})


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_are_trained_by_the_template_that_is_saved(pretraining, tmp_path, streaming):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Tell me of the list number {number}."},
                {"role": "assistant", "content": "It is a short list of words."},
                {"role": "user", "content": "And of its end?"},
                {"role": "assistant", "content": "It has none."},
            ]
        }
        for number in range(60)
    ]
    data = tmp_path / "conversations.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        **pretraining,
        "data": [str(data)],
        "conversations": True,
        "streaming": streaming,
        "held_out_documents": 6,
    }
    assert math.isfinite(main(options)["eval_loss"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True, return_dict=True)
    answered = tokenizer(documents_of(rows[0]["messages"][:2], tokenizer)[0], add_special_tokens=False)
    assert answered["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
    assert len(documents_of(rows[0]["messages"], tokenizer)) == 2


def test_a_model_of_plain_text_has_no_chat_template(pretraining, tmp_path):
    main(pretraining)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template is None


def test_conversations_that_cannot_be_used(tokenizer):
    with pytest.raises(ValueError, match="needs an answer"):
        documents_of([{"role": "user", "content": "a"}], tokenizer)
    with pytest.raises(ValueError, match="the strings `role` and `content`"):
        documents_of([{"role": "user"}], tokenizer)
    foreign = copy.deepcopy(tokenizer)
    foreign.chat_template = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    with pytest.raises(ValueError, match="writes '</s>', a special token"):
        prepare_chat_template(foreign)

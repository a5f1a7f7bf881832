"""Training and evaluation of a language model on segments of whole documents, with a state that goes on."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from factories import TINY_OVERRIDES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hybrid.recipes import evaluate
from hf_hybrid.recipes.pretrain_clm import main

TINY = "hidden_size=16,num_attention_heads=2,head_dim=8,intermediate_size=16,num_hidden_layers=2,block_size=8,ssm_state_size=8"


@pytest.fixture
def pretraining(options, corpus, tokenizer_folder) -> dict:
    return {
        **options,
        "data": [str(corpus)],
        "tokenizer": str(tokenizer_folder),
        "arch": "bst",
        "config_overrides": TINY,
        "segment_length": 20,
        "eval_strategy": "no",
        "validation_fraction": 0.1,
    }


def test_evaluation_equals_one_pass_over_each_document(pretraining, tmp_path, documents):
    metrics = main(pretraining)
    assert metrics["steps"] == 3
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for index, document in enumerate(documents[:3]):
        (held_out / f"{index}.txt").write_text(document[: 700 + 300 * index], encoding="utf-8")
    run = str(tmp_path / "run")
    options = {"kind": "clm", "model_name_or_path": run, "data": [str(held_out)], "validation_data": [str(held_out)]}
    found = evaluate.main({**options, "segment_length": 64, "output_dir": str(tmp_path / "eval"), "use_cpu": True})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    total = count = 0
    for path in sorted(held_out.iterdir()):
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert found["eval_loss_0_4096"] == found["eval_loss"] and "bits_per_byte_0_4096" in found


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bst", f"{TINY},hidden_dropout=0.1,context_variant=mf,num_context_states=4"),
        ("bst", f"{TINY},hidden_dropout=0.1,ssm_type=unstructured,ssm_filter_length=30"),
        ("spade_lm", f"{TINY_OVERRIDES['spade_lm']},local_attention_type=chunk"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(pretraining, tmp_path, model_type, settings):
    base = {**pretraining, "max_steps": 6, "save_steps": 4}
    base |= {"arch": model_type, "config_overrides": settings}
    main(base)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run" / "checkpoint-4", resumed / "checkpoint-4")
    main({**base, "output_dir": str(resumed), "resume_from_checkpoint": "last"})
    straight, continued = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", resumed))
    assert all(torch.equal(straight[name], continued[name]) for name in straight)
    (resumed / "checkpoint-4" / "carried_state_0.safetensors").unlink()
    shutil.rmtree(resumed / "checkpoint-6")
    with pytest.raises(ValueError, match="carried_state_0.safetensors is missing"):
        main({**base, "output_dir": str(resumed), "resume_from_checkpoint": "last"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "arch": "longvq",
                "config_overrides": "hidden_size=16,shared_representation_size=8,value_size=16,intermediate_size=16,"
                "num_hidden_layers=1,window_size=4,codebook_size=6",
            },
            "`segment_length` needs a model.*its codebooks change at every step",
        ),
        ({"segment_length": 0}, "`segment_length` must be a positive number"),
        ({"streaming": True}, "without `streaming`"),
        ({"separate_documents": True}, "and `separate_documents`"),
        ({"gradient_checkpointing": True}, "`gradient_checkpointing` cannot be used with `segment_length`"),
        ({"per_device_train_batch_size": 500}, "documents for 500 rows"),
    ],
)
def test_what_does_not_go_together(pretraining, changes, message):
    options = {name: value for name, value in {**pretraining, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        main(options)

"""Samples of the demonstration: filled spans, generated texts, and the same results from a fresh process."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ...tokenization.special_tokens import sentinel_ids
from .demo_data import entropy
from .runs import Job

RELOAD_SECONDS = 300

# Written next to its inputs, so that it can be run again by hand.
RELOAD_SCRIPT = '''\
"""Load a checkpoint in a fresh process: python reload.py FOLDER_OF_THE_CHECKPOINT"""
import json, pathlib, sys
import torch
import hf_hybrid  # registers the architectures
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

here = pathlib.Path(__file__).resolve().parent
options = json.loads((here / "options.json").read_text())
torch.set_num_threads(options["threads"])  # a different order of summation changes the last bits
inputs = load_file(here / "inputs.safetensors")
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(**inputs).logits
    inputs.pop("labels")
    generated = model.generate(**inputs, **options["generation"]).contiguous()
save_file({"logits": logits, "generated": generated}, here / "outputs.safetensors")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps(tokenizer.batch_decode(generated, skip_special_tokens=True)))
'''


def _evaluation_batch(job: Job, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrupted inputs (B, S) and targets (B, L) of the evaluation set."""
    items = [job.trainer.eval_dataset[index] for index in indices]  # type: ignore[index]
    inputs, labels = (torch.stack([torch.as_tensor(item[name]) for item in items]) for name in ("input_ids", "labels"))
    return inputs, labels


def _tokenizer(job: Job) -> PreTrainedTokenizerBase:
    tokenizer = job.trainer.processing_class
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@torch.no_grad()
def span_corruption_figures(job: Job, batch_size: int = 32) -> dict[str, float]:
    """Losses of the evaluation targets, and what can be reached without looking at the input.

    Targets contain sentinels and `</s>`, whose places are easy to learn, so losses and entropies are also given for
    the masked text alone.

    Returns:
        `unigram_entropy` of all target tokens; `text_loss`, `text_entropy` and `text_accuracy` (top-1) of the masked
        text, teacher-forced; `text_most_frequent`, the accuracy of always predicting its most frequent token.
    """
    model, tokenizer = job.model.eval(), _tokenizer(job)
    special = torch.tensor([*sentinel_ids(tokenizer), tokenizer.eos_token_id])
    count = len(job.trainer.eval_dataset)  # type: ignore[arg-type]
    targets, losses, hits = [], [], []
    for start in range(0, count, batch_size):
        inputs, labels = _evaluation_batch(job, range(start, min(count, start + batch_size)))
        logits = model(input_ids=inputs.to(model.device), labels=labels.to(model.device)).logits.float().cpu()
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
        hits.append(logits.argmax(-1).flatten() == labels.flatten())
        targets.append(labels.flatten())
    target, loss, hit = torch.cat(targets), torch.cat(losses), torch.cat(hits)
    is_text = ~torch.isin(target, special)
    text = target[is_text].numpy()
    return {
        "unigram_entropy": entropy(target.numpy()),
        "text_loss": loss[is_text].mean().item(),
        "text_entropy": entropy(text),
        "text_accuracy": hit[is_text].float().mean().item(),
        "text_most_frequent": float(np.unique(text, return_counts=True)[1].max() / len(text)),
    }


def plain_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a part of a sequence, with its leading space."""
    tokens = tokenizer.convert_ids_to_tokens([int(token) for token in ids])
    return tokenizer.convert_tokens_to_string(["x", *tokens])[1:]


def split_at_sentinels(
    ids: Sequence[int], sentinels: Sequence[int], eos: int
) -> tuple[list[int], dict[int, list[int]]]:
    """Splits a target into the ids before its first sentinel and those after each sentinel (by its number).

    Reading ends at `</s>`; a repeated sentinel keeps its first span.
    """
    number = {int(token): index for index, token in enumerate(sentinels)}
    head: list[int] = []
    spans: dict[int, list[int]] = {}
    current = head
    for token in map(int, ids):
        if token == eos:
            break
        if token in number:
            current = []
            spans.setdefault(number[token], current)
        else:
            current.append(token)
    return head, spans


@torch.no_grad()
def fill_in_examples(job: Job, count: int = 3, max_spans: int = 8) -> list[list[dict[str, str]]]:
    """Evaluation segments with their masked spans and what the model fills in (greedy).

    Returns:
        The parts of each example in order: `{"text": ...}` for visible text, `{"hidden": ..., "filled": ...}` for a
            span.
    """
    model, tokenizer = job.model.eval(), _tokenizer(job)
    total = len(job.trainer.eval_dataset)  # type: ignore[arg-type]
    indices = [index * total // count for index in range(min(count, total))]
    inputs, labels = _evaluation_batch(job, indices)
    generated = model.generate(
        input_ids=inputs.to(model.device), max_new_tokens=labels.shape[1], num_beams=1, do_sample=False
    ).cpu()
    sentinels, eos = sentinel_ids(tokenizer), tokenizer.eos_token_id
    examples = []
    for row in range(len(indices)):
        start, visible = split_at_sentinels(inputs[row].tolist(), sentinels, eos)
        hidden = split_at_sentinels(labels[row].tolist(), sentinels, eos)[1]
        filled = split_at_sentinels(generated[row, 1:].tolist(), sentinels, eos)[1]
        parts = [{"text": plain_text(tokenizer, start)}]
        for number in sorted(visible)[:max_spans]:
            parts.append(
                {
                    "hidden": plain_text(tokenizer, hidden.get(number, [])),
                    "filled": plain_text(tokenizer, filled.get(number, [])),
                }
            )
            parts.append({"text": plain_text(tokenizer, visible[number])})
        examples.append(parts)
    return examples


def fill_in_html(parts: Sequence[dict[str, str]]) -> str:
    """One example of `fill_in_examples` as HTML."""
    pieces = []
    for part in parts:
        if "text" in part:
            pieces.append(html.escape(part["text"]))
        else:
            kind = "right" if part["hidden"].strip() == part["filled"].strip() else "wrong"
            hidden, filled = (html.escape(part[name]) or "∅" for name in ("hidden", "filled"))
            pieces.append(f' <del>{hidden}</del><ins class="{kind}">{filled}</ins> ')
    return "".join(pieces)


def _encode(job: Job, documents: Sequence[str], max_length: int) -> dict[str, torch.Tensor]:
    encoded = _tokenizer(job)(
        list(documents), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def generate_texts(job: Job, documents: Sequence[str], *, max_length: int = 32, **options: Any) -> list[str]:
    """One generated text per document."""
    model = job.model.eval()
    inputs = {name: tensor.to(model.device) for name, tensor in _encode(job, documents, 160).items()}
    ids = model.generate(**inputs, max_length=max_length, **options)
    return [text.strip() for text in _tokenizer(job).batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def reload_in_clean_process(job: Job, documents: Sequence[str], folder: Path, max_length: int = 24) -> dict[str, Any]:
    """Compares the model in memory with its saved checkpoint, loaded with the Auto class by a new Python process.

    Args:
        job: the job whose trainer saved the model into its output folder.
        documents: inputs of the comparison.
        folder: folder for the script, its inputs and its outputs.
        max_length: maximum length of generated sequences.

    Returns:
        `logits_equal`, `generated_equal` (bit for bit), `largest_difference`, `texts` and a `description`.

    Raises:
        RuntimeError: the process failed; the message quotes its error output.
    """
    model = job.model.cpu().eval()
    inputs = _encode(job, documents, 160)
    inputs["labels"] = inputs["input_ids"][:, :16].contiguous()  # any targets will do
    generation = {"max_length": max_length, "num_beams": 2}
    logits = model(**inputs).logits
    generated = model.generate(**{k: v for k, v in inputs.items() if k != "labels"}, **generation)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(inputs, folder / "inputs.safetensors")
    options = {"threads": torch.get_num_threads(), "generation": generation}
    (folder / "options.json").write_text(json.dumps(options), encoding="utf-8")
    script = folder / "reload.py"
    script.write_text(RELOAD_SCRIPT, encoding="utf-8")
    checkpoint = Path(job.trainer.args.output_dir or ".").resolve()
    done = subprocess.run(
        [sys.executable, str(script.resolve()), str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=RELOAD_SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"The checkpoint {checkpoint} could not be used by a fresh process:\n{done.stderr[-4000:]}")
    outputs = load_file(folder / "outputs.safetensors")
    difference = (outputs["logits"] - logits).abs().max().item()
    same_logits, same_ids = torch.equal(outputs["logits"], logits), torch.equal(outputs["generated"], generated)
    return {
        "logits_equal": same_logits,
        "generated_equal": same_ids,
        "largest_difference": difference,
        "texts": json.loads(done.stdout.strip().splitlines()[-1]),
        "description": f"{logits.numel():,} logits, largest difference {difference:.1g}; generated tokens "
        + ("equal" if same_ids else "differ"),
    }

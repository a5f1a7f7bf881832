"""Samples of the demonstration: filled spans, classes, generated texts, and the same results from a fresh process."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...tokenization.special_tokens import sentinel_ids
from ...training.text_tokens import special_ids, text_baselines
from .demo_data import HIDDEN_LINE
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


def _model(job: Job) -> Any:
    """The model for evaluation, in the precision of its weights: the trainer leaves a `forward` for mixed precision at the object."""
    job.model.__dict__.pop("forward", None)
    return job.model.eval()


def _tokenizer(job: Job) -> PreTrainedTokenizerBase:
    tokenizer = job.trainer.processing_class
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def text_references(job: Job) -> dict[str, float]:
    """What no look at the input can beat on the hidden text of the evaluation set; see `text_baselines`."""
    count = len(job.trainer.eval_dataset)  # type: ignore[arg-type]
    labels = _evaluation_batch(job, range(count))[1].numpy()
    return text_baselines(labels, special_ids(_tokenizer(job)))


@torch.no_grad()
def fill_in(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_new_tokens: int = 24) -> str:
    """The text with what the model writes (greedy, no pair of tokens twice) in place of its sentinels."""
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    generated = model.eval().generate(
        **inputs, max_new_tokens=max_new_tokens, num_beams=1, do_sample=False, no_repeat_ngram_size=2
    )
    sentinels, eos = sentinel_ids(tokenizer), tokenizer.eos_token_id
    start, visible = split_at_sentinels(inputs["input_ids"][0].tolist(), sentinels, eos)
    filled = split_at_sentinels(generated[0, 1:].tolist(), sentinels, eos)[1]
    parts = [plain_text(tokenizer, start)]
    for number in sorted(visible):
        parts += [
            f" [{plain_text(tokenizer, filled.get(number, [])).strip()}]",
            plain_text(tokenizer, visible[number]),
        ]
    return "".join(parts).strip()


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
    model, tokenizer = _model(job), _tokenizer(job)
    total = len(job.trainer.eval_dataset)  # type: ignore[arg-type]
    indices = [index * total // count for index in range(min(count, total))]
    inputs, labels = _evaluation_batch(job, indices)
    # The spans that are shown stand at the beginning of the targets.
    longest = min(labels.shape[1], 8 * max_spans)
    generated = model.generate(
        input_ids=inputs.to(model.device), max_new_tokens=longest, num_beams=1, do_sample=False
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


def fill_in_html(parts: Sequence[dict[str, str]], earlier: Sequence[dict[str, str]] | None = None) -> str:
    """One example of `fill_in_examples` as HTML; `earlier` holds what the same model wrote before, which is set in front."""
    pieces = []
    for part, before in zip(parts, earlier or parts):
        if "text" in part:
            pieces.append(html.escape(part["text"]))
            continue
        hidden = html.escape(part["hidden"]) or "∅"
        written = [part] if earlier is None else [before, part]
        pieces.append(f" <del>{hidden}</del>{''.join(_written(part['hidden'], one['filled']) for one in written)} ")
    return "".join(pieces)


def _written(hidden: str, filled: str) -> str:
    kind = "right" if hidden.strip() == filled.strip() else "wrong"
    return f'<ins class="{kind}">{html.escape(filled) or "∅"}</ins>'


@torch.no_grad()
def classify_examples(job: Job, sentences: Sequence[str], max_length: int) -> list[dict[str, Any]]:
    """The class of each sentence, with its probability."""
    model = _model(job)
    inputs = {name: tensor.to(model.device) for name, tensor in _encode(job, sentences, max_length).items()}
    probabilities = model(**inputs).logits.float().softmax(-1).cpu()
    names: dict[Any, str] = model.config.id2label or {}
    best = probabilities.max(-1)
    return [
        {"label": str(names[int(index)]), "probability": float(share)}
        for share, index in zip(best.values, best.indices)
    ]


def _encode(job: Job, documents: Sequence[str], max_length: int) -> dict[str, torch.Tensor]:
    encoded = _tokenizer(job)(
        list(documents), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def generate_texts(job: Job, documents: Sequence[str], *, max_length: int = 32, **options: Any) -> list[str]:
    """The hidden first line of each document."""
    model = _model(job)
    documents = [HIDDEN_LINE + document for document in documents]
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
    model = _model(job).cpu()
    inputs = _encode(job, [HIDDEN_LINE + document for document in documents], 160)
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

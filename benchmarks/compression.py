"""Bits per byte of causal language models on held-out text, beside LZMA on the same bytes.

    python benchmarks/compression.py --models checkpoints/spade-lm-small RUNS/llama --data DATA/books_lm DATA/peps
    python benchmarks/compression.py --lzma --tokenizer checkpoints/spade-lm-small --data DATA/peps --after DATA/eltec_en --after_bytes 15000000

What is coded is the text as the tokenizer reads it (pieces put together again), and the end of every document as one byte more: a
tokenizer that joins white space loses some of the text, and must not be paid for it. A model reads each document in windows of `--length`
tokens that overlap, and predicts every token, `</s>` at the end included, exactly once: with at least `length - stride` tokens before it, or all
of them. The first window of a document begins with the `</s>` that ends the one before. The bits are those of all tokens, over all bytes.

LZMA (xz, preset 9e) compresses the documents of a data set as one file, which it may remember from beginning to end; with `--after`, it is
what they add to the file of training text.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processor seconds are those of one thread

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_hybrid  # noqa: F401 - registers the architectures
from hf_hybrid.data.loading import load_text_source
from hf_hybrid.data.token_corpus import encode_documents, end_of_document

END = b"\n"  # of a document, for the compressor; joined white space leaves no other line end
DICTIONARY_BYTES = 256 << 20  # longer than any text here, so that nothing is forgotten


def encoded(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[list[int]]:
    """Tokens of each document that is not empty, without special tokens."""
    texts = [text for text in documents if text and text.strip()]
    return [
        ids for start in range(0, len(texts), 64) for ids in encode_documents(tokenizer, texts[start : start + 64])
    ]


def text_as_read(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Sequence[int]]) -> bytes:
    """The bytes that the tokens stand for, with a byte for the end of every document."""
    return b"".join(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode() + END for ids in documents)


def windows(tokens: Sequence[int], eos: int, length: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of the windows of a document; -100 where an earlier window has predicted the token.

    Args:
        tokens: of the document, without `</s>`.
        eos: id of `</s>`, which is read before the document and predicted at its end.
        length: tokens of a window.
        stride: tokens by which each window lies behind the one before, at most `length`.
    """
    whole = np.asarray([eos, *tokens, eos], dtype=np.int64)
    inputs, targets = whole[:-1], whole[1:]
    done = 0
    for start in range(0, len(inputs), stride):
        stop = min(start + length, len(inputs))
        wanted = targets[start:stop].copy()
        wanted[: done - start] = -100
        yield inputs[start:stop], wanted
        done = stop
        if stop == len(inputs):
            return


def batches(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], size: int, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows of similar length together, padded on the right, which no causal model sees."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
    for start in range(0, len(order), size):
        chosen = [rows[index] for index in order[start : start + size]]
        width = len(chosen[0][0])
        both = np.stack([np.full((len(chosen), width), pad), np.full((len(chosen), width), -100)])
        for row, (inputs, targets) in enumerate(chosen):
            both[0, row, : len(inputs)], both[1, row, : len(targets)] = inputs, targets
        yield torch.from_numpy(both[0]), torch.from_numpy(both[1])


@torch.no_grad()
def code_length(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    eos: int,
    *,
    length: int = 512,
    stride: int = 384,
    batch_size: int = 8,
    autocast: bool = False,
) -> tuple[float, int]:
    """Bits that the model needs for the documents and their ends, and the number of tokens predicted."""
    rows = [row for ids in documents for row in windows(ids, eos, length, stride)]
    nats, count = 0.0, 0
    for inputs, targets in batches(rows, batch_size, pad=0):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=inputs, use_cache=False).logits
        wanted = targets != -100
        losses = torch.nn.functional.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
        nats += losses.double().sum().item()
        count += int(wanted.sum())
    return nats / math.log(2), count


def compressed_size(text: bytes) -> int:
    """Bytes of the text in xz, preset 9e."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": DICTIONARY_BYTES}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=[], help="checkpoints of language models, with their tokenizers"
    )
    parser.add_argument("--data", nargs="+", required=True, help="data sets with a split `validation`")
    parser.add_argument("--lzma", action="store_true", help="compress the text as the tokenizer reads it, too")
    parser.add_argument("--after", nargs="+", default=[], help="data sets whose split `train` LZMA has seen")
    parser.add_argument("--after_bytes", type=int, help="only as many bytes of them, in documents chosen at random")
    parser.add_argument("--tokenizer", help="tokenizer for LZMA; default: that of the first model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--stride", type=int, default=384, help="tokens between the beginnings of two windows")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    parser.add_argument("--out", type=Path, help="file for the results (JSON)")
    options = parser.parse_args(arguments)
    if not 0 < options.stride <= options.length:
        parser.error(f"--stride must lie between 1 and --length ({options.length}); got {options.stride}.")
    if options.lzma and not (options.models or options.tokenizer):
        parser.error("--lzma needs a model or a --tokenizer: it compresses the text as that reads it.")
    return options


def sample(documents: Sequence[str], num_bytes: int | None) -> list[str]:
    """Documents in random order until there are `num_bytes`; None: all, in their order."""
    if num_bytes is None:
        return list(documents)
    chosen: list[str] = []
    size = 0
    for index in random.Random(0).sample(range(len(documents)), len(documents)):
        if size < num_bytes:
            chosen.append(documents[index])
            size += len(documents[index].encode())
    return chosen


def documents_of(source: str, split: str) -> list[str]:
    """The texts of a split."""
    return [row["text"] for row in load_text_source(source, split)]


class Results:
    """Rows, printed and written as they come."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.rows = file, list[dict[str, Any]]()

    def add(self, coder: str, source: str, bits: float, num_bytes: int, **more: Any) -> None:
        """Adds the bits that a coder needs for the bytes of a data set."""
        row = {"coder": coder, "data": Path(source).name, "bits_per_byte": bits / num_bytes, "bytes": num_bytes} | more
        self.rows.append(row)
        print(f"{coder:<24} {row['data']:<12} {row['bits_per_byte']:.4f} bits per byte of {num_bytes:,}", flush=True)
        if self.file:
            self.file.write_text(json.dumps(self.rows, indent=1) + "\n")


def measure_model(name: str, options: argparse.Namespace, results: Results) -> None:
    """Bits per byte of a checkpoint on every data set."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = {"length": options.length, "stride": options.stride, "batch_size": options.batch_size}
    for source in options.data:
        documents, begin = encoded(tokenizer, documents_of(source, "validation")), time.process_time()
        bits, count = code_length(model, documents, end_of_document(tokenizer), autocast=options.bf16, **sizes)
        seconds = round(time.process_time() - begin, 1)
        more = {"tokens": count, "parameters": parameters, "seconds": seconds, "bf16": options.bf16, **sizes}
        results.add(Path(name).name, source, bits, len(text_as_read(tokenizer, documents)), **more)


def measure_lzma(options: argparse.Namespace, results: Results) -> None:
    """Bits per byte of LZMA, alone and, with `--after`, after training text."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.models[0])
    texts = {
        source: text_as_read(tokenizer, encoded(tokenizer, documents_of(source, "validation")))
        for source in options.data
    }
    for source, text in texts.items():
        results.add("LZMA", source, 8 * compressed_size(text), len(text))
    if options.after:
        train = [text for source in options.after for text in documents_of(source, "train")]
        seen = text_as_read(tokenizer, encoded(tokenizer, sample(train, options.after_bytes)))
        seen_size = compressed_size(seen)
        for source, text in texts.items():
            size = compressed_size(seen + text) - seen_size
            results.add("LZMA after training text", source, 8 * size, len(text), seen_bytes=len(seen))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the command."""
    options = parse(arguments)
    torch.set_num_threads(1)
    results = Results(options.out)
    for name in options.models:
        measure_model(name, options, results)
    if options.lzma:
        measure_lzma(options, results)
    return results.rows


if __name__ == "__main__":
    main()

"""What a model writes, as it is written: words for gaps, summaries and other rewritten texts, continuations."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from .opening import OpenCheckpoint

MAX_INPUT_TOKENS = 65_536
# Hidden spans have three tokens on average; a model that has seen little does not know where to end.
TOKENS_PER_GAP = 8
_GAP = re.compile(r"_{3,}|<extra_id_\d+>")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_GAP_SHOWN = "___"

# Pieces of a text, each with whether the model wrote it.
Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Decoding:
    """How to write.

    Attributes:
        max_new_tokens: length limit, in tokens.
        temperature: temperature of sampling; 0 takes the most likely token every time.
        no_repeats: never write the same three tokens twice.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    no_repeats: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1; got {self.max_new_tokens}.")
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"`temperature` must lie between 0 and 10; got {self.temperature}.")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        found: dict[str, Any] = {"max_new_tokens": int(self.max_new_tokens), "num_beams": 1, "do_sample": False}
        if self.temperature > 0:
            found |= {"do_sample": True, "temperature": float(self.temperature)}
        if self.no_repeats:
            found["no_repeat_ngram_size"] = 3
        return found


class _Stop(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def write(opened: OpenCheckpoint, text: str, decoding: Decoding) -> Iterator[Pieces]:
    """The text with what the model has written so far, again and again until it is done.

    An encoder-decoder fills in the gaps (`___`) of a text that has some, with `TOKENS_PER_GAP` tokens each at most, and rewrites any other (a summary, a
    translation: what it was trained for). A causal model continues the text. A model of masked words guesses gaps.

    Args:
        opened: checkpoint; its lock is held while it generates.
        text: text of the user.
        decoding: how to write.

    Raises:
        ValueError: the text or the model cannot be used.
    """
    if opened.task == "continue":
        for written in _generated(opened, text, decoding, marks_end=False):
            yield [(text, False), (written, True)]
    elif opened.task == "rewrite" and _GAP.search(text):
        yield from _fill_in(opened, text, decoding)
    elif opened.task == "rewrite":
        for written in _generated(opened, text, decoding):
            yield [(written.strip(), True)]
    elif opened.task == "guess":
        yield _guess(opened, text)
    else:
        raise ValueError(f"{type(opened.model).__name__} reads texts and does not write any.")


def _fill_in(opened: OpenCheckpoint, text: str, decoding: Decoding) -> Iterator[Pieces]:
    parts = _GAP.split(text)
    known = set(opened.tokenizer.all_special_tokens)
    sentinels = [f"<extra_id_{index}>" for index in range(len(parts) - 1)]
    if not known.issuperset(sentinels):
        count = sum(bool(_SENTINEL.fullmatch(token)) for token in known)
        raise ValueError(
            f"The text has {len(sentinels)} gaps, but the tokenizer of this model has {count} sentinels to mark them: "
            + ("use fewer gaps." if count else "the model was not trained to fill gaps; remove them.")
        )
    source = "".join(part + mark for part, mark in zip(parts, [*sentinels, ""]))
    decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, TOKENS_PER_GAP * len(sentinels)))
    others = sorted(known.difference(sentinels), key=len, reverse=True)
    for written in _generated(opened, source, decoding, keeps_special_tokens=True):
        answers = _answers(written, others)
        pieces: Pieces = [(parts[0], False)]
        for index, part in enumerate(parts[1:]):
            found = answers.get(index, "")
            pieces += [(found, True) if found else (_GAP_SHOWN, False), (part, False)]
        yield pieces


def _answers(written: str, others: list[str]) -> dict[int, str]:
    """What stands behind each sentinel; the first answer to a gap counts."""
    for token in others:
        written = written.replace(token, "")
    pieces = _SENTINEL.split(written)
    answers: dict[int, str] = {}
    for number, answer in zip(pieces[1::2], pieces[2::2]):
        answers.setdefault(int(number), answer.strip())
    return answers


def _generated(
    opened: OpenCheckpoint,
    text: str,
    decoding: Decoding,
    *,
    marks_end: bool = True,
    keeps_special_tokens: bool = False,
) -> Iterator[str]:
    """What was generated so far, whenever there is more. Stops generating when the caller stops reading."""
    encoded = opened.encode(text, add_special_tokens=marks_end, max_tokens=MAX_INPUT_TOKENS)
    streamer = TextIteratorStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=not keeps_special_tokens)
    stop, failures = threading.Event(), []

    def work() -> None:
        try:
            with opened.lock, torch.inference_mode():
                if not stop.is_set():
                    opened.model.generate(
                        **encoded, streamer=streamer, stopping_criteria=[_Stop(stop)], **decoding.options()
                    )
        except Exception as error:  # raised again where the text is read
            failures.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    threading.Thread(target=work, daemon=True).start()
    written = ""
    try:
        for piece in streamer:
            if piece:
                written += piece
                yield written
    finally:
        stop.set()
    if failures:
        raise failures[0]
    if not written:
        yield written


def _guess(opened: OpenCheckpoint, text: str) -> Pieces:
    """The likeliest word for each gap of a text."""
    mask = opened.tokenizer.mask_token
    if mask is None:
        raise ValueError("The tokenizer of this model has no mask token: it cannot mark a gap.")
    parts = re.split(rf"_{{3,}}|{re.escape(mask)}", text)
    if len(parts) == 1:
        raise ValueError("The text has no gap: write ___ (three underscores) for a word to guess.")
    encoded = opened.encode(mask.join(parts), max_tokens=MAX_INPUT_TOKENS)
    places = (encoded["input_ids"][0] == opened.tokenizer.mask_token_id).nonzero().flatten()
    with opened.lock, torch.inference_mode():
        best = opened.model(**encoded).logits[0, places].argmax(-1)
    words = [opened.tokenizer.decode([token]).strip() for token in best.tolist()]
    pieces: Pieces = [(parts[0], False)]
    for word, part in zip(words, parts[1:]):
        pieces += [(word, True), (part, False)]
    return pieces

"""Text around sentinels and added tokens: the tokens of pretraining, and decoding that gives the text back."""

from __future__ import annotations

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_hybrid.data.corpus import language_reference
from hf_hybrid.data.span_corruption import corrupt_spans, sample_keys
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer
from hf_hybrid.tokenization.sentencepiece_tokenizer import (
    sentinel_ids,
    tokenizer_from_sentencepiece,
    train_sentencepiece_model,
)

ADDED = [
    "foo",
    "東京",
    "ñandú",
    "नमस्ते",
    "a b",
]  # also what the character map rewrites letter by letter, and a space inside
SENTINELS = [f"<extra_id_{index}>" for index in range(4)]

words = st.sampled_from(
    ["it", "bar", "naïve", "東", "한국어", "नमस्ते", ".", ", ", "(", "\t", " ", "  ", "ﬁ", "e\u0301", "▁"]
)
anything = st.text(max_size=8)
pieces_of_text = st.lists(st.one_of(words, anything), max_size=4).map("".join)
text_with_added_tokens = st.lists(st.one_of(words, anything, st.sampled_from(ADDED)), max_size=8).map("".join)


@pytest.fixture(scope="module", params=["nfkc", "nfkc_cf", "identity"])
def pair(request, tmp_path_factory):
    """(our tokenizer with added tokens, saved and loaded; sentencepiece's processor) of one model."""
    model = train_sentencepiece_model(
        language_reference()[:15], vocab_size=500, normalization=request.param, num_threads=1
    )
    tokenizer = tokenizer_from_sentencepiece(model, num_sentinels=32)
    tokenizer.add_tokens(ADDED)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), sentencepiece.SentencePieceProcessor(model_proto=model)


def normalized(reference, text: str) -> str:
    """What sentencepiece makes of a text."""
    return reference.decode(reference.encode(text))


def tokens_of(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


@given(text=text_with_added_tokens)
@example("barfoobaz")
@example("(foo)")
@example("x東京y")
@example("foo foo  foo ")
@example(" foo bar foo.")
def test_decoding_gives_back_a_text_with_added_tokens(pair, text):
    tokenizer, reference = pair
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == normalized(reference, text)


@given(parts=st.lists(pieces_of_text, min_size=2, max_size=5))
@example(["it is in ", "."])
@example(["", "ing <", "> ", " the", ""])
@example(["  ", "  ", "  "])
def test_decoding_gives_back_a_text_with_sentinels(pair, parts):
    """Each part as sentencepiece normalises it; a space before a sentinel belongs to the span that it hides."""
    tokenizer, reference = pair
    text = "".join(part + sentinel for part, sentinel in zip(parts, SENTINELS)) + "".join(parts[len(SENTINELS) :])
    expected, seen = "", text
    for sentinel in SENTINELS[: len(parts)]:
        part, seen = seen.split(sentinel, 1)
        expected += (normalized(reference, "x" + part)[1:] if expected else normalized(reference, part)) + sentinel
    expected += normalized(reference, "x" + seen)[1:]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == expected
    if "▁" not in text:  # without a character map it is decoded as a space, and spaces at an end are dropped
        assert tokenizer(expected, add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it is in <extra_id_0>.", "<extra_id_0> ."),
        ("it is in <extra_id_0> .", "<extra_id_0> ▁."),
        ("it is in<extra_id_0>(", "<extra_id_0> ("),
        ("<extra_id_0> <extra_id_1>", "<extra_id_0> <extra_id_1>"),
    ],
)
def test_word_starts_after_a_sentinel(pair, text, expected):
    tokens = " ".join(tokens_of(pair[0], text)).replace("▁ ", "▁")  # `▁.` is two pieces in a small vocabulary
    assert tokens.endswith(expected)


def test_tokens_around_a_sentinel_are_those_of_span_corruption(pair):
    """Corrupted tokens, decoded and tokenised again, are the same tokens."""
    tokenizer, _ = pair
    sentinels = sentinel_ids(tokenizer)
    lone_space = tokenizer.convert_tokens_to_ids("▁")
    compared = 0
    for document, text in enumerate(language_reference()[20:28]):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        for offset in range(0, min(len(ids) - 40, 2000), 40):
            segment = ids[offset : offset + 40]
            if not tokenizer.convert_ids_to_tokens(segment[0]).startswith("▁"):
                continue  # a text begins with a word
            keys = sample_keys(0, document, [offset])
            inputs, labels = corrupt_spans(np.array([segment]), sentinel_ids=sentinels, eos_token_id=1, keys=keys)
            for corrupted in (inputs[0, :-1].tolist(), labels[0, :-1].tolist()):
                before_sentinel = {a for a, b in zip(corrupted, [*corrupted[1:], sentinels[0]]) if b in sentinels}
                if lone_space in before_sentinel or tokenizer.decode(corrupted).find("\ufffd") >= 0:
                    continue  # a hidden word's start, or half a character, cannot be written down as text
                assert tokens_of(tokenizer, tokenizer.decode(corrupted)) == tokenizer.convert_ids_to_tokens(corrupted)
                compared += 1
    assert compared > 60


@given(text=st.lists(st.one_of(words, anything, st.sampled_from([*ADDED, *SENTINELS])), max_size=8).map("".join))
def test_byte_tokenizer_gives_back_any_text(text):
    ids = BYTES(text, add_special_tokens=False, split_special_tokens=False).input_ids
    assert BYTES.decode(ids) == text


BYTES = byte_tokenizer(num_sentinels=4)
BYTES.add_tokens(ADDED)

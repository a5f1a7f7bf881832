"""The byte tokenizer: exact both ways, saved and loaded, any subset of special tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer, decode_bytes, encode_bytes, sentinel_ids

TOKENIZER = byte_tokenizer(num_sentinels=16)


@given(text=st.text(max_size=80))
def test_text_round_trip(text):
    ids = TOKENIZER(text).input_ids
    assert ids == [byte + 3 for byte in text.encode()] + [1]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert decode_bytes(TOKENIZER, ids).decode() == text


@given(data=st.binary(max_size=80))
def test_bytes_round_trip(data):
    ids = encode_bytes(TOKENIZER, data)
    assert ids[-1] == TOKENIZER.eos_token_id
    assert decode_bytes(TOKENIZER, ids) == data


@pytest.mark.parametrize(
    "text", ["</s> <pad> <extra_id_0>", "  a \n\n\t b  ", "it's n't . , ?", "\x00\x01\x7f\ufeff\u2581"]
)
def test_literal_special_tokens_and_spaces_survive(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids, skip_special_tokens=True) == text


def test_special_tokens_on_request():
    assert TOKENIZER("a</s><extra_id_0>", split_special_tokens=False).input_ids == [100, 1, 274, 1]
    assert TOKENIZER("a</s>").input_ids == [100, *(byte + 3 for byte in b"</s>"), 1]  # the request is not remembered


def test_pairs_and_sentinels():
    assert TOKENIZER("a", "b").input_ids == [100, 1, 101, 1]
    assert len(TOKENIZER) == 3 + 256 + 16
    assert sentinel_ids(TOKENIZER) == list(range(274, 258, -1))


def test_without_special_tokens_ids_are_bytes():
    plain = byte_tokenizer(pad=False, eos=False, unk=False)
    assert len(plain) == 256
    assert plain("aé").input_ids == [97, 195, 169]
    assert encode_bytes(plain, bytes(range(256))) == list(range(256))


def test_save_and_load(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "añ </s> \n <extra_id_1>"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text


def test_other_tokenizers_and_ids_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 275\)"):
        decode_bytes(TOKENIZER, [275])
    from hf_hybrid.tokenization.sentencepiece_tokenizer import train_sentencepiece_tokenizer

    other = train_sentencepiece_tokenizer(
        ["a few words of text here"] * 9, vocab_size=271, num_sentinels=0, num_threads=1
    )
    with pytest.raises(ValueError, match="not a byte tokenizer"):
        encode_bytes(other, b"a")

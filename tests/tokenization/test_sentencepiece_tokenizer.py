"""Ids equal sentencepiece's own, the conventions of T5, saving and loading, bad input."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import unicodedata

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_hybrid.data.corpus import language_reference
from hf_hybrid.tokenization.sentencepiece_tokenizer import (
    padded_vocab_size,
    sentinel_ids,
    tokenizer_from_sentencepiece,
    train_sentencepiece_model,
    train_sentencepiece_tokenizer,
)

TEXTS = language_reference()[:15]
ODD_LINES = [
    "",
    " ",
    "\n",
    "  two  spaces \t tab\nnewline\r\nend ",
    "<0x41> <0x0A> <unk>",
    "▁a ▁ a▁b",
    "a ▁▁",
    " ▁",
    "ﬁ\u0301 e\u0323\u0302 e\u0301 Å \u212b",
    "ｆｕｌｌ　ｗｉｄｔｈ ㌀ ℡ ½ ①",
    "\x00a\x01b\x7f\x85c",
    "\u200bzero\u200dwidth\ufeff\u00ad\u2028\u2029",
    "👩‍👩‍👧 👍🏽 🇩🇪 ☺\ufe0f",
    "한국어 각 नमस्ते ไทย العربية",
    "XXXX XXXXX ------- ======= aaaaaaa",
]


@pytest.fixture(scope="module", params=["nfkc", "nfkc_cf", "identity"])
def pair(request):
    """(our tokenizer, sentencepiece's processor) of one model."""
    model = train_sentencepiece_model(TEXTS, vocab_size=500, normalization=request.param, num_threads=1)
    return tokenizer_from_sentencepiece(model, num_sentinels=32), sentencepiece.SentencePieceProcessor(
        model_proto=model
    )


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece_model(TEXTS, vocab_size=500, num_threads=1)


@pytest.fixture(scope="module")
def tokenizer(model):
    return tokenizer_from_sentencepiece(model, num_sentinels=32)


def ours(tokenizer, line: str) -> list[int]:
    return tokenizer(line, add_special_tokens=False, split_special_tokens=True).input_ids


def random_unicode_lines(count: int) -> list[str]:
    generator = random.Random(0)
    characters = [
        chr(code)
        for code in range(0x110000)
        if not 0xD800 <= code < 0xE000 and unicodedata.category(chr(code)) != "Cn"
    ]
    mapped = [c for c in characters if unicodedata.normalize("NFKC", c) != c]
    marks = [c for c in characters if unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf")]
    pools = [characters, mapped, marks, list("abc xyz <>_0123456789\n\t")]
    return [
        "".join(generator.choice(generator.choice(pools)) for _ in range(generator.randint(1, 30)))
        for _ in range(count)
    ]


def test_ids_equal_sentencepiece(pair):
    tokenizer, reference = pair
    lines = [line for text in language_reference()[30:] for line in text.splitlines()][:1200]
    lines += random_unicode_lines(1200) + ODD_LINES + TEXTS[:5]
    assert len(lines) > 2000
    wrong = [line for line in lines if ours(tokenizer, line) != reference.encode(line)]
    assert not wrong, f"{len(wrong)} of {len(lines)}, first {wrong[0]!a}"


@given(text=st.text(max_size=60))
def test_any_text_gives_the_ids_and_the_text_of_sentencepiece(pair, text):
    tokenizer, reference = pair
    ids = ours(tokenizer, text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids)


def test_conventions(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 532
    assert sentinel_ids(tokenizer) == list(range(531, 499, -1))
    assert padded_vocab_size(tokenizer) == 576
    a = tokenizer("a class", add_special_tokens=False).input_ids
    b = tokenizer("an object", add_special_tokens=False).input_ids
    assert tokenizer("a class").input_ids == [*a, 1]
    assert tokenizer("a class", "an object").input_ids == [*a, 1, *b, 1]
    assert set(tokenizer("a class")) == {"input_ids", "attention_mask"}
    assert tokenizer(text_target="a class").input_ids == [*a, 1]
    assert tokenizer(["a", "a class object"], padding=True).input_ids[0][-1] == 0


def test_special_tokens_in_text(tokenizer):
    assert tokenizer("x </s> <extra_id_0>").input_ids[-3:] == [1, 531, 1]
    split = tokenizer("x </s> <extra_id_0>", split_special_tokens=True, add_special_tokens=False).input_ids
    assert not set(split) & {0, 1, 2, *sentinel_ids(tokenizer)}
    assert tokenizer.decode(split) == "x </s> <extra_id_0>"


def test_white_space_policy(tokenizer):
    assert tokenizer("a\n\n  b\t c ").input_ids == tokenizer("a b c").input_ids


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for line in ODD_LINES + TEXTS[:3]:
        assert loaded(line, line).input_ids == tokenizer(line, line).input_ids
    assert sentinel_ids(loaded) == sentinel_ids(tokenizer)
    assert loaded.model_input_names == ["input_ids", "attention_mask"]
    code = (
        "import sys; from transformers import AutoTokenizer; "
        f"t = AutoTokenizer.from_pretrained({str(tmp_path)!r}); "
        f"print(t({ODD_LINES[6]!r}, 'b <extra_id_3>').input_ids, 'hf_hybrid' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == f"{tokenizer(ODD_LINES[6], 'b <extra_id_3>').input_ids} False"


def test_training_is_deterministic():
    first = train_sentencepiece_model(TEXTS, vocab_size=400, max_sentences=500, num_threads=1)
    second = train_sentencepiece_model(iter(TEXTS), vocab_size=400, max_sentences=500, num_threads=1)
    assert first == second


def test_long_lines_are_not_dropped():
    text = " ".join(f"zyzzyva{index % 7} quokka" for index in range(3000))
    tokenizer = train_sentencepiece_tokenizer([text], vocab_size=277, num_sentinels=0, num_threads=1)
    assert not any(token.startswith("<0x") for token in tokenizer.tokenize("zyzzyva3 quokka"))


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no text"),
        (["", "  \n "], {}, "no text"),
        (["some text"], {"vocab_size": 100}, "`vocab_size` is 100"),
        (["some text"], {"vocab_size": 50_000}, "could not train a vocabulary of 50000"),
        (["some text"], {"normalization": "nfd"}, "accepted are nfkc"),
        ([b"bytes"], {}, "must yield strings"),
    ],
)
def test_bad_input(texts, options, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece_model(texts, **{"vocab_size": 400, "num_threads": 1, **options})


def test_foreign_model_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="ids <pad> 0"):
        tokenizer_from_sentencepiece(model.getvalue())
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        tokenizer_from_sentencepiece(b"garbage" * 10)


def test_negative_number_of_sentinels(model):
    with pytest.raises(ValueError, match="`num_sentinels`"):
        tokenizer_from_sentencepiece(model, num_sentinels=-1)


def test_tokenizer_without_sentinels(model):
    bare = tokenizer_from_sentencepiece(model, num_sentinels=0)
    with pytest.raises(ValueError, match="no sentinel tokens"):
        sentinel_ids(bare)
    bare.add_special_tokens({"extra_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    with pytest.raises(ValueError, match="descend one by one"):
        sentinel_ids(bare)

"""Transformers' own checks of tokenizers, over the two tokenizers that this library makes."""

from __future__ import annotations

import os
import shutil
import tempfile
import unittest
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import sentencepiece
from source_distribution import SKIP_VARIABLE, SourceDistributionError, load
from transformers import PreTrainedTokenizerBase

from hf_hybrid.data.corpus import language_reference
from hf_hybrid.tokenization.byte_tokenizer import byte_tokenizer
from hf_hybrid.tokenization.sentencepiece_tokenizer import tokenizer_from_sentencepiece, train_sentencepiece_model

if os.environ.get(SKIP_VARIABLE):
    pytest.skip(f"{SKIP_VARIABLE} is set", allow_module_level=True)


def make_sentencepiece_tokenizer(text: str) -> tuple[PreTrainedTokenizerBase, list[int], str]:
    """A tokenizer, and the ids and the text that the sentencepiece library itself makes of `text`."""
    model = train_sentencepiece_model(language_reference()[:15], vocab_size=500, num_threads=1)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = reference.encode(text)
    return tokenizer_from_sentencepiece(model, num_sentinels=32), ids, reference.decode(ids)


def make_byte_tokenizer(text: str) -> tuple[PreTrainedTokenizerBase, list[int], str]:
    """A tokenizer, and its ids of `text` as the format defines them."""
    return byte_tokenizer(num_sentinels=8), [byte + 3 for byte in text.encode()], text


def build_test(
    name: str, make: Callable[[str], tuple[PreTrainedTokenizerBase, list[int], str]], **members: Any
) -> type[unittest.TestCase]:
    """The test class of one tokenizer, which is made and saved once."""
    mixin = load("test_tokenization_common").TokenizerTesterMixin

    def set_up_class(cls: Any) -> None:
        cls.folder = tempfile.mkdtemp()
        tokenizer, cls.integration_expected_token_ids, cls.integration_expected_decoded_text = make(
            cls.integration_test_input_string
        )
        cls.integration_expected_tokens = tokenizer.convert_ids_to_tokens(cls.integration_expected_token_ids)
        tokenizer.save_pretrained(cls.folder)
        cls.tokenizer_class, cls.from_pretrained_id = type(tokenizer), cls.folder
        mixin.setUpClass.__func__(cls)

    def tear_down_class(cls: Any) -> None:
        mixin.tearDownClass.__func__(cls)
        shutil.rmtree(cls.folder, ignore_errors=True)

    members |= {"setUpClass": classmethod(set_up_class), "tearDownClass": classmethod(tear_down_class)}
    # Reading a tokenizer.json apart and making a tokenizer of its vocabulary is for classes that define an algorithm; ours are
    # of the general class, which takes the whole file.
    members |= {"test_tokenizer_from_extractor": False, "__module__": __name__}
    return type(name, (mixin, unittest.TestCase), members)


def recognise_special_tokens(self: Any) -> None:
    """In a text, special tokens are bytes like any others unless `split_special_tokens=False`: checked with that."""
    recognising = partial(type(self).get_tokenizer, split_special_tokens=False)
    with mock.patch.object(type(self), "get_tokenizer", recognising):
        load("test_tokenization_common").TokenizerTesterMixin.test_tokenize_special_tokens(self)


try:
    SentencePieceTokenizerTest = build_test("SentencePieceTokenizerTest", make_sentencepiece_tokenizer)
    ByteTokenizerTest = build_test(
        "ByteTokenizerTest", make_byte_tokenizer, test_tokenize_special_tokens=recognise_special_tokens
    )
except SourceDistributionError as error:
    reason = str(error)

    def test_common_checks_are_available() -> None:
        pytest.fail(reason, pytrace=False)

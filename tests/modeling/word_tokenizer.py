"""A tokenizer with one word per id, for the small models of the tests."""

from __future__ import annotations

from factories import VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def word_tokenizer(*, ends: bool = False, mask: bool = False, **options) -> PreTrainedTokenizerFast:
    """Words w3 ... and <pad>, </s>, <unk>.

    Args:
        ends: put </s> after a text, and between and after two.
        mask: let the last word be the mask.
        options: of the tokenizer.
    """
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if ends:
        backend.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if mask:
        names["mask_token"] = f"w{VOCABULARY - 1}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **{"model_max_length": 64, **options})

"""Byte tokenizer: one token per UTF-8 byte, lossless.

By default `<pad>` is 0, `</s>` 1, `<unk>` 2 (never produced) and byte b has the id b + 3, as in ByT5 (arXiv 2105.13626), followed by the
sentinels. Without special tokens the id of a byte is its value. Text is never changed: no normalisation, no added
space, and a literal `</s>` in a text is four bytes, not the special token (pass `split_special_tokens=False` to the
call to change that).

Tokens that are added later must have at least two characters: a single character may be the symbol of a byte.

Python strings cannot hold bytes that are not valid UTF-8; `encode_bytes` and `decode_bytes` take and return any bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from .special_tokens import EOS_TOKEN, PAD_TOKEN, UNK_TOKEN, padded_vocab_size, sentinel_ids, wrap_backend

__all__ = ["byte_tokenizer", "decode_bytes", "encode_bytes", "padded_vocab_size", "sentinel_ids"]

_NOT_BYTES = "\ufdd0\ufdd1\ufdd0\ufdd1"  # noncharacters, which no text contains


def _decoder() -> decoders.Decoder:
    """Decodes symbols to bytes, and leaves added tokens unchanged.

    `ByteLevel` decodes every token whose characters are all byte symbols ("ñandú"), so tokens of several characters
    get a prefix that is not a byte symbol.
    """
    mark = decoders.Replace(Regex(r"\A(?=..)"), _NOT_BYTES)  # no symbol is a line break
    return decoders.Sequence([mark, decoders.ByteLevel(), decoders.Replace(_NOT_BYTES, "")])


def _byte_symbols() -> list[str]:
    """The printable character that the tokenizers library writes for each byte, in the order of the bytes.

    Printable bytes of Latin-1 represent themselves; the others are numbered upwards from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, next_symbol = [], 0x100
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(next_symbol))
            next_symbol += 1
    return symbols


def byte_tokenizer(
    *,
    num_sentinels: int = 0,
    pad: bool = True,
    eos: bool = True,
    unk: bool = True,
    model_max_length: int | None = None,
) -> PreTrainedTokenizerBase:
    """Makes a byte tokenizer, which can be saved and loaded with `AutoTokenizer.from_pretrained` in any process.

    Args:
        num_sentinels: number of sentinels; `<extra_id_0>` has the last id and the others descend from it.
        pad: whether there is a `<pad>` token, with the first id.
        eos: whether there is a `</s>` token, with the next id, appended to every text; a pair becomes `A </s> B </s>`.
        unk: whether there is an `<unk>` token, with the next id. It is never produced, but makes the ids equal to
            those of ByT5.
        model_max_length: length to which `truncation=True` truncates; None = no limit.
    """
    special = [token for token, wanted in ((PAD_TOKEN, pad), (EOS_TOKEN, eos), (UNK_TOKEN, unk)) if wanted]
    vocab = {token: index for index, token in enumerate([*special, *_byte_symbols()])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = _decoder()
    if eos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS_TOKEN}",
            pair=f"$A {EOS_TOKEN} $B {EOS_TOKEN}",
            special_tokens=[(EOS_TOKEN, vocab[EOS_TOKEN])],
        )
    return wrap_backend(
        backend,
        num_sentinels=num_sentinels,
        model_max_length=model_max_length,
        pad=pad,
        eos=eos,
        unk=unk,
        split_special_tokens=True,
    )


def _byte_offset(tokenizer: PreTrainedTokenizerBase) -> int:
    vocabulary = tokenizer.get_vocab()
    offset = vocabulary.get(_byte_symbols()[0])
    if offset is None or any(vocabulary.get(symbol) != offset + byte for byte, symbol in enumerate(_byte_symbols())):
        raise ValueError(
            "`tokenizer` is not a byte tokenizer: it lacks the 256 consecutive byte tokens. Use `byte_tokenizer()`."
        )
    return offset


def encode_bytes(tokenizer: PreTrainedTokenizerBase, data: bytes, *, add_special_tokens: bool = True) -> list[int]:
    """Ids of any bytes, valid UTF-8 or not, with `</s>` if the tokenizer has it.

    Raises:
        ValueError: the tokenizer is not a byte tokenizer.
    """
    ids = (np.frombuffer(data, dtype=np.uint8).astype(np.int64) + _byte_offset(tokenizer)).tolist()
    if add_special_tokens and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids


def decode_bytes(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> bytes:
    """Bytes of the byte tokens among the ids; special tokens and sentinels are left out.

    Raises:
        ValueError: the tokenizer is not a byte tokenizer, or an id is outside the vocabulary.
    """
    offset = _byte_offset(tokenizer)
    array = np.asarray(list(map(int, ids)), dtype=np.int64)
    if array.size and not (0 <= array.min() and array.max() < len(tokenizer)):
        raise ValueError(f"`ids` must lie in [0, {len(tokenizer)}); they span {array.min()} to {array.max()}.")
    values = array - offset
    return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes()

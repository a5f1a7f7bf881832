"""SentencePiece-unigram tokenizer with T5 conventions: `<pad>` 0, `</s>` 1, `<unk>` 2, sentinels at the top.

The pieces are trained by the `sentencepiece` library and then stored as a stock `tokenizer.json`, so that
`AutoTokenizer.from_pretrained(folder)` returns the tokenizer in any process, without this package or sentencepiece.
The ids equal those of sentencepiece for every Unicode string (except for special tokens, see below).

Exact normalisation. The `Precompiled` normaliser of the tokenizers library reads the same character map as sentencepiece, but
applies it once per grapheme cluster, and drops the rest of a short cluster whose first character is mapped ("ﬁ" plus a
combining accent loses the accent). Two measures make the two libraries agree. Our map has rules for single characters
only, and a control character, which the map deletes, is inserted between any two adjacent non-ASCII characters, so
that no cluster continues after a mapped character. As a consequence of the first, decomposed accents stay decomposed.
Scores are rounded so that ties are exact ties in both libraries.

White space. In every mode runs of spaces become one space and leading and trailing spaces are dropped, as
sentencepiece does by default. With `"nfkc"` and `"nfkc_cf"` all other white space (tab, newline, no-break space,
paragraph separator ...) is first converted to spaces: **line breaks are not kept**. Use the byte tokenizer when the
layout of a text matters.

Special and added tokens. An implicit word start is added only at the start of a text. Text after a sentinel or an
added token starts a word if a space precedes it, else it continues a word: `in <extra_id_0>.` is `\u2581in
<extra_id_0> .`, the tokens that span corruption makes of `in the.`, and `barfoobaz` with an added `foo` decodes to
itself. Spaces before a special token are dropped: the word start of a masked span belongs to the span. A literal
`</s>` or `<extra_id_0>` in a text is read as that special token, as everywhere in Transformers; pass
`split_special_tokens=True` to the call to treat it as ordinary characters (as the data streams of this package do).
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from .special_tokens import EOS_TOKEN, padded_vocab_size, sentinel_ids, wrap_backend

__all__ = [
    "padded_vocab_size",
    "sentinel_ids",
    "tokenizer_from_sentencepiece",
    "train_sentencepiece_model",
    "train_sentencepiece_tokenizer",
]

NORMALIZATIONS = ("nfkc", "nfkc_cf", "identity")

_SEPARATOR = "\x01"  # deleted by every character map of `_character_rules`
_SPACE_SYMBOL = "\u2581"
_CONTROLS_THAT_SEPARATE = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85"
_INVISIBLE = "\u200e\u200f\u2060\ufeff\u00ad"  # direction marks, word joiner, byte order mark, soft hyphen
_ZERO_WIDTH_SPACE = "\u200b"
_SENTENCE_CHARACTERS = (
    1000  # at most 4,000 bytes, below sentencepiece's own limit of 4,192, beyond which it drops a line
)
_LITERAL_SCORE = -1.0e4  # log-probability of byte and control pieces, which must never match as text


def _import_sentencepiece():
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(
            'Training a tokenizer needs the `sentencepiece` library: pip install "hf_hybrid[train]".'
        ) from error
    return sentencepiece


def _model_proto() -> Any:
    """An empty message in sentencepiece's model format."""
    _import_sentencepiece()
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError(
            'Reading a sentencepiece model needs the `protobuf` library: pip install "hf_hybrid[train]".'
        ) from error
    return sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]


@lru_cache(maxsize=2)
def _character_rules(normalization: str) -> dict[str, str]:
    """Map of single characters: compatibility form, optional case folding, unified white space, controls removed."""
    rules = {}
    for code in range(1, sys.maxunicode + 1):
        if 0xD800 <= code <= 0xDFFF:
            continue
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Zs", "Zl", "Zp") or character in (_ZERO_WIDTH_SPACE, _SPACE_SYMBOL):
            replacement = " "
        elif category == "Cc":
            replacement = " " if character in _CONTROLS_THAT_SEPARATE else ""
        elif character in _INVISIBLE:
            replacement = ""
        else:
            replacement = unicodedata.normalize("NFKC", character)
            if normalization == "nfkc_cf":
                replacement = unicodedata.normalize("NFKC", replacement.casefold())
        if replacement != character:
            rules[character] = replacement
    return rules


def _write_rules(rules: dict[str, str], path: Path) -> None:
    lines = (
        f"{ord(character):X}\t{' '.join(f'{ord(c):X}' for c in replacement)}"
        for character, replacement in rules.items()
    )
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of all texts; long lines are split at white space so that sentencepiece drops none of them."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`texts` must yield strings; got {type(text).__name__}.")
        for line in text.splitlines():
            line = line.strip()
            while len(line) > _SENTENCE_CHARACTERS:
                cut = line.rfind(" ", 1, _SENTENCE_CHARACTERS)
                cut = cut if cut > 0 else _SENTENCE_CHARACTERS
                yield line[:cut]
                line = line[cut:].lstrip()
            if line:
                yield line


def train_sentencepiece_model(
    texts: Iterable[str],
    *,
    vocab_size: int,
    normalization: str = "nfkc",
    character_coverage: float = 0.9995,
    max_sentences: int = 400_000,
    split_digits: bool = False,
    num_threads: int = 2,
) -> bytes:
    """Trains a unigram model with byte fallback and returns it in sentencepiece's own format.

    Args:
        texts: documents or lines, read once. Lines are the training sentences; long lines are split.
        vocab_size: number of pieces, including the three special tokens and the 256 bytes.
        normalization: `"nfkc"` (compatibility form of each character), `"nfkc_cf"` (the same with case folding) or
            `"identity"`.
        character_coverage: share of the characters of the text that become pieces; the others are encoded as bytes.
        max_sentences: number of lines to sample at random if there are more; 0 uses all.
        split_digits: whether every digit is a separate piece.
        num_threads: threads of the trainer. The result depends only on the texts and the other arguments.

    Raises:
        ValueError: there is no text, the vocabulary is too small or too large for the text, or the normalisation is
            unknown.
        ImportError: sentencepiece is not installed.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"`normalization` is {normalization!r}; accepted are {', '.join(NORMALIZATIONS)}.")
    if vocab_size < 3 + 256 + 1:
        raise ValueError(
            f"`vocab_size` is {vocab_size}; three special tokens and 256 byte pieces already take 259, so pass a few "
            "hundred at least (8,000 to 32,000 for real corpora)."
        )
    sentences = _sentences(texts)
    first = next(sentences, None)
    if first is None:
        raise ValueError("`texts` contains no text: every document is empty. Pass at least one non-empty document.")
    options = {
        "vocab_size": vocab_size,
        "character_coverage": character_coverage,
        "input_sentence_size": max_sentences,
        "shuffle_input_sentence": max_sentences > 0,
        "split_digits": split_digits,
        "num_threads": num_threads,
    }
    try:
        model = _run_trainer(itertools.chain([first], sentences), normalization, options)
    except RuntimeError as error:
        raise ValueError(
            f"sentencepiece could not train a vocabulary of {vocab_size} pieces on this text: {error}. If the size is "
            "reported as too high or too small, change `vocab_size` to the bound it names, or pass more text."
        ) from error
    return _with_exact_scores(model)


def _run_trainer(sentences: Iterator[str], normalization: str, options: Mapping[str, Any]) -> bytes:
    """Runs sentencepiece's trainer with the common settings: unigram, byte fallback, T5's special tokens."""
    sentencepiece = _import_sentencepiece()
    sentencepiece.set_random_generator_seed(0)  # for the sample of lines
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        if normalization == "identity":
            rule = {"normalization_rule_name": "identity"}
        else:
            rules_file = Path(folder) / "rules.tsv"
            _write_rules(_character_rules(normalization), rules_file)
            rule = {"normalization_rule_tsv": str(rules_file)}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="unigram",
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
            **options,
            **rule,
        )
    return model.getvalue()


def _with_exact_scores(model: bytes) -> bytes:
    """Rounds the log-probabilities to multiples of 1/256, and removes the name of the temporary rule file.

    Sums of such numbers are exact in float32 (sentencepiece) up to 65,536 and in float64 (tokenizers), so two segmentations
    of equal probability ("XX X X" and "X XX X") are a tie for both libraries, which break ties in the same way.
    """
    proto = _model_proto()
    proto.ParseFromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * 256) / 256
    proto.normalizer_spec.normalization_rule_tsv = ""  # the name of a temporary file
    return proto.SerializeToString()


def _normalizer(charsmap: bytes) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps.append(normalizers.Replace(Regex(r"(?<=[^\x00-\x7F])(?=[^\x00-\x7F])"), _SEPARATOR))
        steps.append(normalizers.Precompiled(charsmap))
    steps += [normalizers.Replace(Regex(rf"[ {_SPACE_SYMBOL}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence(steps)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Splits into words, each with its leading space symbol; a text without a leading space gets one only there.

    This takes two steps, because `Metaspace` adds no symbol to a text that begins with one: in the first, the symbol
        is the space
    itself, so a literal `\u2581` at the start of a text is not mistaken for it.
    """
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(replacement=_SPACE_SYMBOL, prepend_scheme="never", split=True),
        ]
    )


def tokenizer_from_sentencepiece(
    model: bytes | str | Path, *, num_sentinels: int = 1024, model_max_length: int | None = None
) -> PreTrainedTokenizerBase:
    """A Transformers tokenizer with the ids of a model made by `train_sentencepiece_model`, followed by sentinels.

    Args:
        model: serialised model, or the path of its file.
        num_sentinels: number of sentinels; `<extra_id_0>` has the last id and the others descend from it.
        model_max_length: length to which `truncation=True` truncates; None = no limit.

    Raises:
        ValueError: the model is not a unigram model with pad 0, end of sequence 1 and unknown 2.
    """
    proto = _model_proto()
    serialized = model if isinstance(model, bytes) else Path(model).read_bytes()
    try:
        proto.ParseFromString(serialized)
    except Exception as error:  # raised by protobuf, which may not be installed
        raise ValueError(f"`model` is not a sentencepiece model: {error}.") from error
    trainer = proto.trainer_spec
    if trainer.model_type != trainer.UNIGRAM or (trainer.pad_id, trainer.eos_id, trainer.unk_id) != (0, 1, 2):
        raise ValueError(
            "`model` must be a unigram model with ids <pad> 0, </s> 1 and <unk> 2; this one has type "
            f"{trainer.model_type} and ids {trainer.pad_id}, {trainer.eos_id}, {trainer.unk_id}. Train it with "
            "`train_sentencepiece_model`."
        )
    if num_sentinels < 0:
        raise ValueError(f"`num_sentinels` must be zero or positive; got {num_sentinels}.")
    matchable = (type(proto).SentencePiece.NORMAL, type(proto).SentencePiece.USER_DEFINED)
    vocab = [(p.piece, p.score if p.type in matchable else _LITERAL_SCORE) for p in proto.pieces]

    backend = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=trainer.byte_fallback))
    backend.normalizer = _normalizer(proto.normalizer_spec.precompiled_charsmap)
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE_SYMBOL, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS_TOKEN}", pair=f"$A {EOS_TOKEN} $B {EOS_TOKEN}", special_tokens=[(EOS_TOKEN, 1)]
    )
    return wrap_backend(backend, num_sentinels=num_sentinels, model_max_length=model_max_length)


def train_sentencepiece_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    num_sentinels: int = 1024,
    model_max_length: int | None = None,
    **training_options: object,
) -> PreTrainedTokenizerBase:
    """Trains the pieces and returns the tokenizer: `vocab_size` pieces, then `num_sentinels` sentinels.

    `</s>` is appended to every text, and a pair becomes `A </s> B </s>`.

    Args:
        texts: documents or lines, read once.
        vocab_size: number of pieces without the sentinels.
        num_sentinels: number of sentinels, at least as many as the longest span-corrupted input needs (see
            `span_corruption_lengths`).
        model_max_length: length to which `truncation=True` truncates; None = no limit.
        training_options: options of `train_sentencepiece_model`.
    """
    model = train_sentencepiece_model(texts, vocab_size=vocab_size, **training_options)  # type: ignore[arg-type]
    return tokenizer_from_sentencepiece(model, num_sentinels=num_sentinels, model_max_length=model_max_length)

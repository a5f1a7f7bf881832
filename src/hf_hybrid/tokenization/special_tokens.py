"""Special tokens shared by all tokenizers of this package, in the conventions of T5.

Sentinels `<extra_id_0>`, `<extra_id_1>` ... mark masked spans. `<extra_id_0>` has the last id of the vocabulary and
the others descend from it, so that sentinel j is `len(tokenizer) - 1 - j`.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "</s>", "<unk>"


def wrap_backend(
    backend: Tokenizer,
    *,
    num_sentinels: int,
    model_max_length: int | None = None,
    pad: bool = True,
    eos: bool = True,
    unk: bool = True,
    **options: object,
) -> TokenizersBackend:
    """Adds special tokens and sentinels and wraps the backend in the stock class of Transformers.

    A custom class would be unknown to processes that do not import this package, and is not needed.

    Raises:
        ValueError: `num_sentinels` is negative.
    """
    if num_sentinels < 0:
        raise ValueError(f"`num_sentinels` must be zero or positive; got {num_sentinels}.")
    named = {
        name: token
        for name, token, wanted in (
            ("pad_token", PAD_TOKEN, pad),
            ("eos_token", EOS_TOKEN, eos),
            ("unk_token", UNK_TOKEN, unk),
        )
        if wanted
    }
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(num_sentinels))]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*named.values(), *sentinels)]
    )
    if model_max_length is not None:
        options["model_max_length"] = model_max_length
    return TokenizersBackend(
        tokenizer_object=backend,
        extra_special_tokens=sentinels,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **named,
        **options,
    )


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>` ... in this order, found by name.

    Raises:
        ValueError: the tokenizer has no sentinels, or their ids do not descend one by one (span corruption relies on it).
    """
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[token])
    if not ids:
        raise ValueError(
            "`tokenizer` has no sentinel tokens (`<extra_id_0>`, `<extra_id_1>` ...), which span corruption needs. Train one "
            "with `train_sentencepiece_tokenizer(..., num_sentinels=1024)`, or add them with "
            "`tokenizer.add_special_tokens({'extra_special_tokens': [f'<extra_id_{i}>' for i in reversed(range(1024))]})` and "
            "resize the embeddings of the model."
        )
    if any(later != earlier - 1 for earlier, later in zip(ids, ids[1:])):
        raise ValueError(
            f"The ids of the sentinels of `tokenizer` must descend one by one from `<extra_id_0>`; they begin {ids[:4]}. Add them "
            "in the order `<extra_id_N-1>` ... `<extra_id_0>`."
        )
    return ids


def padded_vocab_size(tokenizer: PreTrainedTokenizerBase, multiple: int = 64) -> int:
    """Embedding size for a model: `len(tokenizer)` rounded up to a multiple, which speeds up matrix products."""
    return -(-len(tokenizer) // multiple) * multiple

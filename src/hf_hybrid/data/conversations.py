"""Conversations as training text: one document per answer, from the first message to the end of the answer.

A language model that is trained on them answers a prompt of the same template and then ends the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# Plain words only: corpora are tokenised without special tokens. Line breaks become spaces if the tokenizer drops
# them.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def prepare_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the plain template on a tokenizer without one; it is saved with the tokenizer.

    Raises:
        ValueError: the tokenizer's template writes special tokens, which a corpus contains as ordinary characters.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        return
    example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = str(tokenizer.apply_chat_template(example, tokenize=False))
    special = [token for token in tokenizer.all_special_tokens if token in written]
    if special:
        raise ValueError(
            f"The chat template of the tokenizer writes {special[0]!r}, a special token, but text is tokenised as ordinary characters. "
            "Set `tokenizer.chat_template = None` for the plain template, or fine-tune with a trainer for conversations (TRL)."
        )


def documents_of(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of a conversation: for every answer (role `assistant`), all messages up to it, in the tokenizer's template.

    Raises:
        ValueError: a message lacks role or content, or there is no answer.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"A message needs the strings `role` and `content`; got {message!r}.")
    ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends:
        raise ValueError(f"A conversation needs an answer (role 'assistant') to train on; got {list(messages)!r}.")
    return [
        str(tokenizer.apply_chat_template([dict(message) for message in messages[:end]], tokenize=False)).rstrip("\n")
        for end in ends
    ]

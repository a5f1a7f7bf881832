"""Several documents in one row, computed as if each had a row of its own.

`position_ids` that restart mark the documents, as `DataCollatorWithFlattening` of Transformers writes them. Recurrent states,
filters and windows would all have to be cut there; instead each document gets a row of its own for the pass, a form
that is tested for every model. The cost is that of a batch padded to the longest document.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.utils import ModelOutput

ForwardMethod = TypeVar("ForwardMethod", bound=Callable[..., Any])

# Outputs of Transformers without a value per token, whatever their sizes.
_PER_DOCUMENT = ("attentions", "cross_attentions")
_PER_TOKEN = ("input_ids", "inputs_embeds", "input_values", "token_type_ids")
# Other arguments by which collators of Transformers separate documents.
_OTHER_MARKS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


def starts_of_documents(position_ids: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Where a document begins: (B, L) or (1, L) positions to (B, L) bool. A document is a run of consecutive positions.

    Raises:
        ValueError: positions of another shape.
    """
    batch, length = shape
    if position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}, but the input needs {(batch, length)}: positions that "
            "count from 0 in every document of a row."
        )
    begins = position_ids.new_ones((batch, length), dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins


@dataclass(frozen=True)
class PackedDocuments:
    """The places of N documents of at most M tokens in B rows of L tokens.

    Args:
        source: (N, M) index into the B * L tokens, 0 beyond the end of a document.
        mask: (N, M) bool, real tokens of each document.
        target: (B, L) index into the N * M places; 0 where `dropped`.
        dropped: (B, L) bool, tokens of documents that consist of padding alone.
    """

    source: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def find(
        cls, position_ids: torch.Tensor, attention_mask: torch.Tensor | None, shape: tuple[int, int]
    ) -> PackedDocuments | None:
        """The documents of a batch; None where every row holds one.

        Args:
            position_ids: (B, L) or (1, L).
            attention_mask: (B, L), nonzero at real tokens, or None.
            shape: (B, L).

        Raises:
            ValueError: positions or a mask of another shape.
        """
        begins = starts_of_documents(position_ids, shape)
        real = torch.ones_like(begins) if attention_mask is None else attention_mask != 0
        if real.shape != begins.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(real.shape)}, but the input needs {tuple(begins.shape)}: one entry per "
                "token, 1 for real tokens and 0 for padding."
            )
        document = begins.flatten().long().cumsum(0) - 1  # (B * L,): a row begins a document
        holds_text = document.new_zeros(int(document[-1]) + 1, dtype=torch.bool)
        holds_text[document[real.flatten()]] = True
        kept = holds_text[document]
        if int((begins & kept.view(shape)).sum(-1).max()) <= 1:
            return None
        number = (holds_text.long().cumsum(0) - 1)[document]  # among the documents that are kept
        place = torch.arange(document.numel(), device=document.device)
        first = torch.where(begins.flatten(), place, 0).cummax(0).values
        within = place - first
        rows, longest = int(holds_text.sum()), int(within[kept].max()) + 1
        target = torch.where(kept, number * longest + within, 0)
        source = document.new_zeros(rows * longest)
        source[target[kept]] = place[kept]
        mask = torch.zeros(rows * longest, dtype=torch.bool, device=document.device)
        mask[target[kept]] = real.flatten()[kept]
        return cls(source.view(rows, longest), mask.view(rows, longest), target.view(shape), ~kept.view(shape))

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) to (N, M, ...), with an arbitrary token of the batch beyond the end of a document."""
        return tensor.flatten(0, 1)[self.source]

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """(N, M, ...) to (B, L, ...), zero at padding that belongs to no document."""
        packed = tensor.flatten(0, 1)[self.target]
        return packed.masked_fill(self.dropped.view(self.dropped.shape + (1,) * (packed.dim() - 2)), 0)


def separates_documents(forward: ForwardMethod) -> ForwardMethod:
    """Lets the forward pass of a stack take `position_ids` that restart at every document of a row.

    The documents are computed in rows of their own, and what has a value for each token is put back in place; other outputs
    (pooled states, rates, attention weights) have a row for each document. `position_ids` that do not restart change nothing.
    The signature names them; heads that generate keep `generate` from making any. A stack with outputs of its own
    that have no value per token names them in a class attribute, `_per_document_outputs`.

    Raises:
        ValueError: positions or a mask of another shape, restarting positions together with a cache or encoder states, or
            positions in pieces of texts; documents that are separated by other arguments alone.
    """
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def read_documents(self: Any, *args: Any, **kwargs: Any) -> Any:
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is None:
            _check_other_marks(kwargs)
            return forward(self, *args, **kwargs)
        if getattr(self, "sequence_group", None) is not None:
            raise ValueError(
                "`position_ids` separate the documents of a row, but this model reads texts cut over processes: leave them out, and "
                "give each document a row of its own."
            )
        bound = signature.bind_partial(self, *args)
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"} | kwargs
        tokens = next((arguments[name] for name in _PER_TOKEN if arguments.get(name) is not None), None)
        cache = arguments.get("past_key_values")
        if tokens is None or tokens.dim() < 2 or (cache is not None and cache.get_seq_length() > 0):
            return forward(self, **arguments)  # which explains what is missing; a continued text is one document
        shape = (tokens.shape[0], tokens.shape[1])
        documents = PackedDocuments.find(position_ids, arguments.get("attention_mask"), shape)
        if documents is None:
            return forward(self, **arguments)
        if cache is not None or arguments.get("use_cache") or arguments.get("encoder_hidden_states") is not None:
            raise ValueError(
                "`position_ids` restart within a row: packed documents have no common cache and no common encoder states. "
                "Pass `use_cache=False` without `past_key_values` and `encoder_hidden_states`, or give each document a row "
                "of its own."
            )
        given = {name: arguments[name] for name in _PER_TOKEN if arguments.get(name) is not None}
        if any(tensor.shape[:2] != shape for tensor in given.values()):
            return forward(self, **arguments)  # which explains what is wrong
        arguments |= {name: documents.unpack(tensor) for name, tensor in given.items()}
        arguments["attention_mask"] = documents.mask
        if "use_cache" in signature.parameters:
            arguments["use_cache"] = False
        return_dict = arguments.pop("return_dict", None)
        packed = _pack_outputs(
            forward(self, **arguments, return_dict=True), documents, getattr(self, "_per_document_outputs", ())
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return packed if return_dict else packed.to_tuple()

    named = list(signature.parameters.values())
    own = inspect.Parameter(
        "position_ids", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=torch.Tensor | None
    )
    read_documents.__signature__ = signature.replace(parameters=[*named[:-1], own, named[-1]])  # type: ignore[attr-defined]
    return read_documents  # type: ignore[return-value]


def _check_other_marks(arguments: dict[str, Any]) -> None:
    """Raises ValueError for documents that only arguments mark which no model here reads: they would see each other."""
    for name in _OTHER_MARKS:
        if arguments.get(name) is not None:
            raise ValueError(
                f"`{name}` separates the documents of a row, but these models read that from `position_ids`, which are missing: pass "
                "positions that count from 0 in every document (`DataCollatorWithFlattening(return_position_ids=True)`)."
            )


def _pack_outputs(outputs: ModelOutput, documents: PackedDocuments, per_document: tuple[str, ...]) -> ModelOutput:
    """Puts every output that has a value per token back into the rows of the batch."""

    def pack(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(pack(part) for part in value)
        is_per_token = isinstance(value, torch.Tensor) and value.shape[:2] == documents.mask.shape
        return documents.pack(value) if is_per_token else value

    names = [name for name in outputs if name not in _PER_DOCUMENT + per_document]
    kept = {name: outputs[name] for name in outputs if name not in names}
    return type(outputs)(**{name: pack(outputs[name]) for name in names} | kept)

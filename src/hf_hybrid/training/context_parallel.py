"""Context parallelism: one text cut over several processes, for inputs that are too long for one.

    group = SequenceGroup()                       # all processes; or one axis of a device mesh
    with context_parallel(model, group):
        piece = split_batch(batch, group, model)  # every process has the whole batch
        loss = model(**piece).loss                # the share of this process
        loss.backward()
    reduce_gradients(model, group)                # sums the shares

The shares of the loss, and the gradients, sum to those of the whole text. Layers exchange what passes from piece to
piece (see `ops.sequence_group`): states of recurrences, keys and values within reach of a window, sums over codes. The
number of bytes does not depend on the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ..modeling.heads import GenericForCausalLM, GenericForMaskedLM
from ..modeling.losses import shift_labels
from ..modeling.sequence_pieces import ReadsPieces
from ..modeling.token_heads import GenericForTokenClassification
from ..ops.sequence_group import SequenceGroup

_PER_TOKEN_HEADS = (GenericForCausalLM, GenericForMaskedLM, GenericForTokenClassification)
_OF_TARGETS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels")  # of encoder-decoders
_PER_TOKEN = {  # inputs with a value per token, and the value of padding
    "input_ids": 0,
    "inputs_embeds": 0.0,
    "input_values": 0.0,
    "attention_mask": 0,
    "token_type_ids": 0,
    "labels": -100,
    "shift_labels": -100,
}


def _inner(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and adapters."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _stack(model: nn.Module) -> ReadsPieces:
    """The one stack of a model that can read pieces.

    Raises:
        ValueError: the model has none, or a head, or a setting, that needs whole texts.
    """
    inner = _inner(model)
    stacks = [module for module in inner.modules() if isinstance(module, ReadsPieces)]
    name = f"{type(inner).__name__} cannot read texts cut over processes"
    if not stacks:
        raise ValueError(f"{name}: its layers exchange nothing. Use whole texts (`context_parallel_size=1`).")
    readers = [
        module for module in inner.modules() if module in stacks or [*module.children()] == stacks
    ]  # and wrappers
    bodies = [module for module in inner.modules() if isinstance(module, PreTrainedModel)]
    is_reader = inner in readers or isinstance(inner, _PER_TOKEN_HEADS)
    is_reader = is_reader and all(body is inner or body in readers for body in bodies)
    if not is_reader and not getattr(inner, "gathers_source", False):
        raise ValueError(
            f"{name}: of the heads, those for causal and masked language modelling, for token classification, and the "
            "encoder-decoder of SPADE can; others read the whole input at once. Use whole texts (`context_parallel_size=1`)."
        )
    obstacle = stacks[0].obstacle_to_pieces()
    if obstacle is not None:
        raise ValueError(f"{name}: {obstacle}, or use whole texts (`context_parallel_size=1`).")
    return stacks[0]


def check_reads_pieces(model: nn.Module) -> None:
    """Raises ValueError for a model that needs whole texts, with the reason."""
    _stack(model)


def set_sequence_group(model: nn.Module, group: SequenceGroup | None) -> None:
    """Makes a model read pieces of texts from now on; None makes it read whole texts again.

    Raises:
        ValueError: the model cannot.
    """
    for module in _stack(model).modules() if group is not None else _inner(model).modules():  # type: ignore[attr-defined]
        if hasattr(type(module), "sequence_group"):
            module.sequence_group = group  # type: ignore[assignment]


@contextmanager
def context_parallel(model: nn.Module, group: SequenceGroup) -> Iterator[None]:
    """Context in which a model reads the piece of its texts that this process holds.

    Forward and backward passes both belong inside: with gradient checkpointing the backward pass exchanges states too.

    Args:
        model: model with a stack that can read pieces; wrapped, adapted or plain.
        group: the processes that share texts.

    Raises:
        ValueError: the model cannot, with the reason.
    """
    set_sequence_group(model, group)
    try:
        yield
    finally:
        set_sequence_group(model, None)


def split_batch(batch: dict[str, Any], group: SequenceGroup, model: nn.Module) -> dict[str, Any]:
    """The piece of a batch that this process reads, and what its share of the loss needs.

    Rows are padded on the right until they can be cut. For a causal language model `labels` become `shift_labels`, as the
    last token of a piece predicts the first of the next. An encoder-decoder gets the whole targets, and the labels of a part of
    them. The loss is divided by the labels of the whole batch.

    Args:
        batch: inputs and labels of whole texts, the same in all processes of the group.
        group: the processes that share texts.
        model: the model that reads them.

    Raises:
        ValueError: the model cannot read pieces, or an input that cannot be cut.
    """
    stack = _stack(model)
    piece = {name: value for name, value in batch.items() if value is not None}
    inner: Any = _inner(model)
    targets: dict[str, Any] = {}
    if getattr(inner, "gathers_source", False):
        targets, number = _share_of_targets(
            inner, group, {name: piece.pop(name) for name in _OF_TARGETS if name in piece}
        )
        piece |= {} if number is None else {"num_items_in_batch": number}
    unknown = [name for name, value in piece.items() if isinstance(value, torch.Tensor) and value.dim() > 1]
    unknown = [name for name in unknown if name not in _PER_TOKEN]
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` cannot be cut over processes; inputs of texts in pieces are {', '.join(_PER_TOKEN)}."
        )
    tokens = next((piece[name] for name in ("input_ids", "inputs_embeds", "input_values") if name in piece), None)
    if tokens is None:
        raise ValueError(
            "The batch has none of `input_ids`, `inputs_embeds` and `input_values`: there is no text to cut."
        )
    length = tokens.shape[1]
    if isinstance(inner, GenericForCausalLM) and "labels" in piece:
        labels = piece.pop("labels")
        piece.setdefault("shift_labels", shift_labels(labels, labels.shape))
    target = piece.get("shift_labels", piece.get("labels"))
    if target is not None and "num_items_in_batch" not in piece:
        piece["num_items_in_batch"] = (target != -100).sum().clamp(min=1)
    missing = -length % (group.size * stack.piece_multiple())
    if missing and "attention_mask" not in piece:
        piece["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    size = (length + missing) // group.size
    for name, filler in _PER_TOKEN.items():
        if name in piece:
            padded = _pad_right(piece[name], missing, filler)
            piece[name] = padded[:, group.rank * size : (group.rank + 1) * size].contiguous()
    return piece | targets


def _share_of_targets(
    model: Any, group: SequenceGroup, targets: dict[str, Any]
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Inputs of a decoder, which every process reads whole, with the labels of this process; and how many labels there are."""
    labels = targets.get("labels")
    if labels is None:
        return targets, None
    if not targets.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        targets["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    places = torch.arange(labels.shape[1], device=labels.device) * group.size // labels.shape[1]
    targets["labels"] = labels.masked_fill(places != group.rank, -100)
    return targets, (labels != -100).sum().clamp(min=1)


def _pad_right(tensor: torch.Tensor, missing: int, filler: float) -> torch.Tensor:
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), filler)], dim=1)


@torch.no_grad()
def reduce_gradients(model: nn.Module | Iterable[nn.Parameter], group: SequenceGroup) -> None:
    """Sums the gradients over the processes of a group, in one exchange per data type.

    Not needed under DistributedDataParallel or FSDP2, which average them: multiply the loss by the number of processes there.

    Args:
        model: model, or its parameters.
        group: the processes that share texts.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # the piece of this process may not reach it
            parameter.grad = torch.zeros_like(parameter)
    for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
        grads = [parameter.grad for parameter in trained if parameter.dtype == dtype and parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=group.process_group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))

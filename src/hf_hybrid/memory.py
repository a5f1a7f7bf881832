"""The memory of a training step, counted without running it.

`estimate_memory` builds the model on the meta device and goes through a step there: every tensor has its shape and no contents, so
a model of any size and a text of any length take a few seconds and no memory. It takes the forms for accelerators
(`ops/branches.py`), and counts the storages that are alive at a time, and those that the forward pass keeps for the backward pass.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from .auto import find_architecture, load_heads
from .compatibility import enable_checkpointing
from .ops.branches import forced_branch

ADAMW_BYTES = 8  # of a parameter: two moments in float32
_LANGUAGE_HEADS = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
}
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step on one device.

    Attributes:
        num_parameters: number of parameters, tied ones once.
        parameters: parameters and buffers.
        gradients: gradients, as large as the parameters that have them.
        optimizer: state of the optimizer.
        activations: what the forward pass keeps for the backward pass.
        step: most bytes alive at a time beside parameters and optimizer: activations, what a pass needs meanwhile (with
            checkpointing a layer that is computed again), and gradients.
    """

    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    step: int

    @property
    def total(self) -> int:
        """Most bytes that tensors take at a time, the allocator's own loss not included."""
        return self.parameters + self.optimizer + max(self.step, self.gradients)

    def __str__(self) -> str:
        rows = {name: value for name, value in asdict(self).items() if name != "num_parameters"}
        lines = [f"{name:12}{format_bytes(value):>12}" for name, value in {**rows, "total": self.total}.items()]
        return "\n".join([f"{self.num_parameters:,} parameters", *lines])


def format_bytes(size: int) -> str:
    """A number of bytes with three digits: `1.25 GiB`."""
    factor, unit = next(((factor, unit) for factor, unit in _UNITS if size >= factor), (1, "B"))
    return f"{size / factor:.3g} {unit}"


def estimate_memory(
    config: PreTrainedConfig,
    batch_size: int,
    length: int,
    *,
    target_length: int | None = None,
    auto_class: str | None = None,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    optimizer_bytes: float = ADAMW_BYTES,
) -> MemoryEstimate:
    """Memory of a training step on an accelerator.

    Args:
        config: configuration of a model of this library; dropout counts as configured.
        batch_size: rows on one device.
        length: tokens of a row, of the source in an encoder-decoder.
        target_length: tokens of a target, for encoder-decoders; None = as many as `length`.
        auto_class: head to train, such as "AutoModelForCausalLM". None = the language model that the configuration describes.
        dtype: data type of parameters and activations. State spaces and norms compute in float32 all the same.
        gradient_checkpointing: compute each layer again in the backward pass.
        optimizer_bytes: bytes of optimizer state per parameter: 8 for AdamW, 4 for Muon and for SGD with momentum.

    Raises:
        ValueError: a number is not positive, or there is no such head.
    """
    for name, value in (("batch_size", batch_size), ("length", length), ("target_length", target_length)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be positive; got {value}.")
    model_class = _model_class(config, auto_class)
    with torch.device("meta"):
        model: Any = model_class(copy.deepcopy(config))
        model.to(dtype).train()
    if gradient_checkpointing:
        enable_checkpointing(model)
    inputs = _inputs(model, batch_size, length, target_length or length)
    counted = LiveBytes()
    with forced_branch("accelerator"), _fused_attention(), counted:
        kept = KeptBytes(model)
        with kept:
            loss = model(**inputs).loss
        activations = kept.total
        kept.clear()
        loss.backward()
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return MemoryEstimate(
        num_parameters=count,
        parameters=sum(tensor.nbytes for tensor in (*parameters, *model.buffers())),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=round(optimizer_bytes * sum(parameter.numel() for parameter in trained)),
        activations=activations,
        step=counted.peak,
    )


def largest_batch(config: PreTrainedConfig, length: int, device_bytes: int, **options: Any) -> int:
    """The largest number of rows whose training step fits; 0 if none does.

    Args:
        config: see `estimate_memory`.
        length: tokens of a row.
        device_bytes: bytes that tensors may take. Leave about a tenth of a device to its driver and allocator.
        options: further arguments of `estimate_memory`.
    """
    one, two = (estimate_memory(config, rows, length, **options) for rows in (1, 2))
    if one.total > device_bytes:
        return 0
    row = two.step - one.step
    room = device_bytes - one.parameters - one.optimizer
    return max(1, 1 + (room - one.step) // row) if room >= one.gradients else 0


def _model_class(config: PreTrainedConfig, auto_class: str | None) -> type[PreTrainedModel]:
    architecture = find_architecture(config.model_type)
    if architecture is None:
        raise ValueError(f"`config` has the model type {config.model_type!r}, which is none of this library.")
    if auto_class is None:
        is_decoder = getattr(config, "is_decoder", False) or "AutoModelForMaskedLM" not in architecture.heads
        kind = "seq2seq" if config.is_encoder_decoder else "decoder" if is_decoder else "encoder"
        auto_class = _LANGUAGE_HEADS[kind]
    heads: dict[str, Any] = dict(load_heads(architecture))
    if auto_class not in heads:
        raise ValueError(
            f"`auto_class` {auto_class!r} is no head of {architecture.title}; its heads are {', '.join(heads)}."
        )
    return heads[auto_class]


def _inputs(model: PreTrainedModel, batch_size: int, length: int, target_length: int) -> dict[str, Any]:
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    if "SequenceClassification" in type(model).__name__:
        return {"input_ids": ids, "labels": ids[:, 0]}
    # As the trainers of this library: only the loss is read.
    labels = ids.new_zeros(batch_size, target_length) if model.config.is_encoder_decoder else ids
    return {"input_ids": ids, "labels": labels} | (
        {"skip_logits": True} if getattr(model, "accepts_loss_options", False) else {}
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside while they are alive; not those of weights and inputs, nor of views of them.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            if id(storage) not in self._known and id(storage) not in given:
                self._note(storage)
        return outputs

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def forget(_: weakref.ref) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what a forward pass inside keeps for the backward pass, each storage once, without parameters and buffers.

    Args:
        model: the model whose parameters do not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._kept: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        if _key(tensor) not in self._own:
            self._kept[_key(tensor)] = tensor.untyped_storage()
        return tensor

    @property
    def total(self) -> int:
        """Bytes kept."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def clear(self) -> None:
        """Lets go of the storages, so that the backward pass can free them."""
        self._kept.clear()


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention keeps what fused kernels keep: no scores. Everywhere, because checkpoints compute again in other threads."""
    with mock.patch.object(F, "scaled_dot_product_attention", _fused):
        yield


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    return _FusedKernel.apply(query, key, value, attn_mask)


class _FusedKernel(torch.autograd.Function):
    """What a fused attention kernel makes and keeps: outputs, and the logarithm of a sum per query."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        tensors = ctx.saved_tensors[:4]
        return tuple(
            torch.empty_like(tensor) if needed else None for tensor, needed in zip(tensors, ctx.needs_input_grad)
        )

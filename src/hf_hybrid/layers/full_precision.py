"""Layers whose tensors are never cast below float32, not even by a sharding engine that casts whole groups of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether a type has less than float32's precision."""
    return dtype.is_floating_point and dtype.itemsize < 4


class GathersFullPrecision(nn.Module):
    """Base of layers whose parameters FSDP2 gathers in the precision in which they are stored.

    A `param_dtype` of half precision (`MixedPrecisionPolicy`, accelerate, `DistributedConfig`) determines how their
    gradients are reduced, not the precision they compute in. (FSDP2 needs gradients of one type per group, so the
    gathered parameter is in half precision, for the gradient, and the layer reads the values it was cast from.)
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GathersFullPrecision:
        super()._apply(fn, recurse)
        for parameter in self.parameters(recurse=False):
            _extend_shard(parameter)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter) and _extend_shard(value):
            _read_gathered(self)


class KeepsFullPrecision(GathersFullPrecision):
    """Base of layers that follow a model to another device, or to float64, but not to half precision."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeepsFullPrecision:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not is_low_precision(moved.dtype) or is_low_precision(tensor.dtype):
                return moved
            return torch.empty_like(tensor, device="meta") if moved.is_meta else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            return
        if isinstance(value, torch.Tensor) and is_low_precision(value.dtype) and name not in self._buffers:
            raise RuntimeError(
                f"`{name}` of {type(self).__name__} was cast to {value.dtype}, in which state spaces give wrong "
                "results. `FullyShardedDataParallel` (FSDP1) casts all parameters that it flattens: use FSDP2 "
                "(`fsdp_version: 2`, `torch.distributed.fsdp.fully_shard`), which keeps these in float32, or no "
                "mixed precision of parameters."
            )

    def widen(self) -> None:
        """Brings tensors that were made in half precision to float32; for constructors."""
        for tensor in [*self.parameters(recurse=False), *self.buffers(recurse=False)]:
            if is_low_precision(tensor.dtype):
                tensor.data = tensor.data.float()


# ------------------------------------------------------------------------------------------------------------- shards


class _FullPrecisionShard(torch.Tensor):
    """Local part of a sharded parameter that FSDP2 gathers in its own type, by the methods that FSDP2 offers for this.

    The layer finds the gathered values in its `_gathered`, by the storage of the parameter in half precision.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if func in _KEEPING else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor], nn.Module]:
        shard = self.detach()
        missing = -(-outer_size[0] // mesh.size()) - shard.shape[0]
        return (F.pad(shard, (0, 0) * (shard.dim() - 1) + (0, missing)) if missing > 0 else shard,), module

    def fsdp_post_all_gather(
        self, outputs: tuple[torch.Tensor], module: Any, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        (full,) = outputs
        if not is_low_precision(dtype):
            return (full, ()) if out is None else None  # what was gathered is the parameter
        if out is not None:
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
                out.copy_(full.as_strided(out.size(), out.stride()))
            return None
        low = full.to(dtype)
        module.__dict__.setdefault("_gathered", []).append((low, full))
        return low, (low,)


_KEEPING = {
    torch.Tensor.cpu,
    torch.Tensor.narrow,
    torch.Tensor.new_zeros,
    torch.Tensor.pin_memory,
    torch.Tensor.to,
}


def _extend_shard(parameter: Any) -> bool:
    """Makes a shard of a full-precision parameter one that is gathered as such; returns whether it is a shard at all."""
    placements = getattr(parameter, "placements", None)
    if placements is None or is_low_precision(parameter.dtype):
        return False
    local = parameter._local_tensor
    if type(local) is torch.Tensor and all(not part.is_shard() or part.is_shard(0) for part in placements):
        parameter._local_tensor = local.as_subclass(_FullPrecisionShard)
    return True


class _Widened(torch.autograd.Function):
    """The values that a parameter in half precision was cast from."""

    @staticmethod
    def forward(ctx: Any, low: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        ctx.dtype = low.dtype
        return full.view_as(full)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class _ReadsGathered:
    """Put before the class of a layer with shards: its parameters read as the gathered values."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if not isinstance(value, nn.Parameter) or not is_low_precision(value.dtype):
            return value
        place = value.untyped_storage().data_ptr()
        for low, full in self.__dict__.get("_gathered", ()):
            if low.untyped_storage().data_ptr() == place:
                return _Widened.apply(value, full.as_strided(value.size(), value.stride()))
        raise RuntimeError(
            f"`{name}` of {type(self).__name__} was gathered in {value.dtype}, in which state spaces give wrong "
            "results: shard it along its first dimension, or call `fully_shard` on the layer itself first, with "
            "`MixedPrecisionPolicy()`."
        )


_READING: dict[type, type] = {}


def _read_gathered(layer: nn.Module) -> None:
    kind = type(layer)
    if not issubclass(kind, _ReadsGathered):
        if kind not in _READING:
            _READING[kind] = type(kind.__name__, (_ReadsGathered, kind), {})
        layer.__class__ = _READING[kind]

"""Results that a layer computes from its own tensors alone, kept while none of them changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class KeepsResults(nn.Module):
    """Base of layers whose kernels or discretised systems depend on their tensors alone.

    A result is kept with the identity and version of every tensor, so that it is never used after a step of an
    optimizer, an assignment, or a load. Nothing is kept while gradients are tracked or the layer is in training (unless
    its tensors are frozen), nor in compiled graphs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cache: dict[str, tuple[Any, Any, list[torch.Tensor]]] = {}
        self._frozen: dict[str, Any] | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeepsResults:
        self._cache.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._cache.clear()  # `assign=True` brings new tensors, which may lie where older ones lay

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def train(self, mode: bool = True) -> KeepsResults:
        """Switch between training and evaluation; what was kept of trained tensors is dropped."""
        if any(tensor.requires_grad for tensor in self._own_tensors()):
            self._cache.clear()
        return super().train(mode)

    def _own_tensors(self) -> list[Any]:
        """What results depend on."""
        return [*self._parameters.values(), *self._buffers.values()]

    def _cache_key(self) -> tuple[Any, ...] | None:
        """Identity and version of every tensor, or None when results must not be kept."""
        if torch.compiler.is_compiling():
            return None
        tensors = self._own_tensors()
        if any(tensor.requires_grad for tensor in tensors) and (self.training or torch.is_grad_enabled()):
            return None
        if any(type(t) not in (torch.Tensor, nn.Parameter) or t.is_meta or t.is_inference() for t in tensors):
            return None
        return tuple((id(t), t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)

    def _constants(self) -> dict[str, Callable[[], Any]]:
        """What may be asked of `_cached` for any input, by name; the layers that have some add theirs."""
        return {}

    def _cached(self, name: str, compute: Callable[[], Any]) -> Any:
        """Result of `compute`, kept while no tensor of the layer changes."""
        if self._frozen is not None and name in self._frozen:
            return self._frozen[name]
        key = self._cache_key()
        if key is None:
            return compute()
        found = self._cache.get(name)
        if found is None or found[0] != key:
            tensors = self._own_tensors()  # kept alive: no `id` is used again
            with torch.inference_mode(False), torch.no_grad():
                found = self._cache[name] = (key, compute(), tensors)
        return found[1]


def keeping_precision(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function for `Module._apply` that follows moves between devices, but never a cast below float32."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        if not _is_low_precision(moved.dtype) or _is_low_precision(tensor.dtype):
            return moved
        return torch.empty_like(tensor, device="meta") if moved.is_meta else tensor.to(moved.device)

    return apply


def _is_low_precision(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4


@contextmanager
def frozen_results(model: nn.Module) -> Iterator[None]:
    """Takes what the layers of a model compute from their tensors alone for constants, as long as the context lasts.

    A graph that is exported inside holds the results and not their computation.
    """
    layers = [module for module in model.modules() if isinstance(module, KeepsResults)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer._frozen = {name: compute() for name, compute in layer._constants().items()}
        yield
    finally:
        for layer in layers:
            layer._frozen = None

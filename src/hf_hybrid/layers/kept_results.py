"""Results that a layer computes from its own tensors alone, kept during one generation or while a model is frozen.

No key detects every change of a weight (`.data`, arrays that share its memory). So the layer itself keeps nothing from
call to call: the cache of a generation holds what its steps need repeatedly, and with `frozen_results` the user
promises that no weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..ops.branches import is_transformed, takes_plain_form

# Results of one generation, by layer and name, with the tensors they were computed from.
KeptResults = dict[Any, tuple[Any, Any, list[torch.Tensor]]]

_GENERATION: ContextVar[KeptResults | None] = ContextVar("generation", default=None)


class keeping:  # noqa: N801 - a context manager, named like those of torch
    """Context in which layers keep results in `kept`, those of one generation; None, or a compiled graph, keeps
    nothing."""

    def __init__(self, kept: KeptResults | None) -> None:
        self.kept = kept

    def __enter__(self) -> None:
        if self.kept is not None and not torch.compiler.is_compiling():
            self.token = _GENERATION.set(self.kept)

    def __exit__(self, *exception: object) -> None:
        if self.kept is not None and not torch.compiler.is_compiling():
            _GENERATION.reset(self.token)


def kept_result(kept: KeptResults, owner: nn.Module, name: str, tensors: list[Any], compute: Callable[[], Any]) -> Any:
    """Result of `compute`, or the one that is kept, while the tensors are the same objects of the same version.

    Args:
        kept: results of a generation; not used in training, nor while gradients of the tensors are tracked.
        owner, name: layer and name of the result.
        tensors: tensors that the result depends on.
        compute: function that computes the result.
    """
    key, place = _key_of(tensors, owner.training), (id(owner), name)
    if key is None:
        kept.pop(place, None)
        return compute()
    found = kept.get(place)
    if found is None or found[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            found = kept[place] = (key, compute(), tensors)  # the tensors stay alive: no `id` is used again
    return found[1]


def _key_of(tensors: list[Any], is_training: bool) -> tuple[Any, ...] | None:
    """Identity and version of every tensor, or None when results must not be kept."""
    if takes_plain_form():  # the tensors may be those of one call alone
        return None
    if any(tensor.requires_grad for tensor in tensors) and (is_training or torch.is_grad_enabled()):
        return None
    if any(type(t) not in (torch.Tensor, nn.Parameter) or t.is_meta or t.is_inference() for t in tensors):
        return None
    return tuple((id(t), t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)


class KeepsResults(nn.Module):
    """Base of layers whose kernels or discretised systems depend on their tensors alone.

    Results are kept in two places only: in the cache of a generation (a layer that is called with `kept`, outside
    training and without gradients, reuses a result while its tensors are the same objects of the same version), and by
    `frozen_results`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._frozen: dict[str, Any] | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KeepsResults:
        self._thaw()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._thaw()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen": None}

    def _thaw(self) -> None:
        """Forgets frozen results, because the module has replaced its tensors."""
        if self._frozen is not None:
            self._frozen.clear()

    def _own_tensors(self) -> list[Any]:
        """The tensors that results depend on."""
        return [*self._parameters.values(), *self._buffers.values()]

    def _tracks_gradients(self) -> bool:
        tensors = self._own_tensors()
        if any(isinstance(tensor, torch.Tensor) and is_transformed(tensor) for tensor in tensors):
            return True
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def _constants(self) -> dict[str, Callable[[], Any]]:
        """The results of `_cached` that no input changes, by name; layers that have some add theirs."""
        return {}

    @property
    def _is_frozen(self) -> bool:
        return self._frozen is not None

    def _keeps(self) -> bool:
        """Whether a result would be kept now."""
        return not torch.compiler.is_compiling() and (self._is_frozen or _GENERATION.get() is not None)

    def _cached(self, name: str, compute: Callable[[], Any]) -> Any:
        """Result of `compute`, or the one kept by `frozen_results` or for this generation."""
        if self._frozen is not None:
            return self._from_frozen(name, compute)
        kept = None if torch.compiler.is_compiling() else _GENERATION.get()
        return compute() if kept is None else kept_result(kept, self, name, self._own_tensors(), compute)

    def _from_frozen(self, name: str, compute: Callable[[], Any]) -> Any:
        assert self._frozen is not None
        if self._tracks_gradients():
            raise RuntimeError(
                "The model is frozen (`with model.frozen():`), but gradients are tracked: what its layers compute from their "
                "weights is a constant there and has no gradient, nor other values in `torch.func`. Run it under `torch.no_grad()`, or outside the context."
            )
        if name not in self._frozen:
            if torch.compiler.is_compiling():
                return compute()
            with torch.inference_mode(False), torch.no_grad():
                self._frozen[name] = compute()
        return self._frozen[name]


@contextmanager
def frozen_results(model: nn.Module, *, ahead: bool = False) -> Iterator[None]:
    """Treats what the layers of a model compute from their tensors alone as constant while the context lasts.

    Args:
        model: model whose weights do not change inside the context.
        ahead: compute the results now, so that a graph exported inside holds them instead of their computation.
    """
    layers = [module for module in model.modules() if isinstance(module, KeepsResults) and not module._is_frozen]
    try:
        with torch.no_grad():
            for layer in layers:
                layer._frozen = {name: compute() for name, compute in layer._constants().items()} if ahead else {}
        yield
    finally:
        for layer in layers:
            layer._frozen = None


class FreezableModel:
    """Adds `frozen` to a model."""

    def frozen(self) -> Any:
        """Context in which no weight of the model changes, so that kernels and discretised systems are computed once.

        For many forward passes without a cache, as in evaluation. (Generation keeps what it needs in its own cache.)
        Inside, weights must not be changed by any means: the results would still be those of the old weights.

            with model.frozen(), torch.no_grad():
                for batch in batches:
                    model(**batch)

        Raises:
            RuntimeError: gradients of such layers are tracked inside.
        """
        return frozen_results(self)  # type: ignore[arg-type]

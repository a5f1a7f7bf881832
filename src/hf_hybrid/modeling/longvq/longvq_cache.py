"""What a causal LongVQ model keeps between calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...ops.code_memory import CodeMemory
from ..cache import StateLayer


class CodeMemoryLayer(StateLayer):
    """State of one layer of attention over quantised keys of a state space: constant in size.

    Attributes:
        state: state of the moving average or state space, batch first; None before the first call.
        memory: `CodeMemory`, whose fields are attributes of this layer too; None before the first call.
        layout: settings, with `window_size`.
        codebook_version: version of the codebook that the codes belong to; None for a state built from tensors.
    """

    description = "attention over quantised keys"
    batch_tensors = (*CodeMemory._fields, "begins")
    code_count: torch.Tensor | None

    def __init__(self, layout: Mapping[str, Any], learns: bool = False) -> None:
        super().__init__(layout)
        if learns:
            self.training_obstacle = "its codebooks change at every step (set `freeze_codebook=True`)"

    def _clear(self) -> None:
        super()._clear()
        self.codebook_version: Any = None

    @property
    def kept_tokens(self) -> int:
        return self.layout["window_size"] - 1

    @property
    def memory(self) -> CodeMemory | None:
        if self.code_count is None:
            return None
        return CodeMemory(*(getattr(self, name) for name in CodeMemory._fields))

    @memory.setter
    def memory(self, memory: CodeMemory) -> None:
        for name, tensor in zip(CodeMemory._fields, memory):
            setattr(self, name, tensor)

    def fill(self, tensors: Mapping[str, torch.Tensor], past: int) -> None:
        super().fill(tensors, past)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self._map(torch.clone)  # it changes its tensors in place


def check_codebooks(cache: Any, versions: Sequence[Any]) -> None:
    """Raises ValueError for a cache made with other codebooks than those of `versions`, one for each layer."""
    for layer, version in zip(cache.layers, versions):
        if layer.get_seq_length() == 0:
            layer.codebook_version = version
        elif layer.codebook_version not in (None, version):
            raise ValueError(
                "`past_key_values` was made with other codebooks than the model has now: its codes are not valid. "
                "Leave `past_key_values` unset and read the text again after training steps, loading or moving the model."
            )

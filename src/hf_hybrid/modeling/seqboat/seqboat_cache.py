"""What a SeqBoat decoder keeps between calls."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ...ops.working_memory import WorkingMemory
from ..cache import StateLayer


class WorkingMemoryLayer(StateLayer):
    """State of one layer of sparsely activated attention over a moving average: constant in size when there is a window.

    Attributes:
        state: state of the moving average, a tensor or a tuple of tensors, batch first; None before the first call.
        memory: the last active tokens of every row (`WorkingMemory`), or None before the first call; its fields are attributes
            of this layer too.
        layout: settings, with `window_size`.
    """

    description = "sparsely activated attention"
    batch_tensors = (*WorkingMemory._fields, "begins")
    token_axes = {"keys": -2, "values": -2, "positions": -1}
    positions: torch.Tensor | None
    counts: torch.Tensor | None

    @property
    def kept_tokens(self) -> int | None:
        return self.layout["window_size"]  # those before a token, and itself

    def fitted(self, slots: int) -> dict[str, torch.Tensor]:
        """Without a window, the memory with as many slots as the text can need; it is never full."""
        found = super().fitted(slots)
        for name, axis in self.token_axes.items() if self.kept_tokens is None else ():
            missing = slots - found[name].shape[1]
            padding = (*(0, 0) * (-axis - 1), 0, missing)
            found[name] = F.pad(found[name], padding) if missing > 0 else found[name][:, :slots]
        return found

    @property
    def memory(self) -> WorkingMemory | None:
        return None if self.keys is None else WorkingMemory(self.keys, self.values, self.positions, self.counts)

    @memory.setter
    def memory(self, memory: WorkingMemory) -> None:
        self.keys, self.values, self.positions, self.counts = memory

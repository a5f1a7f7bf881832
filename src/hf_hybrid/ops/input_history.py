"""The past inputs that causal filters of finite length reach, kept from call to call.

Shape letters: B batch, D channels, F filters per channel, L inputs that the filters reach, P tokens ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

TOKENS_AHEAD = 256  # how far the effect of the past is computed at once while decoding


class InputHistory:
    """State of explicit filters: the last L inputs before an anchor, the inputs since then, and the outputs that the
    former still cause.

    Attributes:
        inputs: (B, D, L + P), the first L + `filled` of them written, oldest first.
        length: L.
        filled: inputs since the anchor, at most P.
        ahead: (B, F, D, P) outputs at the P tokens after the anchor due to the inputs before it; None: not computed
            yet.
    """

    def __init__(self, inputs: torch.Tensor, length: int, filled: int = 0, ahead: torch.Tensor | None = None) -> None:
        self.inputs, self.length, self.filled, self.ahead = inputs, length, filled, ahead

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> InputHistory:
        """The history with an operation applied to every tensor."""
        ahead = None if self.ahead is None else change(self.ahead)
        return InputHistory(change(self.inputs), self.length, self.filled, ahead)

    @classmethod
    def of(cls, past: torch.Tensor) -> InputHistory:
        """A history of the last L inputs (B, D, L), with room for P more."""
        length = past.shape[-1]
        return cls(F.pad(past, (0, min(TOKENS_AHEAD, length))), length)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another input."""
        return self.length + self.filled == self.inputs.shape[-1]

    def last(self, count: int) -> torch.Tensor:
        """The newest `count` inputs (B, D, count), oldest first."""
        stop = self.length + self.filled
        return self.inputs[..., stop - count : stop]

"""What a Mega decoder keeps between calls."""

from __future__ import annotations

import torch

from ..token_cache import TokenLayer


class GatedAttentionLayer(TokenLayer):
    """State of one layer of gated attention over a moving average.

    Attributes:
        keys: (B, P, Z) of the last P tokens; all of them, or with chunks the last C - 1.
        values: (B, P, E) of the same tokens.
        state: state of the moving average, a tensor or a tuple of tensors, batch first; None before the first call.
        cross_keys, cross_values: (B, S, Z) and (B, S, D) of the encoder states, or None.
        layout: settings, with `chunk_size`.
    """

    description = "gated attention"
    batch_tensors = (*TokenLayer.batch_tensors, "cross_keys", "cross_values")
    source_axes = {"cross_keys": -2, "cross_values": -2}
    cross_keys: torch.Tensor | None
    cross_values: torch.Tensor | None

    @property
    def kept_tokens(self) -> int | None:
        chunk: int | None = self.layout["chunk_size"]
        return None if chunk is None else max(chunk - 1, 1)

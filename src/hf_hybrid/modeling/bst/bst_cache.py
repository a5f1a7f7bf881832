"""What a Block-State Transformer keeps between calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...ops.input_history import InputHistory
from ..cache import StateLayer, zeroed


class BlockStateLayer(StateLayer):
    """State of one layer of block-state attention, of constant size: rings of the last tokens, and the state of their
    context.

    Attributes:
        keys, values: (B, n, W, e) rings, position p in slot p mod W; None before the first call.
        context_keys, context_values: (B, n, W, e) rings of context states, or (B, n, S, e) states of the current
            block; None in layers without context.
        state: state of the filters, a tensor or an `InputHistory`; None in layers without context.
        positions: (B,) real tokens of each row so far; None while all rows have had `cumulative_length`.
        was_reset: some rows have begun a new text since the last call.
        layout: settings, with `block_size` and `ssm_type`.
    """

    description = "block-state attention"
    batch_tensors = ("keys", "values", "context_keys", "context_values", "positions")
    context_keys: Any
    context_values: Any
    positions: Any

    def _clear(self) -> None:
        super()._clear()
        self.was_reset = False

    @property
    def kept_tokens(self) -> int:
        return self.layout["block_size"]

    @property
    def start(self) -> int | torch.Tensor:
        """Real tokens so far: one number for all rows where they agree, else (B,)."""
        return self.cumulative_length if self.positions is None else self.positions

    def _row_positions(self) -> torch.Tensor:
        if self.positions is not None:
            return self.positions
        return torch.full(self.keys.shape[:1], self.cumulative_length, device=self.keys.device)

    def count(self, length: int, real: torch.Tensor | None = None) -> None:
        if real is not None and self.positions is None and self.keys is None:  # a layer that another process runs
            self.positions = self.cumulative_length + real
        elif real is not None or self.positions is not None:
            positions = self._row_positions()
            self.positions = positions + (length if real is None else real.to(positions.device))
        super().count(length, real)
        self.was_reset = False

    def reset_rows(self, rows: torch.Tensor) -> None:
        if self.keys is None:
            return
        self.positions = self._row_positions()
        self._map(lambda tensor: zeroed(tensor, rows))
        self.was_reset = True

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        history, self.state = self.state, None if isinstance(self.state, InputHistory) else self.state
        super()._map(change)
        if isinstance(history, InputHistory):
            self.state = history.map(change)

    def tensors(self) -> dict[str, torch.Tensor | None]:
        state = self.state.last(self.state.length) if isinstance(self.state, InputHistory) else self.state
        rings = {name: getattr(self, name) for name in self.batch_tensors if name != "positions"}
        return rings | {"state": state, "counts": None if self.keys is None else self._row_positions()}

    def fill(self, tensors: Mapping[str, torch.Tensor], past: int) -> None:
        """Takes over the `tensors` of another layer; rows of count 0 begin a text."""
        super().fill(tensors, past)
        self.positions = tensors["counts"]
        if self.state is not None and self.layout["ssm_type"] == "unstructured":
            self.state = InputHistory.of(self.state)
        self.was_reset = True

    def hold_by_end(self) -> None:
        super().hold_by_end()
        self.was_reset = False  # every row has begun

    def counters(self) -> dict[str, int]:
        return super().counters() | {"is_uniform": int(self.positions is None)}

    def restore(self, counters: Mapping[str, int]) -> None:
        super().restore(counters)
        if counters["is_uniform"]:
            self.positions = None
        self.was_reset = False

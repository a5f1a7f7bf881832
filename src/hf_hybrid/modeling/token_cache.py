"""Keys and values of attention, token by token: the common part of the cache layers of several architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from .cache import StateLayer

SPARE_TOKENS = 128  # least spare space behind keys and values that grow with the text


class TokenLayer(StateLayer):
    """Keys (..., P, d) and values (..., P, e) of the last P tokens, oldest first: all of them, or the last `kept_tokens`."""

    masks_past = True
    token_axes = {"keys": -2, "values": -2}

    def _clear(self) -> None:
        super()._clear()
        # Tensors with spare space at the end; `keys` and `values` are views of their fronts.
        self._rooms: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (..., L, d) and (..., L, e); returns the tokens kept before, followed by the new ones."""
        keys, values = self._appended("keys", key_states), self._appended("values", value_states)
        self.keys, self.values = keys, values
        kept = self.kept_tokens
        if kept is not None and keys.shape[-2] > kept:
            self.keys, self.values = keys[..., -kept:, :], values[..., -kept:, :]
            if key_states.shape[-2] > 1:
                self.keys, self.values = self.keys.clone(), self.values.clone()  # frees the longer ones
        return keys, values

    def _appended(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """The kept (..., P, d) tokens followed by the (..., L, d) new ones, (..., P + L, d).

        A text that grows by a token is not copied at every step: tokens are written into spare space, a quarter more than
        was needed when it last ran out.
        """
        kept = getattr(self, name)
        if kept is None:
            return states
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        has_gradient = torch.is_grad_enabled() and (kept.requires_grad or states.requires_grad)
        if self.kept_tokens is not None or is_traced or has_gradient:
            return torch.cat([kept, states], dim=-2)
        length, total = kept.shape[-2], kept.shape[-2] + states.shape[-2]
        room = self._rooms.get(name)
        is_ours = room is not None and room.data_ptr() == kept.data_ptr() and room.dtype == states.dtype
        if not is_ours or room.shape[-2] < total or room.is_inference() != torch.is_inference_mode_enabled():
            room = states.new_empty(*states.shape[:-2], total + max(SPARE_TOKENS, total // 4), states.shape[-1])
            room[..., :length, :] = kept
            self._rooms[name] = room
        room[..., length:total, :] = states
        return room[..., :total, :]

    def fitted(self, slots: int) -> dict[str, torch.Tensor]:
        """The kept tokens at the end of as many places as the text can need, with zeros in front."""
        places = slots - 1 if self.kept_tokens is None else min(self.kept_tokens, slots - 1)
        found = super().fitted(slots)
        for name in ("keys", "values"):
            missing = places - found[name].shape[-2]
            found[name] = F.pad(found[name], (0, 0, missing, 0)) if missing > 0 else found[name][..., -missing:, :]
        return found

    def _unfitted(self, tensors: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
        kept = length if self.kept_tokens is None else min(self.kept_tokens, length)
        shown = {name: tensors[name][..., -kept:, :] for name in ("keys", "values")}
        return super()._unfitted({**tensors, **shown}, length)

    def drop_past(self, tokens: int) -> None:
        self.cumulative_length -= tokens
        self.begins = self.begins - tokens
        if self.kept_tokens is None:
            self.keys, self.values = self.keys[..., tokens:, :].clone(), self.values[..., tokens:, :].clone()

"""The states of recurrences that enter the piece of a text that a process holds.

Shape letters: B batch, D channels, N modes (complex ones as pairs), H features, M stored modes, L tokens of a piece.
"""

from __future__ import annotations

import torch

from .diagonal_scan import decayed_state
from .diagonal_ssm import DiagonalSystem, diagonal_final_state
from .s4 import DenseSystem, dplr_block_states, from_real_basis, matrix_power, to_real_basis
from .sequence_group import SequenceGroup

_GROUP = 32  # tokens per step of the recurrence of a dense system


def entering_state(
    inputs: torch.Tensor, system: DiagonalSystem, group: SequenceGroup, *, reverse: bool = False
) -> torch.Tensor:
    """State (B, D, N[, 2]) of a diagonal system before the tokens (B, D, L) of this piece; zeros in the first.

    With `reverse` the texts are read from their ends: the state after the next piece has been read, down to its first token.
    """
    state = diagonal_final_state(inputs.flip(-1) if reverse else inputs, system)
    length = inputs.shape[-1]
    return group.exclusive_scan(
        state, lambda state, pieces: decayed_state(state, system, pieces * length), reverse=reverse
    )


def entering_dense_state(
    inputs: torch.Tensor, dense: DenseSystem, group: SequenceGroup, *, reverse: bool = False
) -> torch.Tensor:
    """As `entering_state` for a system of diagonal plus low rank: inputs (B, H, L) to a state (B, H, M, 2)."""
    length = inputs.shape[-1]
    tokens = inputs.flip(-1) if reverse else inputs
    tokens = torch.nn.functional.pad(tokens, (-length % _GROUP, 0))
    state = dplr_block_states(tokens, dense, tokens.shape[-1], group_size=_GROUP)[:, 0]
    whole = matrix_power(dense.transition, length)  # of a piece

    def advance(state: torch.Tensor, pieces: int) -> torch.Tensor:
        power = matrix_power(whole, pieces).mT.to(state.dtype)
        return from_real_basis((to_real_basis(state).transpose(0, 1) @ power).transpose(0, 1))

    return group.exclusive_scan(state, advance, reverse=reverse)

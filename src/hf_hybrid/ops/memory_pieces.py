"""What attention among active tokens needs of the pieces of a text that other processes hold: the last active tokens in front of a
piece and, where attention sees the future, the first ones behind it.

Each process writes its own into the ring of a `WorkingMemory`, by their ranks in the whole text. The rings of several pieces then
differ in the slots that they fill, or a later one overwrites an earlier one, so that a scan of sums finds what enters a piece.

Shape letters as in `working_memory`; N pieces.
"""

from __future__ import annotations

import torch

from .compaction import ActiveTokens
from .sequence_group import SequenceGroup
from .working_memory import WorkingMemory, empty_memory, write_memory


def entering_memory(
    group: SequenceGroup,
    keys: torch.Tensor,
    values: torch.Tensor,
    tokens: ActiveTokens,
    counts: torch.Tensor,
    slots: int,
    first_position: int,
    *,
    reverse: bool = False,
) -> WorkingMemory:
    """The active tokens nearest to the piece of this process among those of earlier pieces; of later ones with `reverse`.

    Args:
        keys, values: (C, Z) and (C, E) of the active tokens of this piece.
        tokens: those tokens.
        counts: (B, N) active tokens of each piece (`piece_counts`).
        slots: number W of tokens wanted.
        first_position: position of the first token of this piece.
        reverse: texts are read from their ends; ranks count from there.

    Returns:
        At most W tokens of each row, and as `counts` the number of all of them.
    """
    before = counts.flip(1).cumsum(1).flip(1) - counts if reverse else counts.cumsum(1) - counts  # (B, N)
    entered = before[:, group.rank]
    memory = empty_memory(counts.shape[0], slots, keys, values)._replace(counts=entered)
    if reverse:
        tokens = tokens._replace(ranks=tokens.counts[tokens.rows.clamp(min=0)] - 1 - tokens.ranks)
    memory = write_memory(memory, keys, values, tokens, first_position)

    def advance(state: torch.Tensor, pieces: int) -> torch.Tensor:
        """Leaves out what the pieces in between have overwritten."""
        source = group.rank + pieces if reverse else group.rank - pieces
        held = memory._replace(counts=before[:, min(max(source, 0), group.size - 1)]).ranks()
        is_kept = held >= (entered - slots).unsqueeze(-1)
        return torch.where(is_kept.unsqueeze(-1), state, 0)

    width = keys.shape[-1]
    states = torch.cat([memory.keys, memory.values], dim=-1)
    states = group.exclusive_scan(states, advance, reverse=reverse)
    positions = group.exclusive_scan(memory.positions.unsqueeze(-1), advance, reverse=reverse).squeeze(-1)
    return WorkingMemory(states[..., :width], states[..., width:], positions, entered)


def piece_counts(group: SequenceGroup, counts: torch.Tensor) -> torch.Tensor:
    """(B,) active tokens of this piece -> (B, N) of all pieces."""
    return group.collect(counts.unsqueeze(1))

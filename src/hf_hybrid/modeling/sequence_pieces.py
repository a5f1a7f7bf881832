"""What a stack checks before it reads a piece of a text whose other pieces other processes hold."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.branches import can_read_values
from ..ops.sequence_group import SequenceGroup


class ReadsPieces:
    """Base of the stacks that can read texts cut over processes.

    Attributes:
        sequence_group: the processes; None: texts are whole.
    """

    sequence_group: SequenceGroup | None = None
    training: bool

    def obstacle_to_pieces(self) -> str | None:
        """Why a model with this configuration reads whole texts only, with the remedy; None if it need not."""
        return None

    def piece_multiple(self) -> int:
        """Number of tokens of which every piece must hold a multiple."""
        return 1

    def check_piece(self, length: int, mask: torch.Tensor | None) -> None:
        """Checks the piece of this process; without a group every text is whole.

        Args:
            length: tokens of the piece.
            mask: (B, L) bool, True at real tokens, or None.

        Raises:
            ValueError: a length that does not fit, or padding in front of a text that is cut by position.
        """
        group = self.sequence_group
        if group is None:
            return
        multiple = self.piece_multiple()
        if length % multiple:
            raise ValueError(
                f"Each process holds {length} tokens of the text, but {type(self).__name__} cuts texts into chunks of {multiple} "
                f"tokens: pad the texts to a multiple of {multiple} times the number of processes, {group.size}."
            )
        if multiple > 1 and mask is not None and can_read_values(mask) and bool((~mask[:, :-1] & mask[:, 1:]).any()):
            raise ValueError(
                f"`attention_mask` has padding in front of real tokens, but {type(self).__name__} cuts texts into chunks of "
                f"{multiple} tokens, which would begin elsewhere: pad on the right to cut texts over processes."
            )


def refuse_cache(stack: Any, cache: Any, use_cache: bool | None) -> None:
    """Raises ValueError for a cache of a model that reads texts cut over processes."""
    if cache is not None or use_cache:
        raise ValueError(
            f"{type(stack).__name__} reads texts cut over processes, and its state with them: pass `use_cache=False` and no "
            "`past_key_values`, or generate outside of `context_parallel`."
        )

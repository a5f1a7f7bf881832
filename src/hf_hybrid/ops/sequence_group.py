"""One text cut over the processes of a group: what they tell each other, with gradients.

Process r of N holds piece r of every text of its batch; all pieces of a step are equally long. A piece needs little of
the others: a recurrence the state that enters it, a window the tokens next to its ends, a memory the sums over what came
before. None of it grows with the length of the text.

Everything here is a collective operation: all processes of the group call it in the same order, and their graphs must
hold its result, since each of them waits for the gradients of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class SequenceGroup:
    """The processes that share texts.

    Attributes:
        rank: number of this process in the group.
        size: number of processes.
        bytes_sent: bytes that this process has sent in forward and backward passes.

    Args:
        process_group: group of `torch.distributed`; None for all processes.

    Raises:
        RuntimeError: no process group was initialised.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "A text can be cut over processes only in a distributed run: start it with `torchrun` and call "
                "`torch.distributed.init_process_group` first."
            )
        self.process_group: dist.ProcessGroup | None = dist.group.WORLD if process_group is None else process_group
        self.rank: int = dist.get_rank(self.process_group)
        self.size: int = dist.get_world_size(self.process_group)
        self.bytes_sent: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        return self  # copies of a model exchange through the same processes

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_group, ()  # a saved model is a whole one

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    # ------------------------------------------------------------------------------------------------- with gradients

    def shift(self, tensor: torch.Tensor, pieces: int) -> torch.Tensor:
        """The tensor of the process `pieces` before this one (behind it, if negative); zeros where there is none."""
        return _Shift.apply(tensor, self, pieces)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return _Sum.apply(tensor, self)

    def gather(self, piece: torch.Tensor) -> torch.Tensor:
        """The whole (B, N L, ...) of the pieces (B, L, ...): the one exchange that grows with the text."""
        return _Gather.apply(piece, self)

    def exclusive_scan(
        self,
        state: torch.Tensor,
        advance: Callable[[torch.Tensor, int], torch.Tensor] = lambda state, pieces: state,
        *,
        reverse: bool = False,
    ) -> torch.Tensor:
        """The state that enters this piece, in 1 + log2(N - 1) exchanges.

        Args:
            state: state after this piece if zeros had entered it.
            advance: linear function of a state and a number: that state after so many pieces without input. Default: sums.
            reverse: texts are read from their ends; then the states of later pieces enter.

        Returns:
            The states of all earlier pieces, advanced to the beginning of this one and summed; zeros in the first.
        """
        direction = -1 if reverse else 1
        entering = self.shift(state, direction)
        pieces = 1
        while pieces < self.size - 1:  # `entering` covers so many pieces
            entering = entering + advance(self.shift(entering, direction * pieces), pieces)
            pieces *= 2
        return entering

    # ---------------------------------------------------------------------------------------------- without gradients

    @torch.compiler.disable
    def exchange(self, tensor: torch.Tensor, pieces: int) -> torch.Tensor:
        """As `shift`. The processes form a ring, so that all of them take part in every exchange."""
        received = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if pieces % self.size == 0 or abs(pieces) >= self.size:
            return received
        sent = tensor.detach().contiguous()
        target, source = (self._global((self.rank + step) % self.size) for step in (pieces, -pieces))
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, target, self.process_group),
                dist.P2POp(dist.irecv, received, source, self.process_group),
            ]
        )
        for request in requests:
            request.wait()
        self.bytes_sent += sent.numel() * sent.element_size()
        return received if 0 <= self.rank - pieces < self.size else torch.zeros_like(received)

    @torch.compiler.disable
    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `sum`."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.process_group)
        self.bytes_sent += total.numel() * total.element_size()
        return total

    @torch.compiler.disable
    def collect(self, piece: torch.Tensor) -> torch.Tensor:
        """As `gather`."""
        own = piece.detach().contiguous()
        pieces = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(pieces, own, group=self.process_group)
        self.bytes_sent += own.numel() * own.element_size()
        return torch.cat(pieces, dim=1)

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.process_group, rank)


def _no_group() -> None:
    return None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(tensor: torch.Tensor, group: SequenceGroup, pieces: int) -> torch.Tensor:
        return group.exchange(tensor, pieces)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.group, ctx.pieces = inputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.group.exchange(grads[0], -ctx.pieces), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(tensor: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        return group.reduce(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.group.reduce(grads[0]), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(piece: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        return group.collect(piece)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        piece, ctx.group = inputs
        ctx.length = piece.shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole = ctx.group.reduce(grads[0])
        return whole.narrow(1, ctx.group.rank * ctx.length, ctx.length), None

"""Vector quantisation of keys with codebooks that follow them (arXiv 2404.11163, Eqs. 5 and 6; arXiv 1711.00937).

The forward pass never changes a codebook: it stores the statistics of the batch, and `update_quantizers` applies them
before the next training step. Recomputation under gradient checkpointing stores the same statistics again, and several
graphs may await their backward pass. One sum over processes keeps all codebooks equal; the statistics are not buffers,
because DistributedDataParallel overwrites buffers with those of the first process.

Shapes: B batch, H heads, L tokens, S codewords, d width of keys, R candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers.utils import logging

from ...layers.full_precision import KeepsFullPrecision
from ...ops.branches import takes_plain_form, transforms
from ...ops.codebook import (
    Codebook,
    CodeStatistics,
    average_codebook,
    code_counts,
    gather_statistics,
    look_up,
    nearest_codes,
    perplexity,
    start_codebook,
)
from ...ops.sequence_group import SequenceGroup

logger = logging.get_logger(__name__)

INITIAL_KINDS = ("data", "kmeans", "random")
MOST_CANDIDATES = 64  # codewords revived at a time, at most
_KMEANS_POOL = 4  # candidates per codeword of the first clustering


class Quantized(NamedTuple):
    """Keys by their codes.

    Attributes:
        codes: (B, H, L) int64.
        words: (H, S, d), a copy of the codebook that later updates do not touch, float32 or better.
        commitment: (), mean square distance of a coordinate from its codeword; differentiable in the keys.
        perplexity: (H,), of the codes of this batch. Both None where they are not measured.
    """

    codes: torch.Tensor
    words: torch.Tensor
    commitment: torch.Tensor | None
    perplexity: torch.Tensor | None


class VectorQuantizer(KeepsFullPrecision):
    """One codebook per head.

    Buffers, always float32 or better: `codebook` (H, S, d), `ema_count` (H, S), `ema_sum` (H, S, d), `num_updates` (), int64.

    Args:
        num_heads: H.
        codebook_size: S.
        width: d.
        decay: decay rate of the moving averages.
        decay_warmup: start as means over all batches.
        init: "data" (codewords start at keys of the first batch), "kmeans" (at centres of clusters of them) or
            "random".
        init_iterations: iterations of "kmeans".
        dead_code_threshold: share of the uniform count below which a codeword is moved to a badly quantised key; 0:
            never.
        frozen: the codebook never changes.

    Raises:
        ValueError: unknown kind of `init`.
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts
    codebook: torch.Tensor
    ema_count: torch.Tensor
    ema_sum: torch.Tensor
    num_updates: torch.Tensor

    def __init__(
        self,
        num_heads: int,
        codebook_size: int,
        width: int,
        *,
        decay: float = 0.99,
        decay_warmup: bool = True,
        init: str = "data",
        init_iterations: int = 10,
        dead_code_threshold: float = 0.01,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if init not in INITIAL_KINDS:
            raise ValueError(f"`init` must be one of {', '.join(INITIAL_KINDS)}; got {init!r}.")
        self.codebook_size, self.decay, self.decay_warmup = codebook_size, decay, decay_warmup
        self.init, self.init_iterations = init, init_iterations
        self.dead_code_threshold, self.frozen = dead_code_threshold, frozen
        self.register_buffer("codebook", torch.empty(num_heads, codebook_size, width))
        self.register_buffer("ema_count", torch.empty(num_heads, codebook_size))
        self.register_buffer("ema_sum", torch.empty(num_heads, codebook_size, width))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.widen()
        self._forget()
        self.initialize(_PlainInit)

    def _forget(self) -> None:
        self._has_started: bool | None = None  # whether there was an update; None: to be read from the buffer
        self._pending: dict[int, CodeStatistics] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._revived: torch.Tensor | None = None

    @torch.no_grad()
    def initialize(self, init: ModuleType | type) -> None:
        """Writes initial values through `init.copy_`: codewords with a mean square of 1, each with a count of 1.

        The codewords are random but always the same, like any buffer: all processes begin with the same ones.
        """
        generator = torch.Generator(device="cpu").manual_seed(0)
        words = torch.randn(self.codebook.shape, generator=generator, dtype=torch.float32, device="cpu")
        words = words * words.square().mean(-1, keepdim=True).rsqrt()
        init.copy_(self.codebook, words.to(self.codebook))
        init.copy_(self.ema_count, torch.ones_like(self.ema_count))
        init.copy_(self.ema_sum, words.to(self.ema_sum))
        init.copy_(self.num_updates, torch.zeros_like(self.num_updates))

    def extra_repr(self) -> str:
        heads, size, width = self.codebook.shape
        return f"heads={heads}, codewords={size}, width={width}, decay={self.decay}, frozen={self.frozen}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(
        self, keys: torch.Tensor, mask: torch.Tensor | None = None, slot: int = 0, measures: bool = True
    ) -> Quantized:
        """Quantises keys; in training with gradients it also stores the statistics of the batch, for the next update.

        Args:
            keys: (B, H, L, d).
            mask: (B, L) bool, True at real tokens, or None.
            slot: number of the call within a step. The statistics replace those that the slot held.
            measures: compute `commitment` and `perplexity`, in training always; otherwise they are None.
        """
        words = self.codebook.to(torch.promote_types(keys.dtype, self.codebook.dtype))
        if torch.is_grad_enabled() and words is self.codebook:
            words = words.clone()
        keys = keys.to(words.dtype)
        codes = nearest_codes(keys.detach(), words)
        if not (measures or self.training):
            return Quantized(codes, words, None, None)
        error = (keys - look_up(words, codes)).square().sum(-1)  # (B, H, L)
        square = keys.detach().square().sum(-1)
        if mask is not None:
            error, square = error * mask.unsqueeze(1), square * mask.unsqueeze(1)
        counts = code_counts(codes, mask, self.codebook_size, words.dtype)
        total_error, number, total_counts = error.sum(), self._number(codes, mask), counts
        if self.sequence_group is not None:
            total_error, total_counts = self.sequence_group.sum(total_error), self.sequence_group.reduce(counts)
            number = total_counts[0].sum().clamp(min=1)
        commitment = total_error / (number * words.shape[0] * words.shape[2])
        used = perplexity(total_counts)
        if self.training and not self.frozen:
            if "Vmap" in transforms():
                raise RuntimeError(
                    "The codebooks of LongVQ learn from whole batches, which `torch.func.vmap` takes apart: set "
                    "`config.freeze_codebook=True` when the model is made, or call `model.eval()`."
                )
            self._store(keys.detach(), codes, error.detach(), mask, counts, slot)
        if not (torch.compiler.is_exporting() or takes_plain_form()):
            self._last = (used.detach(), error.detach().sum() / square.sum().clamp(min=1e-12))
        return Quantized(codes, words, commitment, used)

    @staticmethod
    def _number(codes: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | int:
        """Real tokens of the batch, at least 1."""
        return codes.shape[0] * codes.shape[2] if mask is None else mask.sum().clamp(min=1)

    def _store(
        self,
        keys: torch.Tensor,
        codes: torch.Tensor,
        error: torch.Tensor,
        mask: torch.Tensor | None,
        counts: torch.Tensor,
        slot: int,
    ) -> None:
        """Keeps the statistics of a batch. They are drawn without gradients too: recomputation must draw the same."""
        number = min(self.codebook_size, MOST_CANDIDATES)
        if not self.has_started():
            number = self.codebook_size * (_KMEANS_POOL if self.init == "kmeans" else 1)
            if keys.shape[0] * keys.shape[2] < self.codebook_size and not torch.compiler.is_compiling():
                logger.warning_once(
                    f"The first batch has {keys.shape[0] * keys.shape[2]} keys for {self.codebook_size} codewords: some start "
                    "at the same keys, with a little noise. Use longer or larger batches, or a smaller `codebook_size`."
                )
        statistics = gather_statistics(
            keys,
            codes,
            error,
            mask,
            counts,
            num_candidates=-(-number // _num_processes()),
            uniform=self.num_updates == 0,
        )
        if torch.is_grad_enabled():
            self._pending[slot] = statistics

    def has_started(self) -> bool:
        """Whether the codebook was updated before; compiled graphs may answer no although it was."""
        if not self._has_started and not torch.compiler.is_compiling():
            self._has_started = not self.num_updates.is_meta and bool(self.num_updates > 0)
        return bool(self._has_started)

    # ------------------------------------------------------------------------------------------------------- updates

    def take_pending(self) -> CodeStatistics | None:
        """Removes and returns the statistics of the last step, all slots together."""
        parts = [self._pending[slot] for slot in sorted(self._pending)]
        self._pending = {}
        if not parts:
            return None
        if len(parts) == 1:
            return parts[0]
        candidates = torch.stack([part.candidates for part in parts], dim=2).flatten(1, 2)  # interleaved
        is_key = torch.stack([part.is_key for part in parts], dim=1).flatten()
        kept = parts[0].candidates.shape[1]
        counts, sums = sum(part.count for part in parts), sum(part.sums for part in parts)
        return CodeStatistics(counts, sums, candidates[:, :kept], is_key[:kept])  # type: ignore[arg-type]

    @torch.no_grad()
    def update(self, statistics: CodeStatistics) -> None:
        """Updates the codebook with the statistics of a step, summed over processes. Without any key nothing
        changes."""
        old = Codebook(self.codebook, self.ema_count, self.ema_sum, self.num_updates)
        statistics = CodeStatistics(*(part.to(self.codebook) for part in statistics))
        new, revived = average_codebook(
            old,
            statistics,
            decay=self.decay,
            decay_warmup=self.decay_warmup,
            dead_code_threshold=self.dead_code_threshold,
        )
        if self.init != "random" and not self.has_started():
            first = start_codebook(old, statistics, self.init_iterations if self.init == "kmeans" else 0)
            is_first = self.num_updates == 0
            new = Codebook(*(torch.where(is_first, *pair) for pair in zip(first, new)))
            revived = torch.where(is_first, 0, revived)
        has_keys = statistics.count.sum() > 0
        for buffer, value in zip(old, new):
            buffer.copy_(torch.where(has_keys, value, buffer))
        revived = torch.where(has_keys, revived, 0)
        self._revived = revived if self._revived is None else self._revived + revived
        if torch.compiler.is_compiling():
            self._has_started = True

    def report(self) -> dict[str, Any]:
        """Health of the codebook.

        Returns:
            `perplexity` of each head and `relative_error` (mean square error of the keys over their mean square) of the last
            forward pass, None before it; `active_fraction` of the codewords above the threshold of revival; and
            `revived` codewords since the last report.
        """
        share = self.ema_count.mean(-1, keepdim=True)
        active = (self.ema_count >= self.dead_code_threshold * share).double().mean()
        used, error = (None, None) if self._last is None else (self._last[0].tolist(), float(self._last[1]))
        revived = 0 if self._revived is None else int(self._revived.sum())
        self._revived = None
        return {
            "perplexity": used,
            "active_fraction": float(active),
            "relative_error": error,
            "revived": revived,
            "num_updates": int(self.num_updates),
        }

    def version(self) -> tuple[int, int]:
        """Changes with the codebook, as far as PyTorch counts changes of the tensor."""
        codebook = self.codebook
        return (codebook.data_ptr(), 0 if codebook.is_inference() else codebook._version)


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def update_quantizers(quantizers: Sequence[VectorQuantizer]) -> None:
    """Applies what the last training step stored in some layers; in a distributed run all processes must call it.

    All statistics of all layers travel in one sum over processes; each process has its own places among the candidates.
    """
    pending = [(quantizer, quantizer.take_pending()) for quantizer in quantizers]
    found = [(quantizer, statistics) for quantizer, statistics in pending if statistics is not None]
    if not found:
        return
    statistics = _sum_over_processes([part for _, part in found])
    for (quantizer, _), total in zip(found, statistics):
        quantizer.update(total)


def _sum_over_processes(statistics: list[CodeStatistics]) -> list[CodeStatistics]:
    world = _num_processes()
    if world == 1:
        return statistics
    rank, parts = dist.get_rank(), []
    for part in statistics:
        candidates = part.candidates.new_zeros(*part.candidates.shape[:2], world, part.candidates.shape[2])
        candidates[:, :, rank] = part.candidates
        is_key = part.is_key.new_zeros(len(part.is_key), world)
        is_key[:, rank] = part.is_key
        parts += [part.count, part.sums, candidates.flatten(1, 2), is_key.flatten()]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    pieces = iter(flat.split([part.numel() for part in parts]))
    restored = [piece.view(part.shape) for piece, part in zip(pieces, parts)]
    return [CodeStatistics(*restored[index : index + 4]) for index in range(0, len(restored), 4)]


class _PlainInit:
    """The initialiser that `initialize` needs; loaded values are overwritten."""

    @staticmethod
    def copy_(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(other)

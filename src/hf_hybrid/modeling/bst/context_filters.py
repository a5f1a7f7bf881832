"""Causal filters whose outputs are context states: F filters per channel, at every token or at the ends of blocks only.

Each output is Y_t = sum_k K_k u_{t-k} + D u_t, per channel and filter, without activation or projection. Three kinds share one
interface: diagonal state spaces, state spaces of diagonal plus low rank (both of unlimited reach, with a state whose size
does not depend on F), and explicit filters of finite length (whose state is the past inputs they reach).

In a call, the real tokens of a row are its first ones and the others are zero; see `ops.block_state`.

Shape letters: B batch, T tokens, D channels, F filters per channel, N state size, M = N / 2 modes, K block ends, L filter length.
Reference: arXiv 2306.09539.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.full_precision import KeepsFullPrecision
from ...layers.kept_results import KeepsResults, KeptResults, keeping
from ...layers.ssm import StateSpaceLayer
from ...ops.autocast import without_autocast
from ...ops.block_state import Start, writable
from ...ops.branches import uses_cpu_form, widest_float
from ...ops.diagonal_scan import block_divisor, decayed_state, diagonal_block_states, diagonal_scan
from ...ops.diagonal_ssm import (
    DiagonalSystem,
    complex_multiply,
    diagonal_final_state,
    discretize_zoh,
    initial_state_response,
    step_decay,
    system_kernel,
)
from ...ops.fft_conv import causal_fft_conv
from ...ops.full_products import full_matmul
from ...ops.input_history import InputHistory
from ...ops.s4 import DenseSystem, dplr_advance, dplr_block_states, dplr_dense, dplr_step
from ...ops.sequence_group import SequenceGroup
from ...ops.sequence_states import entering_dense_state, entering_state
from ...ops.windowed_filter import filtered_block_ends, lag_features, windowed_filters

_GROUP = 32  # tokens per group where only a final state is wanted


def _shifted(inputs: torch.Tensor, shift: torch.Tensor, columns: int) -> torch.Tensor:
    """(B, D, T) moved by `shift` (B,) columns to the right, cut or filled with zeros to `columns`."""
    index = torch.arange(columns, device=inputs.device) - shift.unsqueeze(1)
    inside = (index >= 0) & (index < inputs.shape[-1])
    index = index.clamp(0, inputs.shape[-1] - 1).unsqueeze(1).expand(-1, inputs.shape[1], -1)
    return inputs.gather(2, index) * inside.unsqueeze(1)


def _block_aligned(inputs: torch.Tensor, start: Start, block_size: int) -> tuple[torch.Tensor, Start, int]:
    """(B, D, T) moved to the right so that blocks begin at multiples of W; the tokens moved; and the whole blocks now there."""
    phase, length = start % block_size, inputs.shape[-1]
    if isinstance(phase, int):
        return F.pad(inputs, (phase, 0)), phase, (phase + length) // block_size
    columns = length + block_size - 1
    return _shifted(inputs, phase, columns), phase, columns // block_size


class ContextFilters(nn.Module):
    """Common part of the three kinds; everything that reads their tensors runs inside a call of the module.

    A kind defines `_run`, `_advance`, `_read_token` and `_entering`, the state that enters the piece of a text which this process
    holds.
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def forward(
        self,
        hidden_states: torch.Tensor,
        initial_state: Any = None,
        return_state: bool = False,
        counts: torch.Tensor | None = None,
        block_size: int | None = None,
        start: Start = 0,
        *,
        kept: KeptResults | None = None,
        token: str | None = None,
        valid: torch.Tensor | None = None,
        is_block_end: bool = False,
    ) -> Any:
        """Outputs at every token, or at the ends of blocks.

        Args:
            hidden_states: (B, T, D); zeros after the real tokens of a row.
            initial_state: state after the tokens of earlier calls, or None at the start.
            return_state: also return the state after the last real token.
            counts: (B,) real tokens of each row; None: all.
            block_size: W, for outputs at the ends of blocks only, namely of all blocks that may end in this call.
            start: tokens of earlier calls, of all rows or (B,); needed with `block_size` only.
            kept: results kept from earlier calls of the same generation, reused and extended; None keeps nothing.
            token: "advance" or "read", for a single token: see the methods of these names, also for `valid` and
                `is_block_end`.

        Returns:
            (B, F, D, T) or (B, K, F, D), in float32 or better; and the state, or None.
        """
        with keeping(kept), without_autocast(hidden_states.device):
            if token == "advance":
                return self._advance(hidden_states, initial_state, valid)
            if token == "read":
                return self._read_token(hidden_states, initial_state, is_block_end)
            if self.sequence_group is not None:
                initial_state = self._entering(hidden_states, self.sequence_group)
            return self._run(hidden_states, initial_state, return_state, counts, block_size, start)

    def advance(self, hidden_states: torch.Tensor, state: Any, valid: torch.Tensor | None = None) -> Any:
        """State after one token (B, 1, D); rows that are not `valid` (B,) keep theirs."""
        return self(hidden_states, state, token="advance", valid=valid)

    def read(self, hidden_states: torch.Tensor, state: Any, is_block_end: bool = False) -> torch.Tensor:
        """Outputs (B, F, D) at the token (B, 1, D) that the state was advanced by last."""
        return self(hidden_states, state, token="read", is_block_end=is_block_end)

    def _no_block_ends(self, inputs: torch.Tensor, num_filters: int) -> torch.Tensor:
        """(B, 0, F, D) of inputs (B, D, T); every parameter takes part, as distributed wrappers wait for its gradient."""
        empty = inputs.new_zeros(inputs.shape[0], 0, num_filters, inputs.shape[1])
        if not torch.is_grad_enabled():
            return empty
        return empty + sum(parameter.flatten()[:0].sum() for parameter in self.parameters())


class DiagonalFilters(ContextFilters, KeepsFullPrecision, KeepsResults):
    """Diagonal state spaces (S4D, arXiv 2206.11893), zero-order hold; the F filters of a channel share its state.

    Tensors: `log_dt` (D,), `log_A_real` and `A_imag` (D, M) with A = -exp(log_A_real) + i A_imag, `C` (F, D, M, 2) and `D` (F, D), in
    float32 or better whatever the model is cast to. The state is (B, D, M, 2).

    Args:
        hidden_size: D.
        num_filters: F.
        state_size: N, even.
        dt_min, dt_max: range of the initial step sizes (log-uniform).
    """

    def __init__(
        self, hidden_size: int, num_filters: int, state_size: int, *, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        super().__init__()
        if state_size < 2 or state_size % 2:
            raise ValueError(f"`state_size` must be even and at least 2 (modes come in pairs); got {state_size}.")
        self.hidden_size, self.num_filters, self.state_size = hidden_size, num_filters, state_size
        self.dt_min, self.dt_max = dt_min, dt_max
        modes, dtype = state_size // 2, torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.log_dt = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
        self.log_A_real = nn.Parameter(torch.empty(hidden_size, modes, dtype=dtype))
        self.A_imag = nn.Parameter(torch.empty(hidden_size, modes, dtype=dtype))
        self.C = nn.Parameter(torch.empty(num_filters, hidden_size, modes, 2, dtype=dtype))
        self.D = nn.Parameter(torch.empty(num_filters, hidden_size, dtype=dtype))

    @torch.no_grad()
    def initialize(self, init: ModuleType) -> None:
        """Initial values (S4D-Lin) through `transformers.initialization`, which leaves loaded tensors alone."""
        init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        init.constant_(self.log_A_real, math.log(0.5))
        frequencies = math.pi * torch.arange(self.state_size // 2, dtype=self.A_imag.dtype, device=self.A_imag.device)
        init.copy_(self.A_imag, frequencies.expand(self.A_imag.shape))
        init.normal_(self.C, std=math.sqrt(0.5))
        init.normal_(self.D)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, num_filters={self.num_filters}, state_size={self.state_size}"

    def system(self) -> DiagonalSystem:
        """Discretised system, formed in float64: decays stay so, coefficients are rounded to working precision."""
        dtype = self.C.dtype
        wide = widest_float(self.C)
        dt = torch.exp(self.log_dt.to(wide)).unsqueeze(-1)
        decay_real, decay_imag, input_real, input_imag = discretize_zoh(
            -torch.exp(self.log_A_real.to(wide)), self.A_imag.to(wide), dt
        )
        output = 2 * self.C
        return DiagonalSystem(
            decay_real, decay_imag, input_real.to(dtype), input_imag.to(dtype), output[..., 0], output[..., 1]
        )

    def kernel(self, length: int) -> torch.Tensor:
        """K at lags 0 to `length` - 1, without the direct term: (F, D, length)."""
        return system_kernel(self._cached("system", self.system), length)

    def _step_decay(self) -> tuple[torch.Tensor, torch.Tensor]:
        return step_decay(self._cached("system", self.system))

    def _constants(self) -> dict[str, Callable[[], Any]]:
        return {"system": self.system, "decay": self._step_decay}

    def _run(
        self,
        hidden_states: torch.Tensor,
        initial_state: torch.Tensor | None,
        return_state: bool,
        counts: torch.Tensor | None,
        block_size: int | None,
        start: Start,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = hidden_states.transpose(1, 2).to(self.C.dtype)  # (B, D, T)
        system = self._cached("system", self.system)
        if block_size is not None:
            return self._block_ends(inputs, system, initial_state, return_state, counts, block_size, start)
        if uses_cpu_form(inputs) and not torch.compiler.is_compiling():
            outputs, state = diagonal_scan(inputs, system, initial_state, feedthrough=self.D)
        else:
            kernel = system_kernel(system, inputs.shape[-1])
            outputs = causal_fft_conv(inputs.unsqueeze(1), kernel) + self.D.unsqueeze(-1) * inputs.unsqueeze(1)
            if initial_state is not None:
                outputs = outputs + initial_state_response(system, initial_state, inputs.shape[-1])
            state = diagonal_final_state(inputs, system, initial_state) if return_state else None
        if counts is not None and return_state:
            state = self._last_state(inputs, system, initial_state, counts)
        return outputs, state if return_state else None

    def _entering(self, hidden_states: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        inputs = hidden_states.transpose(1, 2).to(self.C.dtype)
        return entering_state(inputs, self._cached("system", self.system), group)

    def _last_state(
        self,
        inputs: torch.Tensor,
        system: DiagonalSystem,
        initial_state: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        """State after the last real token of every row: the rows are moved to the right, so that they end together."""
        length = inputs.shape[-1]
        state = diagonal_final_state(_shifted(inputs, length - counts, length), system)
        return state if initial_state is None else state + decayed_state(initial_state, system, counts)

    def _block_ends(self, inputs, system, initial_state, return_state, counts, block_size, start):
        aligned, phase, num_blocks = _block_aligned(inputs, start, block_size)
        ends, states = self._no_block_ends(inputs, self.num_filters), None
        if num_blocks:
            entering = None
            if initial_state is not None:
                entering = decayed_state(initial_state, system, block_size - phase)
            is_loop_slow = not uses_cpu_form(inputs) or torch.compiler.is_compiling()
            aligned = aligned[..., : num_blocks * block_size]
            size = block_size if is_loop_slow else None
            states = diagonal_block_states(aligned, system, block_size, entering, group_size=size)
            last = aligned[..., block_size - 1 :: block_size].transpose(1, 2)  # (B, K, D)
            ends = self._read(states.flatten(0, 1), last.flatten(0, 1)).unflatten(0, last.shape[:2])
        if not return_state:
            return ends, None
        if counts is not None or isinstance(phase, torch.Tensor):
            counts = torch.full_like(inputs[:, 0, 0], inputs.shape[-1], dtype=torch.long) if counts is None else counts
            return ends, self._last_state(inputs, system, initial_state, counts)
        state = initial_state if states is None else states[:, -1]
        rest = inputs[..., num_blocks * block_size - phase if num_blocks else 0 :]
        return ends, diagonal_final_state(rest, system, state) if rest.shape[-1] else state

    def _read(self, states: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs of states (X, D, M, 2) whose last input was (X, D): (X, F, D)."""
        weight = torch.stack([self.C[..., 0], -self.C[..., 1]], dim=-1).flatten(2)  # (F, D, N)
        outputs = 2 * full_matmul(states.flatten(2).transpose(0, 1), weight.permute(1, 2, 0)).permute(1, 2, 0)
        return outputs + self.D * inputs.unsqueeze(1)

    def _advance(
        self, hidden_states: torch.Tensor, state: torch.Tensor | None, valid: torch.Tensor | None
    ) -> torch.Tensor:
        inputs = hidden_states[:, 0].to(self.C.dtype).unsqueeze(-1)
        system = self._cached("system", self.system)
        before = inputs.new_zeros(*inputs.shape[:2], self.state_size // 2, 2) if state is None else state
        decay = self._cached("decay", self._step_decay)
        real, imag = complex_multiply(before[..., 0], before[..., 1], *decay)
        after = torch.stack([real + system.input_real * inputs, imag + system.input_imag * inputs], dim=-1)
        return after if valid is None else torch.where(valid[:, None, None, None], after, before)

    def _read_token(self, hidden_states: torch.Tensor, state: torch.Tensor, is_block_end: bool) -> torch.Tensor:
        return self._read(state, hidden_states[:, 0].to(self.C.dtype))


class DplrFilters(ContextFilters, StateSpaceLayer):
    """State spaces of diagonal plus low rank (S4, arXiv 2111.00396) with the interface of `DiagonalFilters`.

    Tensors are those of `StateSpaceLayer` with `ssm_type="s4"` and F channels.
    """

    def __init__(
        self, hidden_size: int, num_filters: int, state_size: int, *, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        super().__init__(hidden_size, state_size, ssm_type="s4", channels=num_filters, dt_min=dt_min, dt_max=dt_max)

    def _run(
        self,
        hidden_states: torch.Tensor,
        initial_state: torch.Tensor | None,
        return_state: bool,
        counts: torch.Tensor | None,
        block_size: int | None,
        start: Start,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_states = hidden_states.to(self._math_dtype)
        inputs, state = hidden_states.transpose(1, 2), None
        if block_size is None:
            outputs, state = StateSpaceLayer.forward(self, hidden_states, initial_state, return_state)
            outputs = outputs.transpose(1, 2).unflatten(1, (self.channels, -1))
        else:
            outputs = self._block_ends(inputs, initial_state, block_size, start)
        if return_state and (counts is not None or block_size is not None):
            state = self._last_state(inputs, initial_state, counts)
        return outputs, state

    def _entering(self, hidden_states: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        return entering_dense_state(hidden_states.transpose(1, 2).to(self._math_dtype), self._dense(), group)

    def _compute_dense(self) -> DenseSystem:
        return dplr_dense(self.dplr_system(self._wide_dtype))

    def _compute_output(self) -> torch.Tensor:
        return self.raw_c().to(self._math_dtype)

    def _constants(self) -> dict[str, Callable[[], Any]]:
        return {**super()._constants(), "dense": self._compute_dense, "output": self._compute_output}

    def _dense(self) -> DenseSystem:
        return self._cached("dense", self._compute_dense)

    def _last_state(
        self, inputs: torch.Tensor, initial_state: torch.Tensor | None, counts: torch.Tensor | None
    ) -> torch.Tensor:
        length = inputs.shape[-1]
        columns = -(-length // _GROUP) * _GROUP
        if counts is None:
            counts = torch.full_like(inputs[:, 0, 0], length, dtype=torch.long)
            inputs = F.pad(inputs, (columns - length, 0))
        else:
            inputs = _shifted(inputs, columns - counts, columns)
        state = dplr_block_states(inputs, self._dense(), columns, group_size=_GROUP)[:, 0]
        if initial_state is None:
            return state
        return state + dplr_advance(initial_state.to(state.dtype), self._dense(), counts, length)

    def _block_ends(
        self, inputs: torch.Tensor, initial_state: torch.Tensor | None, block_size: int, start: Start
    ) -> torch.Tensor:
        aligned, phase, num_blocks = _block_aligned(inputs, start, block_size)
        if not num_blocks:
            return self._no_block_ends(inputs, self.channels)
        entering = None
        if initial_state is not None:
            rest = block_size - phase
            if isinstance(rest, int):
                rest = torch.full_like(inputs[:, 0, 0], rest, dtype=torch.long)
            entering = dplr_advance(initial_state.to(inputs.dtype), self._dense(), rest, block_size)
        aligned = aligned[..., : num_blocks * block_size]
        size = block_divisor(block_size)
        states = dplr_block_states(aligned, self._dense(), block_size, entering, group_size=size)
        last = aligned[..., block_size - 1 :: block_size].transpose(1, 2)
        return self._read(states.flatten(0, 1), last.flatten(0, 1)).unflatten(0, last.shape[:2])

    def _read(self, states: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        output = self._cached("output", self._compute_output)
        weight = torch.stack([output[..., 0], -output[..., 1]], dim=-1).flatten(2)  # (F, D, N)
        outputs = 2 * full_matmul(states.flatten(2).transpose(0, 1), weight.permute(1, 2, 0)).permute(1, 2, 0)
        return outputs + self.D * inputs.unsqueeze(1)

    def _advance(
        self, hidden_states: torch.Tensor, state: torch.Tensor | None, valid: torch.Tensor | None
    ) -> torch.Tensor:
        inputs = hidden_states[:, 0].to(self._math_dtype)
        constants = self._cached("step", self._step_constants)
        constants = constants._replace(outputs=constants.outputs[:1])  # not used
        after = dplr_step(inputs, constants, None if state is None else state.to(inputs.dtype))[1]
        if valid is None:
            return after
        before = torch.zeros_like(after) if state is None else state
        return torch.where(valid[:, None, None, None], after, before)

    def _read_token(self, hidden_states: torch.Tensor, state: torch.Tensor, is_block_end: bool) -> torch.Tensor:
        return self._read(state, hidden_states[:, 0].to(self._math_dtype))


class _FilterProjection(KeepsFullPrecision):
    """Holds `weight` (F D, E) and `bias` (F D,), row f D + j: not a linear map of activations, so not an
    `nn.Linear`."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype))

    def forward(self, function: Callable[..., torch.Tensor], num_filters: int) -> torch.Tensor:
        """`function` of the weight (F, D, E) and the bias (F, D)."""
        return function(self.weight.unflatten(0, (num_filters, -1)), self.bias.unflatten(0, (num_filters, -1)))


class ExplicitFilters(ContextFilters, KeepsFullPrecision, KeepsResults):
    """Explicitly parametrised filters of finite length, with the interface of `DiagonalFilters` (`ops.windowed_filter`).

    Tensors: `filter_proj.weight` (F D, E), `filter_proj.bias` (F D,), `D` (F, D) and the buffer `alpha` (D,), in float32 or better.
    The state is an `InputHistory`.

    Args:
        hidden_size: D.
        num_filters: F.
        length: L, in tokens, at least 2.
        feature_size: E, even.
        base: base of the geometric frequencies.
    """

    alpha: torch.Tensor

    def __init__(
        self, hidden_size: int, num_filters: int, length: int, *, feature_size: int = 64, base: float = 10000.0
    ) -> None:
        super().__init__()
        if length < 2 or feature_size < 2 or feature_size % 2:
            raise ValueError(
                f"`length` must be at least 2 and `feature_size` even and at least 2; got {length} and {feature_size}."
            )
        self.hidden_size, self.num_filters, self.length = hidden_size, num_filters, length
        self.feature_size, self.base = feature_size, base
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.filter_proj = _FilterProjection(num_filters * hidden_size, feature_size, dtype)
        self.D = nn.Parameter(torch.empty(num_filters, hidden_size, dtype=dtype))
        self.register_buffer("alpha", torch.empty(hidden_size, dtype=dtype))

    @torch.no_grad()
    def initialize(self, init: ModuleType) -> None:
        """Filters of unit expected energy, with decays exp(-alpha) from 1 / 20 down to 2e-7 over their length."""
        like: dict[str, Any] = {"dtype": self.alpha.dtype, "device": self.alpha.device}
        alpha = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, self.hidden_size, **like)
        init.copy_(self.alpha, alpha)
        steps = torch.arange(self.length, **like) / (self.length - 1)
        energy = torch.exp(-2 * alpha.unsqueeze(1) * steps).sum(1)
        std = (2 / (self.feature_size * energy)).sqrt().repeat(self.num_filters).unsqueeze(1)
        init.copy_(self.filter_proj.weight, torch.randn_like(self.filter_proj.weight) * std)
        init.zeros_(self.filter_proj.bias)
        init.normal_(self.D)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, num_filters={self.num_filters}, length={self.length}, features={self.feature_size}"
        )

    def _own_tensors(self) -> list[Any]:
        return [*super()._own_tensors(), *self.filter_proj.parameters()]

    def _features(self) -> torch.Tensor:
        return lag_features(
            self.length, self.feature_size, self.base, device=self.alpha.device, dtype=self.alpha.dtype
        )

    def _compute_filters(self) -> torch.Tensor:
        def compute(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return windowed_filters(weight, bias, self.alpha, self._features())

        return self.filter_proj(compute, self.num_filters)

    def _at_places(self, inputs: torch.Tensor, ends: range) -> torch.Tensor:
        """Outputs (B, K, F, D), without the direct term, at a few places of (B, D, X)."""

        def compute(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return filtered_block_ends(inputs, weight, bias, self.alpha, self._features(), ends)

        return self.filter_proj(compute, self.num_filters)

    def _constants(self) -> dict[str, Callable[[], Any]]:
        return {"filters": self._compute_filters}

    def filters(self) -> torch.Tensor:
        """(F, D, L)."""
        return self._cached("filters", self._compute_filters)

    def kernel(self, length: int) -> torch.Tensor:
        """As `DiagonalFilters.kernel`; zero beyond the reach."""
        return F.pad(self.filters()[..., :length], (0, max(0, length - self.length)))

    def _run(
        self,
        hidden_states: torch.Tensor,
        initial_state: InputHistory | None,
        return_state: bool,
        counts: torch.Tensor | None,
        block_size: int | None,
        start: Start,
    ) -> tuple[torch.Tensor, InputHistory | None]:
        inputs = hidden_states.transpose(1, 2).to(self.D.dtype)  # (B, D, T)
        before = 0 if initial_state is None else self.length
        known = inputs if initial_state is None else torch.cat([initial_state.last(self.length), inputs], dim=-1)
        if block_size is None:
            outputs = causal_fft_conv(known.unsqueeze(1), self.filters())[..., before:]
            outputs = outputs + self.D.unsqueeze(-1) * inputs.unsqueeze(1)
        else:
            outputs = self._block_ends(known, before, block_size, start)
        return outputs, self._history_after(known, inputs.shape[-1], counts) if return_state else None

    def _entering(self, hidden_states: torch.Tensor, group: SequenceGroup) -> InputHistory:
        inputs = hidden_states.transpose(1, 2).to(self.D.dtype)
        if inputs.shape[-1] < self.length:
            raise ValueError(
                f"Each process holds {inputs.shape[-1]} tokens of the text, but the filters reach {self.length} tokens back: use "
                "fewer processes, longer texts, or a smaller `ssm_filter_length`."
            )
        return InputHistory.of(group.shift(inputs[..., -self.length :], 1))

    def _block_ends(self, known: torch.Tensor, before: int, block_size: int, start: Start) -> torch.Tensor:
        aligned, phase, _ = _block_aligned(known, start, block_size)
        blocks = (aligned.shape[-1] - before) // block_size
        if blocks == 0:
            return self._no_block_ends(known, self.num_filters)
        first = before + block_size - 1
        ends = range(first, first + blocks * block_size, block_size)
        last = aligned[..., first::block_size].transpose(1, 2).unsqueeze(2)  # (B, K, 1, D)
        return self._at_places(aligned, ends) + self.D * last

    def _history_after(self, known: torch.Tensor, length: int, counts: torch.Tensor | None) -> InputHistory:
        padded = F.pad(known, (max(0, self.length + length - known.shape[-1]), 0))
        if counts is None:
            past = padded[..., -self.length :]
        else:
            index = counts.unsqueeze(1) + torch.arange(self.length, device=known.device)
            past = padded.gather(2, index.unsqueeze(1).expand(-1, known.shape[1], -1))
        return InputHistory.of(past)

    def _advance(
        self, hidden_states: torch.Tensor, state: InputHistory | None, valid: torch.Tensor | None
    ) -> InputHistory:
        """The given history is changed in place where nothing else needs it."""
        inputs = hidden_states.transpose(1, 2).to(self.D.dtype)  # (B, D, 1)
        if state is None:
            state = InputHistory.of(inputs.new_zeros(*inputs.shape[:2], self.length))
        if valid is not None:
            known = torch.cat([state.last(self.length), inputs], dim=-1)
            return self._history_after(known, 1, valid.long())
        if state.is_full:
            state = InputHistory.of(state.last(self.length))
        buffer = writable(state.inputs, inputs)
        buffer[..., self.length + state.filled] = inputs[..., 0]
        return InputHistory(buffer, self.length, state.filled + 1, state.ahead)

    def _read_token(self, hidden_states: torch.Tensor, state: InputHistory, is_block_end: bool) -> torch.Tensor:
        """Outputs at one token.

        At the end of a block the filters are not computed; otherwise the effect of the inputs before the anchor is
        computed for P tokens at once, by one FFT, and only the inputs since then are summed for each.
        """
        direct = self.D * hidden_states.to(self.D.dtype)  # (B, F, D)
        if is_block_end or state.filled == 0:
            ends = range(self.length - 1, self.length)
            return self._at_places(state.last(self.length), ends)[:, 0] + direct
        filters, recent = self.filters(), state.last(state.filled)
        if state.ahead is None:
            past = F.pad(state.inputs[..., : self.length], (0, state.inputs.shape[-1] - self.length))
            state.ahead = causal_fft_conv(past.unsqueeze(1), filters)[..., self.length :]
        taps = filters[..., : state.filled].flip(-1)
        return state.ahead[..., state.filled - 1] + torch.einsum("bdk,fdk->bfd", recent, taps) + direct

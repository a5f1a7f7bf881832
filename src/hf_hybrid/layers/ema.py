"""Multi-dimensional damped exponential moving average, the part of Mega that mixes tokens along the sequence.

Every feature is expanded to N components, each averaged with its own decay, and projected back (arXiv 2209.10655, Eq. 4-6):

    h_t = q h_{t-1} + p beta u_t,   y_t = gamma / sqrt(N) . h_t,   p = sigmoid(delta),  q = 1 - p sigmoid(alpha)
    outputs_t = silu(y_t + omega x_t)

with u = x zeroed at padding, while the residual uses x unchanged. A bidirectional layer has a second set of components
for the reversed sequence, and the current token enters through both. With truncation tau, only the last tau tokens
count.

Shape letters: B batch, L tokens, D features, N components, K = D rows of parameters, or 2D: forward, then backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.autocast import without_autocast
from ..ops.branches import uses_cpu_form, widest_float
from ..ops.diagonal_scan import diagonal_scan
from ..ops.diagonal_ssm import (
    DiagonalSystem,
    diagonal_final_state,
    diagonal_step,
    initial_state_response,
    split_rows,
    step_decay,
    system_kernel,
)
from ..ops.export_shapes import is_open
from ..ops.fft_conv import bidirectional_fft_conv, causal_fft_conv
from ..ops.layout import to_signals, to_states
from ..ops.sequence_group import SequenceGroup
from ..ops.sequence_states import entering_state
from .full_precision import GathersFullPrecision
from .kept_results import KeepsResults, KeptResults, keeping

# Tokens from which the grouped scan beats computing a kernel and convolving by FFT, forward and backward on CPU. Time of
# the FFT over that of the scan, D 512, N 16, one thread: 0.9 at 256 tokens, 1.4 at 512, 2.2 at 1,024, 3.9 at 4,096; in
# both directions 0.7, 0.9, 1.3, 2.3; a little earlier for batches of narrower layers.
_SCAN_LENGTH = 256
_SCAN_LENGTH_BIDIRECTIONAL = 512
_GROUP_SIZE = 32  # tokens per group of the scan: the best of 16 to 128 from 512 to 16,384 tokens

EmaState = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class MultiDimensionalDampedEma(GathersFullPrecision, KeepsResults):
    """Damped moving average with N components per feature, its residual and its activation.

    Tensors, under their names in Transformers 4.x: `damping_factor` (delta), `decay_factor` (alpha),
    `ema_expansion_matrix` (beta), each (K, N, 1); `kernel_projection_matrix` (gamma, K, N); `residual_weight` (omega, D).
    The computation is in float32 or better whatever their dtype; a half-precision kernel would be off by half.

    The state is (B, D, N). With truncation it is a pair of that and the last tau inputs (B, D, tau), oldest first. Both
    are float32 or better.

    Args:
        hidden_size: D.
        ema_size: N.
        bidirectional: average over the future too; such a layer has no state.
        truncation: tau, reach in tokens, the current one included; None for no limit.
        activate: apply the silu.

    Raises:
        ValueError: a size is not positive.
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def __init__(
        self,
        hidden_size: int,
        ema_size: int = 16,
        *,
        bidirectional: bool = False,
        truncation: int | None = None,
        activate: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or ema_size < 1:
            raise ValueError(f"`hidden_size` and `ema_size` must be positive; got {hidden_size} and {ema_size}.")
        if truncation is not None and truncation < 1:
            raise ValueError(f"`truncation` must be a positive number of tokens, or None; got {truncation}.")
        self.hidden_size, self.ema_size = hidden_size, ema_size
        self.bidirectional, self.truncation, self.activate = bidirectional, truncation, activate
        rows = 2 * hidden_size if bidirectional else hidden_size
        self.damping_factor = nn.Parameter(torch.empty(rows, ema_size, 1))
        self.decay_factor = nn.Parameter(torch.empty(rows, ema_size, 1))
        self.ema_expansion_matrix = nn.Parameter(torch.empty(rows, ema_size, 1))
        self.kernel_projection_matrix = nn.Parameter(torch.empty(rows, ema_size))
        self.residual_weight = nn.Parameter(torch.empty(hidden_size))
        self.initialize(_PlainInit)

    @torch.no_grad()
    def initialize(
        self,
        init: ModuleType | type,
        *,
        delta_alpha_range: float = 0.2,
        beta_range: float = 0.02,
        gamma_omega_range: float = 1.0,
    ) -> None:
        """Write initial values through `init.normal_` and `init.copy_`; the ranges are standard deviations.

        The expansion alternates between 1 and -1 over the components, plus noise. With `transformers.initialization`,
        tensors loaded from a checkpoint stay as they are.
        """
        init.normal_(self.damping_factor, mean=0.0, std=delta_alpha_range)
        init.normal_(self.decay_factor, mean=0.0, std=delta_alpha_range)
        signs = torch.ones(self.ema_size, 1)
        signs[1::2] = -1
        noise = beta_range * torch.randn(self.ema_expansion_matrix.shape)
        init.copy_(self.ema_expansion_matrix, (signs + noise).to(self.ema_expansion_matrix))
        init.normal_(self.kernel_projection_matrix, mean=0.0, std=gamma_omega_range)
        init.normal_(self.residual_weight, mean=0.0, std=gamma_omega_range)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.ema_size}, bidirectional={self.bidirectional}, truncation={self.truncation}"

    # ------------------------------------------------------------------------------------------------------- system

    @property
    def _math_dtype(self) -> torch.dtype:
        return torch.promote_types(self.damping_factor.dtype, torch.float32)

    def system(self) -> DiagonalSystem:
        """The K x N recurrences: decays in float64 (long kernels need it), coefficients in working precision."""
        return self._cached("system", self._compute_system)

    def _compute_system(self) -> DiagonalSystem:
        dtype = self._math_dtype
        wide = widest_float(self.damping_factor)
        damping = torch.sigmoid(self.damping_factor.to(wide)).squeeze(-1)
        loss = damping * torch.sigmoid(self.decay_factor.to(wide)).squeeze(-1)  # 1 - q
        log_decay = torch.log1p(-loss.clamp(max=1 - torch.finfo(wide).eps))  # q = 0 has no logarithm
        inputs = damping * self.ema_expansion_matrix.to(wide).squeeze(-1)
        outputs = self.kernel_projection_matrix.to(dtype) / math.sqrt(self.ema_size)
        return DiagonalSystem(log_decay, None, inputs.to(dtype), None, outputs, None)

    def kernel(self, length: int) -> torch.Tensor:
        """Convolution kernel of the first `length` lags (fewer when truncated), (K, lags) from lag 0."""
        return system_kernel(self.system(), self._reach(length))

    def _reach(self, length: int) -> int:
        if self.truncation is None:
            return length
        return self.truncation if is_open(length) else min(length, self.truncation)

    def _constants(self) -> dict[str, Callable[[], Any]]:
        steps = {} if self.bidirectional else {"step": self._step_constants}
        return {"system": self._compute_system, **steps}

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        initial_state: EmaState | None = None,
        return_state: bool = False,
        kept: KeptResults | None = None,
    ) -> tuple[torch.Tensor, EmaState | None]:
        """Apply the layer to a sequence, or to the next piece of one.

        Args:
            hidden_states: (B, L, D).
            mask: (B, L), nonzero at tokens, zero at padding; None = no padding.
            initial_state: state after the previous piece, or None at the start.
            return_state: also return the state after the last token. Every split of a sequence gives the same result.
            kept: results kept from earlier calls of the same generation, reused and extended; None keeps nothing.

        Returns:
            Outputs (B, L, D), activation included, in the dtype of the input; and the state, or None.

        Raises:
            ValueError: a state is given to, or asked of, a bidirectional layer, or shapes do not fit.
        """
        self._check_inputs(hidden_states, mask, initial_state, return_state)
        with keeping(kept), without_autocast(hidden_states.device):
            states = hidden_states.to(self._math_dtype)
            inputs = states if mask is None else states * mask.unsqueeze(-1).to(states.dtype)
            residual = self.residual_weight.to(states.dtype)
            if states.shape[1] == 1 and (return_state or initial_state is not None):
                outputs, state = self._step(inputs, initial_state)
                outputs = torch.addcmul(outputs, residual, states)
            else:
                # Without padding u = x, and the residual is one more weight of the current token.
                feedthrough = residual if mask is None else torch.zeros_like(residual)
                averages, state = self._averages(to_signals(inputs), feedthrough, initial_state, return_state)
                outputs = to_states(averages)
                outputs = outputs if mask is None else torch.addcmul(outputs, residual, states)
            outputs = (F.silu(outputs) if self.activate else outputs).to(hidden_states.dtype)
        return outputs, state if return_state else None

    def _averages(
        self, inputs: torch.Tensor, feedthrough: torch.Tensor, state: EmaState | None, return_state: bool
    ) -> tuple[torch.Tensor, EmaState | None]:
        """y + feedthrough * u, both (B, D, L), and the state after the last token."""
        system = self.system()
        if self.sequence_group is not None:
            return self._piece_average(inputs, system, feedthrough, self.sequence_group), None
        if self.bidirectional:
            return self._average(inputs, system, feedthrough), None
        if self.truncation is not None:
            return self._truncated_average(inputs, system, feedthrough, state, return_state)
        return self._causal_average(inputs, system, feedthrough, state, return_state)

    def step(
        self, hidden_states: torch.Tensor, state: EmaState | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, EmaState]:
        """One token, O(N) per feature: (B, 1, D) and a state -> output (B, 1, D) and the next state."""
        outputs, state = self(hidden_states, mask, state, return_state=True)
        return outputs, state

    def _uses_scan(self, inputs: torch.Tensor) -> bool:
        """Whether the grouped scan is faster than kernel and FFT: long inputs on a CPU, outside compiled graphs."""
        if not uses_cpu_form(inputs) or torch.compiler.is_compiling():
            return False
        return inputs.shape[-1] >= (_SCAN_LENGTH_BIDIRECTIONAL if self.bidirectional else _SCAN_LENGTH)

    def _average(self, inputs: torch.Tensor, system: DiagonalSystem, feedthrough: torch.Tensor) -> torch.Tensor:
        """As `_averages`, for a whole sequence without state."""
        length, features = inputs.shape[-1], self.hidden_size
        if self._uses_scan(inputs) and self._reach(length) == length:
            if not self.bidirectional:
                return diagonal_scan(inputs, system, feedthrough=feedthrough, group_size=_GROUP_SIZE)[0]
            forward, future = split_rows(system, features)
            feedthrough = feedthrough + (future.input_real * future.output_real).sum(-1)  # lag 0 counts twice
            future = future._replace(output_real=future.output_real * step_decay(future)[0])  # from lag -1 on
            return diagonal_scan(inputs, forward, backward=future, feedthrough=feedthrough, group_size=_GROUP_SIZE)[0]
        kernel = system_kernel(system, self._reach(length))
        if not self.bidirectional:
            return causal_fft_conv(inputs, _add_to_first(kernel, feedthrough))
        forward, backward = kernel.split(features)
        return bidirectional_fft_conv(inputs, _add_to_first(forward, feedthrough + backward[:, 0]), backward[:, 1:])

    def _piece_average(
        self, inputs: torch.Tensor, system: DiagonalSystem, feedthrough: torch.Tensor, group: SequenceGroup
    ) -> torch.Tensor:
        """As `_averages`, for the piece of a text that this process holds."""
        if self.truncation is not None:
            raise ValueError(
                "A moving average with `truncation` cannot read texts cut over processes: set it to None."
            )
        if not self.bidirectional:
            state = entering_state(inputs, system, group)
            return self._causal_average(inputs, system, feedthrough, state, return_state=False)[0]
        forward, future = split_rows(system, self.hidden_size)
        before, behind = entering_state(inputs, forward, group), entering_state(inputs, future, group, reverse=True)
        averages = self._average(inputs, system, feedthrough)
        averages = averages + initial_state_response(forward, before, inputs.shape[-1])
        return averages + initial_state_response(future, behind, inputs.shape[-1]).flip(-1)

    def _causal_average(
        self,
        inputs: torch.Tensor,
        system: DiagonalSystem,
        feedthrough: torch.Tensor,
        state: torch.Tensor | None,
        return_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_averages`, for the next piece of a sequence."""
        if self._uses_scan(inputs):
            return diagonal_scan(inputs, system, state, feedthrough=feedthrough, group_size=_GROUP_SIZE)
        averages = self._average(inputs, system, feedthrough)
        if state is not None:
            state = state.to(inputs.dtype)
            averages = averages + initial_state_response(system, state, inputs.shape[-1])
        return averages, diagonal_final_state(inputs, system, state) if return_state else None

    def _truncated_average(
        self,
        inputs: torch.Tensor,
        system: DiagonalSystem,
        feedthrough: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor] | None,
        return_state: bool,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """As `_causal_average`, where no output or state depends on tokens before the last tau."""
        length = inputs.shape[-1]
        window = inputs if state is None else torch.cat([state[1].to(inputs.dtype), inputs], dim=-1)
        averages = self._average(window, system, feedthrough)[..., window.shape[-1] - length :]
        if not return_state:
            return averages, None
        recent = window[..., -self.truncation :]
        ema = diagonal_final_state(recent, system)
        return averages, (ema, F.pad(recent, (self.truncation - recent.shape[-1], 0)))

    def _step(self, token: torch.Tensor, state: EmaState | None) -> tuple[torch.Tensor, EmaState]:
        """y (B, 1, D) of one token by the recurrence, and the next state."""
        system = self.system()
        decay, left = self._cached("step", self._step_constants)
        signal = token.transpose(1, 2)  # (B, D, 1)
        if self.truncation is None:
            outputs, state = diagonal_step(token[:, 0], system, state, decay)
            return outputs.unsqueeze(1), state
        if state is None:
            ema, recent = None, signal.new_zeros(*signal.shape[:2], self.truncation)
        else:
            ema, recent = (part.to(signal.dtype) for part in state)
            ema = ema - left * recent[..., :1]
        outputs, ema = diagonal_step(token[:, 0], system, ema, decay)
        return outputs.unsqueeze(1), (ema, torch.cat([recent[..., 1:], signal], dim=-1))

    def _step_constants(self) -> tuple[tuple[torch.Tensor, None], torch.Tensor | None]:
        """Decay per step; with truncation also the weight (D, N) in the state of the token about to leave it."""
        system = self.system()
        decay = step_decay(system)
        if self.truncation is None:
            return decay, None
        # It has decayed tau - 1 times, by the same factor as in the steps, rounding included.
        passed = decay[0].to(system.log_decay_real.dtype) ** (self.truncation - 1)
        return decay, system.input_real * passed.to(system.input_real.dtype)

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        state: EmaState | None,
        return_state: bool,
    ) -> None:
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.hidden_size or hidden_states.shape[1] == 0:
            raise ValueError(
                f"`hidden_states` must have shape (batch, length >= 1, {self.hidden_size}); "
                f"got {tuple(hidden_states.shape)}."
            )
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(f"`mask` must have shape {tuple(hidden_states.shape[:2])}; got {tuple(mask.shape)}.")
        if self.bidirectional and (return_state or state is not None):
            raise ValueError("A bidirectional moving average has no state: call it on whole sequences only.")
        if state is None:
            return
        expected = [(hidden_states.shape[0], self.hidden_size, self.ema_size)]
        if self.truncation is not None:
            expected.append((hidden_states.shape[0], self.hidden_size, self.truncation))
        found = [tuple(part.shape) for part in ([state] if isinstance(state, torch.Tensor) else state)]
        if found != expected:
            raise ValueError(f"The state must consist of tensors of shapes {expected}; got {found}.")


def _add_to_first(kernel: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """(D, lags) with (D,) added at lag 0."""
    return torch.cat([kernel[:, :1] + amount.unsqueeze(-1), kernel[:, 1:]], dim=-1)


class _PlainInit:
    """The two initialisers that `initialize` needs; loaded values are overwritten."""

    normal_ = staticmethod(nn.init.normal_)

    @staticmethod
    def copy_(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(other)

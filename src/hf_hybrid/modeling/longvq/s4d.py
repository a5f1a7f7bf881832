"""Diagonal state space model with its residual and activation, in place of a moving average (arXiv 2206.11893).

Every feature drives N / 2 complex modes with rates w = -exp(log_A_real) + i A_imag, discretised by zero-order hold:

    x_t = exp(dt w) x_{t-1} + (exp(dt w) - 1) / w u_t,   y_t = 2 Re sum_n C_n x_{t,n},   outputs_t = silu(y_t + omega x_t)

with u = x zeroed at padding. A bidirectional layer has a second set of modes for the reversed sequence, and the current token
enters through both.

Shapes: B batch, L tokens, D features, N / 2 modes, K = D rows of parameters, or 2D: forward, then backward.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.full_precision import KeepsFullPrecision
from ...layers.kept_results import KeepsResults, KeptResults, keeping
from ...ops.autocast import without_autocast
from ...ops.branches import uses_cpu_form, widest_float
from ...ops.diagonal_scan import diagonal_scan
from ...ops.diagonal_ssm import (
    DiagonalSystem,
    diagonal_final_state,
    diagonal_step,
    discretize_zoh,
    initial_state_response,
    split_rows,
    step_decay,
    system_kernel,
)
from ...ops.fft_conv import causal_fft_conv
from ...ops.layout import to_signals, to_states
from ...ops.sequence_group import SequenceGroup
from ...ops.sequence_states import entering_state

_SCAN_LENGTH = 1024  # tokens from which the scan beats computing a kernel and convolving, on CPU


class ActivatedS4D(KeepsFullPrecision, KeepsResults):
    """Diagonal state space model, residual and SiLU.

    Tensors: `log_dt` (K,), `log_A_real` and `A_imag` (K, N / 2), `C` (K, N / 2, 2) as pairs, `omega` (D,); float32 or better
    whatever the model is cast to. The state is (B, D, N / 2, 2).

    Args:
        hidden_size: D.
        state_size: N, even.
        bidirectional: read the future too; such a layer has no state.

    Raises:
        ValueError: a size is not positive, or N is odd.
    """

    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def __init__(self, hidden_size: int, state_size: int = 16, *, bidirectional: bool = False) -> None:
        super().__init__()
        if hidden_size < 1 or state_size < 2 or state_size % 2:
            raise ValueError(
                f"`hidden_size` must be positive and `state_size` even and positive; got {hidden_size}, {state_size}."
            )
        self.hidden_size, self.state_size, self.bidirectional = hidden_size, state_size, bidirectional
        rows, modes = (2 * hidden_size if bidirectional else hidden_size), state_size // 2
        self.log_dt = nn.Parameter(torch.empty(rows))
        self.log_A_real = nn.Parameter(torch.empty(rows, modes))
        self.A_imag = nn.Parameter(torch.empty(rows, modes))
        self.C = nn.Parameter(torch.empty(rows, modes, 2))
        self.omega = nn.Parameter(torch.empty(hidden_size))
        self.widen()
        self.initialize(_PlainInit)

    @torch.no_grad()
    def initialize(self, init: ModuleType | type) -> None:
        """Writes initial values; with `transformers.initialization`, loaded tensors stay as they are."""
        init.uniform_(self.log_dt, math.log(1e-3), math.log(1e-1))
        init.copy_(self.log_A_real, torch.full_like(self.log_A_real, math.log(0.5)))
        frequencies = math.pi * torch.arange(self.state_size // 2)
        init.copy_(self.A_imag, frequencies.expand(self.A_imag.shape).to(self.A_imag))
        init.normal_(self.C, std=math.sqrt(0.5))
        init.normal_(self.omega)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.state_size}, bidirectional={self.bidirectional}"

    def system(self) -> DiagonalSystem:
        """The K recurrences: decays in float64 (long kernels need it), coefficients in working precision."""
        return self._cached("system", self._compute_system)

    def kernel(self, length: int) -> torch.Tensor:
        """Convolution kernels at lags 0 to `length` - 1, without omega: (K, length)."""
        return system_kernel(self.system(), length)

    def _compute_system(self) -> DiagonalSystem:
        dtype = torch.promote_types(self.C.dtype, torch.float32)
        wide = widest_float(self.C)
        rate = -torch.exp(self.log_A_real.to(wide))
        dt = torch.exp(self.log_dt.to(wide)).unsqueeze(-1)
        decay_real, decay_imag, input_real, input_imag = discretize_zoh(rate, self.A_imag.to(wide), dt)
        output = 2 * self.C.to(dtype)
        return DiagonalSystem(
            decay_real, decay_imag, input_real.to(dtype), input_imag.to(dtype), output[..., 0], output[..., 1]
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        return_state: bool = False,
        kept: KeptResults | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Applies the layer to a sequence, or to the next piece of one.

        Args:
            hidden_states: (B, L, D).
            mask: (B, L), nonzero at tokens, zero at padding; None = no padding.
            initial_state: state after the previous piece, or None at the start.
            return_state: also return the state after the last token. Every split of a sequence gives the same result.
            kept: results kept from earlier calls of the same generation, reused and extended; None keeps nothing.

        Returns:
            Outputs (B, L, D) in the dtype of the input; and the state, or None.

        Raises:
            ValueError: a state is given to, or asked of, a bidirectional layer.
        """
        if self.bidirectional and (return_state or initial_state is not None):
            raise ValueError("A bidirectional state space layer has no state: call it on whole sequences only.")
        with keeping(kept), without_autocast(hidden_states.device):
            states = hidden_states.to(torch.promote_types(self.C.dtype, torch.float32))
            inputs = states if mask is None else states * mask.unsqueeze(-1).to(states.dtype)
            if states.shape[1] == 1 and return_state:
                system = self.system()
                decay = self._cached("step", lambda: step_decay(system))
                outputs, state = diagonal_step(inputs[:, 0], system, initial_state, decay)
                outputs = outputs.unsqueeze(1)
            else:
                outputs, state = self._run(to_signals(inputs), initial_state, return_state)
                outputs = to_states(outputs)
            outputs = F.silu(torch.addcmul(outputs, self.omega.to(states.dtype), states))
            return outputs.to(hidden_states.dtype), state

    def _run(
        self, inputs: torch.Tensor, state: torch.Tensor | None, return_state: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y (B, D, L) of u (B, D, L), and the state after the last token."""
        system, length = self.system(), inputs.shape[-1]
        if self.sequence_group is not None:
            state = self._entering_states(inputs, system, self.sequence_group)
        if self.bidirectional:
            inputs = torch.cat([inputs, inputs.flip(-1)], dim=1)
        if uses_cpu_form(inputs) and not torch.compiler.is_compiling() and length >= _SCAN_LENGTH:
            outputs, final = diagonal_scan(inputs, system, state)
        else:
            outputs = causal_fft_conv(inputs, system_kernel(system, length))
            if state is not None:
                outputs = outputs + initial_state_response(system, state.to(inputs.dtype), length)
            final = diagonal_final_state(inputs, system, state) if return_state else None
        if self.bidirectional:
            past, future = outputs.chunk(2, dim=1)
            outputs = past + future.flip(-1)
        return outputs, final if return_state else None

    def _entering_states(self, inputs: torch.Tensor, system: DiagonalSystem, group: SequenceGroup) -> torch.Tensor:
        """States (B, K, N / 2, 2) that enter the piece of this process from its beginning, and from its end."""
        if not self.bidirectional:
            return entering_state(inputs, system, group)
        past, future = split_rows(system, self.hidden_size)
        return torch.cat(
            [entering_state(inputs, past, group), entering_state(inputs, future, group, reverse=True)], dim=1
        )


class _PlainInit:
    """The initialisers that `initialize` needs; loaded values are overwritten."""

    normal_ = staticmethod(nn.init.normal_)
    uniform_ = staticmethod(nn.init.uniform_)

    @staticmethod
    def copy_(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(other)

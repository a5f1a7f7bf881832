"""State space layer: S4 (diagonal plus low rank) and S4D (diagonal), causal or two-sided, with an exact recurrence.

The layer is y = SSM(u) + D u and nothing else: no activation, no projection, no mask (zero the padded positions of the
input before calling it; results at real positions are then independent of padding on either side).

Shape letters: B batch, L tokens, H features, N state size, M = N/2 stored modes, S copies of (w, B, P), c channels.
References: S4, arXiv 2111.00396; S4D, arXiv 2206.11893; as used in SPADE, arXiv 2212.08136.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..ops.autocast import without_autocast
from ..ops.branches import takes_plain_form, uses_cpu_form, widest_float, without_transforms
from ..ops.diagonal_scan import diagonal_scan
from ..ops.diagonal_ssm import (
    DiagonalSystem,
    complex_multiply,
    diagonal_final_state,
    diagonal_step,
    discretize_bilinear,
    discretize_zoh,
    initial_state_response,
    step_decay,
    system_kernel,
)
from ..ops.export_shapes import is_open
from ..ops.fft_conv import bidirectional_fft_conv, causal_fft_conv
from ..ops.hippo import hippo_legs_dplr, s4d_init
from ..ops.s4 import (
    DplrBlocks,
    DplrStep,
    DplrSystem,
    dplr_blocks,
    dplr_dense,
    dplr_kernel,
    dplr_kernel_from_nodes,
    dplr_scan,
    dplr_state_response,
    dplr_step,
    dplr_step_constants,
    recover_c,
)
from ..ops.sequence_group import SequenceGroup
from ..ops.sequence_states import entering_dense_state, entering_state
from .full_precision import KeepsFullPrecision
from .kept_results import KeepsResults, KeptResults, keeping

logger = logging.get_logger(__name__)

_SCAN_LENGTH = 1024  # tokens from which the scan beats computing a kernel and convolving, measured on CPU
_SCAN_LENGTH_CACHED = 4096  # the same with the kernel at hand

_INITIAL_KINDS = {"s4": ("legs",), "s4d": ("legs", "lin", "inv", "real")}


class StateSpaceLayer(KeepsFullPrecision, KeepsResults):
    """State space model over the sequence axis, one single-input system per feature.

    Tensors (names of the official checkpoints): `D` (c, H); `C` (c or 2c, H, M, 2); `log_dt` (H,); `B` (1, S, M, 2);
    `P` (R, S, M, 2), s4 only; `inv_w_real` and `w_imag` (S, M) with w = -exp(inv_w_real) + i w_imag; and the integer
    buffer `kernel_length`: 0 when C is raw, or the length for which it is the truncated C-tilde. All stay in float32
    (or float64) whatever precision the model is cast to. Feature h uses copy h mod S.

    The state is (B, H, M, 2), float32 or better.

    Args:
        hidden_size: H.
        state_size: N, even.
        ssm_type: "s4" (diagonal plus low rank, bilinear) or "s4d" (diagonal).
        init: initial spectrum: "legs"; for "s4d" also "lin", "inv", "real".
        num_copies: S, a divisor of H; None for H.
        bidirectional: add a kernel over the future, starting at the next token; such a layer has no state.
        channels: c, outputs per feature.
        dt_min, dt_max: range of the initial step sizes (log-uniform).
        max_length: reach of the "s4" convolution in tokens; None for no limit. The recurrence is never truncated.
        trainable: False makes every tensor a persistent buffer.
        rank: R, number of low-rank terms ("s4").
        discretization: "zoh" or "bilinear" for "s4d"; "s4" is always bilinear.
        kernel_length: initial value of the buffer.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    kernel_length: torch.Tensor
    sequence_group: SequenceGroup | None = None  # processes that hold the other pieces of the texts

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 64,
        *,
        ssm_type: str = "s4d",
        init: str = "legs",
        num_copies: int | None = None,
        bidirectional: bool = False,
        channels: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        max_length: int | None = None,
        trainable: bool = True,
        rank: int = 1,
        discretization: str = "zoh",
        kernel_length: int = 0,
    ) -> None:
        super().__init__()
        num_copies = hidden_size if num_copies is None else num_copies
        _check_arguments(
            hidden_size,
            state_size,
            ssm_type,
            init,
            num_copies,
            channels,
            dt_min,
            dt_max,
            max_length,
            rank,
            discretization,
        )
        self.hidden_size, self.state_size, self.channels, self.rank = hidden_size, state_size, channels, rank
        self.ssm_type, self.init, self.num_copies, self.discretization = ssm_type, init, num_copies, discretization
        self.bidirectional, self.max_length, self.trainable = bidirectional, max_length, trainable
        self.dt_min, self.dt_max = dt_min, dt_max
        modes = state_size // 2
        self._register("D", channels, hidden_size)
        self._register("C", channels * (1 + bidirectional), hidden_size, modes, 2)
        self._register("log_dt", hidden_size)
        self._register("B", 1, num_copies, modes, 2)
        if ssm_type == "s4":
            self._register("P", rank, num_copies, modes, 2)
        self._register("inv_w_real", num_copies, modes)
        self._register("w_imag", num_copies, modes)
        self._initial_kernel_length = kernel_length
        self.register_buffer("kernel_length", torch.tensor(kernel_length, dtype=torch.int64))
        self._loads = 0
        self._length_read: tuple[tuple[int, ...], int] | None = None
        self.reset_parameters()

    def _register(self, name: str, *shape: int) -> None:
        """A trainable parameter or a persistent buffer, never in half precision."""
        value = torch.empty(*shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        if self.trainable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    # ------------------------------------------------------------------------------------------------ initial values

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        self.initialize(_PlainInit)

    @torch.no_grad()
    def initialize(self, init: ModuleType | type) -> None:
        """Write initial values through `init.normal_`, `init.uniform_` and `init.copy_`.

        With `transformers.initialization`, tensors loaded from a checkpoint stay as they are.
        """
        if self.log_dt.is_meta:
            return
        init.normal_(self.D)
        init.normal_(self.C, std=math.sqrt(0.5))
        init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        if self.ssm_type == "s4":
            rates, low_rank, inputs = hippo_legs_dplr(self.state_size)
            low_rank = torch.cat([low_rank, low_rank.new_zeros(self.rank - 1, *low_rank.shape[1:])])
            init.copy_(self.P, low_rank.unsqueeze(1).expand(self.P.shape).to(self.P))
        else:
            rates, inputs = s4d_init(self.init, self.state_size)
        init.copy_(self.B, inputs.expand(self.B.shape).to(self.B))
        inverse_real = torch.log(rates[:, 0].neg().clamp_min(1e-3))
        init.copy_(self.inv_w_real, inverse_real.expand(self.inv_w_real.shape).to(self.inv_w_real))
        init.copy_(self.w_imag, rates[:, 1].expand(self.w_imag.shape).to(self.w_imag))
        init.copy_(self.kernel_length, torch.full_like(self.kernel_length, self._initial_kernel_length))

    def extra_repr(self) -> str:
        text = f"{self.hidden_size}, {self.state_size}, ssm_type={self.ssm_type!r}, init={self.init!r}"
        text += f", num_copies={self.num_copies}, bidirectional={self.bidirectional}, max_length={self.max_length}"
        return text if self.trainable else text + ", frozen"

    # ------------------------------------------------------------------------------------------- precision and cache

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._loads += 1

    @property
    def _math_dtype(self) -> torch.dtype:
        return torch.promote_types(self.C.dtype, torch.float32)

    @property
    def _wide_dtype(self) -> torch.dtype:
        """Precision of the discretisation: the tensors are small, and phases of long kernels need it."""
        return widest_float(self.C)

    def _truncated_for(self) -> int:
        """Value of the `kernel_length` buffer as a Python number, read again when the buffer has changed."""
        if torch.compiler.is_compiling():
            return _read_length(self, self._loads)
        if takes_plain_form():
            return _length_of_all(self.kernel_length)
        buffer = self.kernel_length
        version = (id(buffer), buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version, self._loads)
        if self._length_read is None or self._length_read[0] != version:
            self._length_read = version, _read_length(self, self._loads)
        return self._length_read[1]

    # ------------------------------------------------------------------------------------------------------ systems

    def _tile(self, tensor: torch.Tensor) -> torch.Tensor:
        """(..., S, M) -> (..., H, M): feature h takes copy h mod S."""
        repeats = self.hidden_size // self.num_copies
        return tensor if repeats == 1 else tensor.repeat(*[1] * (tensor.dim() - 2), repeats, 1)

    def _tile_pairs(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([self._tile(part.to(dtype)) for part in tensor.unbind(-1)], dim=-1)

    def dplr_system(self, dtype: torch.dtype) -> DplrSystem:
        """Continuous system of every feature in a precision ("s4"): rates, P, B of (H, M, 2), dt of (H,), Λ - P P* as in HiPPO."""
        rates = torch.stack([-torch.exp(self.inv_w_real.to(dtype)), self.w_imag.to(dtype)], dim=-1)
        return DplrSystem(
            self._tile_pairs(rates, dtype),
            self._tile_pairs(self.P, dtype),
            self._tile_pairs(self.B, dtype)[0],
            torch.exp(self.log_dt.to(dtype)),
        )

    def diagonal_system(self) -> DiagonalSystem:
        """Discretised system ("s4d"), formed in float64: decays stay so, coefficients are rounded to working precision."""
        wide, dtype = self._wide_dtype, self._math_dtype
        rate_real = self._tile(-torch.exp(self.inv_w_real.to(wide)))
        rate_imag = self._tile(self.w_imag.to(wide))
        discretize = discretize_zoh if self.discretization == "zoh" else discretize_bilinear
        dt = torch.exp(self.log_dt.to(wide)).unsqueeze(-1)
        decay_real, decay_imag, unit_real, unit_imag = discretize(rate_real, rate_imag, dt)
        inputs = self._tile_pairs(self.B, wide)[0]
        input_real, input_imag = complex_multiply(inputs[..., 0], inputs[..., 1], unit_real, unit_imag)
        output = 2 * self.C.to(dtype)
        return DiagonalSystem(
            decay_real, decay_imag, input_real.to(dtype), input_imag.to(dtype), output[..., 0], output[..., 1]
        )

    def raw_c(self) -> torch.Tensor:
        """C, (c, H, M, 2) in float64; recovered from C-tilde when that is what is stored."""
        output = self.C.to(self._wide_dtype)
        truncated_for = self._truncated_for()
        return output if truncated_for == 0 else recover_c(output, self.dplr_system(self._wide_dtype), truncated_for)

    # ------------------------------------------------------------------------------------------------------- kernel

    def kernel(self, length: int) -> torch.Tensor:
        """Convolution kernel of the first `length` taps (fewer when the reach is shorter): (c or 2c, H, taps)."""
        limit = self.max_length if self.ssm_type == "s4" else None
        if self._frozen is not None and "longest kernel" in self._frozen:
            return self._frozen["longest kernel"]
        if is_open(length) and self.ssm_type == "s4":
            raise ValueError(
                "The kernel of an 's4' state space layer cannot be computed for a length that a graph leaves open: export through "
                "`hf_hybrid.export` a model whose `ssm_max_length` is set, or export with a fixed length."
            )
        reach = length if limit is None else min(length, limit)
        if not self._is_frozen or torch.compiler.is_compiling():
            return self._compute_kernel(reach)
        # Kept kernels have few different lengths. The prefix of a longer one differs in the last bits, so the length
        # must follow from `reach` alone: outputs would otherwise depend on the lengths seen before.
        kept = 1 << (reach - 1).bit_length()
        kept = kept if limit is None else min(kept, limit)
        kept = min(kept, self._truncated_for()) if reach <= self._truncated_for() else kept
        return self._cached(f"kernel {kept}", lambda: self._compute_kernel(kept))[..., :reach]

    def _constants(self) -> dict[str, Callable[[], Any]]:
        if self.ssm_type == "s4d":
            steps = {} if self.bidirectional else {"step": self._diagonal_step_constants}
            return {"system": self.diagonal_system, **steps}
        kernel = {} if self.max_length is None else {"longest kernel": lambda: self._compute_kernel(self.max_length)}
        return kernel if self.bidirectional else {**kernel, "step": self._step_constants, "blocks": self._blocks}

    def _compute_kernel(self, length: int) -> torch.Tensor:
        if self.ssm_type == "s4d":
            return system_kernel(self._cached("system", self.diagonal_system), length)
        dtype, truncated_for = self._math_dtype, self._truncated_for()
        if 0 < length <= truncated_for:
            wide = self._wide_dtype
            return dplr_kernel_from_nodes(self.C.to(wide), self.dplr_system(wide), truncated_for, length).to(dtype)
        dense = dplr_dense(self.dplr_system(self._wide_dtype))
        return dplr_kernel(self.raw_c(), dense, length).to(dtype)

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        return_state: bool = False,
        kept: KeptResults | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the layer to a sequence, or to the next chunk of one. A single token that continues a text takes one
        step of the recurrence.

        Args:
            hidden_states: (B, L, H), padded positions zeroed.
            initial_state: (B, H, M, 2), state after the previous chunk, or None at the start.
            return_state: also return the state after the last token. With a state in or out, "s4" computes the
                untruncated recurrence, so that every split of a sequence gives the same result.
            kept: results kept from earlier calls of the same generation, reused and extended; None keeps nothing.

        Returns:
            Outputs (B, L, c H), channel-major, in the dtype of the input; and the state, or None.

        Raises:
            ValueError: if a state is asked of a bidirectional layer, or shapes do not fit.
        """
        self._check_inputs(hidden_states, initial_state, return_state)
        with keeping(kept), without_autocast(hidden_states.device):
            if hidden_states.shape[1] == 1 and initial_state is not None and return_state:
                return self._step(hidden_states, initial_state)
            inputs = hidden_states.transpose(1, 2).to(self._math_dtype)  # (B, H, L)
            state = None
            if self.sequence_group is not None and initial_state is None and not return_state:
                outputs = self._run_piece(inputs, self.sequence_group)
            elif self._use_scan(inputs, return_state):
                outputs, state = self._scan(inputs, initial_state)
            elif initial_state is None and not return_state:
                outputs = self._convolve(inputs)
            elif self.ssm_type == "s4":
                outputs, state = dplr_scan(inputs, self._cached("blocks", self._blocks), initial_state)
            else:
                system = self._cached("system", self.diagonal_system)
                outputs = self._convolve(inputs)
                if initial_state is not None:
                    initial_state = initial_state.to(inputs.dtype)
                    outputs = outputs + initial_state_response(system, initial_state, inputs.shape[-1])
                state = diagonal_final_state(inputs, system, initial_state) if return_state else None
            outputs = outputs + self.D.to(inputs.dtype).unsqueeze(-1) * inputs.unsqueeze(1)  # (B, c, H, L)
            outputs = outputs.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
        return outputs, state if return_state else None

    def _use_scan(self, inputs: torch.Tensor, return_state: bool) -> bool:
        """Whether the grouped scan is faster than kernel plus FFT: long inputs on a CPU, outside compiled graphs."""
        if self.ssm_type != "s4d" or not uses_cpu_form(inputs) or torch.compiler.is_compiling():
            return False
        has_kernel = not return_state and self._is_frozen
        return inputs.shape[-1] >= (_SCAN_LENGTH_CACHED if has_kernel else _SCAN_LENGTH)

    def _scan(self, inputs: torch.Tensor, initial_state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        system = self._cached("system", self.diagonal_system)
        forward, backward = system, None
        if self.bidirectional:
            real, imag = system.output_real, system.output_imag
            forward = system._replace(output_real=real[: self.channels], output_imag=imag[: self.channels])
            backward = system._replace(output_real=real[self.channels :], output_imag=imag[self.channels :])
        return diagonal_scan(inputs, forward, initial_state, backward=backward)

    def _run_piece(self, inputs: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        """(B, H, L) -> (B, c, H, L): the convolution within the piece of this process, and what enters it on either side."""
        length, channels = inputs.shape[-1], self.channels
        if self.ssm_type == "s4d":
            system = self._cached("system", self.diagonal_system)
            outputs = self._scan(inputs, None)[0] if self._use_scan(inputs, False) else self._convolve(inputs)
            past, future = (
                system._replace(output_real=system.output_real[part], output_imag=system.output_imag[part])
                for part in (slice(channels), slice(channels, None))
            )
            outputs = outputs + initial_state_response(past, entering_state(inputs, system, group), length)
            if self.bidirectional:
                state = entering_state(inputs, system, group, reverse=True)
                outputs = outputs + initial_state_response(future, state, length, offset=0).flip(-1)
            return outputs
        self._check_whole_reach(length * group.size)
        dense, rows = dplr_dense(self.dplr_system(self._wide_dtype)), self.raw_c()
        state = entering_dense_state(inputs, dense, group)
        outputs = self._convolve(inputs) + dplr_state_response(rows[:channels], dense, state, length).to(inputs.dtype)
        if self.bidirectional:
            state = entering_dense_state(inputs, dense, group, reverse=True)
            response = dplr_state_response(rows[channels:], dense, state, length, offset=0)
            outputs = outputs + response.flip(-1).to(inputs.dtype)
        return outputs

    def _check_whole_reach(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"A text of {length} tokens over several processes exceeds the reach of the state space layer, {self.max_length} "
                "tokens: states that pass from process to process cannot be cut off there. Raise `ssm_max_length` to the length of "
                "the text, or use `ssm_type='s4d'`."
            )

    def _convolve(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, H, L) -> (B, c, H, L) by convolution with the kernel."""
        length = inputs.shape[-1]
        if self.ssm_type == "s4" and self.max_length is not None and not torch.compiler.is_compiling():
            if length > self.max_length:
                logger.warning_once(
                    f"The input has {length} tokens but the state space layer reaches only {self.max_length} back; "
                    "longer dependencies are cut off. Raise `ssm_max_length` in the config to at least the input length."
                )
        kernel = self.kernel(length)
        if self.bidirectional:
            return bidirectional_fft_conv(inputs.unsqueeze(1), kernel[: self.channels], kernel[self.channels :])
        return causal_fft_conv(inputs.unsqueeze(1), kernel)

    def step(
        self, hidden_states: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token of the exact recurrence, O(N) per feature.

        Args:
            hidden_states: (B, 1, H).
            state: (B, H, M, 2), or None at the start.

        Returns:
            Output (B, 1, c H) and the next state.
        """
        if state is None:
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            state = hidden_states.new_zeros(*self._state_shape(hidden_states), dtype=dtype)
        output, state = self(hidden_states, state, return_state=True)
        assert state is not None
        return output, state

    def _step(self, hidden_states: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = hidden_states[:, 0].to(self._math_dtype)  # (B, H)
        if self.ssm_type == "s4d":
            system, decay = self._cached("step", self._diagonal_step_constants)
            outputs, state = diagonal_step(inputs, system, state, decay)
        else:
            constants = self._cached("step", self._step_constants)
            outputs, state = dplr_step(inputs, constants, state.to(inputs.dtype))
        outputs = torch.addcmul(outputs, self.D.to(inputs.dtype), inputs.unsqueeze(1))  # (B, c, H)
        return outputs.flatten(1).unsqueeze(1).to(hidden_states.dtype), state

    def _blocks(self) -> DplrBlocks:
        return dplr_blocks(self.raw_c(), dplr_dense(self.dplr_system(self._wide_dtype)), dtype=self._math_dtype)

    def _diagonal_step_constants(self) -> tuple[DiagonalSystem, tuple[torch.Tensor, torch.Tensor | None]]:
        system = self._cached("system", self.diagonal_system)
        return system, step_decay(system)

    def _step_constants(self) -> DplrStep:
        constants = dplr_step_constants(self.dplr_system(self._wide_dtype), self.raw_c())
        return DplrStep(*(tensor.to(self._math_dtype) for tensor in constants))

    def _state_shape(self, hidden_states: torch.Tensor) -> tuple[int, ...]:
        return (hidden_states.shape[0], self.hidden_size, self.state_size // 2, 2)

    def _check_inputs(self, hidden_states: torch.Tensor, state: torch.Tensor | None, with_state: bool) -> None:
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.hidden_size or hidden_states.shape[1] == 0:
            raise ValueError(
                f"`hidden_states` must have shape (batch, length >= 1, {self.hidden_size}); "
                f"got {tuple(hidden_states.shape)}."
            )
        if self.bidirectional and (with_state or state is not None):
            raise ValueError("A bidirectional state space layer has no state: call it on whole sequences only.")
        expected = self._state_shape(hidden_states)
        if state is not None and state.shape != expected:
            raise ValueError(f"The state must have shape {expected}; got {tuple(state.shape)}.")


@torch.compiler.assume_constant_result
def _read_length(layer: StateSpaceLayer, loads: int) -> int:
    """`kernel_length` as a number.

    The compiler runs this once and treats the result as a constant; a change of `loads` makes it read again.
    """
    return layer._initial_kernel_length if layer.kernel_length.is_meta else int(layer.kernel_length)


def _length_of_all(kernel_length: torch.Tensor) -> int:
    """`kernel_length` as a number, in a transform of `torch.func` that may have stacked those of several models."""
    lengths = set(without_transforms(kernel_length).flatten().tolist())
    if len(lengths) > 1:
        raise ValueError(
            f"The state spaces of models that run at once (`torch.func.vmap`) must be truncated alike; got the `kernel_length` "
            f"{sorted(lengths)}. Run these models one after another."
        )
    return int(lengths.pop())


class _PlainInit:
    """The three initialisers that `StateSpaceLayer.initialize` needs; loaded values are overwritten."""

    normal_ = staticmethod(nn.init.normal_)
    uniform_ = staticmethod(nn.init.uniform_)

    @staticmethod
    def copy_(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(other)


def _check_arguments(
    hidden_size: int,
    state_size: int,
    ssm_type: str,
    init: str,
    num_copies: int,
    channels: int,
    dt_min: float,
    dt_max: float,
    max_length: int | None,
    rank: int,
    discretization: str,
) -> None:
    if ssm_type not in _INITIAL_KINDS:
        raise ValueError(f"`ssm_type` must be one of {sorted(_INITIAL_KINDS)}; got {ssm_type!r}.")
    if init not in _INITIAL_KINDS[ssm_type]:
        raise ValueError(f"`init` must be one of {_INITIAL_KINDS[ssm_type]} for ssm_type {ssm_type!r}; got {init!r}.")
    if state_size < 2 or state_size % 2:
        raise ValueError(f"`state_size` must be even and at least 2 (modes come in pairs); got {state_size}.")
    if hidden_size < 1 or num_copies < 1 or hidden_size % num_copies:
        raise ValueError(f"`num_copies` must be a divisor of hidden_size {hidden_size}, or None; got {num_copies}.")
    if channels < 1 or rank < 1:
        raise ValueError(f"`channels` and `rank` must be positive; got {channels} and {rank}.")
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"`dt_min` and `dt_max` must satisfy 0 < dt_min <= dt_max; got {dt_min} and {dt_max}.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"`max_length` must be a positive number of tokens, or None; got {max_length}.")
    if discretization not in ("zoh", "bilinear"):
        raise ValueError(f"`discretization` must be 'zoh' or 'bilinear'; got {discretization!r}.")

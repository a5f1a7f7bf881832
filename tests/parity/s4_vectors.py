"""State space layers against stored outputs of the official S4 and S4D code.

One reader per kind of file turns its parameters into a `StateSpaceLayer`; from there every stored tensor is computed by
name, in float32 for `output.*` and `post.*`, in float64 for `output64.*` and `post64.*`. A name that is not known is an error.

Kinds: `spade_s4` (layer of SPADE: D skip, one- or two-sided), `s4d_minimal` (S4D with activation and gated projection),
`ss_diag` and `ss_dplr` (bare kernels of the state-spaces repository, without D), `init` (initial values).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from comparison import largest_error

from hf_hybrid.layers.ssm import StateSpaceLayer
from hf_hybrid.ops.diagonal_ssm import decay_powers, pack_state
from hf_hybrid.ops.hippo import hippo_legs_dplr, legs_matrices, s4d_init
from hf_hybrid.ops.s4 import dplr_dense, truncate_c

Tensors = Mapping[str, torch.Tensor]

FLOAT32_TOLERANCE = 1e-4
FLOAT64_TOLERANCE = 1e-9
RECOVERED_C_TOLERANCE = 1e-5  # float64 C solved from C-tilde: ill-conditioned
INITIAL_VALUE_TOLERANCE = 1e-8  # float64 eigenvectors of two LAPACK builds

_POSITIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda value: value,
    "exp": torch.exp,
    "relu": lambda value: torch.relu(value) + 1e-4,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
}


# ---------------------------------------------------------------------------------------------------------------------
# layers from official parameters
# ---------------------------------------------------------------------------------------------------------------------


def _filled(layer: StateSpaceLayer, values: Tensors) -> StateSpaceLayer:
    layer = layer.double()
    layer.load_state_dict(
        {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
    )
    return layer


def _spade_layer(config: Mapping[str, Any], parameters: Tensors) -> StateSpaceLayer:
    values = {name.removeprefix("kernel.kernel."): value for name, value in parameters.items()}
    values["kernel_length"] = values.pop("L")
    layer = StateSpaceLayer(
        config["d_model"],
        config["d_state"],
        ssm_type="s4",
        num_copies=config["n_ssm"],
        bidirectional=config["bidirectional"],
        channels=config["channels"],
        max_length=config["l_max"],
        rank=config.get("rank", 1),
    )
    return _filled(layer, values)


def _minimal_layer(config: Mapping[str, Any], parameters: Tensors) -> StateSpaceLayer:
    output = parameters["kernel.C"]
    ones = torch.zeros_like(output).unsqueeze(0)
    ones[..., 0] = 1  # B is absorbed into C
    values = {
        "D": parameters["D"].unsqueeze(0),
        "C": output.unsqueeze(0),
        "log_dt": parameters["kernel.log_dt"],
        "B": ones,
        "inv_w_real": parameters["kernel.log_A_real"],
        "w_imag": parameters["kernel.A_imag"],
        "kernel_length": torch.tensor(0),
    }
    layer = StateSpaceLayer(config["d_model"], config["d_state"], init="lin", discretization=config.get("disc", "zoh"))
    return _filled(layer, values)


def _bare_layer(config: Mapping[str, Any], parameters: Tensors) -> StateSpaceLayer:
    is_dplr = config["kind"] == "ss_dplr"
    damping = _POSITIVE[config.get("real_transform", "exp")](parameters["A_real"].double())
    frequency = _POSITIVE[config.get("imag_transform", "none")](parameters["A_imag"].double())
    step = _POSITIVE[config.get("dt_transform", "exp")](parameters["inv_dt"].double())
    channels = config.get("channels", 1)
    values = {
        "D": torch.zeros(channels, config["d_model"]),
        "C": parameters["C"],
        "log_dt": torch.log(step).squeeze(-1),
        "B": parameters["B"],
        "inv_w_real": torch.log(damping),
        "w_imag": -frequency,
        "kernel_length": parameters.get("l_kernel", torch.tensor(0)),
    }
    if is_dplr:
        values["P"] = parameters["P"]
    layer = StateSpaceLayer(
        config["d_model"],
        config["d_state"],
        ssm_type="s4" if is_dplr else "s4d",
        num_copies=config["n_ssm"],
        bidirectional=config.get("bidirectional", False),
        channels=channels,
        max_length=config.get("l_max"),
        rank=config.get("rank", 1),
        discretization="zoh" if is_dplr else config["disc"],
    )
    return _filled(layer, values)


# ---------------------------------------------------------------------------------------------------------------------
# stored quantities by name
# ---------------------------------------------------------------------------------------------------------------------


def _conjugate_pairs(pairs: torch.Tensor, dim: int) -> torch.Tensor:
    """(..., M, ..., 2) -> both members of every pair, (..., 2M, ..., 2)."""
    return torch.cat([pairs, torch.stack([pairs[..., 0], -pairs[..., 1]], dim=-1)], dim=dim)


def _full_matrix(matrix: torch.Tensor) -> torch.Tensor:
    """Real-basis matrix (H, N, N) as the complex one on [x; conj x], (H, N, N, 2)."""
    size = matrix.shape[-1] // 2
    identity = torch.eye(size, dtype=matrix.dtype)
    change = torch.cat([torch.complex(identity, 0 * identity), torch.complex(0 * identity, identity)], dim=1)
    change = torch.cat([change, change.conj()], dim=0)  # [Re; Im] -> [x; conj x]
    return torch.view_as_real(change @ matrix.to(change.dtype) @ (0.5 * change.mH))


def _transition(layer: StateSpaceLayer) -> torch.Tensor:
    if layer.ssm_type == "s4":
        return _full_matrix(dplr_dense(layer.dplr_system(torch.float64)).transition)
    system = layer.diagonal_system()
    real, imag = decay_powers(system.log_decay_real, system.log_decay_imag, count=1, offset=1)
    return pack_state(real, imag).squeeze(-2)


def _input_vector(layer: StateSpaceLayer) -> torch.Tensor:
    if layer.ssm_type == "s4":
        vector = dplr_dense(layer.dplr_system(torch.float64)).inputs
        return _conjugate_pairs(torch.stack(vector.chunk(2, dim=-1), dim=-1), dim=-2)
    system = layer.diagonal_system()
    return pack_state(system.input_real, system.input_imag)


def _truncated(layer: StateSpaceLayer, length: int) -> torch.Tensor:
    """C-tilde for a kernel length, as the official module leaves it behind after its first forward."""
    if int(layer.kernel_length) or layer.ssm_type == "s4d":
        return layer.C
    return truncate_c(layer.C.double(), layer.dplr_system(torch.float64), length)


class _Quantities:
    """Everything a file of one layer may store, by the name after the prefix."""

    def __init__(self, config: Mapping[str, Any], inputs: Tensors, layer: StateSpaceLayer) -> None:
        self.config, self.layer = config, layer
        self.dtype = layer.C.dtype
        self.inputs = {name: value.to(self.dtype) for name, value in inputs.items()}

    def get(self, name: str, expected: torch.Tensor) -> torch.Tensor:
        """The quantity called `name`, shaped as stored.

        Raises:
            KeyError: the name is not known.
        """
        layer, length = self.layer, self.config.get("l_max") or self.config.get("L")
        if name in ("kernel.kernel.C", "kernel.kernel.L", "C", "l_kernel"):
            truncated_for = int(layer.kernel_length) or length
            return _truncated(layer, truncated_for) if name.endswith("C") else torch.tensor(truncated_for)
        if name == "kernel":
            return layer.kernel(length).reshape(expected.shape)
        if name == "dA":
            return _transition(layer)
        if name == "dB":
            return _input_vector(layer)
        if name == "dC":
            return _conjugate_pairs(layer.raw_c(), dim=-2) if layer.ssm_type == "s4" else layer.C
        if match := re.fullmatch(r"y(\d*)(_noD)?", name):
            return self._shaped(layer(self._input(match[1]))[0], expected)
        if match := re.fullmatch(r"step_(y|state)(_noD)?", name):
            outputs, state = self._stepped(expected.shape[-1] if match[1] == "y" else None)
            return state if match[1] == "state" else self._shaped(outputs, expected)
        if name in ("chunked_y_noD", "chunked_y", "state_final", "state_after_first_chunk"):
            outputs, first, final = self._chunked()
            if name.startswith("chunked"):
                return self._shaped(outputs, expected)
            return first if name == "state_after_first_chunk" else final
        raise KeyError(f"no rule for the stored output {name!r} of a {self.config['kind']!r} file")

    def _input(self, length: str = "") -> torch.Tensor:
        """Stored input of a length (or the only one, or the one of the internal length), (B, L, H)."""
        names = [f"u{length}"] if length else ["u", f"u{self.config.get('l_max')}", *sorted(self.inputs)]
        return self.inputs[next(name for name in names if name in self.inputs)].transpose(1, 2)

    def _shaped(self, outputs: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """(B, L, c H) -> (B, c H, L) or (B, c, H, L)."""
        outputs = outputs.transpose(1, 2)
        return outputs.unflatten(1, expected.shape[1:3]) if expected.dim() == 4 else outputs

    def _stepped(self, length: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self._input(str(length) if f"u{length}" in self.inputs else "")
        outputs, state = [], None
        for position in range(inputs.shape[1]):
            output, state = self.layer.step(inputs[:, position : position + 1], state)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    def _chunked(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs, states = [], [None]
        for chunk in self._input().split(self.config["chunk"], dim=1):
            output, state = self.layer(chunk, states[-1], return_state=True)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), states[1], states[-1]


class _MinimalQuantities(_Quantities):
    """S4D layer with exact GELU, 1x1 convolution to twice the width and gate."""

    def __init__(
        self, config: Mapping[str, Any], inputs: Tensors, layer: StateSpaceLayer, projection: Tensors
    ) -> None:
        super().__init__(config, inputs, layer)
        self.projection = {name: value.to(self.dtype) for name, value in projection.items()}

    def get(self, name: str, expected: torch.Tensor) -> torch.Tensor:
        if name != "y":
            return super().get(name, expected)
        transposed = self.config.get("transposed", True)  # (B, H, L)
        inputs = self.inputs["u"].transpose(1, 2) if transposed else self.inputs["u"]
        hidden = torch.nn.functional.gelu(self.layer(inputs)[0])
        weight = self.projection["output_linear.0.weight"].squeeze(-1)
        projected = torch.nn.functional.linear(hidden, weight, self.projection["output_linear.0.bias"])
        outputs = torch.nn.functional.glu(projected, dim=-1)
        return outputs.transpose(1, 2) if transposed else outputs


# ---------------------------------------------------------------------------------------------------------------------
# initial values
# ---------------------------------------------------------------------------------------------------------------------


def _legs_value(state_size: int, name: str, expected: torch.Tensor) -> torch.Tensor:
    rates, low_rank, inputs = hippo_legs_dplr(state_size)
    if name == "w":
        return rates
    if name == "abs_B":
        return torch.linalg.vector_norm(inputs, dim=-1)
    if name == "abs_P":
        return torch.linalg.vector_norm(low_rank, dim=-1)
    if name == "B_times_conj_P":
        product = torch.view_as_complex(inputs) * torch.view_as_complex(low_rank)[0].conj()
        return torch.view_as_real(product)
    transition, drive = legs_matrices(state_size)
    if name in ("A_dense", "B_dense"):
        return transition if name == "A_dense" else drive
    if match := re.fullmatch(r"state_impulse_dt([\d.e-]+)_first(\d+)", name):
        step, components = float(match[1]), int(match[2])
        identity = torch.eye(state_size, dtype=torch.float64)
        inverse = torch.linalg.inv(identity - 0.5 * step * transition)
        states = [step * inverse @ drive]
        while len(states) < expected.shape[0]:
            states.append(inverse @ (states[-1] + 0.5 * step * transition @ states[-1]))
        return torch.stack(states)[:, :components]
    raise KeyError(f"no rule for the initial value {name!r}")


def _initial_value(name: str, expected: torch.Tensor) -> torch.Tensor:
    family, _, quantity = name.partition(".")
    match = re.fullmatch(r"(legs|diag_\w+?)(\d+)", family)
    if match is None:
        raise KeyError(f"no rule for the initial value {name!r}")
    if match[1] == "legs":
        return _legs_value(int(match[2]), quantity, expected)
    rates, inputs = s4d_init(match[1].removeprefix("diag_"), int(match[2]))
    if quantity == "A":
        return rates
    if quantity == "abs_B":
        return torch.linalg.vector_norm(inputs, dim=-1)
    raise KeyError(f"no rule for the initial value {name!r}")


def _check_initial_values(tensors: Tensors) -> list[tuple[str, float, float]]:
    rows = []
    for full_name, expected in tensors.items():
        prefix, _, name = full_name.partition(".")
        if prefix not in ("output", "output64"):
            continue
        scale = expected.abs().max().item()  # rates grow with the square of the size; float32 rounds them
        if expected.dtype == torch.float32:
            tolerance = max(FLOAT32_TOLERANCE, 1e-6 * scale)
        else:
            tolerance = max(INITIAL_VALUE_TOLERANCE, 1e-11 * scale)
        rows.append((full_name, largest_error(_initial_value(name, expected), expected), tolerance))
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def _tolerance(name: str, tensors: Tensors) -> float:
    prefix, _, quantity = name.partition(".")
    if prefix.endswith("64"):
        return RECOVERED_C_TOLERANCE if quantity == "dC" else FLOAT64_TOLERANCE
    wide = tensors.get(f"{prefix}64.{quantity}")
    if wide is None:
        return FLOAT32_TOLERANCE
    # a long official float32 run is itself further from exact than the tolerance (inexact FFT nodes)
    return max(FLOAT32_TOLERANCE, 2 * largest_error(tensors[name], wide))


def _reader(config: Mapping[str, Any], tensors: Tensors) -> Callable[[torch.dtype], _Quantities]:
    """Function that gives the quantities of a file in a precision."""
    parameters = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    inputs = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
    kind = config["kind"]
    if kind == "s4d_minimal":
        projection = {name: value for name, value in parameters.items() if name.startswith("output_linear.")}
        layer = _minimal_layer(config, parameters)
        return lambda dtype: _MinimalQuantities(config, inputs, layer.to(dtype), projection)
    if kind not in ("spade_s4", "ss_diag", "ss_dplr"):
        raise KeyError(f"no reader for files of kind {kind!r}")
    layer = _spade_layer(config, parameters) if kind == "spade_s4" else _bare_layer(config, parameters)
    return lambda dtype: _Quantities(config, inputs, layer.to(dtype))


@torch.no_grad()
def check(path: Path, config: Mapping[str, Any], tensors: Tensors) -> list[tuple[str, float, float]]:
    """Compares every stored output of a file: (name, largest error, tolerance).

    Raises:
        KeyError: a kind or an output there is no rule for.
    """
    if config["kind"] == "init":
        return _check_initial_values(tensors)
    quantities = _reader(config, tensors)
    rows = []
    for dtype, prefixes in ((torch.float64, ("output64", "post64")), (torch.float32, ("output", "post"))):
        run = quantities(dtype)
        for name, expected in tensors.items():
            prefix, _, quantity = name.partition(".")
            if prefix in prefixes:
                actual = run.get(quantity, expected)
                rows.append((name, largest_error(actual, expected), _tolerance(name, tensors)))
    return rows

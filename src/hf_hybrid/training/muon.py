"""Muon for matrices and AdamW for everything else, in one optimizer.

Muon replaces the averaged gradient of a matrix with a nearby matrix with orthonormal rows or columns, so that every
direction moves at the same speed. Embeddings, norms, biases, heads and state space tensors are trained with AdamW.

Reference: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of the steps is that of
arXiv 2502.16982, Eq. 4, under which learning rates and weight decay of AdamW carry over.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

# Quintic iteration with a steep slope at zero: singular values end up between about 0.7 and 1.2, not at 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_RMS_OF_ADAMW = (
    0.2  # root mean square of an update of AdamW in units of its learning rate, as measured in arXiv 2502.16982
)


def _whole(tensor: Any) -> torch.Tensor:
    """A tensor in one piece; the pieces of a sharded one are gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _sharded_as(tensor: torch.Tensor, other: Any) -> torch.Tensor:
    """A tensor that every process has in one piece, in pieces like those of `other`."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # not in every build of torch

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


@functools.cache
def product_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where its products are faster than those of float32: accelerators, and processors with instructions for it."""
    if device_type != "cpu":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if is_fast else torch.float32


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The matrices with singular values near one, by `steps` Newton-Schulz iterations.

    Args:
        matrices: (..., R, C). Products are computed in the given dtype: bfloat16 is sufficient on accelerators, while
            CPUs without instructions for bfloat16 are several times faster in float32.
        steps: number of iterations.

    Returns:
        (..., R, C).
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)  # Frobenius, at least the spectral norm
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


class MuonAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, with Muon for the parameter groups that say `muon=True`.

    Args:
        params: parameter groups; those with `muon=True` hold matrices only.
        momentum: decay rate of the averaged gradient of Muon (Nesterov momentum).
        orthogonalization_dtype: dtype of the products of Muon. None: bfloat16 on accelerators and on processors with
            instructions for it (AVX512-BF16, AMX), else float32.
        options: options of `torch.optim.AdamW`.

    Raises:
        ValueError: a group of Muon holds a tensor that is not a matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        orthogonalization_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.momentum = momentum
        self.orthogonalization_dtype = orthogonalization_dtype
        super().__init__(params, lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        if self.param_groups[-1].setdefault("muon", False):
            shapes = [tuple(parameter.shape) for parameter in self.param_groups[-1]["params"]]
            wrong = next((shape for shape in shapes if len(shape) != 2), None)
            if wrong is not None:
                raise ValueError(
                    f"Muon trains matrices; got a tensor of shape {wrong}. Put it into a group without `muon=True`, which "
                    "AdamW trains."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns the result of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = []
        for group in self.param_groups:
            if group["muon"]:
                found = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
                taken.append((group, found))
                for parameter, _ in found:
                    parameter.grad = None  # so that AdamW skips it
        try:
            super().step()
        finally:
            for _, found in taken:
                for parameter, gradient in found:
                    parameter.grad = gradient
        for group, found in taken:
            self._step_matrices(group, found)
        return loss

    def _step_matrices(self, group: dict[str, Any], found: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Orthogonalises matrices of the same shape together: many small products cost more than a few large ones.

        Those that are sharded are gathered, and orthogonalised by every process.
        """
        alike: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for parameter, gradient in found:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)  # AdamW expects this entry in every state that it loads
                state["momentum_buffer"] = torch.zeros_like(gradient)
            state["step"] += 1
            average = state["momentum_buffer"]
            average.lerp_(gradient, 1 - self.momentum)
            alike[(parameter.shape, parameter.device, parameter.dtype)].append(
                (parameter, gradient.lerp(average, self.momentum))
            )
        for (shape, device, _), pairs in alike.items():
            dtype = self.orthogonalization_dtype or product_dtype(device.type)
            updates = orthogonalize(torch.stack([_whole(update) for _, update in pairs]).to(dtype))
            rate = group["lr"] * _RMS_OF_ADAMW * max(shape) ** 0.5
            for (parameter, _), update in zip(pairs, updates):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(_sharded_as(update.to(parameter.dtype), parameter), alpha=-rate)

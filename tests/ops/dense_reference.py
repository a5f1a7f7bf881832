"""The recurrence of a DPLR system with its dense matrices: what the fast forms are compared with."""

from __future__ import annotations

import torch

from hf_hybrid.ops.s4 import DenseSystem, from_real_basis, output_to_real_basis, to_real_basis


def dplr_dense_step(
    inputs: torch.Tensor, output: torch.Tensor, dense: DenseSystem, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token, O(N^2). Arguments and results of `dplr_step`, the matrices in place of its constants."""
    vector = dense.inputs * inputs.unsqueeze(-1)
    if state is not None:
        vector = vector + torch.einsum("hij,bhj->bhi", dense.transition, to_real_basis(state))
    outputs = torch.einsum("shn,bhn->bsh", output_to_real_basis(output), vector)
    return outputs, from_real_basis(vector)

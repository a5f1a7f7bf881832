"""Linear recurrences of vectors with one matrix per feature, over the blocks of a text.

Shape letters: H features, B batch, G groups of tokens, N state size.
"""

from __future__ import annotations

import torch

from .branches import uses_cpu_form, widest_float
from .full_products import full_matmul


def block_recurrence(
    drive: torch.Tensor, transition: torch.Tensor, initial: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """s_{g+1} = s_g T + drive_g: one product per group on CPU, elsewhere about log2(G) products of all groups.

    Args:
        drive: (H, B, G, N), G >= 0.
        transition: T, (H, N, N).
        initial: s_0, (H, B, N).

    Returns:
        The states before the groups, s_0 to s_{G-1}, (H, B, G, N), and s_G.
    """
    groups = drive.shape[2]
    if uses_cpu_form(drive) and not torch.compiler.is_compiling():
        state, before = initial, []
        for index in range(groups):
            before.append(state)
            state = torch.baddbmm(drive[:, :, index], state, transition)
        return torch.stack(before, dim=2) if before else drive, state
    states = torch.cat([initial.unsqueeze(2), drive], dim=2)  # (H, B, G + 1, N)
    power, reach = transition.to(widest_float(transition)), 1
    while reach <= groups:
        factor = power.to(states.dtype)
        moved = full_matmul(states[:, :, :-reach].flatten(1, 2), factor).view_as(states[:, :, reach:])
        states = torch.cat([states[:, :, :reach], states[:, :, reach:] + moved], dim=2)
        power, reach = power @ power, 2 * reach
    return states[:, :, :-1], states[:, :, -1]

"""Explicit filters of finite length: an exponentially decaying window times a linear map of sinusoids of the lag.

Filter f of channel j is K[f, j, k] = exp(-alpha_j k / (L - 1)) (w_fj . phi_k + b_fj) for 0 <= k < L and zero beyond, with
phi_k = [sin(omega_i k), cos(omega_i k)] and omega_i = base^(-2 i / E), whatever the length of the input.

Shape letters: B batch, D channels, F filters per channel, T tokens, L filter length, E features, K blocks of W tokens.
References: arXiv 2306.09539 (unstructured filters), arXiv 2302.10866 (Hyena).
"""

from __future__ import annotations

import torch

from .branches import uses_cpu_form, widest_float
from .full_products import full_matmul

# Of the windows before block ends.
_ELEMENTS_AT_A_TIME = 1 << 22
_ACCELERATOR_ELEMENTS_AT_A_TIME = 1 << 28


def lag_features(length: int, size: int, base: float, *, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """phi, (L, E): sines, then cosines, of `size` / 2 geometric frequencies; angles in double precision."""
    wide = widest_float(device)
    frequencies = base ** (-torch.arange(0, size, 2, device=device, dtype=wide) / size)
    angles = torch.arange(length, device=device, dtype=wide).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)


def decay_window(alpha: torch.Tensor, length: int) -> torch.Tensor:
    """exp(-alpha_j k / (L - 1)), (D, L)."""
    return torch.exp(-alpha.unsqueeze(1) * torch.arange(length, device=alpha.device, dtype=alpha.dtype) / (length - 1))


def windowed_filters(
    weight: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """The filters themselves.

    Args:
        weight: (F, D, E).
        bias: (F, D).
        alpha: (D,).
        features: phi, (L, E).

    Returns:
        (F, D, L).
    """
    rows = full_matmul(weight.flatten(0, 1), features.T).unflatten(0, weight.shape[:2])
    return (rows + bias.unsqueeze(-1)) * decay_window(alpha, features.shape[0])


def filtered_block_ends(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    features: torch.Tensor,
    ends: range,
) -> torch.Tensor:
    """Outputs of all filters at a few places, without computing the filters.

    The windows that end there are multiplied by their decay and projected onto the features, one product for all channels and
    filters; so (F, D, L) tensors and transforms are never made.

    Args:
        inputs: (B, D, X), from the beginning of the text or from L - 1 tokens before the first place.
        weight, bias, alpha, features: as in `windowed_filters`.
        ends: places in the inputs, equally spaced, at least one.

    Returns:
        (B, K, F, D).
    """
    length = min(features.shape[0], ends[-1] + 1)
    window = decay_window(alpha, features.shape[0])[:, :length].flip(-1)  # oldest first
    basis = torch.cat([features[:length], features.new_ones(length, 1)], dim=1).flip(0)  # (L, E + 1)
    matrix = torch.cat([weight, bias.unsqueeze(-1)], dim=-1)  # (F, D, E + 1)
    missing = max(0, length - 1 - ends[0])
    padded = torch.nn.functional.pad(inputs[..., : ends[-1] + 1], (missing, 0))
    windows = padded[..., missing + ends[0] - length + 1 :].unfold(-1, length, ends.step)  # (B, D, K, L), a view
    at_a_time = 1
    if len(ends) > 1:  # for a single place the number of rows must not matter: exported steps leave it open
        elements = _ELEMENTS_AT_A_TIME if uses_cpu_form(inputs) else _ACCELERATOR_ELEMENTS_AT_A_TIME
        at_a_time = max(1, elements // (windows.shape[0] * windows.shape[1] * length))
    found = []
    for first in range(0, len(ends), at_a_time):
        projected = (windows[:, :, first : first + at_a_time] * window.unsqueeze(1)) @ basis  # (B, D, K, E + 1)
        found.append(torch.einsum("bdke,fde->bkfd", projected, matrix))
    return torch.cat(found, dim=1)


def windowed_filter_reference(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Outputs of all filters at all tokens by the definition: (B, D, T) -> (B, F, D, T)."""
    filters = windowed_filters(weight, bias, alpha, features)
    outputs = []
    for position in range(inputs.shape[-1]):
        taps = min(position + 1, filters.shape[-1])
        past = inputs[..., position + 1 - taps : position + 1].flip(-1)
        outputs.append((filters[..., :taps] * past.unsqueeze(1)).sum(-1))
    return torch.stack(outputs, dim=-1)

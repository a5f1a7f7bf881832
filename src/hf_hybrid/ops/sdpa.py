"""`scaled_dot_product_attention`, by the form of it that torch differentiates in every way where that is asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .branches import takes_plain_form


def dot_product_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; its fused kernels have no tangents, and no gradient of a mask."""
    if takes_plain_form():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, **options)
    return F.scaled_dot_product_attention(query, key, value, **options)

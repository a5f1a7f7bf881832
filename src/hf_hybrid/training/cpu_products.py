"""Products of float32 matrices by oneDNN on CPUs, where it computes the same faster than MKL.

MKL leaves half of the vector units of processors of AMD with AVX-512 idle. oneDNN uses them, but PyTorch asks it for products of float32 only
where it may round to bfloat16. On processors without units for matrices of bfloat16 it never does, which is measured here.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..ops.full_products import product_precision

# oneDNN, and what calls it in PyTorch, keep up to 1,024 products with their scratch memory, one for every new shape: gigabytes
# where lengths vary. A training step has fewer shapes than this.
_KEPT_PRODUCTS = "128"
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_SHAPES = ((4, 64, 64), (128, 512, 128), (512, 2048, 512))  # rows, terms of a sum, columns
_FLOAT32_ERROR = 1e-5  # of a product of normal numbers, for one of their deviation; 1e-6 in float32, 4e-3 in bfloat16


def limit_kept_products() -> None:
    """Bounds what oneDNN keeps, unless the environment does; before its first product, later calls change nothing."""
    for name in _CACHES:
        os.environ.setdefault(name, _KEPT_PRODUCTS)


def _settings() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _allowed() -> AbstractContextManager[None]:
    return product_precision(_settings(), "bf16")


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN, allowed to round to bfloat16, computes products of float32 in float32 here all the same."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    generator = torch.Generator().manual_seed(0)
    for rows, terms, columns in _SHAPES:
        left = torch.randn(rows, terms, generator=generator, device="cpu", dtype=torch.float32)
        right = torch.randn(columns, terms, generator=generator, device="cpu", dtype=torch.float32)
        with _allowed():
            products = left @ right.mT
        exact = left.double() @ right.double().mT
        if (products - exact).abs().max() > _FLOAT32_ERROR * terms**0.5:
            return False
    return True


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Context in which oneDNN computes products of float32 on a CPU, where they stay products of float32.

    Nothing changes on other devices, or where the process has chosen `torch.backends.mkldnn.matmul.fp32_precision` itself.
    """
    has_chosen = _settings().fp32_precision != "none"
    if device.type != "cpu" or has_chosen or not onednn_is_exact():
        yield
        return
    with _allowed():
        yield

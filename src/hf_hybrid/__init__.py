"""Hybrid state-space/attention architectures as Hugging Face Transformers models.

`import hf_hybrid` registers every architecture with the Auto classes of Transformers; the public names below are imported when
they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .auto import public_classes, register

__version__ = "0.1.0"

_PUBLIC = public_classes()

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()

"""Hybrid state-space/attention architectures as Hugging Face Transformers models.

`import hf_hybrid` registers every architecture with the Auto classes of Transformers; the public names (see `public_names`) are
imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .auto import register
from .public_names import modules_by_name, no_such_name

__version__ = "0.1.0"

_PUBLIC = modules_by_name()

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    raise no_such_name(name, _PUBLIC)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


register()

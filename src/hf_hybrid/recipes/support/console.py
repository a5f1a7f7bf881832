"""What a recipe prints while it runs."""

from __future__ import annotations

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether the recipe that starts now prints only warnings, errors and results."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether only warnings, errors and results are printed."""
    return _quiet

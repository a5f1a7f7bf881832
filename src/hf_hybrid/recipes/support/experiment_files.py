"""Where the option files of published experiments are; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path


def folder_of_experiments() -> Path:
    """The folder `configs/published`: that of the installed package, or of the source tree."""
    installed = Path(__file__).parents[2] / "configs" / "published"
    return installed if installed.is_dir() else Path(__file__).parents[4] / "configs" / "published"


def experiment_names() -> list[str]:
    """All experiments, as "<paper>/<experiment>"."""
    folder = folder_of_experiments()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))

"""Where the option files that come with the package are; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path


def folder_of_configs() -> Path:
    """The folder `configs`: that of the installed package, or of the source tree."""
    installed = Path(__file__).parents[2] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[4] / "configs"


def folder_of_experiments() -> Path:
    """The folder `configs/published`."""
    return folder_of_configs() / "published"


def option_file(name: str) -> Path:
    """The option file of a name: a path, or `configs/...` for one that comes with the package, in any folder."""
    path = Path(name)
    own = folder_of_configs().parent / path
    return own if not path.exists() and path.parts[:1] == ("configs",) and own.is_file() else path


def experiment_names() -> list[str]:
    """All experiments, as "<paper>/<experiment>"."""
    folder = folder_of_experiments()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))

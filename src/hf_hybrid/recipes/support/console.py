"""What a recipe prints while it runs: one line per event, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether the recipe that starts now prints only warnings, errors and results."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether only warnings, errors and results are printed."""
    return _quiet


class LineHandler(logging.Handler):
    """Prints each record in a line, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class LineFormatter(logging.Formatter):
    """The time and the message; in front of it the level, if it is not plain information."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno <= logging.INFO:
            return super().formatMessage(record)
        return f"{record.asctime} {record.levelname.lower()}: {record.message}"


def hide_bars_of_libraries(*, all_of_them: bool) -> None:
    """Hides the progress bars of Transformers, which load and write in seconds; with `all_of_them` those of Datasets too."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if all_of_them and (datasets := _installed_datasets()) is not None:
        datasets.disable_progress_bars()


def _installed_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        return None
    return datasets

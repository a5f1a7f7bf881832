"""Settings of the common checks of Transformers: their markers, which skips are accepted, and the table of the results."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from conformance_table import read_outcomes, write_table
from skip_conditions import is_accepted

MARKERS_OF_TRANSFORMERS = (
    "accelerate_tests",
    "all_flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_training_test",
    "torch_compile_test",
)
FOLDER = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-table", metavar="FILE", help="write the results of the common checks into FILE")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS_OF_TRANSFORMERS:
        config.addinivalue_line("markers", f"{marker}: of the common checks of Transformers")
    if config.getoption("conformance_table", None) is not None:
        # The table is of all heads, not of those of the default suite.
        config.option.markexpr = config.option.markexpr.replace("not wide and ", "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A check may be skipped for reasons that are listed, and fails when it is skipped for another one."""
    report = yield
    if not item.path.is_relative_to(FOLDER) or not report.skipped or not isinstance(report.longrepr, tuple):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not is_accepted(reason):
        report.outcome = "failed"
        report.longrepr = f"The check was skipped, and skip_conditions.py does not list the reason: {reason}"
    return report


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Writes the table from all reports, of this process or of several workers."""
    path = config.getoption("conformance_table", None)
    if path is None:
        return
    outcomes = read_outcomes(report for reports in terminalreporter.stats.values() for report in reports)
    write_table(Path(path), outcomes)
    terminalreporter.write_line(f"{len(outcomes)} results of the common checks of Transformers written into {path}")

"""The results of the common checks of Transformers as a table: checks by architecture."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import transformers
from skip_conditions import condition

from hf_hybrid.auto import ARCHITECTURES, load_config_class

BEGIN, END = "<!-- begin of the generated part -->", "<!-- end of the generated part -->"
_CHECK = re.compile(r"conformance/test_\w+\.py::(\w+Test)::(test_\w+)$")
TOKENIZERS = {"SentencePieceTokenizerTest": "SentencePiece", "ByteTokenizerTest": "bytes"}


@dataclass(frozen=True)
class Outcome:
    """Result of one check on one class."""

    test_class: str
    check: str
    passed: bool
    reason: str | None = None


def read_outcomes(reports: Iterable[object]) -> list[Outcome]:
    """The outcomes in the reports of pytest. A check of which a part was skipped counts as skipped."""
    outcomes: dict[str, Outcome] = {}
    skipped_parts: dict[str, str] = {}
    for report in reports:
        match = isinstance(report, pytest.TestReport) and _CHECK.search(report.nodeid)
        if not match or not (report.when == "call" or (report.when == "setup" and report.skipped)):
            continue
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else None
        if not hasattr(report, "context"):
            outcomes[report.nodeid] = Outcome(match[1], base_name(match[2]), report.passed, reason)
        elif reason is not None:
            skipped_parts[report.nodeid] = reason
    return [
        replace(outcome, passed=False, reason=skipped_parts[name])
        if outcome.passed and name in skipped_parts
        else outcome
        for name, outcome in outcomes.items()
    ]


def base_name(check: str) -> str:
    """Name of a check without the number and the label of its parameters."""
    if check.startswith("test_flash_attn"):
        return check
    return re.sub(r"_\d+(_.*)?$", "", check)


def columns() -> dict[str, list[str]]:
    """Column of the table -> names of the test classes that it sums up."""
    result = {
        architecture.model_type: [f"{name}Test" for name in architecture.heads.values()]
        + [f"{load_config_class(architecture).__name__}Test"]
        for architecture in ARCHITECTURES
    }
    return result | {label: [name] for name, label in TOKENIZERS.items()}


def _cell(outcomes: Iterable[Outcome], marks: dict[str, str]) -> str:
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.passed:
            counts["passed"] += 1
        elif outcome.reason is None:
            counts["**failed**"] += 1
        else:
            counts[marks.setdefault(condition(outcome.reason), f"s{len(marks) + 1}")] += 1
    return ", ".join(str(count) if kind == "passed" else f"{count} {kind}" for kind, count in counts.items())


def _rows(outcomes: list[Outcome], labels: list[str], marks: dict[str, str]) -> list[str]:
    places = {name: label for label, names in columns().items() for name in names}
    results: dict[str, dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        results[outcome.check][places[outcome.test_class]].append(outcome)
    lines = [f"| check | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    never = defaultdict(list)
    for check in sorted(results):
        cells = results[check]
        if not any(label in cells for label in labels):
            continue
        everything = [outcome for label in labels for outcome in cells[label]]
        if not any(outcome.passed or outcome.reason is None for outcome in everything):
            for reason in sorted({condition(outcome.reason or "") for outcome in everything}):
                never[reason].append(check)
            continue
        row = [_cell(sorted(cells[label], key=lambda outcome: not outcome.passed), marks) for label in labels]
        lines.append(f"| {check.removeprefix('test_')} | {' | '.join(row)} |")
    lines += ["", "Checks that apply to none of them:", ""]
    for reason, checks in sorted(never.items()):
        lines.append(f"- {reason}: {', '.join(check.removeprefix('test_') for check in checks)}.")
    return lines


def render(outcomes: list[Outcome]) -> str:
    """The generated part of the page."""
    marks: dict[str, str] = {}
    models = _rows(outcomes, [architecture.model_type for architecture in ARCHITECTURES], marks)
    tokenizers = _rows(outcomes, list(TOKENIZERS.values()), marks)
    legend = [f"- {mark}: {reason}." for reason, mark in marks.items()]
    totals = Counter("passed" if outcome.passed else "skipped" if outcome.reason else "failed" for outcome in outcomes)
    summary = ", ".join(f"{count:,} {kind}" for kind, count in totals.items())
    return "\n".join(
        [
            f"Transformers {transformers.__version__}: {summary}. A number counts the classes (heads, and parameters of a check)",
            "that passed; a number with a mark those that the library itself skips, for the reason below the tables.",
            "",
            "### Models and configurations",
            "",
            *models,
            "",
            "### Tokenizers",
            "",
            *tokenizers,
            "",
            "### Why the library skips a check",
            "",
            *legend,
        ]
    )


def write_table(path: Path, outcomes: list[Outcome]) -> None:
    """Replaces the generated part of the page at `path`."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{render(outcomes)}\n{END}{rest.split(END)[1]}", encoding="utf-8")

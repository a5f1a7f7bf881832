"""docs/conformance.md belongs to the checks that are run."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import transformers
from conformance_table import Outcome, base_name, columns, read_outcomes, render
from model_checks import Overrides
from skip_conditions import is_accepted
from source_distribution import SourceDistributionError, load

from hf_hybrid.auto import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


def test_names_of_checks_without_their_parameters() -> None:
    assert base_name("test_eager_matches_sdpa_inference_00_fp16_pad_left") == "test_eager_matches_sdpa_inference"
    assert base_name("test_encode_plus_with_padding_0") == "test_encode_plus_with_padding"
    assert base_name("test_flash_attn_2_fp32_ln") == "test_flash_attn_2_fp32_ln"
    assert base_name("test_keep_in_fp32_modules") == "test_keep_in_fp32_modules"


def test_a_table_of_outcomes() -> None:
    model_type, classes = next(iter(columns().items()))
    outcomes = [
        Outcome(classes[0], "test_a", True),
        Outcome(classes[1], "test_a", False, "Model does not have a TP plan."),
        Outcome(classes[0], "test_b", False, "Model does not have a TP plan."),
        Outcome(classes[0], "test_c", False),
    ]
    text = render(outcomes)
    assert re.search(r"\| a \| 1, 1 s1 \|", text) and re.search(r"\| c \| 1 \*\*failed\*\* \|", text)
    assert "- no plan for tensor parallelism: b." in text and "- s1: no plan for tensor parallelism." in text
    assert model_type in text


def report(check: str, outcome: str, longrepr: object = None) -> pytest.TestReport:
    nodeid = f"tests/conformance/test_models.py::SpadeModelTest::{check}"
    return pytest.TestReport(nodeid, ("", 0, ""), {}, outcome, longrepr, "call")


def test_a_check_of_which_a_part_was_skipped_counts_as_skipped() -> None:
    part = report("test_a", "skipped", ("file", 1, "Skipped: no loss"))
    part.context = None
    reports = [
        report("test_a", "passed"),
        part,
        report("test_b_0", "passed"),
        report("test_c", "failed", "error"),
        "text",
    ]
    assert read_outcomes(reports) == [
        Outcome("SpadeModelTest", "test_a", False, "no loss"),
        Outcome("SpadeModelTest", "test_b", True),
        Outcome("SpadeModelTest", "test_c", False),
    ]


def test_unknown_reasons_are_not_accepted() -> None:
    assert is_accepted("test requires Flash Attention 3")
    assert not is_accepted("flaky") and not is_accepted("")


def page_and_checks() -> tuple[str, list[str]]:
    """The page, and the checks of the suite that is installed; skipped where the page is of another release."""
    text = PAGE.read_text(encoding="utf-8")
    if f"Transformers {transformers.__version__}:" not in text:
        pytest.skip("the page was made with another release of Transformers")
    try:
        mixin = load("test_modeling_common").ModelTesterMixin
    except SourceDistributionError as error:
        pytest.fail(str(error), pytrace=False)
    slow = {
        name
        for name, check in vars(mixin).items()
        if any(mark.name == "slow" for mark in getattr(check, "pytestmark", ()))
    }
    names = [name for name, check in vars(mixin).items() if name.startswith("test_") and callable(check)]
    return text, [base_name(name).removeprefix("test_") for name in names if name not in slow]


def test_the_page_is_up_to_date() -> None:
    """Every architecture has its column, every check of the suite is there, every change of ours has its line."""
    text, checks = page_and_checks()
    for name, check in vars(Overrides).items():
        if name.startswith("test_") and callable(check):
            assert name.removeprefix("test_") in text.split("## Results")[0], name
    header = f"| check | {' | '.join(architecture.model_type for architecture in ARCHITECTURES)} |"
    assert header in text.splitlines()
    assert [name for name in checks if name not in text] == []


def test_the_page_counts_every_head() -> None:
    """The wide ones too, which the default suite leaves out, as often as a check has parameters."""
    text, checks = page_and_checks()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    for name, number in Counter(checks).items():
        if name not in rows:  # skipped everywhere
            continue
        cells = rows[name].strip("| ").split(" | ")[1:]
        for architecture, cell in zip(ARCHITECTURES, cells, strict=True):
            counted = sum(map(int, re.findall(r"(?:^|, )(\d+)", cell)))
            assert counted == number * len(architecture.heads), f"{name} on {architecture.model_type}: {cell}"

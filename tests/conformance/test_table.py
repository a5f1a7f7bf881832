"""docs/conformance.md belongs to the checks that are run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from conformance_table import Outcome, base_name, columns, render
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


def test_unknown_reasons_are_not_accepted() -> None:
    assert is_accepted("test requires Flash Attention 3")
    assert not is_accepted("flaky") and not is_accepted("")


def test_the_page_is_up_to_date() -> None:
    """Every architecture has its column, every check of the suite is there, every change of ours has its line."""
    text = PAGE.read_text(encoding="utf-8")
    for name, check in vars(Overrides).items():
        if name.startswith("test_") and callable(check):
            assert name.removeprefix("test_") in text.split("## Results")[0], name
    header = next(line for line in text.splitlines() if line.startswith("| check | spade"))
    assert header.split(" | ")[1:] == [
        *(item.model_type for item in ARCHITECTURES[:-1]),
        f"{ARCHITECTURES[-1].model_type} |",
    ]
    if f"Transformers {transformers.__version__}:" not in text:
        pytest.skip("the page was made with another release of Transformers")
    try:
        mixin = load("test_modeling_common").ModelTesterMixin
    except SourceDistributionError as error:
        pytest.fail(str(error), pytrace=False)
    for name in vars(mixin):
        if name.startswith("test_") and callable(getattr(mixin, name)) and "deepspeed" not in name:
            assert base_name(name).removeprefix("test_") in text, name

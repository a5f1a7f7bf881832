"""Scripts that know nothing of these models train exports of them, without the package: what Transformers' examples do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clean_process import run_without_package
from factories import Case, all_heads, parametrize
from word_tokenizer import word_tokenizer
from works_with import working

from hf_hybrid.hub import export_remote_code

pytest.importorskip("datasets")
pytestmark = pytest.mark.company

TASKS = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
HEADS = working(
    "the example scripts",
    [case for case in all_heads() + all_heads(other_inputs=True) if case.auto_name in TASKS],
)
CODE = """
sys.path.insert(0, arguments["scripts"])
from plain_script import run
answer = {name: run(*words) for name, words in arguments["runs"].items()}
"""


def name_of(case: Case) -> str:
    return f"{case.model_type}-{case.auto_name}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script says of every head; causal models with label smoothing, which it would train to copy their input."""
    root = tmp_path_factory.mktemp("script")
    runs = {}
    for case in HEADS:
        folder = root / name_of(case)
        tokenizer = word_tokenizer(ends=True, mask=True)
        export_remote_code(case.model(), folder, tokenizer)
        smoothing = 0.1 if case.auto_name == "AutoModelForCausalLM" else 0.0
        runs[name_of(case)] = (str(folder), case.auto_name, str(root / f"{name_of(case)}-run"), smoothing)
    modules = tmp_path_factory.mktemp("modules")
    return run_without_package(CODE, modules, {"scripts": str(Path(__file__).parent), "runs": runs})


@parametrize(HEADS)
def test_a_script_trains_evaluates_predicts_and_reloads(case: Case, results: dict[str, Any]) -> None:
    found = results[name_of(case)]
    assert found["same"] and found["finite"] and found["rows"] == 12
    assert found["after"] < found["before"]
    assert (
        found["smoothing"] < 1e-4
    )  # with next to no weight; a causal model whose labels are not shifted is off by 1 and more

"""Model cards: unknown values say so, and problems are found without a network."""

from __future__ import annotations

import re

import pytest
from factories import all_heads, parametrize
from huggingface_hub import ModelCard as HubCard

from hf_hybrid.hub import UNKNOWN, EvaluationResult, ModelCard, model_card_problems, write_model_card
from hf_hybrid.model_card import card_of_model


def card(**changes) -> ModelCard:
    fields = {
        "model_name": "spade-tiny",
        "description": "A tiny model.",
        "model_type": "spade",
        "architecture": "SpadeForConditionalGeneration",
        "results": [EvaluationResult("accuracy", 0.5, "toy")],
        "task_type": "text-classification",
        "language": ["en"],
        "license": "apache-2.0",
    }
    return ModelCard(**{**fields, **changes})


def test_a_card_round_trips_through_the_hub_reader(tmp_path):
    path = write_model_card(card(datasets=["nyu-mll/glue"], pipeline_tag="text-classification"), tmp_path)
    data = HubCard.load(path).data
    assert data.library_name == "transformers" and data.license == "apache-2.0" and data.datasets == ["nyu-mll/glue"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.5, "toy")


def test_unknown_values_say_so():
    text = card(results=[], training={"seed": None}).render()
    assert model_card_problems(text) == []
    assert f"| parameters | {UNKNOWN} |" in text and f"| seed | {UNKNOWN} |" in text
    assert f"## Evaluation\n\n{UNKNOWN}" in text


def test_the_paper_is_cited_by_architecture():
    text = card().render()
    assert "https://arxiv.org/abs/2212.08136" in text and "@misc{zuo2022efficient," in text
    assert f"## Citation\n\n{UNKNOWN}" in card(model_type="t5").render()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"license": "apache"}, "license 'apache'"),
        ({"language": ["English"]}, "language 'English'"),
        ({"pipeline_tag": "text2text"}, "pipeline_tag 'text2text'"),
        ({"description": "TODO"}, "placeholder 'TODO'"),
    ],
)
def test_problems_are_found_and_nothing_is_written(tmp_path, changes, problem):
    assert any(problem in found for found in model_card_problems(card(**changes).render()))
    with pytest.raises(ValueError, match="not valid"):
        write_model_card(card(**changes), tmp_path)
    assert not any(tmp_path.iterdir())


def test_texts_without_a_readable_header_are_refused():
    assert model_card_problems("# no header") == ["the YAML header is missing"]
    (problem,) = model_card_problems("---\nlanguage: [en\n---\n# broken")
    assert "cannot be read" in problem
    malformed = "---\nlibrary_name: transformers\nmodel-index: 3\n---\n"
    assert "cannot be read" in model_card_problems(malformed)[0]


@parametrize(all_heads() + all_heads(other_inputs=True))
def test_a_card_is_drafted_of_every_head(case):
    """It names class, Auto class and pipeline, and cites the paper of the record."""
    text = card_of_model(case.model()).render()
    assert model_card_problems(text) == []
    assert f"| class | {case.model_class.__name__} |" in text and f"{case.auto_name}.from_pretrained(source)" in text
    assert f"\nimport {case.architecture.package}  # registers" in text
    paper = case.architecture.paper
    assert (paper.bibtex() if paper else f"## Citation\n\n{UNKNOWN}") in text


@pytest.mark.parametrize(
    ("name", "is_placeholder"),
    [("TODO", True), ("{{name}}", True), ("TODO-run", False), ("my_TODO", False), ("todo", False)],
)
def test_names_of_folders_are_no_placeholders(name, is_placeholder):
    assert bool(model_card_problems(card(model_name=name).render())) == is_placeholder


def test_results_that_are_no_numbers_stay_out_of_the_header():
    results = [EvaluationResult("loss", 1.5, "text"), EvaluationResult("perplexity", float("inf"), "text")]
    text = card(results=results).render()
    assert model_card_problems(text) == [] and "| perplexity | inf |" in text


TEXT_FIELDS = (
    "model_name",
    "description",
    "architecture",
    "training_data",
    "lengths",
    "intended_use",
    "limits",
    "adapter_of",
)
HOSTILE = "a | b\n\n---\n# c <script>alert(1)</script> <img src=x onerror=y> ![d](http://e)"


@pytest.mark.parametrize("name", [*TEXT_FIELDS, "training", "environment", "results"])
def test_no_string_of_a_run_becomes_markup(name):
    value = {"training": {HOSTILE: HOSTILE}, "environment": {HOSTILE: HOSTILE}}.get(name, HOSTILE)
    if name == "results":
        value = [EvaluationResult(HOSTILE, 0.5, HOSTILE, split=HOSTILE, baseline=HOSTILE)]
    text = card(**{name: value}).render()
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body and "<img" not in body and "&lt;script" in body
    if name not in ("description", "intended_use", "limits"):  # those are Markdown
        assert "![d](" not in body and "\n# c" not in body
    for line in body.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            assert len(cells) in (4, 7), line

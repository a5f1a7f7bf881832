"""Model cards: written from what a run saw, and checked without a network.

A value the run did not determine reads "not measured"; nothing is copied from papers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNKNOWN = "not measured"

# Papers of the architectures, by `model_type`.
CITATIONS = {
    "spade": ("Efficient Long Sequence Modeling via State Space Augmented Transformer", "2212.08136"),
    "spade_lm": ("Efficient Long Sequence Modeling via State Space Augmented Transformer", "2212.08136"),
    "mega": ("Mega: Moving Average Equipped Gated Attention", "2209.10655"),
    "seqboat": ("Sparse Modular Activation for Efficient Sequence Modeling", "2306.11197"),
    "bst": ("Block-State Transformers", "2306.09539"),
    "longvq": ("LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory", "2404.11163"),
}

# Licences the Hub accepts (https://huggingface.co/docs/hub/repositories-licenses), the common ones.
LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m afl-3.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause cc cc0-1.0 "
    "cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-3.0 "
    "cc-by-nc-sa-4.0 cc-by-nd-4.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0 mpl-2.0 unlicense wtfpl isc "
    "odbl pddl odc-by other unknown".split()
)

PIPELINE_TAGS = frozenset(
    "text-classification token-classification question-answering zero-shot-classification translation summarization "
    "feature-extraction text-generation fill-mask sentence-similarity multiple-choice image-classification "
    "audio-classification text-ranking".split()
)

_LANGUAGE = re.compile(r"^([a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual)$")
_PLACEHOLDERS = ("[More Information Needed]", "TODO", "{{", "}}")


@dataclass
class EvaluationResult:
    """One measured number: `value` of `metric` on a split of a data set."""

    metric: str
    value: float
    dataset: str
    split: str = "validation"


@dataclass
class ModelCard:
    """What a card says. Every field that stays empty is rendered as "not measured" or left out of the header.

    Attributes:
        model_name: title of the card.
        description: what the model is and what it was trained to do, in full sentences.
        model_type, architecture: of the configuration and the class.
        num_parameters: counted, tied tensors once.
        auto_class: Auto class that loads the checkpoint.
        task_type: Hub task of the evaluation results, e.g. "text-classification".
        pipeline_tag: Hub pipeline, where one fits.
        language: codes of the languages of the training text.
        license: of the weights; decided by the publisher, never guessed.
        datasets: Hub names of the training data; `training_data` describes data of any origin.
        base_model: Hub name of the checkpoint that was fine-tuned.
        training: rows of the training table.
        environment: rows of the hardware and software table.
        results: the evaluation table.
        lengths: tokens of the inputs and targets that were trained or evaluated.
        extra_tags: added to the tags of the header.
    """

    model_name: str
    description: str
    model_type: str
    architecture: str
    num_parameters: int | None = None
    auto_class: str = "AutoModel"
    task_type: str | None = None
    pipeline_tag: str | None = None
    language: Sequence[str] = ()
    license: str | None = None
    datasets: Sequence[str] = ()
    training_data: str = ""
    base_model: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[EvaluationResult] = ()
    lengths: str = ""
    extra_tags: Sequence[str] = ()

    def render(self) -> str:
        """The whole README.md, header included."""
        parts = [
            "---\n" + self._header() + "\n---",
            f"# {self.model_name}",
            self.description or UNKNOWN,
            "## How to use\n\n" + self._usage(),
            "## Architecture\n\n"
            + _table(
                {"class": self.architecture, "model type": self.model_type, "parameters": _count(self.num_parameters)}
            ),
            "## Training\n\n" + f"Data: {self.training_data or UNKNOWN}\n\n" + _table(self.training),
            "## Evaluation\n\n" + self._results_table(),
            f"Lengths used: {self.lengths or UNKNOWN}.",
            "## Environment\n\n" + _table(self.environment),
            "## Limits\n\nKnown failures, bias and out-of-scope uses: not measured. The figures above are those of one "
            "run on the data named here; nothing is claimed beyond them.",
            "## Citation\n\n" + self._citation(),
        ]
        return "\n\n".join(parts) + "\n"

    def _header(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        results = [
            EvalResult(
                task_type=self.task_type or "text-generation",
                dataset_type=result.dataset,
                dataset_name=result.dataset,
                dataset_split=result.split,
                metric_type=result.metric,
                metric_value=round(float(result.value), 6),
            )
            for result in self.results
        ]
        data = ModelCardData(
            language=list(self.language) or None,
            license=self.license,
            library_name="transformers",
            pipeline_tag=self.pipeline_tag,
            tags=sorted({"hf_hybrid", self.model_type, *self.extra_tags}),
            datasets=list(self.datasets) or None,
            metrics=sorted({result.metric for result in self.results}) or None,
            base_model=self.base_model,
            model_name=self.model_name,
            eval_results=results or None,
        )
        return data.to_yaml()

    def _usage(self) -> str:
        return (
            "```python\nimport hf_hybrid  # registers the architectures\n"
            f"from transformers import AutoTokenizer, {self.auto_class}\n\n"
            'folder = "."  # this folder, or the name of the repository\n'
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
            f"model = {self.auto_class}.from_pretrained(folder)\n```"
        )

    def _results_table(self) -> str:
        if not self.results:
            return UNKNOWN
        rows = "\n".join(
            f"| {result.dataset} | {result.split} | {result.metric} | {result.value:.4g} |" for result in self.results
        )
        return "| data | split | metric | value |\n|---|---|---|---|\n" + rows

    def _citation(self) -> str:
        if self.model_type not in CITATIONS:
            return UNKNOWN
        title, identifier = CITATIONS[self.model_type]
        return f"Architecture: *{title}*, [arXiv {identifier}](https://arxiv.org/abs/{identifier})."


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _table(rows: Mapping[str, Any]) -> str:
    if not rows:
        return UNKNOWN
    lines = [f"| {key} | {UNKNOWN if value in (None, '', []) else value} |" for key, value in rows.items()]
    return "| | |\n|---|---|\n" + "\n".join(lines)


def write_model_card(card: ModelCard, folder: str | os.PathLike) -> Path:
    """Write `README.md` into a folder, after checking it.

    Raises:
        ValueError: the card has problems; all are listed.
    """
    text = card.render()
    problems = model_card_problems(text)
    if problems:
        raise ValueError("The model card is not valid: " + "; ".join(problems) + ".")
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def model_card_problems(text: str) -> list[str]:
    """What the Hub, or a reader, would object to in a model card; checked without a network.

    Args:
        text: the whole README.md.

    Returns:
        One sentence per problem; an empty list for a valid card.
    """
    from huggingface_hub import ModelCard as HubCard
    from yaml import YAMLError

    try:
        data = HubCard(text, ignore_metadata_errors=False).data.to_dict()
    except (YAMLError, ValueError, TypeError, KeyError) as error:
        return [f"the YAML header cannot be read: {error}"]
    if not data:
        return ["the YAML header is missing"]
    problems = []
    license_name = data.get("license")
    if license_name is not None and license_name not in LICENSES:
        problems.append(f"license {license_name!r} is not an identifier of the Hub (see hub.LICENSES)")
    languages = data.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not _LANGUAGE.match(str(language)):
            problems.append(f"language {language!r} is not an ISO 639 code")
    tag = data.get("pipeline_tag")
    if tag is not None and tag not in PIPELINE_TAGS:
        problems.append(f"pipeline_tag {tag!r} is unknown")
    if not data.get("library_name"):
        problems.append("library_name is missing")
    problems += [f"the placeholder {mark!r} is left in the text" for mark in _PLACEHOLDERS if mark in text]
    for index in data.get("model-index") or []:
        for result in index.get("results", []):
            if not result.get("metrics"):
                problems.append("a result of the model index has no metric")
    return problems

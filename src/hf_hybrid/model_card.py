"""Model cards: written from what a run recorded, and checked without a network.

A value that the run did not determine reads "not measured"; nothing is copied from papers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .auto import ARCHITECTURES, find_architecture

UNKNOWN = "not measured"
CARD_FILE = "README.md"

# The common ones of the licences that the Hub accepts (https://huggingface.co/docs/hub/repositories-licenses).
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

# Hub pipeline of the head that an Auto class loads, where there is one.
PIPELINE_OF_HEAD = {
    "AutoModel": "feature-extraction",
    "AutoModelForTextEncoding": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
}

# Processors other than a tokenizer that turn the inputs of a head into tensors.
_PREPARED_BY = {
    "AutoModelForImageClassification": ("image_processor", "AutoImageProcessor"),
    "AutoModelForAudioClassification": ("feature_extractor", "AutoFeatureExtractor"),
}

_LANGUAGE = re.compile(r"^([a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual)$")
_DATASET = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
# Names such as `TODO-list` or `data/TODO.txt` are not placeholders.
_PLACEHOLDERS = re.compile(r"\[More Information Needed\]|\{\{|\}\}|(?<![\w./-])TODO(?![\w/-]|\.\w)")


@dataclass
class EvaluationResult:
    """One measured number: `value` of `metric` on a split of a data set, and what a simple baseline reaches there.

    Attributes:
        baseline: e.g. "0.519 (largest class)"; empty where none was run.
    """

    metric: str
    value: float
    dataset: str
    split: str = "validation"
    baseline: str = ""


@dataclass
class ModelCard:
    """What a card says. Every field that stays empty is rendered as "not measured" or left out of the header.

    Attributes:
        model_name: title of the card.
        description: what the model is and what it was trained to do, in full sentences.
        model_type: that of the configuration.
        architecture: name of the class.
        num_parameters: number of parameters, tied tensors counted once.
        auto_class: Auto class that loads the checkpoint.
        task_type: Hub task of the evaluation results, e.g. "text-classification".
        pipeline_tag: Hub pipeline, where one fits.
        language: codes of the languages of the training text.
        license: licence of the weights; decided by the publisher, never guessed.
        datasets: Hub names of the training data; `training_data` describes data of any origin.
        base_model: Hub name of the checkpoint that was fine-tuned.
        training: rows of the training table.
        environment: rows of the hardware and software table.
        results: rows of the evaluation table.
        lengths: lengths of the inputs and targets in training or evaluation.
        extra_tags: tags added to those of the header.
        intended_use: what the model may and may not be used for.
        limits: known failures; what the figures do not show.
        adapter_of: name of the base checkpoint of a LoRA adapter; None for a whole model.
        has_processor: whether a tokenizer or another processor is stored with the model.
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
    intended_use: str = ""
    limits: str = ""
    adapter_of: str | None = None
    has_processor: bool = True

    def render(self) -> str:
        """The whole README.md, header included."""
        parts = [
            "---\n" + self._header() + "\n---",
            f"# {_inline(self.model_name)}",
            _without_html(self.description) or UNKNOWN,
            "## How to use\n\n" + self._usage(),
            "## Architecture\n\n"
            + _table(
                {"class": self.architecture, "model type": self.model_type, "parameters": _count(self.num_parameters)}
            ),
            "## Training\n\n" + f"Data: {_inline(self.training_data) or UNKNOWN}\n\n" + _table(self.training),
            "## Evaluation\n\n" + self._results_table(),
            f"Lengths used: {_inline(self.lengths) or UNKNOWN}.",
            "## Environment\n\n" + _table(self.environment),
            "## Intended use\n\n" + (_without_html(self.intended_use) or _INTENDED_USE),
            "## Limits\n\n" + (_without_html(self.limits) or _LIMITS),
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
            if math.isfinite(result.value)  # the table says it, the index of the Hub takes numbers only
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

    def _registration(self) -> str:
        """The line that registers the model with the Auto classes."""
        architecture = find_architecture(self.model_type)
        package = "hf_hybrid" if architecture is None else architecture.package.partition(".")[0]
        return f"import {package}  # registers the architectures\n"

    def _adapter_usage(self) -> str:
        name, loader = _PREPARED_BY.get(self.auto_class, ("tokenizer", "AutoTokenizer"))
        return (
            f"This is a LoRA adapter of the checkpoint `{_inline(self.adapter_of or '').replace('`', '')}`, which must be available too; loading "
            "merges the two:\n\n"
            f"```python\n{self._registration()}from transformers import {self.auto_class}, {loader}\n"
            "from hf_hybrid.training.adapters import load_adapted_model\n\n"
            'source = "."  # this folder, or the name of the repository\n'
            f"{name} = {loader}.from_pretrained(source)\nmodel = load_adapted_model({self.auto_class}, source)\n```"
        )

    def _usage(self) -> str:
        if self.adapter_of is not None:
            return self._adapter_usage()
        classes, processor = self.auto_class, ""
        if self.has_processor:
            name, loader = _PREPARED_BY.get(self.auto_class, ("tokenizer", "AutoTokenizer"))
            classes, processor = (
                f"{self.auto_class}, {loader}",
                f"{name} = {loader}.from_pretrained(source{{trust}})\n",
            )
        load = (
            f"from transformers import {classes}\n\n"
            'source = "."  # this folder, or the name of the repository\n'
            f"{processor}model = {self.auto_class}.from_pretrained(source{{trust}})"
        )
        return (
            f"With the package:\n\n```python\n{self._registration()}"
            + load.format(trust="")
            + "\n```\n\nWithout it, if the model comes with its code (files `modeling_*.py`), which this runs:\n\n```python\n"
            + load.format(trust=", trust_remote_code=True")
            + "\n```"
        )

    def _results_table(self) -> str:
        if not self.results:
            return UNKNOWN
        rows = "\n".join(
            f"| {_inline(result.dataset)} | {_inline(result.split)} | {_inline(result.metric)} | {result.value:.4g} "
            f"| {_inline(result.baseline) or UNKNOWN} |"
            for result in self.results
        )
        return "| data | split | metric | value | baseline |\n|---|---|---|---|---|\n" + rows

    def _citation(self) -> str:
        architecture = find_architecture(self.model_type)
        paper = None if architecture is None else architecture.paper
        if paper is None:
            return UNKNOWN
        return (
            f"Architecture: *{paper.title}*, [arXiv {paper.arxiv}]({paper.url}).\n\n```bibtex\n{paper.bibtex()}\n```"
        )


_INTENDED_USE = "Research on data like the data named here. Nothing else was tried."
_LIMITS = (
    "Known failures, bias and out-of-scope uses: not measured. The figures above are those of one run on the data named "
    "here; nothing is claimed beyond them."
)


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _without_html(text: str) -> str:
    """Markdown in which no tag stands: names of files and of data are anybody's words."""
    return text.replace("<", "&lt;")


def _inline(value: Any) -> str:
    """A value inside a heading, a sentence or a cell of a table: one line, no tag, no link, no border of a cell."""
    return re.sub(r"(?<!\\)([|\[\]])", r"\\\1", _without_html(" ".join(str(value).split())))


def _table(rows: Mapping[str, Any]) -> str:
    if not rows:
        return UNKNOWN
    lines = [
        f"| {_inline(key)} | {UNKNOWN if value in (None, '', []) else _inline(value)} |" for key, value in rows.items()
    ]
    return "| | |\n|---|---|\n" + "\n".join(lines)


def card_of_model(model: Any) -> ModelCard:
    """A draft that says what the model itself shows, and that everything else was not measured."""
    name = type(model).__name__
    heads = next(found.heads for found in ARCHITECTURES if name in found.heads.values())
    auto_class = next(auto_name for auto_name, head in heads.items() if head == name)
    return ModelCard(
        model_name=f"{name} of hf_hybrid",
        description=f"A model of the type `{model.config.model_type}`. Its training was not recorded.",
        model_type=model.config.model_type,
        architecture=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        auto_class=auto_class,
        pipeline_tag=PIPELINE_OF_HEAD.get(auto_class),
    )


def with_metadata(text: str, changes: Mapping[str, Any]) -> str:
    """The card with fields of its header set or replaced, e.g. `{"license": "apache-2.0"}`.

    Args:
        text: the whole README.md.
        changes: field of the header -> value.
    """
    from huggingface_hub import ModelCard as HubCard

    if not changes:
        return text
    card = HubCard(text)
    for name, value in changes.items():
        card.data[name] = value
    return str(card)


def write_model_card(card: ModelCard, folder: str | os.PathLike[str]) -> Path:
    """Checks a card and writes it as `README.md` into a folder.

    Raises:
        ValueError: the card has problems; all are listed.
    """
    text = card.render()
    check_model_card(text)
    path = Path(folder) / CARD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def check_model_card(text: str) -> None:
    """Rejects a card with problems.

    Raises:
        ValueError: the card has problems; all are listed.
    """
    problems = model_card_problems(text)
    if problems:
        raise ValueError("The model card is not valid: " + "; ".join(problems) + ".")


def model_card_problems(text: str) -> list[str]:
    """Problems that the Hub or a reader would find in a model card; needs no network.

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
    problems = _header_problems(data)
    marks = dict.fromkeys(_PLACEHOLDERS.findall(text))
    problems += [f"the placeholder {mark!r} is left in the text" for mark in marks]
    for index in data.get("model-index") or []:
        for result in index.get("results", []):
            problems += _result_problems(result)
    return problems


def _header_problems(data: Mapping[str, Any]) -> list[str]:
    problems = []
    license_name = data.get("license")
    if license_name is not None and license_name not in LICENSES:
        problems.append(f"license {license_name!r} is not a licence identifier of the Hub (see model_card.LICENSES)")
    for language in _as_list(data.get("language")):
        if not _LANGUAGE.match(str(language)):
            problems.append(f"language {language!r} is not an ISO 639 code")
    for name in _as_list(data.get("datasets")) + _as_list(data.get("base_model")):
        if not _DATASET.match(str(name)):
            problems.append(f"{name!r} is not the name of a repository of the Hub")
    tag = data.get("pipeline_tag")
    if tag is not None and tag not in PIPELINE_TAGS:
        problems.append(f"pipeline_tag {tag!r} is unknown")
    if not data.get("library_name"):
        problems.append("library_name is missing")
    return problems


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _result_problems(result: Mapping[str, Any]) -> list[str]:
    """Problems of one result of the model index."""
    metrics = result.get("metrics")
    if not metrics:
        return ["a result of the model index has no metric"]
    values = [metric.get("value") for metric in metrics]
    if any(isinstance(value, (int, float)) and not math.isfinite(value) for value in values):
        return ["a result of the model index is not a finite number"]
    return []

"""Data of the demonstration: files for the recipes, written from the embedded corpus, and simple baselines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import metrics
from ...data.corpus import (
    FAMILIES,
    embedded_classification_examples,
    embedded_summarization_pairs,
    embedded_text_corpus,
)

CORPUS, CLASSIFICATION, SUMMARIZATION = "corpus", "classification", "summarization"
SPLITS = ("train", "validation")

# Libraries that come with torch and the extra `train`, and whose documentation `checkpoints/spade-small` has not seen.
NEW_FAMILIES = ("sympy", "networkx", "huggingface_hub", "accelerate", "datasets", "joblib")

# The input of a summary is a document whose first line is hidden: what the model was pretrained to fill in, with the name of what it
# documents. The space behind the sentinel makes the first word of a text one token, as in the middle of a text.
HIDDEN_LINE = "<extra_id_0> "

# This share of the files serves as validation data of one of the tasks: pretraining never reads them.
_HELD_OUT = 0.2
_FEWEST_PER_CLASS = 800


@dataclass(frozen=True)
class DataPlan:
    """How much of the embedded corpus to use.

    Attributes:
        families: libraries whose docstrings are read for the two tasks, and to pretrain from random weights.
        max_source_bytes: bytes of source code read per library.
        new_families: libraries to continue the pretraining on; none for those of `families` and the language reference.
        max_characters: characters of pretraining text; None for all.
        max_per_class: training rows per class. Pretraining should help most with few labels and much text.
        max_words: words of a docstring that the classifier and its baselines see.
        max_pairs: (document, summary) training pairs; None for all.
        max_evaluation: evaluation rows of each task; None for all.
    """

    families: tuple[str, ...] = FAMILIES
    max_source_bytes: int = 3_000_000
    new_families: tuple[str, ...] = ()
    max_characters: int | None = None
    max_per_class: int = 400
    max_words: int = 40
    max_pairs: int | None = None
    max_evaluation: int | None = None


def write_data(folder: Path, plan: DataPlan, advance: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Write `corpus/`, `classification/` and `summarization/`, each with `train.jsonl` and `validation.jsonl`.

    Args:
        folder: parent of the three folders.
        plan: how much to write.
        advance: called with the share of the work that is done.

    Returns:
        Counts for the records.

    Raises:
        ValueError: this installation contains too little text.
    """
    source: dict[str, Any] = {"families": plan.families, "max_source_bytes": plan.max_source_bytes}
    texts = _pretraining_text(plan)
    advance(0.4)
    classes: dict[str, list[dict[str, Any]]] = {}
    pairs: dict[str, list[dict[str, Any]]] = {}
    # From the same rows whatever the number of labels: few labels are not to mean few validation rows.
    limit = max(_FEWEST_PER_CLASS, 2 * plan.max_per_class)
    for split in SPLITS:
        examples = embedded_classification_examples(split, max_per_class=limit, **source)
        rows = (
            _first_of_each_class(examples, plan.max_per_class) if split == "train" else examples[: plan.max_evaluation]
        )
        classes[split] = [
            {"sentence": " ".join(str(row["sentence"]).split()[: plan.max_words]), "label": row["label_name"]}
            for row in rows
        ]
        advance(0.6 if split == "train" else 0.8)
    for split in SPLITS:
        found_pairs = embedded_summarization_pairs(split, **source)
        kept = _spread(found_pairs, plan.max_pairs if split == "train" else plan.max_evaluation)
        pairs[split] = [
            {
                "document": named(row["name"], row["document"]),
                "summary": HIDDEN_LINE + row["summary"],
                "targets": [row["summary"]],
                "text": row["document"],
            }
            for row in kept
        ]
    if len({row["label"] for row in classes["train"]}) < 2 or not all([*classes.values(), *pairs.values()]):
        raise ValueError(
            "The installed libraries contain too few docstrings for the demonstration: install numpy, scikit-learn "
            'and torch with their sources (`pip install "hf_hybrid[all]"`).'
        )
    written = {CORPUS: texts, CLASSIFICATION: classes, SUMMARIZATION: pairs}
    for name, rows_of in written.items():
        for split in SPLITS:
            write_rows(folder / name / f"{split}.jsonl", rows_of[split])
    return {
        "documents": {split: len(rows) for split, rows in texts.items()},
        "characters": {split: sum(len(row["text"]) for row in rows) for split, rows in texts.items()},
        "libraries": list(plan.new_families or plan.families),
        "classification_rows": {split: len(rows) for split, rows in classes.items()},
        "classes": dict(Counter(row["label"] for row in classes["train"]).most_common()),
        "summarization_pairs": {split: len(rows) for split, rows in pairs.items()},
    }


def _pretraining_text(plan: DataPlan) -> dict[str, list[dict[str, str]]]:
    """Documents to pretrain on, by split: none of them holds a validation row of a task."""
    options: dict[str, Any] = {"max_source_bytes": plan.max_source_bytes}
    if plan.new_families:
        options |= {"families": plan.new_families, "with_reference": False, "validation_share": 0.1}
        train = embedded_text_corpus("train", max_characters=plan.max_characters, **options)
        held_out = embedded_text_corpus("validation", **options)
    else:
        options["families"] = plan.families
        train = embedded_text_corpus(
            "train", validation_share=_HELD_OUT, max_characters=plan.max_characters, **options
        )
        held_out = embedded_text_corpus("validation", **options)
    return {
        split: [{"text": text} for text in documents]
        for split, documents in (("train", train), ("validation", held_out))
    }


def named(name: str, text: str) -> str:
    """The input of the summarizer: the name in words, and the text; the text alone for a module, which has none."""
    return f"{name}: {text}" if name else text


def _first_of_each_class(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    seen: Counter[Any] = Counter()
    kept = []
    for row in rows:
        seen[row["label"]] += 1
        if seen[row["label"]] <= limit:
            kept.append(row)
    return kept


def _spread(rows: Sequence[Any], limit: int | None) -> list[Any]:
    """All rows, or `limit` of them, evenly spaced."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[index * len(rows) // limit] for index in range(limit)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON Lines file; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------------------------------------------------------- baselines


def classification_baselines(folder: Path, seed: int) -> dict[str, Any]:
    """Accuracy of two baselines on the validation rows: the majority class, and multinomial Naive Bayes.

    Naive Bayes counts words and pairs of words. Its smoothing is chosen by cross-validation on the training rows, which makes
    it a stronger baseline than its default of 1 (also reported).
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.naive_bayes import MultinomialNB

    rows = {split: read_rows(folder / f"{split}.jsonl") for split in SPLITS}
    labels = {split: [row["label"] for row in part] for split, part in rows.items()}
    vectorizer = CountVectorizer(ngram_range=(1, 2))
    counts = {
        "train": vectorizer.fit_transform([row["sentence"] for row in rows["train"]]),
        "validation": vectorizer.transform([row["sentence"] for row in rows["validation"]]),
    }
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    search = GridSearchCV(MultinomialNB(), {"alpha": [0.01, 0.03, 0.1, 0.3, 1.0]}, cv=folds)
    search.fit(counts["train"], labels["train"])
    plain = MultinomialNB().fit(counts["train"], labels["train"])
    majority = Counter(labels["train"]).most_common(1)[0][0]
    return {
        "majority": labels["validation"].count(majority) / len(labels["validation"]),
        "naive_bayes": float(search.score(counts["validation"], labels["validation"])),
        "naive_bayes_alpha": search.best_params_["alpha"],
        "naive_bayes_default": float(plain.score(counts["validation"], labels["validation"])),
    }


def summary_words(folder: Path) -> int:
    """Words that a training summary has on average."""
    return round(float(np.mean([len(row["targets"][0].split()) for row in read_rows(folder / "train.jsonl")])))


def first_words(text: str, words: int) -> str:
    """The beginning of a text: the baseline of a summary."""
    return " ".join(text.split()[:words])


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE F-measures in percent, as the summarization recipe computes them."""
    scores = metrics.load("rouge").compute(
        predictions=list(predictions),
        references=[[reference] for reference in references],
        use_stemmer=True,
        split_sentences=True,
    )
    return {name: 100.0 * float(value) for name, value in scores.items()}

"""The classes of `metrics.load`: `evaluate.Metric`s that need no network.

The numbers come from scikit-learn, SciPy, rouge-score and sacrebleu.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

try:
    import evaluate
    from datasets import Features, List, Value
except ImportError as error:
    raise ImportError('Metrics need `evaluate` and `datasets`: pip install "hf_hybrid[train]".') from error

from .metric_names import GLUE_TASKS, ROUGE_TYPES, glue_metric_names

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_KEYWORDS = "predictions and references, two sequences of equal length."


def _class_features() -> Features:
    return Features({"predictions": Value("int64"), "references": Value("int64")})


def _number_features() -> Features:
    return Features({"predictions": Value("float64"), "references": Value("float64")})


def _text_features() -> list[Features]:
    """One reference per prediction, or a list of them."""
    return [
        Features({"predictions": Value("string"), "references": List(Value("string"))}),
        Features({"predictions": Value("string"), "references": Value("string")}),
    ]


class OfflineMetric(evaluate.Metric):
    """Base class: fills in what every `evaluate.Metric` must declare, from class attributes."""

    description = ""
    citation = ""

    def input_features(self) -> Features | list[Features]:
        """Types of predictions and references."""
        return _class_features()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=_KEYWORDS,
            features=self.input_features(),
        )


class Accuracy(OfflineMetric):
    """Share of equal labels."""

    description = "Share of predictions that equal their reference."

    def _compute(self, predictions: Sequence[int], references: Sequence[int], **options: Any) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions, **options))}


class F1(OfflineMetric):
    """F1 of class 1, or with `average="macro"` the mean over classes."""

    description = "Harmonic mean of precision and recall."

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], average: str = "binary", **options: Any
    ) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0, **options))}


class MatthewsCorrelation(OfflineMetric):
    """Matthews correlation coefficient, the metric of CoLA."""

    description = "Matthews correlation coefficient; 0 for constant predictions."

    def _compute(self, predictions: Sequence[int], references: Sequence[int], **options: Any) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(references, predictions, **options))}


class PearsonCorrelation(OfflineMetric):
    """Pearson correlation; 0 where it is undefined (constant values, fewer than two rows)."""

    description = "Pearson correlation coefficient; 0 for constant values."

    def input_features(self) -> Features:
        return _number_features()

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import pearsonr

        return {"pearson": _correlation(pearsonr, predictions, references)}


class SpearmanCorrelation(OfflineMetric):
    """Spearman rank correlation; 0 where it is undefined."""

    description = "Spearman rank correlation coefficient; 0 for constant values."

    def input_features(self) -> Features:
        return _number_features()

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import spearmanr

        return {"spearmanr": _correlation(spearmanr, predictions, references)}


def _correlation(function: Any, predictions: Sequence[float], references: Sequence[float]) -> float:
    if len(predictions) < 2 or min(predictions) == max(predictions) or min(references) == max(references):
        return 0.0
    return float(function(predictions, references)[0])


class Glue(OfflineMetric):
    """The metrics of one GLUE task, named by `config_name` (arXiv 1804.07461, table 1)."""

    description = "The metrics of a GLUE task."
    citation = "Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, arXiv 1804.07461."

    def input_features(self) -> Features:
        if self.config_name not in GLUE_TASKS:
            raise ValueError(f"The GLUE task must be one of {', '.join(GLUE_TASKS)}; got {self.config_name!r}.")
        return _number_features() if self.config_name == "stsb" else _class_features()

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        results: dict[str, float] = {}
        for name in glue_metric_names(self.config_name):
            results.update(CLASSES[name]._compute(self, predictions, references))  # type: ignore[attr-defined]
        return results


class Rouge(OfflineMetric):
    """ROUGE-1, -2, -L and -Lsum F-measures (0 to 1), the best over the references of each prediction.

    `split_sentences=True` puts every sentence on its own line before ROUGE-Lsum, which is defined on lines.
    """

    description = "ROUGE F-measures of rouge-score; with several references, the best one per row and type."
    citation = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004."

    def input_features(self) -> list[Features]:
        return _text_features()

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        rouge_types: Sequence[str] = ROUGE_TYPES,
        use_stemmer: bool = False,
        split_sentences: bool = False,
        use_aggregator: bool = True,
    ) -> dict[str, Any]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(rouge_types), use_stemmer=use_stemmer)
        prepare = _one_sentence_per_line if split_sentences else str
        scores: dict[str, list[float]] = {name: [] for name in rouge_types}
        for prediction, row in zip(predictions, references):
            targets = [row] if isinstance(row, str) else list(row)
            if not targets:
                raise ValueError("Every prediction needs at least one reference; a row has none.")
            best = scorer.score_multi([prepare(target) for target in targets], prepare(prediction))
            for name in rouge_types:
                scores[name].append(best[name].fmeasure)
        if not use_aggregator:
            return dict(scores)
        return {name: sum(values) / len(values) for name, values in scores.items()}


def _one_sentence_per_line(text: str) -> str:
    return _SENTENCE_END.sub("\n", text.strip())


class SacreBleu(OfflineMetric):
    """Corpus BLEU (0 to 100) with sacrebleu's tokenisation."""

    description = "Corpus BLEU of sacrebleu."
    citation = "Post, A Call for Clarity in Reporting BLEU Scores, arXiv 1804.08771."

    def input_features(self) -> list[Features]:
        return _text_features()

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]], **options: Any
    ) -> dict[str, Any]:
        from sacrebleu import BLEU

        result = BLEU(**options).corpus_score(list(predictions), _by_reference(references))
        return {
            "score": result.score,
            "precisions": list(result.precisions),
            "bp": result.bp,
            "sys_len": result.sys_len,
            "ref_len": result.ref_len,
        }


class Chrf(OfflineMetric):
    """Corpus chrF (0 to 100); `word_order=2` gives chrF++."""

    description = "Character n-gram F-score of sacrebleu."
    citation = "Popović, chrF: character n-gram F-score for automatic MT evaluation, 2015."

    def input_features(self) -> list[Features]:
        return _text_features()

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]], **options: Any
    ) -> dict[str, float]:
        from sacrebleu import CHRF

        return {"score": CHRF(**options).corpus_score(list(predictions), _by_reference(references)).score}


def _by_reference(references: Sequence[str] | Sequence[Sequence[str]]) -> list[Any]:
    """References as sacrebleu expects them: one list per reference number, None where a row has fewer."""
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    if any(not row for row in rows):
        raise ValueError("Every prediction needs at least one reference; a row has none.")
    most = max(map(len, rows), default=0)
    return [[row[number] if number < len(row) else None for row in rows] for number in range(most)]


CLASSES: dict[str, type[OfflineMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": PearsonCorrelation,
    "spearmanr": SpearmanCorrelation,
    "glue": Glue,
    "rouge": Rouge,
    "sacrebleu": SacreBleu,
    "chrf": Chrf,
}

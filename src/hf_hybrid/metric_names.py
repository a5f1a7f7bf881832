"""Names of tasks and scores that metrics and recipes share."""

from __future__ import annotations

GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def glue_metric_names(task: str) -> tuple[str, ...]:
    """Metrics of a GLUE task."""
    special = {
        "cola": ("matthews_correlation",),
        "stsb": ("pearson", "spearmanr"),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
    }
    return special.get(task, ("accuracy",))


__all__ = ["GLUE_TASKS", "ROUGE_TYPES", "glue_metric_names"]

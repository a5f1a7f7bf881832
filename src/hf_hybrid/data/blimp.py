"""Minimal pairs in the format of BLiMP (arXiv 1912.00582) as local tasks of the lm-evaluation-harness."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .loading import MissingSplitError, load_table
from .records import place_of

GROUP = "blimp_local"
PARADIGM_COLUMNS = ("paradigm", "UID")  # the second is the name in the published files


def read_minimal_pairs(
    sources: Sequence[str] | str, *, encoding: str | None = None, on_bad_record: str = "error"
) -> dict[str, list[dict[str, str]]]:
    """Pairs of sentences by paradigm, in the order of the data.

    Args:
        sources: files, a folder, or a Hub data set, with the columns `sentence_good` and `sentence_bad`, and `paradigm` (or `UID`).
        encoding, on_bad_record: as in `load_table`.

    Raises:
        ValueError: the data cannot be read, has no rows, or a sentence is missing.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    reading: dict[str, Any] = {"encoding": encoding, "on_bad_record": on_bad_record}
    try:
        rows: Any = load_table(sources, "validation", **reading)
    except MissingSplitError:
        rows = load_table(sources, "train", **reading)  # files that are not named after splits
    except ValueError:
        if any(Path(source).exists() for source in sources):  # a damaged file is no missing one
            raise
        rows = load_table(sources, "train", **reading)
    missing = [name for name in ("sentence_good", "sentence_bad") if name not in rows.column_names]
    if missing:
        raise ValueError(f"Minimal pairs need the column {missing[0]!r}; there are {', '.join(rows.column_names)}.")
    column = next((name for name in PARADIGM_COLUMNS if name in rows.column_names), None)
    pairs: dict[str, list[dict[str, str]]] = {}
    for number, row in enumerate(rows):
        pair = {name: row[name] for name in ("sentence_good", "sentence_bad")}
        if not all(isinstance(text, str) and text.strip() for text in pair.values()):
            raise ValueError(
                f"{place_of(rows, number, 'minimal pairs')}: a sentence is missing, empty or no text: {pair}."
            )
        name = "all" if column is None else re.sub(r"\W+", "_", str(row[column]))
        pairs.setdefault(name, []).append(pair)
    if not pairs:
        raise ValueError("The minimal pairs are empty.")
    return pairs


def write_blimp_tasks(
    pairs: Mapping[str, Sequence[Mapping[str, str]]],
    folder: str | os.PathLike[str],
    *,
    rows: int | None = None,
    context: str = "",
) -> list[str]:
    """Writes one harness task per paradigm, and the group `blimp_local` of all of them.

    A model is right on a pair if it gives the good sentence the higher total log-probability; the score of the group
    is the mean over paradigms.

    Args:
        pairs: result of `read_minimal_pairs`.
        folder: folder for `--include_path` of the harness; new or empty.
        rows: number of pairs per paradigm to use, the first ones; None: all.
        context: text that the sentences continue, e.g. "<extra_id_0>"; by default the harness begins with one special
            token.

    Returns:
        Names of the tasks, the group last.

    Raises:
        ValueError: `rows` is not positive.
        FileExistsError: the folder is not empty.
    """
    import yaml

    if rows is not None and rows < 1:
        raise ValueError(f"The number of pairs per paradigm must be positive; got {rows}.")
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"The folder {folder} is not empty. Choose a new one for the tasks.")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for paradigm, several in pairs.items():
        data = folder.resolve() / f"{paradigm}.jsonl"
        data.write_text("".join(json.dumps(pair) + "\n" for pair in several[:rows]), encoding="utf-8")
        names.append(f"{GROUP}_{paradigm}")
        task = {
            "task": names[-1],
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(data)}},
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "doc_to_text": context,
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
            "doc_to_target": 0,
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        (folder / f"{names[-1]}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    group = {
        "group": GROUP,
        "task": list(names),
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{GROUP}.yaml").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")
    return [*names, GROUP]

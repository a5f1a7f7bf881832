"""Generate ListOps or Pathfinder data of the Long Range Arena.

Writes `train`, `validation` and `test` files in Parquet.

    python -m hf_hybrid.recipes.generate_lra --task pathfinder --num_train 160000 --num_validation 20000 --num_test 20000 \
        --output_dir data/pathfinder32
    python -m hf_hybrid.recipes.train_lra --task pathfinder --data data/pathfinder32 --arch mega --output_dir runs/pathfinder

The rows are a function of the options and of `--generator_seed` alone, whatever `--num_processes`. The validation and test rows
do not depend on the number of training rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.lra import LraTask, lra_rows, lra_task
from ..data.lra_listops import ListOpsSettings, generate_listops
from ..data.lra_pathfinder import DIFFICULTIES, generate_pathfinder, pathfinder_settings
from ..data.parallel import available_processes
from ..training.run_folder import RunFolder, is_main_process
from .support.options import parse_arguments, require, resolved_arguments
from .support.runs import set_up_logging

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

GENERATED = ("listops", "pathfinder")
_ALONE = 200  # this many rows are generated faster than another process starts

SPLITS = ("validation", "test", "train")  # in the order in which they are taken from one sequence of rows


@dataclass
class GeneratorArguments:
    """Generated data: ListOps and Pathfinder."""

    num_train: int = field(default=10_000, metadata={"help": "Generated training rows (official: 96000, 160000)."})
    num_validation: int = field(default=1_000, metadata={"help": "Generated validation rows."})
    num_test: int = field(default=0, metadata={"help": "Generated test rows."})
    generator_seed: int = field(default=0, metadata={"help": "Seed of the generated rows."})
    num_processes: int | None = field(
        default=None, metadata={"help": "Number of generating processes. Default: all cores."}
    )
    max_depth: int = field(default=10, metadata={"help": "ListOps: maximum depth of a tree."})
    max_args: int = field(default=10, metadata={"help": "ListOps: maximum number of arguments of an operator."})
    longer_than: int = field(default=500, metadata={"help": "ListOps: trees have more tokens than this."})
    shorter_than: int = field(default=2000, metadata={"help": "ListOps: trees have fewer tokens than this."})
    resolution: int = field(default=32, metadata={"help": "Pathfinder: 32, 64 or 128 (Path-X) pixels per side."})
    difficulty: str = field(default="hard", metadata={"help": f"Pathfinder: {', '.join(DIFFICULTIES)}."})


@dataclass
class OutputArguments:
    """Task to generate and folder to write."""

    task: str = field(metadata={"help": f"{' or '.join(GENERATED)}."})
    output_dir: str = field(metadata={"help": "Folder to write; it must be new or empty."})


def generate_splits(task: LraTask, arguments: GeneratorArguments, *, with_train: bool = True) -> dict[str, Dataset]:
    """The rows of all splits that have any; `with_train=False` leaves the training rows out.

    Raises:
        ValueError: a task that is not generated, or an option out of range.
        ImportError: `datasets` is not installed.
    """
    require("Generating data", "datasets", extra="train")
    if task.name not in GENERATED:
        raise ValueError(f"Only {' and '.join(GENERATED)} can be generated; pass `data` for the task {task.name!r}.")
    sizes = {
        "validation": arguments.num_validation,
        "test": arguments.num_test,
        "train": arguments.num_train if with_train else 0,
    }
    if min(sizes.values()) < 0 or sum(sizes.values()) == 0:
        raise ValueError(f"`num_train`, `num_validation` and `num_test` must be zero or positive; got {sizes}.")
    count = sum(sizes.values())
    processes = arguments.num_processes or (available_processes() if count > _ALONE else 1)
    options: dict[str, Any] = {
        "seed": arguments.generator_seed,
        "num_processes": processes,
        "progress": is_main_process() and count > _ALONE,
    }
    columns: dict[str, Any]
    if task.name == "listops":
        shape = ListOpsSettings(arguments.max_depth, arguments.max_args, arguments.longer_than, arguments.shorter_than)
        columns = generate_listops(count, settings=shape, **options)
    else:
        settings = pathfinder_settings(arguments.resolution, arguments.difficulty)
        pixels, labels = generate_pathfinder(count, settings=settings, **options)
        columns = {"pixels": pixels, "label": labels}
    splits, start = {}, 0
    for name in SPLITS:
        if sizes[name]:
            rows = {column: values[start : start + sizes[name]] for column, values in columns.items()}
            splits[name] = lra_rows(task, rows)
        start += sizes[name]
    return splits


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Generate and write.

    Args:
        args: see `parse_arguments`.

    Returns:
        Rows and share of the most frequent label, by split.

    Raises:
        ValueError: an option cannot be used.
        FileExistsError: the output folder is not empty.
    """
    output, arguments = parse_arguments((OutputArguments, GeneratorArguments), args, __doc__)
    set_up_logging()
    folder = RunFolder(output.output_dir)
    task = lra_task(output.task)
    summary: dict[str, Any] = {}
    with folder.recording(resolved_arguments(output, arguments)):
        for name, rows in generate_splits(task, arguments).items():
            labels = np.asarray(rows["label"])
            summary[name] = {"rows": len(rows), "majority": float(np.bincount(labels).max() / len(labels))}
            rows.to_parquet(str(Path(output.output_dir) / f"{name}.parquet"))
            logger.info("%s: %s", name, summary[name])
    return summary


if __name__ == "__main__":
    main()

"""Compares our models with stored outputs of official implementations.

Usage:
    python tests/parity/check.py DIR [DIR ...]

Every `.safetensors` file below the folders is read. Its metadata entry `config` (JSON) says which adapter checks it, by
`model`, `kind` or `model_type`. Every stored tensor named `output.*`, `post.*`, `grad.*` (or `output64.*`, `post64.*`, of a float64 run) must be
checked by the adapter. Printed are, per tensor, the largest error and its tolerance, and, where an adapter reports it, the error
of our own float64 run against the same tensor. The exit code is 0 when every file could be checked completely and every error is
within its tolerance, else 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from comparison import Row
from safetensors import safe_open

# `model`, `kind` or `model_type` of a file: module with `check(path, config, tensors) -> rows`.
ADAPTERS = {
    "spade_encoder_decoder": "spade_vectors",
    "spade_lm": "spade_vectors",
    "spade_s4": "s4_vectors",
    "s4d_minimal": "s4_vectors",
    "ss_diag": "s4_vectors",
    "ss_dplr": "s4_vectors",
    "init": "s4_vectors",
    "lra": "mega_vectors",
    "sc_raw": "mega_vectors",
    "mega_lm": "mega_vectors",
    "mega": "mega_vectors",
    "bst": "bst_vectors",
    "seqboat": "seqboat_vectors",
    "longvq": "longvq_vectors",
}

CHECKED_PREFIXES = ("output.", "output64.", "post.", "post64.", "grad.", "grad64.")


class Report(NamedTuple):
    """Result for one file: its rows, and what kept it from being checked completely (empty: nothing)."""

    path: Path
    rows: list[Row]
    problem: str

    @property
    def is_ok(self) -> bool:
        return not self.problem and bool(self.rows) and all(row.is_ok for row in self.rows)


def read_vectors(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and tensors of a file.

    Raises:
        ValueError: there is no configuration, or it is not a JSON object.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dictionary
    if "config" not in metadata:
        raise ValueError("the metadata has no `config`")
    config = json.loads(metadata["config"])
    if not isinstance(config, dict):
        raise ValueError(f"the `config` of the metadata is no JSON object but {config!r}")
    return config, tensors


def check_file(path: Path) -> Report:
    """Checks one file; whatever goes wrong becomes the `problem` of the report."""
    rows: list[Row] = []
    try:
        config, tensors = read_vectors(path)
        kind = config.get("model") or config.get("kind") or config.get("model_type")
        if kind is None and "bst_layers" in config:
            kind = "bst"
        if kind is None and "init_temp_scale" in config:  # only the routers of SeqBoat have a temperature
            kind = "seqboat"
        if kind is None and "codebook_size" in config:
            kind = "longvq"
        if kind not in ADAPTERS:
            return Report(path, rows, f"no adapter for {kind!r}; known are {', '.join(sorted(ADAPTERS))}")
        torch.manual_seed(0)
        rows = [Row(*row) for row in importlib.import_module(ADAPTERS[kind]).check(path, config, tensors)]
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return Report(path, rows, f"{type(error).__name__}: {error} (at {place})")
    stored = {name for name in tensors if name.startswith(CHECKED_PREFIXES)}
    left = sorted(stored - {row.name for row in rows})
    if left:
        return Report(path, rows, f"not checked, because the adapter does not know them: {', '.join(left)}")
    return Report(path, rows, "" if stored else "the file holds no outputs")


def find_files(folders: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Vector files below the folders (or files given directly), and complaints about those without any."""
    files: list[Path] = []
    problems: list[str] = []
    for folder in map(Path, folders):
        found = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
        files += [path for path in found if path not in files]
        if not folder.exists():
            problems.append(f"{folder}: no such folder")
        elif not found:
            problems.append(f"{folder}: no .safetensors files")
    return files, problems


def print_report(report: Report) -> None:
    """One line per tensor, then the verdict on the file."""
    print(report.path)
    width = max((len(row.name) for row in report.rows), default=0)
    for row in report.rows:
        sanity = "" if row.error64 is None else f"  float64 {row.error64:.1e}"
        print(
            f"  {row.name:<{width}}  {row.error:.2e}  <= {row.tolerance:.1e}  {'ok' if row.is_ok else 'FAIL'}{sanity}"
        )
    if report.problem:
        print(f"  FAIL: {report.problem}")


def _use_this_checkout() -> None:
    """Makes the adapters, and the package beside them rather than an installed one, importable."""
    here = Path(__file__).resolve().parent
    for folder in (here, here.parents[1] / "src"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the folders of the command line; returns the exit code."""
    _use_this_checkout()
    parser = argparse.ArgumentParser(description="Compare with stored outputs of official implementations.")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of .safetensors files, read recursively")
    options = parser.parse_args(arguments)
    files, problems = find_files(options.folders)
    reports = []
    for path in files:
        reports.append(check_file(path))
        print_report(reports[-1])
    for problem in problems:
        print(f"FAIL: {problem}")
    failed = [report.path.name for report in reports if not report.is_ok]
    rows = [row for report in reports for row in report.rows]
    within = sum(row.is_ok for row in rows)
    print(
        f"{len(reports) - len(failed)} of {len(reports)} files ok, {within} of {len(rows)} comparisons within tolerance"
    )
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed or problems or not reports else 0


if __name__ == "__main__":
    sys.exit(main())

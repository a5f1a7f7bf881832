"""Runs benchmark cases: each contender in a fresh process, in turn with its peers, after a check of its results.

    python benchmarks/run.py --list
    python benchmarks/run.py --case diagonal-kernel local-attention --repeats 5 --out benchmarks/results/today
    python benchmarks/run.py --case local-attention --compare HEAD~3

Writes `results.json` and a log-log picture. Exit status 1: a check failed, or with --enforce a floor was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import BENCHMARKS, REPOSITORY, Case, Settings, load_cases, run_case


def git(*arguments: str) -> str:
    """Output of a git command in the repository, empty when there is none."""
    result = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


@contextlib.contextmanager
def checked_out(revision: str | None) -> Iterator[Path | None]:
    """Temporary working tree of a revision."""
    if revision is None:
        yield None
        return
    if not git("rev-parse", "--verify", f"{revision}^{{commit}}"):
        raise SystemExit(f"--compare: {revision!r} is not a revision of {REPOSITORY}.")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as parent:
        tree = Path(parent) / "tree"
        git("worktree", "add", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def machine() -> dict[str, Any]:
    """Hardware, load and commit, for the record."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "src", "benchmarks")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def show(report: dict[str, Any]) -> None:
    """Prints one case."""
    print(f"\n{report['case']}: {report['timed']}")
    if "error" in report:
        print(f"  NOT REPORTED: {report['error']}")
        return
    for results in report["comparisons"]:
        for result in results:
            size = " ".join(f"{key} {value}" for key, value in result["size"].items())
            rate = f"  {result['rate']:.3g} {result['unit']}" if "rate" in result else ""
            token = (
                f", {result['growth_bytes'] / result['size']['length']:.0f} bytes a token"
                if "length" in result["size"]
                else ""
            )
            print(
                f"  {result['contender']:<28} {size:<28} {result['median_s'] * 1e3:10.1f} ms  ratio {result['ratio']:6.2f}"
                f"  peak {result['peak_bytes'] / 2**20:8.0f} MiB (grew {result['growth_bytes'] / 2**20:.0f}{token}){rate}"
            )
    for line in report["missed"]:
        print(f"  BELOW THE FLOOR: {line}")


def draw(reports: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against the first entry of the size, one row per case, both axes logarithmic."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is missing, `pip install "hf_hybrid[viz]"`.', file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    reports = [report for report in reports if report.get("comparisons")]
    if not reports:
        return
    figure, rows = pyplot.subplots(len(reports), 2, figsize=(10, 3.2 * len(reports)), squeeze=False)
    for report, axes in zip(reports, rows):
        points: dict[str, dict[float, tuple[float, float]]] = {}
        for result in (result for results in report["comparisons"] for result in results):
            place = next(iter(result["size"].values()))
            figures = (result["median_s"], result["peak_bytes"] / 2**20)
            points.setdefault(result["contender"], {})[place] = figures
        axis_name = next(iter(report["comparisons"][0][0]["size"]))
        for axis, index, unit in ((axes[0], 0, "seconds per step"), (axes[1], 1, "peak memory, MiB")):
            for name, series in points.items():
                places = sorted(series)
                axis.plot(places, [series[place][index] for place in places], marker="o", label=name)
            axis.set(xscale="log", yscale="log", xlabel=axis_name, ylabel=unit, title=report["case"])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def select(cases: dict[str, Case], names: list[str] | None) -> list[Case]:
    """Cases by name; all when no name is given."""
    unknown = [name for name in names or () if name not in cases]
    if unknown:
        raise SystemExit(f"--case: unknown {', '.join(unknown)}; known: {', '.join(cases)}.")
    return [cases[name] for name in names] if names else list(cases.values())


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the cases and leave")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="cases to run; default: all")
    parser.add_argument("--largest", type=int, metavar="N", help="leave out sizes whose first entry exceeds N")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after the warm-up; default 5")
    parser.add_argument(
        "--warm_up", type=int, default=1, help="untimed steps before them; 0 for steps of minutes; default 1"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each process; default all cores"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time; see Settings")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results/<time>")
    parser.add_argument("--compare", metavar="REV", help="time against another git revision instead of the peers")
    parser.add_argument("--enforce", action="store_true", help="exit with status 1 when a floor is missed")
    parser.add_argument("--cases", type=Path, default=BENCHMARKS / "cases", help="folder of case modules")
    options = parser.parse_args(arguments)
    cases = load_cases(options.cases)
    if options.list:
        for case in cases.values():
            print(f"{case.name:<26} {case.timed}")
        return 0
    if options.repeats < 1:
        raise SystemExit(f"--repeats: at least 1; got {options.repeats}.")
    if options.warm_up < 0:
        raise SystemExit(f"--warm_up: 0 or more; got {options.warm_up}.")
    settings = Settings(repeats=options.repeats, warm_up=options.warm_up, threads=options.threads, clock=options.clock)
    folder = options.out or BENCHMARKS / "results" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    reports: list[dict[str, Any]] = []
    record = {
        "command": sys.argv,
        "machine": machine(),
        "settings": asdict(settings),
        "compared_with": options.compare,
        "results": reports,
    }
    with checked_out(options.compare) as tree:
        for case in select(cases, options.case):
            if options.largest is not None:
                kept = tuple(size for size in case.sizes if next(iter(size.values())) <= options.largest)
                if not kept:
                    continue
                case = Case(**{**case.__dict__, "sizes": kept})
            report = run_case(case, settings, _progress, tree, options.compare or "")
            reports.append(report)
            show(report)
            (folder / "results.json").write_text(json.dumps(record, indent=1))  # after each case: a stop loses one
    draw(reports, folder / "results.png")
    print(f"\nwritten to {folder}")
    failed = any("error" in report or (options.enforce and report["missed"]) for report in reports)
    return 1 if failed else 0


def _progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

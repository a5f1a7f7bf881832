"""The benchmark runner on cases of milliseconds: results, checks, peers in their own environment, floors, the registry."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RUNNER = REPOSITORY / "benchmarks" / "run.py"

CASES = """
import time
from harness import Case, Environment, Peer


def ours(length):
    return lambda: time.sleep(0.002 * length)


def slower(length):
    print("a library that prints must not disturb the protocol")
    return lambda: time.sleep(0.02 * length)


def where(length):
    import sys

    assert "runner-test" in sys.prefix, sys.prefix
    import transformers  # inherited from the environment that runs the benchmark

    return lambda: time.sleep(0.02 * length)


def check(length):
    return None


def wrong(length):
    raise AssertionError("not the reference's result")


def work(length):
    return length, "tokens"


SIZES = ({"length": 1}, {"length": 2})
CASES = (
    Case("good", "a good case", "ours", SIZES, "check", work="work", rate_at_least=1e9,
         peers=(Peer("slower", "slower", at_least=2.0, sizes=(0,)),
                Peer("own", "where", environment=Environment("runner-test"), sizes=(0,)))),
    Case("bad", "a case with a wrong result", "ours", SIZES, "wrong"),
    Case("growing", "growth", "ours", SIZES, "check", growth_at_most=1.1),
)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(RUNNER), *arguments], capture_output=True, text=True, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "cases").mkdir()
    (folder / "cases" / "tiny.py").write_text(CASES)
    out = folder / "out"
    options = ("--repeats", "2", "--threads", "1", "--out", str(out))
    return run("--cases", str(folder / "cases"), *options), out


def test_good_case_is_reported_with_its_peers(outcome):
    process, out = outcome
    record = json.loads((out / "results.json").read_text())
    assert record["machine"]["cores"] >= 1 and record["machine"]["time"] and record["settings"]["repeats"] == 2
    report = {report["case"]: report for report in record["results"]}["good"]
    assert "error" not in report, process.stderr
    first, second = report["comparisons"]
    assert [result["contender"] for result in first] == ["ours", "slower", "own"]
    assert [result["contender"] for result in second] == ["ours"]  # the peers run at the first size alone
    ours, slower = first[:2]
    assert len(ours["seconds"]) == 2 and ours["median_s"] >= 0.002
    ratios = [late / early for late, early in zip(slower["seconds"], ours["seconds"])]
    assert slower["ratio"] == pytest.approx(sum(ratios) / 2) and ours["ratio"] == 1
    assert ours["peak_bytes"] > 2**20 and first[2]["versions"]["transformers"]
    assert (out / "results.png").stat().st_size > 1000
    assert len([line for line in report["missed"] if "tokens/s" in line]) == 2  # no rate reaches 1e9


def test_case_with_a_wrong_result_is_not_reported(outcome):
    process, out = outcome
    (report,) = [r for r in json.loads((out / "results.json").read_text())["results"] if r["case"] == "bad"]
    assert "not the reference's result" in report["error"] and "comparisons" not in report
    assert process.returncode == 1
    assert "NOT REPORTED" in process.stdout


def test_growth_compares_neighbouring_sizes(outcome):
    _, out = outcome
    (report,) = [r for r in json.loads((out / "results.json").read_text())["results"] if r["case"] == "growing"]
    ((small, large),) = report["comparisons"]
    assert (small["size"], large["size"]) == ({"length": 1}, {"length": 2})
    assert bool(report["missed"]) == (large["ratio"] > 1.1)


def test_registry_of_the_project():
    process = run("--list")
    assert process.returncode == 0, process.stderr
    names = {line.split()[0] for line in process.stdout.splitlines()}
    assert {"diagonal-kernel", "s4-kernel", "local-attention", "spade-encoder-train", "span-corruption"} <= names


def test_unknown_names_are_refused():
    assert "unknown nothing" in run("--case", "nothing").stderr
    assert "not a revision" in run("--case", "span-corruption", "--compare", "no-such-revision").stderr


def test_growth_and_peers_are_two_cases(monkeypatch):
    monkeypatch.syspath_prepend(RUNNER.parent)
    harness = importlib.import_module("harness")
    with pytest.raises(ValueError, match="`growth_at_most` and `peers`, which are compared apart"):
        harness.Case("both", "", "build", ({"length": 1},), "check", (harness.Peer("a", "b"),), growth_at_most=2.0)


def test_a_revision_runs_its_own_case(monkeypatch, tmp_path):
    """Names and layout may have changed since: the build function of the revision goes with its sources."""
    monkeypatch.syspath_prepend(RUNNER.parent)
    harness = importlib.import_module("harness")
    current, earlier = tmp_path / "current", tmp_path / "earlier"
    for folder, build in ((current, "ours"), (earlier / "benchmarks" / "cases", "slower")):
        folder.mkdir(parents=True)
        (folder / "tiny.py").write_text(CASES.replace('"a good case", "ours"', f'"a good case", "{build}"'))
    cases = harness.load_cases(current)
    ours, theirs = next(harness.groups(cases["good"], earlier, "earlier"))
    assert (ours.build, ours.module) == ("ours", None)
    assert (theirs.build, theirs.module) == ("slower", earlier / "benchmarks" / "cases" / "tiny.py")
    assert theirs.sources == earlier / "src"
    newer = harness.Case("new", "", "ours", ({"length": 1},), "check", module=current / "tiny.py")
    assert next(harness.groups(newer, earlier, "earlier"))[1].module is None


def test_the_pictures_are_of_figures_that_stand_in_the_table() -> None:
    """Every pair has two lengths, and its ratios and peaks stand in the row of the long table."""
    rows: dict[tuple[str, int, str], str] = {}
    case, length, peer = "", 0, ""
    for line in (REPOSITORY / "docs" / "all_benchmarks.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5:
            name, size = re.match(r"`([\w-]+)`", cells[0]), re.match(r"L ([\d,]+)$", cells[1])
            case = name[1] if name else case
            length = int(size[1].replace(",", "")) if size else length
            peer = peer if cells[2] == "the same" else cells[2]
            if size:
                rows[case, length, peer] = cells[3].replace(",", "")
    spec = importlib.util.spec_from_file_location("picture", REPOSITORY / "benchmarks" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    for result in json.loads(picture.STORED.read_text(encoding="utf-8"))["results"]:
        row = rows[result["case"], result["length"], result["in_table"]]
        assert re.match(rf"\**{result['time_ratio']:.2f}", row), (result, row)
        for peak in ("peer_peak",) if "peer_peak" in result else ():
            number, unit = result[peak].split()
            assert any(float(found) == float(number) for found in re.findall(rf"([\d.]+) {unit}", row)), (result, row)
    assert all(len(points) >= 2 and any(memory for *_, memory in points) for points in picture.measured().values())

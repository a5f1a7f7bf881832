"""`make gpu-check` ends in time, and what fails, hangs or dies does not take the rest with it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORKER = """
import json, os, subprocess, sys, time
print(json.dumps({"ready": True}), flush=True)
for name in sys.argv[1:]:
    if name == "hangs":
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        open("child", "w").write(str(child.pid))
        time.sleep(60)
    if name == "dies":
        os._exit(3)
    print("A library greets.", 1, flush=True)
    print(json.dumps({name: {"train_tokens_per_second": 1.0}}), flush=True)
"""


def is_running(number: str) -> bool:
    """Whether there is a process that has not ended."""
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    record = Path(f"/proc/{number}/stat")
    return not record.exists() or record.read_text().rpartition(")")[2].split()[0] != "Z"


def ends(number: str) -> bool:
    """Whether a process that has been killed ends: on a busy machine it takes a moment to."""
    end = time.monotonic() + 10
    while is_running(number) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(number)


def test_contenders_that_hang_or_die(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "REPOSITORY", tmp_path)
    monkeypatch.setattr(check, "SECONDS_PER_CASE", 2)
    kept: list[dict[str, Any]] = []
    names, command = ["first", "hangs", "second", "dies", "third"], [sys.executable, "-S", "-c", WORKER]
    found = check.run_cases(names, command, time.monotonic() + 30, lambda results: kept.append(dict(results)))
    assert list(found) == names and set(kept[0]) == {"first"}
    assert found["hangs"] == {"failed": "took more than 2 seconds"}
    assert found["dies"] == {"failed": "the process ended with status 3"}
    assert ends((tmp_path / "child").read_text())
    assert all("train_tokens_per_second" in found[name] for name in ("first", "second", "third"))


def test_contenders_end_in_time(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "REPOSITORY", tmp_path)
    begin, command = time.monotonic(), [sys.executable, "-S", "-c", WORKER]
    found = check.run_cases(["first", "hangs", "second"], command, begin + 3, lambda results: None)
    assert time.monotonic() - begin < 8
    assert found["hangs"] == found["second"] == {"not_measured": "the time was up"} and "failed" not in found["first"]


TESTS = """
import os, subprocess, sys, time, pytest
pytestmark = pytest.mark.gpu
def test_passes(): assert os.environ["HF_HYBRID_CHECK_DEVICE"] == "cpu"
@pytest.mark.parametrize("case", ["one two"])
def test_fails(case): assert False
def test_is_skipped(): pytest.skip("why not")
def test_hangs():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    open("child", "w").write(str(child.pid))
    time.sleep(60)
def test_is_never_reached(): pass
"""


def test_tests_that_ran_before_a_stop_count(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "tests" / "modeling"
    folder.mkdir(parents=True)
    (folder / "test_on_accelerator.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(check, "REPOSITORY", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    found = check.run_tests(torch.device("cpu"), 10.0, None)
    assert found["passed"] == found["skipped"] == 1 and found["failed"] == ["test_fails[one two]"]
    assert found["stopped"] == "after 10 seconds"
    assert ends((tmp_path / "child").read_text())
    record = {
        "device": "cpu",
        "time": "",
        "torch": "",
        "transformers": "",
        "commit": "",
        "results": {},
        "tests": found,
    }
    assert "1 passed, 1 failed, 1 skipped, then stopped" in check.page_of(record | {"sizes": check.SMALL_SIZES})
    assert json.dumps(found)

"""Fetching the common checks: once, whole or not at all, and a clear message when there is no package index."""

from __future__ import annotations

import io
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import source_distribution
from source_distribution import MISSING_FILES, PACKAGE, SourceDistributionError, fetch

FILES = {
    "transformers-9.9/tests/test_modeling_common.py": "answer = 42\n",
    "transformers-9.9/tests/models/test_one.py": "",
    "transformers-9.9/src/transformers/__init__.py": "",
    "transformers-9.9/tests/../escaped.py": "",
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(source_distribution.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "run")


def write_archive(folder: Path) -> Path:
    path = folder / "transformers-9.9.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name, text in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            file.addfile(member, io.BytesIO(text.encode()))
    return path


def test_workers_that_ask_at_once_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(version: str, folder: Path) -> Path:
        calls.append(version)
        return write_archive(folder)

    monkeypatch.setattr(source_distribution, "download", download)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch("9.9"), range(8)))
    assert calls == ["9.9"]
    assert folders == {tmp_path / "cache" / "transformers-9.9"}
    package = folders.pop() / PACKAGE
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    packages = {"__init__.py"} | {
        f"{name}/__init__.py" for name in ("exporters", "fixtures", "generation", "models", "utils")
    }
    assert files == {"test_modeling_common.py", "models/test_one.py"} | set(MISSING_FILES) | packages
    assert not (tmp_path / "escaped.py").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith("tmp")] == []


def test_without_an_index_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="ERROR: no matching distribution")

    monkeypatch.setattr(source_distribution.subprocess, "run", run)
    for _ in range(2):  # the second worker of a run repeats the message and does not ask again
        with pytest.raises(
            SourceDistributionError, match="(?s)no matching distribution.*HF_HYBRID_SKIP_CONFORMANCE=1"
        ):
            fetch("9.9")
    assert len(calls) == 1 and "transformers==9.9" in calls[0]
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "next run")
    with pytest.raises(SourceDistributionError):
        fetch("9.9")
    assert len(calls) == 2
    assert not (tmp_path / "cache" / "transformers-9.9").exists()


def test_an_archive_without_the_checks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(version: str, folder: Path) -> Path:
        path = folder / "transformers-9.9.tar.gz"
        with tarfile.open(path, "w:gz"):
            return path

    monkeypatch.setattr(source_distribution, "download", download)
    with pytest.raises(SourceDistributionError, match="holds no tests/test_modeling_common.py"):
        fetch("9.9")

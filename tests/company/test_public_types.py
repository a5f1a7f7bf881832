"""A type checker of a program that uses the library finds the types of the public names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import hf_hybrid

pytest.importorskip("pyright")
pytestmark = pytest.mark.company

STUB = Path(hf_hybrid.__file__).with_suffix(".pyi")


def is_public(name: str, public: set[str]) -> bool:
    """Whether a name is one of the public ones or a member of one, neither with a leading underscore."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in public:
            return not any(part.startswith("_") and not part.startswith("__") for part in parts[end:])
    return False


def test_types_of_public_names_are_known() -> None:
    """95 % of the public names and of their members; those of other packages do not count."""
    places = re.findall(r"^from \.([\w.]+) import (\w+) as", STUB.read_text(encoding="utf-8"), flags=re.MULTILINE)
    public = {f"hf_hybrid.{module}.{name}" for module, name in places}
    command = [
        "pyright",
        "--pythonpath",
        sys.executable,
        "--verifytypes",
        "hf_hybrid",
        "--ignoreexternal",
        "--outputjson",
    ]
    # `--verifytypes` of pyright 1.1.414 looks for packages there alone.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(STUB.parents[1]), sysconfig.get_path("purelib")))}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=1800
    )
    report = json.loads(done.stdout)["typeCompleteness"]
    symbols: list[dict[str, Any]] = [symbol for symbol in report["symbols"] if is_public(symbol["name"], public)]
    unknown = [symbol["name"] for symbol in symbols if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]]
    assert len(symbols) > len(public) > 100
    assert len(unknown) <= 0.05 * len(symbols), unknown

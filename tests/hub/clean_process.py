"""Python processes in which this package does not exist, as on the machine of somebody who never installed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# The tests may run with an editable installation, so the package is hidden by a finder rather than by the search path.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".", 1)[0] == "hf_hybrid":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
try:
    import hf_hybrid
    raise SystemExit("the package is there")
except ModuleNotFoundError:
    pass
"""
_PRELUDE = f"""{WITHOUT_PACKAGE}
import json
arguments, answer = json.loads(sys.argv[1]), None
"""

_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run_without_package(code: str, modules_cache: Path, arguments: Any = None, **environment: str) -> Any:
    """Runs code in a clean process.

    Args:
        code: reads `arguments` and sets `answer`, both of what JSON can hold.
        modules_cache: where Transformers keeps its copies of remote code.
        environment: variables to set.

    Returns:
        The answer.
    """
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings |= {"HF_MODULES_CACHE": str(modules_cache), "OMP_NUM_THREADS": "1", **_QUIET, **environment}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{_PRELUDE}\n{code}\nprint('\\n' + json.dumps(answer, default=float))",
            json.dumps(arguments),
        ],
        capture_output=True,
        text=True,
        env=settings,
        stdin=subprocess.DEVNULL,
        cwd=modules_cache,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])

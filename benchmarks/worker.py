"""Process of one benchmark contender: reads requests as JSON lines from stdin, answers with JSON lines on stdout.

    start   module, paths, clock            imports the case module
    build   build, size                     makes the step
    run     times                           runs the step untimed, and learns how short it is; answers the memory before the first
    time                                    runs the step (several times when it is short), answers the seconds of one
    call    function, size                  answers the result of a function of the case module
    memory                                  answers the peak and the versions

Runs in the environments of peers too: standard library only.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SHORTEST_MEASUREMENT = 0.2  # seconds; shorter steps are repeated inside one measurement


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Process:
    """State between requests."""

    def __init__(self) -> None:
        self.module: Any = None
        self.step: Any = None
        self.count = 1
        self.clock = time.perf_counter

    def start(self, module: str, paths: list[str], clock: str) -> dict[str, Any]:
        sys.path[:0] = paths
        from harness import load_module

        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        self.module = load_module(Path(module))
        return {}

    def build(self, build: str, size: dict[str, Any]) -> dict[str, Any]:
        self.step = getattr(self.module, build)(**size)
        return {}

    def run(self, times: int) -> dict[str, Any]:
        before = peak_bytes()
        for _ in range(times):
            self.step()
        if times:
            self.count = max(1, round(SHORTEST_MEASUREMENT / max(self._seconds(1), 1e-6)))
        return {"before_bytes": before}

    def time(self) -> dict[str, Any]:
        return {"seconds": self._seconds(self.count)}

    def _seconds(self, count: int) -> float:
        start = self.clock()
        for _ in range(count):
            self.step()
        return (self.clock() - start) / count

    def call(self, function: str, size: dict[str, Any]) -> dict[str, Any]:
        return {"result": getattr(self.module, function)(**size)}

    def memory(self) -> dict[str, Any]:
        versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers") if name in sys.modules}
        return {"peak_bytes": peak_bytes(), "versions": versions}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    process = Process()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(process, request.pop("command"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""Benchmark cases, and the processes that time them.

A case compares *contenders*: ours and its peers, or ours at neighbouring sizes. Each contender of one comparison lives
in its own fresh process (`worker.py`), possibly with the Python of another virtual environment or the sources of another
revision; the processes are built first, then run one after the other in turn, so that load on the machine meets all of
them alike. Only ratios between contenders of one comparison mean anything on a shared machine.

Standard library only: case modules import this file in every peer's environment.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parent
Size = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: timed repeats.
        warm_up: untimed steps before them.
        threads: threads of torch in every process.
        clock: "wall", or "cpu": processor time of all threads, for one thread on a loaded machine.
    """

    repeats: int = 5
    warm_up: int = 1
    threads: int = os.cpu_count() or 1
    clock: str = "wall"


@dataclass(frozen=True)
class Environment:
    """A pinned virtual environment for a peer, made on first use under `benchmarks/.peers/<name>`.

    Attributes:
        name: folder.
        requirements: arguments of `pip install`, pinned.
        inherit: packages of the running environment are seen too, after those installed here; keeps the same torch.
    """

    name: str
    requirements: tuple[str, ...] = ()
    inherit: bool = True

    def python(self) -> Path:
        """Path of its interpreter; creates and fills the environment when missing or when its definition changed."""
        folder = BENCHMARKS / ".peers" / self.name
        executable = folder / "bin" / "python"
        stamp, wanted = folder / "installed", hashlib.sha256(repr(self).encode()).hexdigest()
        if stamp.exists() and stamp.read_text() == wanted:
            return executable
        print(f"making the environment of {self.name} in {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=bool(self.requirements), symlinks=True)
        if self.inherit:
            (packages,) = folder.glob("lib/python*/site-packages")
            (packages / "inherited.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if self.requirements:
            subprocess.run([executable, "-m", "pip", "install", "--quiet", *self.requirements], check=True)
        stamp.write_text(wanted)
        return executable


@dataclass(frozen=True)
class Peer:
    """What ours is compared with.

    Attributes:
        name: shown in the report.
        build: name of a function of the case module; see `Case`.
        at_least: smallest acceptable ratio, time of the peer / our time.
        floor_from: the floor holds from this value of the first entry of the size on.
        environment: None = the running one.
        sizes: which sizes of the case to run at, by index; None = all.
    """

    name: str
    build: str
    at_least: float | None = None
    floor_from: float = 0
    environment: Environment | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """One thing to time. Functions are named, and found in the module that defines the case.

    A *build* function takes the entries of a size as keywords, prepares everything, and returns a function without
    arguments: the step that is timed.

    Attributes:
        name: unique, lower case with hyphens.
        timed: what one step is, with the configuration.
        build: name of our build function.
        sizes: keyword arguments of the build functions; the first entry of each is its axis in pictures.
        check: name of a function with the same keywords that raises when the result is wrong; the case is not
            reported then.
        peers: see `Peer`.
        growth_at_most: largest acceptable ratio of the time of a size to that of the size before it; the two are run in
            turn. Such a case has no peers.
        work: name of a function with the same keywords: (amount of work in a step, unit), for a rate.
        rate_at_least: smallest acceptable rate.
        memory_at_most: name of a function with the same keywords: largest acceptable growth of our process's memory
            over what it had before the first step, in bytes.
        threads: threads of torch; None = all cores.
    """

    name: str
    timed: str
    build: str
    sizes: tuple[Size, ...]
    check: str
    peers: tuple[Peer, ...] = ()
    growth_at_most: float | None = None
    work: str | None = None
    rate_at_least: float | None = None
    memory_at_most: str | None = None
    threads: int | None = None
    module: Path = field(default=Path())

    def __post_init__(self) -> None:
        if self.growth_at_most is not None and self.peers:
            raise ValueError(
                f"the case {self.name!r} has `growth_at_most` and `peers`, which are compared apart: make two."
            )


def load_module(path: Path) -> Any:
    """Imports a case module from its file."""
    specification = importlib.util.spec_from_file_location(f"case_{path.stem}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def load_cases(folder: Path = BENCHMARKS / "cases") -> dict[str, Case]:
    """All cases by name: every module of the folder defines a tuple CASES."""
    cases: dict[str, Case] = {}
    for path in sorted(folder.glob("*.py")):
        for case in getattr(load_module(path), "CASES", ()):
            if case.name in cases:
                raise ValueError(f"two cases have the name {case.name!r}; names must be unique.")
            cases[case.name] = Case(**{**case.__dict__, "module": path})
    return cases


@dataclass(frozen=True)
class Contender:
    """One process of a comparison.

    Attributes:
        module: file that defines the build function; None = that of the case.
        sources: folder from which it imports this package.
    """

    name: str
    case: Case
    build: str
    size: Size
    environment: Environment | None = None
    sources: Path = REPOSITORY / "src"
    module: Path | None = None


class WorkerError(RuntimeError):
    """A worker process reported an exception, or died."""


class Worker:
    """A process with one contender, ready to run its step on request; see `worker.py` for the protocol."""

    def __init__(self, contender: Contender, settings: Settings):
        python = Path(sys.executable) if contender.environment is None else contender.environment.python()
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        threads = contender.case.threads or settings.threads
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.contender = contender
        self.process = subprocess.Popen(
            [python, BENCHMARKS / "worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )
        self.ask(
            command="start",
            module=str(contender.module or contender.case.module),
            paths=[str(contender.sources), str(BENCHMARKS)],
            clock=settings.clock,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise WorkerError(f"{self.contender.name}: the process ended with status {self.process.wait()}.")
        result = json.loads(answer)
        if "error" in result:
            raise WorkerError(f"{self.contender.name}: {result['error']}")
        return result

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def compare(contenders: list[Contender], settings: Settings) -> list[dict[str, Any]]:
    """Runs contenders in turn and returns one result for each, in the same order.

    The first contender is the one that the others are related to: `ratio` is the median over the repeats of their time
    over its time in the same repeat.
    """
    workers: list[Worker] = []
    try:
        for contender in contenders:
            workers.append(Worker(contender, settings))
            workers[-1].ask(command="build", build=contender.build, size=contender.size)
        starts = [worker.ask(command="run", times=settings.warm_up) for worker in workers]
        seconds: list[list[float]] = [[] for _ in workers]
        for repeat in range(settings.repeats):
            order = range(len(workers)) if repeat % 2 == 0 else reversed(range(len(workers)))
            for index in order:
                seconds[index].append(workers[index].ask(command="time")["seconds"])
        ends = [worker.ask(command="memory") for worker in workers]
        for worker, end in zip(workers, ends):
            case, size = worker.contender.case, worker.contender.size
            for key, function in (("work", case.work), ("memory_limit", case.memory_at_most)):
                if function is not None:
                    end[key] = worker.ask(command="call", function=function, size=size)["result"]
    finally:
        for worker in workers:
            worker.close()
    results = [
        {
            "contender": contender.name,
            "size": contender.size,
            "median_s": statistics.median(own),
            "best_s": min(own),
            "seconds": own,
            "ratio": statistics.median(time / first for time, first in zip(own, seconds[0])),
            "peak_bytes": end["peak_bytes"],
            "growth_bytes": end["peak_bytes"] - start["before_bytes"],
            "memory_limit": end.get("memory_limit"),
            "versions": end["versions"],
        }
        for contender, own, start, end in zip(contenders, seconds, starts, ends)
    ]
    for result, end in zip(results, ends):
        if "work" in end:
            amount, unit = end["work"]
            result |= {"rate": amount / result["median_s"], "unit": f"{unit}/s"}
    return results


def check(case: Case) -> None:
    """Runs the check of a case at its first size, in a fresh process."""
    worker = Worker(Contender("check", case, case.check, case.sizes[0]), Settings())
    try:
        worker.ask(command="call", function=case.check, size=case.sizes[0])
    finally:
        worker.close()


def groups(case: Case, revision: Path | None, revision_name: str) -> Iterator[list[Contender]]:
    """Comparisons of a case: ours with its peers per size, or neighbouring sizes, or with another revision."""

    def ours(size: Size) -> Contender:
        return Contender("ours", case, case.build, size)

    if revision is not None:
        for size in case.sizes:
            yield [ours(size), _earlier(case, size, revision, revision_name)]
    elif case.growth_at_most is not None:
        for smaller, larger in zip(case.sizes, case.sizes[1:]):
            yield [ours(smaller), ours(larger)]
    else:
        for index, size in enumerate(case.sizes):
            peers = peers_at(case, index)
            yield [ours(size)] + [Contender(p.name, case, p.build, size, p.environment) for p in peers]


def _earlier(case: Case, size: Size, revision: Path, name: str) -> Contender:
    """The case as another revision has it: names and layout may have changed since. A case that is newer runs as it is now."""
    module = None
    folder = revision / "benchmarks" / "cases"
    for path in sorted(folder.glob("*.py")):
        own = next((own for own in getattr(load_module(path), "CASES", ()) if own.name == case.name), None)
        if own is not None:
            module, case = path, own
            break
    return Contender(name, case, case.build, size, sources=revision / "src", module=module)


def peers_at(case: Case, index: int) -> list[Peer]:
    """The peers that run at one of the sizes of a case."""
    return [peer for peer in case.peers if peer.sizes is None or index in peer.sizes]


Progress = Callable[[str], None]


def run_case(
    case: Case, settings: Settings, progress: Progress, revision: Path | None = None, revision_name: str = ""
) -> dict[str, Any]:
    """Checks, times and judges one case.

    Returns:
        name, timed, and either `error` (check or contender failed: no figures) or `comparisons`, each a list of results
        of `compare`, and `missed`: what stayed below its floor, in words.
    """
    report: dict[str, Any] = {"case": case.name, "timed": case.timed, "comparisons": [], "missed": []}
    try:
        progress(f"{case.name}: check")
        check(case)
        for contenders in groups(case, revision, revision_name):
            shown = ", ".join(f"{c.name} {next(iter(c.size.values()))}" for c in contenders)
            progress(f"{case.name}: {shown}")
            results = compare(contenders, settings)
            report["comparisons"].append(results)
            if revision is None:
                report["missed"] += list(_missed(case, results))
    except WorkerError as error:
        return {"case": case.name, "timed": case.timed, "error": str(error)}
    return report


def _missed(case: Case, results: list[dict[str, Any]]) -> Iterator[str]:
    """Floors that one comparison stayed below."""
    ours, others = results[0], results[1:]
    place = next(iter(ours["size"].values()))
    peers = peers_at(case, case.sizes.index(ours["size"]))
    floors = {peer.name: peer.at_least for peer in peers if place >= peer.floor_from}
    for other in others:
        floor = floors.get(other["contender"])
        if floor is not None and other["ratio"] < floor:
            yield f"{other['contender']} at {ours['size']}: ratio {other['ratio']:.2f}, floor {floor}"
        if case.growth_at_most is not None and other["ratio"] > case.growth_at_most:
            yield f"{ours['size']} -> {other['size']}: time x {other['ratio']:.2f}, at most {case.growth_at_most}"
    if case.rate_at_least is not None and ours["rate"] < case.rate_at_least:
        yield f"{ours['size']}: {ours['rate']:.3g} {ours['unit']}, at least {case.rate_at_least:.3g}"
    if ours["memory_limit"] is not None and ours["growth_bytes"] > ours["memory_limit"]:
        yield f"{ours['size']}: memory grew by {ours['growth_bytes']:.3g} bytes, at most {ours['memory_limit']:.3g}"

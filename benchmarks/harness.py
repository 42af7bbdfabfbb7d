"""What the benchmarks share: contenders in processes of their own, run in turn; statistics; tables.

A figure that compares two programs is only worth something when both were measured in the same
window on the same machine. So every contender lives in its own worker process (own threads, own
memory peak), all are alive at once, and the parent lets one at a time do one unit of work, round
after round, starting with another one each round. Idle workers sleep in a read. What is reported is
the median with its range, and ratios are taken within rounds.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MIB = 1 << 20


@dataclass
class Times:
    """Wall and CPU seconds of repeated units of work, in the order of the rounds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    def summary(self) -> dict[str, Any]:
        return {
            "median_s": self.median,
            "min_s": min(self.wall),
            "max_s": max(self.wall),
            "cpu_median_s": statistics.median(self.cpu),
            "wall_s": self.wall,
        }

    def text(self, per: float = 1.0, digits: int = 2) -> str:
        """Median and range, each divided by `per` units of work."""
        numbers = (self.median / per, min(self.wall) / per, max(self.wall) / per)
        return "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*numbers, d=digits)


class ContenderError(RuntimeError):
    """Something went wrong inside a worker; the message is its traceback."""


class WorkerDiedError(ContenderError):
    """A worker ended without a word; too little memory is the usual reason."""


class Contender:
    """An object built and kept in its own process; its methods are called from here and timed there."""

    def __init__(
        self, name: str, build: Callable[..., Any], arguments: dict[str, Any], threads: int
    ) -> None:
        """Start the worker and wait until `build(**arguments)` is done in it. Raises `ContenderError`."""
        self.name, self.threads = name, threads
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        worker_arguments = (theirs, build, arguments, threads)
        self._process = context.Process(target=_serve, args=worker_arguments, daemon=True)
        with _environment(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)):
            self._process.start()
        theirs.close()
        self.resident_before = int(self._answer()[0])

    def call(self, method: str, *arguments: Any) -> Any:
        """Result of a method of the worker's object."""
        return self.timed(method, *arguments)[0]

    def timed(self, method: str, *arguments: Any) -> tuple[Any, float, float]:
        """Result, wall seconds and CPU seconds of a method of the worker's object."""
        self._pipe.send((method, arguments))
        return self._answer()

    def peak(self) -> int:
        """Highest resident size in bytes since `reset_peak` (since the start where that cannot be reset)."""
        return self.call("_peak")

    def reset_peak(self) -> None:
        self.call("_reset_peak")

    def close(self) -> None:
        """End the worker."""
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()
        self._pipe.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> tuple[Any, float, float]:
        try:
            problem, result, wall, cpu = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise WorkerDiedError(f"{self.name}: the worker died, exit code {code}") from None
        if problem:
            raise ContenderError(f"{self.name}: {problem}")
        return result, wall, cpu


class _environment:
    """Environment variables for the time of a block; what starts inside inherits them."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(
    pipe: Connection, build: Callable[..., Any], arguments: dict[str, Any], threads: int
) -> None:
    """The worker: build, then answer calls until None comes."""
    try:
        limit_threads(threads)
        before = resident_bytes()
        subject = build(**arguments)
        pipe.send((None, before, 0.0, 0.0))
        while (message := pipe.recv()) is not None:
            method, call_arguments = message
            function = {"_peak": peak_bytes, "_reset_peak": reset_peak}.get(method)
            function = function or getattr(subject, method)
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*call_arguments)
            pipe.send((None, result, time.perf_counter() - wall, time.process_time() - cpu))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        pipe.send((traceback.format_exc(), None, 0.0, 0.0))


def limit_threads(threads: int) -> None:
    """Torch on that many threads, pinned to as many cores where the system allows it."""
    import torch

    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[-threads:]))


def alternate(
    contenders: Sequence[Contender],
    method: str,
    rounds: int,
    *arguments: Any,
    warm_up: int = 1,
    say: Callable[[str], None] | None = None,
) -> dict[str, Times]:
    """Times of `method` of each contender over `rounds` rounds; every round begins with another one."""
    times = {contender.name: Times() for contender in contenders}
    for contender in contenders:
        for _ in range(warm_up):
            contender.call(method, *arguments)
    for number in range(rounds):
        shift = number % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            _, wall, cpu = contender.timed(method, *arguments)
            times[contender.name].wall.append(wall)
            times[contender.name].cpu.append(cpu)
            if say:
                say(f"    round {number + 1}/{rounds}  {contender.name}: {wall:.3f} s")
    return times


def ratios(slow: Times, fast: Times) -> list[float]:
    """`slow` over `fast` round by round: how many times as fast the second is."""
    return [a / b for a, b in zip(slow.wall, fast.wall, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    numbers = (statistics.median(values), min(values), max(values))
    return "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*numbers, d=digits)


def resident_bytes() -> int:
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak() -> None:
    """Let the peak begin at the present size (Linux; elsewhere the peak stays that of the whole process)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def available_memory() -> int:
    """Bytes that can be had without swapping; physical memory where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def environment() -> dict[str, Any]:
    """Hardware and versions, to stand beside every figure."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe(facts: dict[str, Any]) -> str:
    """The environment in one line."""
    return (
        f"{facts['cores']} cores of {facts['cpu']} ({facts['cpu_capability']}), {facts['memory_gib']} GiB; "
        f"Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}; "
        f"load average at start {facts['load_average']:.2f}"
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def write_json(path: Path | None, payload: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")

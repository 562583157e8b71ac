"""What a benchmark is here: one function with a key, a goal and one number: a ratio or an amount, never a bare time.

    @bench("cat_vs_copy", "merge with cat against copying the same bytes", at_most=1.5, unit="x")
    def cat_vs_copy(room: Path) -> Figure: ...

The two sides of a ratio run in one process, in turns, several rounds; the medians are compared. `room` is an empty
folder. Everything registered under a key is run by `bench/run.py`.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """A measured value, and in words what it is made of."""

    value: float
    detail: str


@dataclass(frozen=True)
class Benchmark:
    key: str
    what: str
    unit: str
    function: Callable[[Path], Figure]
    at_most: float | None = None
    at_least: float | None = None
    limit: str = ""

    @property
    def goal(self) -> str:
        return f"≤ {self.at_most:g}{self.unit}" if self.at_most is not None else f"≥ {self.at_least:,g}{self.unit}"

    def met(self, value: float) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)


BENCHMARKS: dict[str, Benchmark] = {}


def bench(
    key: str,
    what: str,
    *,
    unit: str = "",
    at_most: float | None = None,
    at_least: float | None = None,
    limit: str = "",
) -> Callable[[Callable[[Path], Figure]], Callable[[Path], Figure]]:
    """Register a benchmark under `key` with its goal; `limit` says what keeps it from there, where it is missed."""

    def register(function: Callable[[Path], Figure]) -> Callable[[Path], Figure]:
        BENCHMARKS[key] = Benchmark(key, what, unit, function, at_most, at_least, limit)
        return function

    return register


@dataclass
class Rounds:
    """Seconds of each side, round by round: by the clock, and of this process on all its CPUs."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self, side: str, to: str) -> float:
        return self.median(side) / self.median(to)

    def cpu_ratio(self, side: str, to: str) -> float:
        """Of the least CPU-seconds: what is left when neighbours take the CPUs away."""
        return min(self.cpu_seconds[side]) / min(self.cpu_seconds[to])


def take_turns(sides: Mapping[str, Callable[[], None]], rounds: int) -> Rounds:
    """Run every side once unmeasured, then all of them in turns, `rounds` times."""
    for run in sides.values():
        run()
    result = Rounds({side: [] for side in sides}, {side: [] for side in sides})
    for _ in range(rounds):
        for side, run in sides.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            result.seconds[side].append(time.perf_counter() - start)
            result.cpu_seconds[side].append(time.process_time() - cpu_start)
    return result


@dataclass(frozen=True)
class Ended:
    """What a process cost: CPU-seconds of all its threads, wall seconds, and peak resident memory."""

    cpu_s: float
    wall_s: float
    peak_bytes: int


def exponent(points: Mapping[int, float]) -> float:
    """The slope of the straight line through the logarithms: y grows as x to this power."""
    slope, _ = statistics.linear_regression([math.log(x) for x in points], [math.log(y) for y in points.values()])
    return slope


def run_process(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Ended:
    """Run a process to its end and read its costs from the kernel. A process that fails is an error."""
    with tempfile.TemporaryFile() as complaint:
        start = time.perf_counter()
        process = subprocess.Popen(
            arguments,
            env=None if environment is None else dict(environment),
            stdout=subprocess.DEVNULL,
            stderr=complaint,
        )
        peak = 0
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            # not ru_maxrss: a child inherits that of the process that started it, torch included
            peak = max(peak, _peak_so_far(process.pid))
            time.sleep(0.01)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            complaint.seek(0)
            said = complaint.read().decode(errors="replace")[-4000:]
            raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{said}")
    return Ended(usage.ru_utime + usage.ru_stime, wall, peak)


def _peak_so_far(pid: int) -> int:
    """VmHWM of a live process in bytes; 0 for one that has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)

"""Measures, prints the table, and writes it down: docs/benchmarks.md for people, build/bench.json for programs.

    python bench/run.py [--only key,key]

Rows that are not run are kept from the last build/bench.json. A missed goal is printed as such and is no failure: the
command fails only when something cannot be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bakes  # these modules register their benchmarks
import commands
import jobs
import lineage
import listing
import merges
import pages
import service
import tuning
from measure import BENCHMARKS, Benchmark, Figure

from adapterctl.workers.receipt import fingerprint

ROOT = Path(__file__).resolve().parent.parent
FIGURES, PAGE = ROOT / "build" / "bench.json", ROOT / "docs" / "benchmarks.md"
MODULES = (merges, bakes, lineage, listing, pages, commands, service, jobs, tuning)
PACKAGES = ("numpy", "torch", "peft", "transformers", "mlflow")


def main() -> int:
    parser = argparse.ArgumentParser(description="measure adapterctl against its goals")
    parser.add_argument("--only", default="", help="keys, separated by commas")
    parser.add_argument("--room", type=Path, default=None, help="where scratch files go (default: a temporary folder)")
    arguments = parser.parse_args()
    asked = [key for key in arguments.only.split(",") if key] or list(BENCHMARKS)
    unknown = sorted(set(asked) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown keys: {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    figures = _read_figures()
    failed = 0
    for key in asked:
        benchmark = BENCHMARKS[key]
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.room) as room:
            try:
                figure = benchmark.function(Path(room))
            except Exception as error:  # noqa: BLE001 - the edge: one benchmark that breaks must not hide the others
                failed += 1
                print(f"{key}: cannot be measured: {error}", file=sys.stderr)
                continue
        figures[key] = _row(benchmark, figure, load)
        print(_line(key, figures[key]), flush=True)
    _write(figures)
    return 1 if failed else 0


def _row(benchmark: Benchmark, figure: Figure, load: float) -> dict[str, object]:
    return {
        "value": figure.value,
        "unit": benchmark.unit,
        "goal": benchmark.goal,
        "met": benchmark.met(figure.value),
        "what": benchmark.what,
        "detail": figure.detail,
        "load": round(load, 1),
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": _machine(),
    }


def _machine() -> dict[str, str]:
    found = fingerprint()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": f"{found['cpu']}, {os.cpu_count()} logical cores",
        "blas": f"{found['blas']} ({found['blas_kernel']})",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        **versions,
    }


def _read_figures() -> dict[str, dict[str, object]]:
    known = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    return {key: known[key] for key in BENCHMARKS if key in known}


def _write(figures: dict[str, dict[str, object]]) -> None:
    ordered = {key: figures[key] for key in BENCHMARKS if key in figures}
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if ordered:
        PAGE.write_text(_page(ordered), encoding="utf-8")


def _page(figures: dict[str, dict[str, object]]) -> str:
    machine = next(reversed(figures.values()))["machine"]
    assert isinstance(machine, dict)
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; do not edit. Ratios are measured side by side in one run, in turns, and medians are",
        "compared; a figure is as good as the machine was quiet (the load when it began stands in the last column).",
        "",
        "| key | what | goal | measured | verdict | made of | load |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in figures.items():
        verdict = "met" if row["met"] else "**missed**"
        lines.append(
            f"| `{key}` | {row['what']} | {row['goal']} | {_number(row['value'])}{row['unit']} | {verdict}"
            f" | {row['detail']} | {row['load']} |"
        )
    missed = [key for key, row in figures.items() if not row["met"] and BENCHMARKS[key].limit]
    if missed:
        lines += ["", "What keeps those that missed their goal from it:", ""]
        lines += [f"* `{key}`: {BENCHMARKS[key].limit}" for key in missed]
    lines += ["", "Machine and versions:", "", *(f"* {name}: {value}" for name, value in machine.items()), ""]
    return "\n".join(lines)


def _line(key: str, row: dict[str, object]) -> str:
    verdict = "met" if row["met"] else "MISSED"
    return f"{key:24} {_number(row['value'])}{row['unit']:4} goal {row['goal']:10} {verdict:7} {row['detail']}"


def _number(value: object) -> str:
    assert isinstance(value, float)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1e-3 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())

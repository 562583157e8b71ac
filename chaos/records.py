"""What was run and found: one JSON line a run in docs/proofs/chaos.jsonl, and the page that is written from them."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from piece import Piece, Result, load
from verdict import KINDS

from adapterctl import __version__

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "proofs"
LINES, PAGE = FOLDER / "chaos.jsonl", FOLDER / "README.md"
FORMS = ("sqlite", "postgres", "celery")
PACKAGES = ("mlflow", "sqlalchemy", "celery", "psycopg")


def append(piece: Piece, result: Result) -> None:
    verdict = result.verdict
    add_line(
        {
            "what": "chaos",
            "seed": piece.seed,
            "database": piece.database,
            "asked": [piece.jobs, piece.faults],
            "faults": dict(sorted(result.faults.items())),
            "died_at_points": result.died_at_points,
            "merges": piece.jobs,
            "jobs": verdict.jobs,
            "attempts": verdict.attempts,
            "used_up": result.used_up,
            **{kind: verdict.count(kind) for kind in KINDS},
            "seconds": round(result.seconds),
            "findings": {kind: messages[:5] for kind, messages in verdict.findings.items()},
        }
    )


def add_line(line: Mapping[str, Any]) -> None:
    """Append a record, with when and with what it was made, and write the page anew."""
    versions = {"adapterctl": __version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in PACKAGES}
    whole = {**line, "date": time.strftime("%Y-%m-%d", time.gmtime()), "load": round(load(), 1), "versions": versions}
    FOLDER.mkdir(parents=True, exist_ok=True)
    with LINES.open("a", encoding="utf-8") as file:
        file.write(json.dumps(whole) + "\n")
    write_page()


def is_recorded(piece: Piece) -> bool:
    """Whether this very piece was run with this version and found nothing; one that found something runs again."""
    return any(
        (line["what"], line["seed"], line["database"], line["asked"], line["versions"]["adapterctl"])
        == ("chaos", piece.seed, piece.database, [piece.jobs, piece.faults], __version__)
        and not line["findings"]
        for line in read_lines()
        if line["what"] == "chaos"
    )


def read_lines() -> list[dict[str, Any]]:
    if not LINES.exists():
        return []
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()]


def write_page() -> None:
    PAGE.write_text(page(read_lines()), encoding="utf-8")


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    pieces = [line for line in lines if line["what"] == "chaos"]
    return "\n".join([*_HEAD, *_pieces(pieces), *_faults(pieces), *_others(lines), ""])


_HEAD = [
    "# What was tried, and what was found",
    "",
    "Written by `make chaos` and `make soak` from `chaos.jsonl`; do not edit. How to repeat a row, and what the words",
    "mean: [docs/jobs.md](../jobs.md#proof).",
]


def _pieces(pieces: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["", "## Merges under faults", ""]
    columns = ("seed", "database", "faults", "merges", "jobs", "attempts", "cut short", "used up", *KINDS, "minutes")
    rows += [f"| {' | '.join((*columns, 'date'))} |", "|---" * (len(columns) + 1) + "|"]
    total: Counter[str] = Counter()
    unnoted: Counter[str] = Counter()
    for line in pieces:
        figures = {
            "faults": sum(line["faults"].values()),
            "cut short": line["attempts"] - line["jobs"],
            "used up": line["used_up"],
            "minutes": round(line["seconds"] / 60, 1),
            **{name: line[name] for name in ("merges", "jobs", "attempts", *KINDS) if name in line},
        }
        total.update(figures)
        if "note" not in line:
            unnoted.update({**figures, "pieces": 1})
        shown = {**figures, "seed": line["seed"], "database": line["database"]}
        rows.append(f"| {' | '.join(str(shown.get(column, '–')) for column in columns)} | {line['date']} |")
    notes = {line["note"]: None for line in pieces if "note" in line}
    sums = [("**all**", len(pieces), total)]
    if notes:
        sums.append(("**all without a note below**", unnoted["pieces"], unnoted))
    for name, count, figures in sums if pieces else ():
        whole = {**figures, "minutes": round(figures["minutes"]), "seed": name, "database": f"{count} pieces"}
        rows.append(f"| {' | '.join(str(whole.get(column, '–')) for column in columns)} | |")
    return [*rows, *(f"\n{note}" for note in notes)]


def _faults(pieces: Sequence[Mapping[str, Any]]) -> list[str]:
    by_kind: dict[str, Counter[str]] = {}
    for line in pieces:
        for kind, count in line["faults"].items():
            by_kind.setdefault(kind, Counter())[line["database"]] += count
    rows = ["", "## Faults by kind", "", "| fault | sqlite | postgres | celery | all |", "|---|---|---|---|---|"]
    for kind, counts in sorted(by_kind.items(), key=lambda item: -item[1].total()):
        rows.append(f"| {kind} | {' | '.join(str(counts[form]) for form in FORMS)} | {counts.total()} |")
    died = sum(line["died_at_points"] for line in pieces)
    rows += [
        "",
        f"Of those armed to die at a named point, {died} got there; others were struck by something else first.",
    ]
    return rows


def _others(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rows: list[str] = []
    others = [line for line in lines if line["what"] != "chaos"]
    if others:
        rows += [
            "",
            "## Contests and endurance",
            "",
            "| what | database | figures | found | date |",
            "|---|---|---|---|---|",
        ]
    for line in others:
        figures = ", ".join(f"{name} {value}" for name, value in line["figures"].items())
        found = "; ".join(message for messages in line["findings"].values() for message in messages) or "nothing"
        rows.append(f"| {line['what']} | {line['database']} | {figures} | {found} | {line['date']} |")
    if lines:
        rows += ["", f"Versions of the last run: {', '.join(f'{k} {v}' for k, v in lines[-1]['versions'].items())}."]
    return rows

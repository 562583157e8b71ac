"""Chaos, for those who do not believe it: `make chaos SEEDS=1-4` kills processes while merges run, and counts.

    python chaos/run.py [--seeds 1-4] [--database sqlite|postgres|celery|all] [--jobs 60] [--faults 30] [--again]

A seed on a database is one piece: it ends within 20 minutes, appends one line to docs/proofs/chaos.jsonl, and the table
in docs/proofs/README.md is written anew. A piece whose line is there already is left out (unless `--again`), so a long
run may be interrupted and taken up. Exits with 1 as soon as one piece found anything.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import contests
import records
from contests import Outcome
from piece import Piece, Result, run_piece
from scene import Scene, end_properly, open_scene
from teeth import show_teeth
from verdict import KINDS

DATABASES = ("sqlite", "postgres", "celery")
#: The contests by name, as they are recorded; each takes its size from the command line.
CONTESTS: Mapping[str, Callable[[Scene, argparse.Namespace], Outcome]] = {
    "promote": lambda scene, asked: contests.promote(scene, promoters=asked.promoters, rounds=asked.rounds),
    "race": lambda scene, asked: contests.race(scene, races=asked.races),
    "drain": lambda scene, asked: contests.drain(scene, rows=asked.rows, real=asked.real),
    "teeth": lambda scene, asked: bite(scene),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1", help="1, 1-4 or 1,3,5")
    parser.add_argument("--database", choices=(*DATABASES, "all"), default="all")
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--not-served", action="store_true", help="leave out the server")
    parser.add_argument("--kinds", default="", help="kinds of faults, separated by commas (default: all)")
    parser.add_argument("--again", action="store_true", help="run what was recorded already")
    parser.add_argument("--no-record", action="store_true", help="write nothing down")
    parser.add_argument("--room", type=Path, default=None, help="where scratch files go")
    parser.add_argument("--only", default="", help=f"contests instead of seeds: {', '.join(CONTESTS)}")
    parser.add_argument("--promoters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=100, help="of the promoters")
    parser.add_argument("--races", type=int, default=500, help="of two executors on one recipe")
    parser.add_argument("--rows", type=int, default=10_000, help="of the queue that is drained")
    parser.add_argument("--real", type=int, default=200, help="jobs of it that are really done")
    end_properly()
    asked = parser.parse_args(arguments)
    databases = DATABASES if asked.database == "all" else (asked.database,)
    if names := [name for name in asked.only.split(",") if name]:
        return max(_contest(name, asked, database) for name in names for database in databases)
    return _pieces(asked, databases)


def _pieces(asked: argparse.Namespace, databases: Sequence[str]) -> int:
    failed = False
    for seed in _numbers(asked.seeds):
        for database in databases:
            piece = Piece(
                seed,
                database,
                asked.jobs,
                asked.faults,
                clients=asked.clients,
                served=not asked.not_served,
                kinds=[kind for kind in asked.kinds.split(",") if kind],
            )
            if not asked.again and not asked.no_record and records.is_recorded(piece):
                print(f"seed {seed} on {database}: recorded already")
                continue
            result = run_piece(piece, asked.room)
            failed |= not result.verdict.clean
            tell(piece, result)
            if not asked.no_record:
                records.append(piece, result)
    return 1 if failed else 0


def _contest(name: str, asked: argparse.Namespace, database: str) -> int:
    folder = tempfile.TemporaryDirectory(prefix="chaos-", dir=asked.room)
    with folder as room, open_scene(database, Path(room)) as scene:
        outcome = CONTESTS[name](scene, asked)
    print(f"{name} on {database}: {', '.join(f'{key} {value}' for key, value in outcome.figures.items())}")
    for kind, messages in outcome.findings.items():
        for message in messages[:10]:
            print(f"    {kind}: {message}")
    if not asked.no_record:
        line = {"what": name, "database": database, "figures": outcome.figures, "findings": outcome.findings}
        records.add_line(line)
    return 1 if outcome.findings else 0


def bite(scene: Scene) -> Outcome:
    """A safety that is switched off must be missed; one that works must not."""
    outcome = Outcome()
    for safety, found in show_teeth(scene).items():
        kinds = {kind: len(messages) for kind, messages in found["without"].items()}
        harm = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        outcome.figures[f"without {safety}:"] = harm or "nothing"
        if not kinds:
            outcome.add(safety, f"without {safety}, the judge finds nothing")
        for kind, messages in found["with"].items():
            outcome.add(safety, f"with {safety}, {kind}: {messages}")
    return outcome


def tell(piece: Piece, result: Result) -> None:
    verdict = result.verdict
    print(
        f"seed {piece.seed} on {piece.database}: {result.faults.total()} faults, {verdict.jobs} jobs, "
        f"{verdict.attempts} attempts, {result.used_up} tried again, "
        f"{verdict.versions} versions in {result.seconds:.0f} s; "
        + ", ".join(f"{verdict.count(kind)} {kind}" for kind in KINDS),
        flush=True,
    )
    print("   ", ", ".join(f"{count} {kind}" for kind, count in result.faults.most_common()))
    for kind, messages in verdict.findings.items():
        for message in messages[:10]:
            print(f"    {kind}: {message}")


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


if __name__ == "__main__":
    sys.exit(main())

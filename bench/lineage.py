"""How fast the ledger answers in a large registry: lineage over 100,000 versions, and a listing of 1,000.

The graph: 50 families of 2,000 versions, 21 generations each; a version has 2 or 3 parents in the generation before it.
A walk up from the last generation, or down from the first, reaches nearly its whole family: 20 steps deep.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import statistics
import sys
import time
from pathlib import Path

from measure import Figure, bench, run_process, take_turns
from sqlalchemy import Connection, insert

from adapterctl.migrations import migrate
from adapterctl.registry import wire
from adapterctl.registry.domain.adapter import AdapterFacts, LoraModule, TensorEntry
from adapterctl.registry.domain.version import Base, Edge, FileRecord, NewVersion, Placement
from adapterctl.registry.stores.sql import tables
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger

FAMILIES, GENERATIONS, PER_GENERATION = 50, 21, 96
QUERIES = 400


@bench(
    "lineage_p99_ms",
    "a walk up or down, 20 generations and up to 2,000 of 100,000 versions, 99th percentile (SQLite)",
    unit=" ms",
    at_most=20,
)
def lineage_p99_ms(room: Path) -> Figure:
    database = _registry(room)
    first, last = _fill_lineage(database)
    ledger = SqlLedger(database)
    walks = [(ledger.edges_up, version_id) for version_id in last] + [(ledger.edges_down, v) for v in first]
    random.Random(2).shuffle(walks)
    gc.freeze()  # else the ids and rows of this script are searched for garbage again and again, in our time
    times_ms, nodes = [], []
    for walk, version_id in walks[:QUERIES]:
        begun = time.perf_counter()
        edges = walk(version_id, 20)
        times_ms.append((time.perf_counter() - begun) * 1000)
        nodes.append(len({edge.child_id for edge in edges} | {edge.parent_id for edge in edges}))
    gc.unfreeze()
    ledger.close()
    times_ms.sort()
    median_ms, p99_ms = times_ms[len(times_ms) // 2], times_ms[int(len(times_ms) * 0.99)]
    return Figure(p99_ms, f"median {median_ms:.1f} ms; {statistics.median(nodes):,.0f} versions a walk in the median")


@bench("ls_s", "`adapterctl ls` in a registry of 1,000 versions, less a bare `python -c pass`", unit=" s", at_most=0.5)
def ls_s(room: Path) -> Figure:
    _fill_listing(_registry(room))
    environment = {**os.environ, "ADAPTERCTL_HOME": str(room)}
    ls, bare = [sys.executable, "-m", "adapterctl", "ls", "-o", "json"], [sys.executable, "-c", "pass"]
    rounds = take_turns(
        {"ls": lambda: _run(ls, environment), "bare": lambda: _run(bare, environment)},
        rounds=7,
    )
    return Figure(
        rounds.median("ls") - rounds.median("bare"), f"{rounds.median('ls'):.2f} s − {rounds.median('bare'):.2f} s"
    )


def _run(command: list[str], environment: dict[str, str]) -> None:
    run_process(command, environment)


def _registry(home: Path) -> Database:
    migrate(sqlite_url(home))
    database = Database(sqlite_url(home))
    SqlLedger(database).establish("sqlite:///mlflow.db")
    return database


def _fill_lineage(database: Database) -> tuple[list[str], list[str]]:
    """The ids of all first and of all last generations; rows are written past the ledger, for speed."""
    rng = random.Random(1)
    numbers = itertools.count(1)
    versions, edges, first, last = [], [], [], []
    for _family in range(FAMILIES):
        before: list[str] = []
        for generation in range(GENERATIONS):
            here = []
            for _ in range(PER_GENERATION):
                number = next(numbers)
                version_id = f"{rng.getrandbits(128):032x}"
                here.append(version_id)
                versions.append(_version_row(version_id, number, kind="merge" if before else "import"))
                for position, parent in enumerate(rng.sample(before, rng.choice((2, 3, 3)))) if before else ():
                    edges.append(Edge(version_id, position, parent, "merge", 0.5, f"{number:064x}"))
            first += here if generation == 0 else []
            last += here if generation == GENERATIONS - 1 else []
            before = here
    names = list(Edge.__dataclass_fields__)
    with database.write() as connection:
        _insert_shared(connection)
        connection.execute(insert(tables.version), versions)
        connection.execute(insert(tables.edge), [{name: getattr(edge, name) for name in names} for edge in edges])
    return first, last


def _fill_listing(database: Database) -> None:
    """1,000 versions of a 7B adapter with 128 modules: their facts are 60 MB that a listing must not read."""
    ledger = SqlLedger(database)
    facts = AdapterFacts(tuple(_module(i) for i in range(128)), "llama", None, "CAUSAL_LM", False, {"r": 16}, {})
    base = ledger.add_base(Base("base-1", "llama"), ["llama"])
    parents: list[str] = []
    for number in range(1, 1001):
        name = f"adapter-{number % 20}"
        spec = NewVersion(
            adapter=name,
            kind="import",
            content_digest=f"{number:064x}",
            base=base,
            facts=facts,
            metrics={"bleu": 0.3, "nll": 1.5},
            tags={"team": "mt"},
        )
        version_id = f"version-{number}"
        ledger.add_version(
            version_id,
            ledger.ensure_adapter(name),
            spec,
            _placement(number),
            [Edge(version_id, i, parent, "trained_from") for i, parent in enumerate(parents[-2:])],
            created_by="bench",
        )
        parents.append(version_id)
    ledger.close()


def _insert_shared(connection: Connection) -> None:
    connection.execute(insert(tables.base).values(id="base-1", name="llama", created_at=0.0))
    connection.execute(insert(tables.adapter).values(id="adapter-1", name="family", created_at=0.0))


def _version_row(version_id: str, number: int, *, kind: str) -> dict[str, object]:
    return {
        "id": version_id,
        "adapter_id": "adapter-1",
        "number": number,
        "kind": kind,
        "state": "live",
        "content_digest": f"{number:064x}",
        "base_id": "base-1",
        "recipe_digest": f"{number:064x}" if kind == "merge" else None,
        "created_at": float(number),
        "created_by": "bench",
        "params": "{}",
        "tags": "{}",
        "summary": '{"rank":16,"dtype":"BF16","modules":128,"parameters":1}',
        "placement": wire.to_json(_placement(number)),
    }


def _placement(number: int) -> Placement:
    files = tuple(
        FileRecord(name, 1000, f"{number:064x}") for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    return Placement(number, f"m-{number}", f"run-{number}", f"file:///artifacts/{number}", files)


def _module(index: int) -> LoraModule:
    name = f"model.layers.{index // 4}.self_attn.{'qkvo'[index % 4]}_proj"
    a = TensorEntry(f"base_model.model.{name}.lora_A.weight", "BF16", (16, 4096), 0, 1)
    b = TensorEntry(f"base_model.model.{name}.lora_B.weight", "BF16", (4096, 16), 1, 2)
    return LoraModule(name, "linear", 16, 2.0, a, b)

"""How fast the ledger answers in a large registry: lineage over 100,000 versions, a recall, a listing of 1,000.

The graph: 50 families of 2,000 versions, 21 generations each; a version has 2 or 3 parents in the generation before it.
A walk up from the last generation, or down from the first, reaches nearly its whole family: 20 steps deep.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from measure import Figure, bench, exponent, run_process, take_turns
from sqlalchemy import Connection, insert, text

from adapterctl.migrations import migrate
from adapterctl.registry import wire
from adapterctl.registry.domain.adapter import AdapterFacts, LoraModule, TensorEntry
from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.domain.version import Base, Edge, FileRecord, NewVersion, Placement
from adapterctl.registry.services.recall import recall
from adapterctl.registry.services.resolve import resolve
from adapterctl.registry.stores.sql import tables
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger

QUERIES = 400


@dataclass(frozen=True)
class Shape:
    """Families that have nothing to do with each other, and what each looks like."""

    families: int = 50
    generations: int = 21
    per_generation: int = 96


WALKED = Shape(generations=10, per_generation=20)  # of `lineage_growth`; only the number of families grows
SERVED = 100  # versions that hold a stage when the root is recalled, half of them made of it


@bench(
    "lineage_p99_ms",
    "a walk up or down, 20 generations and up to 2,000 of 100,000 versions, 99th percentile (SQLite)",
    unit=" ms",
    at_most=20,
)
def lineage_p99_ms(room: Path) -> Figure:
    database = _registry(room)
    return _walk_families(database, *_fill_lineage(database))


@bench(
    "lineage_p99_ms_pg",
    "the same walks on PostgreSQL, over TCP on this machine",
    unit=" ms",
    at_most=20,
    limit="the processor: an Intel Xeon took 18.8 ms",
)
def lineage_p99_ms_pg(room: Path) -> Figure:
    with _on_postgres() as database:
        first, last = _fill_lineage(database)
        with database.write() as connection:
            connection.execute(text("ANALYZE"))  # the server does so by itself within a minute of a large change
        return _walk_families(database, first, last)


@bench(
    "lineage_growth",
    "how the CPU time of a walk over 200 versions grows with the edges of the registry: the exponent (SQLite)",
    at_most=0.2,
)
def lineage_growth(room: Path) -> Figure:
    """By theory, each step is a search in a tree of all edges, log n; and there are as many steps as versions."""
    of_registry, of_walk = {}, {}
    for families in (2, 20, 210, 2_200):
        edges, _, ms = _walk_time(room, replace(WALKED, families=families))
        of_registry[edges] = ms
    for generations in (4, 8, 14, 21):
        _, nodes, ms = _walk_time(room, Shape(10, generations))
        of_walk[nodes] = ms
    logarithm = exponent({edges: math.log(edges) for edges in of_registry})
    of_edges = exponent(of_registry)
    return Figure(
        of_edges,
        f"edges: {_series(of_registry)}; exponent {of_edges:.2f}, of log n {logarithm:.2f}. "
        f"Versions walked: {_series(of_walk)}; exponent {exponent(of_walk):.2f}, by theory 1",
    )


@bench(
    "recall_s",
    "recall of a root with 500 descendants among 100,000 versions, to the list of exactly the stages that serve them",
    unit=" s",
    at_most=1,
)
def recall_s(room: Path) -> Figure:
    database = _registry(room)
    _fill_lineage(database)
    root, stages = _fill_recalled(database)
    ledger = SqlLedger(database)
    version = resolve(ledger, root)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        impact = recall(ledger, _Silent(), version, "recall", actor="bench", reason="leaked")
        times.append(time.perf_counter() - begun)
        if len(set(impact.descendants)) != 500 or {hit.ref for hit in impact.stages} != stages:
            raise AssertionError(f"{len(impact.descendants)} descendants and {len(impact.stages)} stages are named")
        recall(ledger, _Silent(), version, "undo", actor="bench", reason="again")
    ledger.close()
    named = f"{len(stages)} of the {SERVED} stages in use"
    return Figure(max(times), f"the slowest of {len(times)}, median {statistics.median(times):.3f} s; {named}")


class _Silent:
    """A doorbell that nobody hears."""

    def ring(self, job_id: str) -> None:
        return

    def check(self) -> None:
        return


def _walk_families(database: Database, first: Sequence[str], last: Sequence[str]) -> Figure:
    times_ms, nodes = _walk(database, first, last, QUERIES)
    times_ms.sort()
    median_ms, p99_ms = times_ms[len(times_ms) // 2], times_ms[int(len(times_ms) * 0.99)]
    return Figure(p99_ms, f"median {median_ms:.1f} ms; {statistics.median(nodes):,.0f} versions a walk in the median")


def _walk(
    database: Database,
    first: Sequence[str],
    last: Sequence[str],
    queries: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[int]]:
    """Milliseconds and versions of walks down from the first and up from the last generation, in any order."""
    ledger = SqlLedger(database)
    walks: list[tuple[Callable[[str, int], list[Edge]], str]]
    walks = [(ledger.edges_up, version_id) for version_id in last] + [(ledger.edges_down, v) for v in first]
    random.Random(2).shuffle(walks)
    gc.freeze()  # else the ids and rows of this script are searched for garbage again and again, in our time
    times_ms, nodes = [], []
    for walk, version_id in walks[:queries]:
        begun = clock()
        edges = walk(version_id, 20)
        times_ms.append((clock() - begun) * 1000)
        nodes.append(len({edge.child_id for edge in edges} | {edge.parent_id for edge in edges}))
    gc.unfreeze()
    ledger.close()
    return times_ms, nodes


def _walk_time(room: Path, shape: Shape) -> tuple[int, int, float]:
    """Of a registry of this shape: its edges; the versions of a walk and its CPU milliseconds, both in the median."""
    with tempfile.TemporaryDirectory(dir=room) as home:
        database = _registry(Path(home))
        first, last = _fill_lineage(database, shape)
        with database.read() as connection:
            edges = connection.execute(text("SELECT count(*) FROM edge")).scalar_one()
        # SQLite works in this process: its CPU time grows as the work does, whoever else is on the machine
        times_ms, nodes = _walk(database, first, last, QUERIES, clock=time.process_time)
    return int(edges), round(statistics.median(nodes)), statistics.median(times_ms)


def _series(points: Mapping[int, float]) -> str:
    return ", ".join(f"{x:,} {ms:.2f} ms" for x, ms in points.items())


@contextmanager
def _on_postgres() -> Iterator[Database]:
    """An empty registry on a PostgreSQL of its own, as the tests start it."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "plugins"))
    try:
        from postgres import postgres_server  # deferred: only the development environment has it
    except ImportError as error:
        raise RuntimeError(f"needs a PostgreSQL from the development environment: {error}") from error
    with postgres_server() as server:
        server.run("CREATE DATABASE bench")
        migrate(server.url("bench"))
        database = Database(server.url("bench"))
        SqlLedger(database).establish("elsewhere")
        yield database
        database.close()


@bench(
    "ls_s",
    "`adapterctl ls` in a registry of 1,000 versions, less a bare `python -c pass`",
    unit=" s",
    at_most=0.5,
    limit="the processor: an Intel Xeon took 0.47 s",
)
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


def _fill_lineage(database: Database, shape: Shape = Shape()) -> tuple[list[str], list[str]]:
    """The ids of all first and of all last generations; rows are written past the ledger, for speed."""
    rng = random.Random(1)
    numbers = itertools.count(1)
    first, last = [], []
    with database.write() as connection:
        _insert_shared(connection)
        for _family in range(shape.families):
            versions, edges = [], []
            before: list[str] = []
            for generation in range(shape.generations):
                here = []
                for _ in range(shape.per_generation):
                    number = next(numbers)
                    version_id = f"{rng.getrandbits(128):032x}"
                    here.append(version_id)
                    versions.append(_version_row(version_id, number, kind="merge" if before else "import"))
                    for position, parent in enumerate(rng.sample(before, rng.choice((2, 3, 3)))) if before else ():
                        edges.append(Edge(version_id, position, parent, "merge", 0.5, f"{number:064x}"))
                first += here if generation == 0 else []
                last += here if generation == shape.generations - 1 else []
                before = here
            _insert_rows(connection, versions, edges)
    return first, last


def _fill_recalled(database: Database) -> tuple[Ref, set[str]]:
    """A root with 500 descendants, each an adapter of its own, and which of those serve; others serve beside them."""
    rng = random.Random(3)
    names = ["root", *(f"made-{n}" for n in range(500)), *(f"beside-{n}" for n in range(SERVED // 2))]
    versions = [_version_row(f"version-{n}", 200_000 + i, kind="import", adapter=n) for i, n in enumerate(names)]
    edges, generation = [], names[:1]
    for start in range(1, 501, 25):
        here = names[start : start + 25]
        for name in here:
            parents = rng.sample(generation, min(2, len(generation)))
            edges += [Edge(f"version-{name}", i, f"version-{each}", "merge", 0.5) for i, each in enumerate(parents)]
        generation = here
    serving = names[10:501:10]
    with database.write() as connection:
        connection.execute(insert(tables.adapter), [{"id": n, "name": n, "created_at": 0.0} for n in names])
        _insert_rows(connection, versions, edges)
        held = [*serving, *names[501:]]
        connection.execute(
            insert(tables.stage), [{"adapter_id": n, "stage": "production", "version_id": f"version-{n}"} for n in held]
        )
    return Ref("root", number=200_000), {f"{name}:v{200_000 + names.index(name)}" for name in serving}


def _insert_rows(connection: Connection, versions: list[dict[str, object]], edges: Sequence[Edge]) -> None:
    names = list(Edge.__dataclass_fields__)
    connection.execute(insert(tables.version), versions)
    connection.execute(insert(tables.edge), [{name: getattr(edge, name) for name in names} for edge in edges])


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


def _version_row(version_id: str, number: int, *, kind: str, adapter: str = "adapter-1") -> dict[str, object]:
    return {
        "id": version_id,
        "adapter_id": adapter,
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

"""Hours of mixed load with a kill every minute: is anything lost, and does memory stay flat?

    python chaos/soak.py --hours 2 [--database sqlite|postgres]

Clients submit merges all the time, one of them through the server; beside them someone lists, looks, plans, verifies
and promotes through that server, which is never killed, so that the slope of its memory means something. What ran is
recorded as the chaos runs are.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import records
from faults import Injector
from model import make_model, make_parents, share_out
from piece import come_to_rest, hear_out, pronounce
from run import DATABASES
from scene import Scene, end_properly, open_scene

from adapterctl.bootstrap import remote
from adapterctl.registry.api import RegistryAPI
from adapterctl.registry.domain.errors import AdapterctlError
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref

KINDS = ("kill supervisor", "kill child", "kill supervisor and child", "kill client", "stop supervisor past its lease")
FAULT_EVERY_S, LOOK_EVERY_S, SAMPLE_EVERY_S = 60.0, 2.0, 10.0
#: A merge in so many seconds, over all clients; and how long memory may grow first: caches and pools fill.
MERGE_EVERY_S, WARM_S = 5.0, 300.0
CLIENTS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--database", choices=DATABASES, default="sqlite")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--room", type=Path, default=None)
    end_properly()
    asked = parser.parse_args()
    folder = tempfile.TemporaryDirectory(prefix="soak-", dir=asked.room)
    with folder as name, open_scene(asked.database, Path(name)) as scene:
        line = soak(scene, asked.hours * 3600)
    line = {"what": "soak", "database": asked.database, **line}
    print(line)
    if not asked.no_record:
        records.add_line(line)
    return 1 if line["findings"] else 0


def soak(scene: Scene, seconds: float) -> dict[str, Any]:
    parents = make_parents(scene.room / "parents")
    model = make_model(1, max(6, int(seconds / MERGE_EVERY_S)), parents, scene.room / "undisturbed")
    for name, parent in parents.items():
        scene.registry.register(str(parent), name=name)
    lists = share_out(model, CLIENTS, 1)
    scene.start_clients(model, lists, served=True, pause_s=seconds / max(map(len, lists)))
    injector = Injector(scene, 1, KINDS)
    memory, asked = endure(scene, injector, seconds)
    injector.take_back(all_of_them=True)
    told = come_to_rest(scene, deadline=time.monotonic() + 600)
    hear_out(scene)
    scene.end()
    verdict = pronounce(scene, model)
    server = memory.get("server", [])
    return {
        "figures": {
            "minutes": round(seconds / 60),
            "faults": injector.done.total(),
            "jobs": verdict.jobs,
            "attempts": verdict.attempts,
            "used up": told,
            "other questions": asked.total(),
            "of them refused for a while": asked["unavailable"],
            "server at first": f"{statistics.median(mb for _, mb in server[:6]):.0f} MB",
            "at the end": f"{statistics.median(mb for _, mb in server[-6:]):.0f} MB",
            "slope after five minutes": _slope(server, WARM_S),
            "in the second half": _slope(server, max(WARM_S, seconds / 2)),
            "largest supervisor": f"{max((mb for _, mb in memory.get('supervisor', [])), default=0):.0f} MB",
        },
        "findings": verdict.findings,
    }


def endure(
    scene: Scene, injector: Injector, seconds: float
) -> tuple[dict[str, list[tuple[float, float]]], Counter[str]]:
    """Memory by program as (seconds, MB), and questions by outcome."""
    dice, begun = random.Random(1), time.monotonic()
    due = dict.fromkeys(("fault", "look", "sample"), begun)
    memory: dict[str, list[tuple[float, float]]] = {}
    asked: Counter[str] = Counter()
    while (now := time.monotonic()) - begun < seconds:
        scene.tend()
        injector.take_back()
        if now >= due["fault"] and injector.inject():
            due["fault"] = now + FAULT_EVERY_S
        if now >= due["look"]:
            due["look"] = now + LOOK_EVERY_S
            asked[_ask(remote(scene.address, None), dice)] += 1
        if now >= due["sample"]:
            due["sample"] = now + SAMPLE_EVERY_S
            for name, pid in _watched(scene):
                with suppress(OSError):
                    memory.setdefault(name, []).append((now - begun, _resident_mb(pid)))
        time.sleep(0.05)
    return memory, asked


def _ask(registry: RegistryAPI, dice: random.Random) -> str:
    questions: Mapping[str, Callable[[], Any]] = {
        "ls": registry.versions,
        "jobs": registry.jobs,
        "show": lambda: registry.version(parse_ref("ada:v1")),
        "lineage": lambda: registry.lineage(parse_ref("ada:v1")),
        "plan": lambda: registry.plan(MergeRequest((parse_parent("ada:v1"), parse_parent("bob:v1")), into="planned")),
        "verify": lambda: registry.verify(parse_ref("shared-0:v1"), rerun=False),
        "promote": lambda: registry.promote(parse_ref("shared-0"), to="staging"),
    }
    name = dice.choice(list(questions))
    try:
        questions[name]()
    except AdapterctlError as error:
        return error.code
    return name


def _watched(scene: Scene) -> list[tuple[str, int]]:
    server = [("server", scene.server.pid)] if scene.server is not None else []
    return [*server, *(("supervisor", pid) for pid in scene.supervisors())]


def _resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def _slope(samples: list[tuple[float, float]], from_s: float) -> str:
    late = [(at / 3600, mb) for at, mb in samples if at >= from_s]
    if len(late) < 2:
        return "not measured: too short"
    return f"{statistics.linear_regression(*zip(*late, strict=True)).slope:+.1f} MB an hour"


if __name__ == "__main__":
    sys.exit(main())

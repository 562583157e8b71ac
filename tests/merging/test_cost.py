"""What a forecast says of memory and time, against a merge and its proof in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_adapter
from tiny_merge import WEIGHTS, facts_of, plan_of

from adapterctl.registry.domain.plan import build_plan
from adapterctl.registry.merging.cost import cost
from adapterctl.registry.merging.forecast import forecast
from adapterctl.registry.merging.method import find_method

MEASURE = """
import json, os, sys, time
from pathlib import Path
from tiny_merge import WEIGHTS, engine, plan_of, receipt
os.fsync = lambda descriptor: None
folders, out = [Path(folder) for folder in sys.argv[2:-1]], Path(sys.argv[-1])
plan, files = plan_of(folders, method=sys.argv[1]), [folder / WEIGHTS for folder in folders]
peak = lambda: int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024
out.mkdir()
before, began = peak(), time.process_time()
receipt.prove(plan, files, out, engine.merge(plan, files, out))
print(json.dumps([peak() - before, time.process_time() - began]))
"""


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("parents")
    linear = {f"layers.{i}.q_proj": (1200, 2048) for i in range(3)}
    return [write_tiny_adapter(root / f"p{i}", seed=i, rank=48, linear=linear) for i in range(4)]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("method", ["cat", "svd", "ties", "ties_svd", "knots_ties"])
def test_the_memory_of_a_merge_is_as_forecast_within_a_factor_of_two(parents: list[Path], tmp_path: Path, method: str):
    plan = plan_of(parents, method=method)

    said = cost(plan.modules, find_method(method), plan.recipe.rank, plan.recipe.dtype)

    ran = [sys.executable, "-c", MEASURE, method, *map(str, parents), str(tmp_path / "out")]
    done = subprocess.run(ran, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    memory, seconds = json.loads(done.stdout)
    assert memory / 2 <= said.memory_bytes <= 2 * memory
    # a machine that is three times as fast, or busy and ten times as slow, is no fault of the forecast
    assert seconds / 10 <= said.cpu_s <= 6 * seconds


def test_every_row_of_a_forecast_says_what_it_takes(parents: list[Path]):
    plan = plan_of(parents, method="svd", rank=8)

    rows, _, _ = forecast(plan, [folder / WEIGHTS for folder in parents], list("abcd"))

    taken = {row.method: (row.cpu_s, row.memory_bytes) for row in rows}
    assert all(seconds > 0 and memory > 0 for seconds, memory in taken.values())
    assert taken["ties_svd"][0] > 5 * taken["svd"][0]
    assert taken["ties_svd"][1] > 2 * taken["svd"][1]


def test_time_grows_with_the_modules_and_memory_does_not(tmp_path: Path):
    def said(modules: int) -> tuple[float, int]:
        folders = [
            write_tiny_adapter(tmp_path / f"{modules}-{i}", linear={f"layers.{j}.q": (8, 8) for j in range(modules)})
            for i in range(2)
        ]
        plan = build_plan(plan_of(folders).recipe, [facts_of(folder) for folder in folders])
        found = cost(plan.modules, find_method("cat"), plan.recipe.rank, "F32")
        return found.cpu_s, found.memory_bytes

    one, ten = said(1), said(10)

    assert ten[0] == pytest.approx(10 * one[0])
    assert ten[1] == one[1]

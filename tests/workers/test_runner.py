"""The child process as its supervisor sees it: a task file in, lines of JSON out, three files, and a quick death."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LINEAR, safetensors_bytes, write_tiny_adapter
from tiny_merge import WEIGHTS, facts_of, plan_of, run_merge

from adapterctl.registry.domain.adapter import AdapterFacts, LoraModule, TensorEntry
from adapterctl.registry.domain.digest import file_digest
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.merging.tensors import measure
from adapterctl.registry.wire import from_json, to_builtins
from adapterctl.workers.receipt import ROUNDING

MANY = {f"model.layers.{layer}.mlp.{name}_proj": (64, 64) for layer in range(200) for name in ("up", "down")}
COMMAND = [sys.executable, "-m", "adapterctl.workers.runner"]


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Path]:
    """A merge task of two tiny adapters; `max_loss` and what `plan_of` takes can be asked for."""

    def make(
        *,
        linear: Mapping[str, tuple[int, int]] = LINEAR,
        max_loss: float | None = None,
        lora_bias: bool = False,
        **ask: Any,
    ) -> Path:
        folders = [write_tiny_adapter(tmp_path / f"p{i}", seed=i, linear=linear, lora_bias=lora_bias) for i in range(2)]
        (tmp_path / "out").mkdir()
        task = {
            "kind": "merge",
            "plan": to_builtins(replace(plan_of(folders, **ask), max_loss=max_loss)),
            "parents": [
                {
                    "folder": str(folder),
                    "sha256": {name: file_digest(folder / name) for name in (WEIGHTS, "adapter_config.json")},
                }
                for folder in folders
            ],
            "out": str(tmp_path / "out"),
            "threads": 2,
        }
        path = tmp_path / "task.json"
        path.write_text(json.dumps(task), encoding="utf-8")
        return path

    return make


def run(task: Path, **environment: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, the lines on stdout, and stderr."""
    done = subprocess.run(
        [*COMMAND, str(task)], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_merge_task_ends_with_its_result_and_three_files(make_task: Callable[..., Path], tmp_path: Path):
    code, lines, stderr = run(make_task(method="svd"))

    assert (code, stderr) == (0, "")
    assert lines[-2] == {"progress": {"stage": "merge", "done": 4, "total": 4}}
    result = lines[-1]["result"]
    assert sorted(result) == ["content_digest", "facts", "norms", "receipt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]
    facts = from_json(json.dumps(result["facts"]), AdapterFacts)
    measured = measure(tmp_path / "out" / WEIGHTS, facts)
    assert (measured.content_digest, measured.norms) == (result["content_digest"], pytest.approx(result["norms"]))
    assert result["receipt"]["passed"]


def test_the_child_writes_the_bytes_that_the_library_writes(make_task: Callable[..., Path], tmp_path: Path):
    run(make_task(method="svd"))

    here = run_merge([tmp_path / "p0", tmp_path / "p1"], tmp_path / "here", method="svd")

    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (here.folder / path.name).read_bytes()


def test_a_parent_that_is_not_what_the_manifest_says_is_not_used(make_task: Callable[..., Path], tmp_path: Path):
    task = make_task()
    config = tmp_path / "p1" / "adapter_config.json"
    config.write_text(config.read_text() + " ")

    code, lines, _ = run(task)

    assert code == 1
    assert lines[-1]["error"]["code"] == "corrupt"
    assert "adapter_config.json has SHA-256" in lines[-1]["error"]["message"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_loss_above_the_limit_is_refused_before_anything_is_written(make_task: Callable[..., Path], tmp_path: Path):
    code, lines, _ = run(make_task(method="svd", rank=1, max_loss=0.01))

    assert code == 1
    assert lines[-1]["error"]["code"] == "loss_too_high"
    assert "--max-loss allows 0.01" in lines[-1]["error"]["message"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_limit_of_zero_allows_rounding(make_task: Callable[..., Path]):
    assert run(make_task(method="cat", dtype="bf16", max_loss=0.0))[0] == 0


def test_a_limit_does_not_allow_what_goes_below_the_range_of_the_type(make_task: Callable[..., Path]):
    """A of about 2e-6 in float16, whose smallest number is 6e-8: near 1 % is lost, ten times what rounding explains."""
    code, lines, _ = run(make_task(method="cat", dtype="f16", weights=(1e-5, 1e-5), max_loss=0.0))

    assert (code, lines[-1]["error"]["code"]) == (1, "loss_too_high")
    assert "the merge lost 0.00" in lines[-1]["error"]["message"]


def other_gauge(module: LoraModule) -> Mapping[TensorEntry, float]:
    return {module.a: 2.0, module.b: 0.5}


@pytest.mark.parametrize(
    ("factors", "metadata", "same_arithmetic", "verdict", "distance", "details"),
    [
        (lambda module: {}, {}, True, "identical", 0, ()),
        (lambda module: {}, {}, False, "identical", 0, ()),
        (lambda module: {module.a: 1 + 1e-6}, {}, False, "equal within bound", 1e-6, ("distance",)),
        (lambda module: {module.a: 1 + 1e-6}, {}, True, "different", 1e-6, ("distance",)),
        (lambda module: {module.a: 1.001}, {}, False, "different", 1e-3, ("distance",)),
        (other_gauge, {}, False, "equal within bound", 0, ("distance 0",)),
        (other_gauge, {}, True, "different", 0, ("distance 0",)),
        (lambda module: {}, {"note": "added"}, False, "different", 0, ("distance 0", "the headers differ")),
        (lambda module: {module.bias: 2.0}, {}, False, "different", 0, ("distance 0", "base_model.model.")),
        (lambda module: {module.a: 0.0}, {}, False, "different", None, ("distance unknown",)),
    ],
    ids=[
        "same bytes", "same bytes elsewhere", "last bits elsewhere", "last bits", "too far", "other factors elsewhere",
        "other factors", "header", "bias", "zero",
    ],
)  # fmt: skip
def test_a_recipe_that_is_run_again_is_held_against_the_stored_file(
    make_task: Callable[..., Path],
    tmp_path: Path,
    factors: Callable[[LoraModule], Mapping[TensorEntry, float]],
    metadata: Mapping[str, str],
    same_arithmetic: bool,
    verdict: str,
    distance: float | None,
    details: tuple[str, ...],
):
    """The stored file is one that the child made, with tensors of every module times a factor."""
    task = make_task(method="svd", lora_bias=True)
    receipt = run(task)[1][-1]["result"]["receipt"]
    stored = tmp_path / "stored"
    (tmp_path / "out").rename(stored)
    (tmp_path / "out").mkdir()
    scaled = {entry.key: by for module in facts_of(stored).modules for entry, by in factors(module).items()}
    rewrite(stored / WEIGHTS, scaled, metadata)
    fingerprint = receipt["fingerprint"] if same_arithmetic else {**receipt["fingerprint"], "blas": "another"}
    compare = {"folder": str(stored), "fingerprint": fingerprint}
    task.write_text(json.dumps({**json.loads(task.read_text(encoding="utf-8")), "compare": compare}), encoding="utf-8")

    found = run(task)[1][-1]["result"]["comparison"]

    assert found["verdict"] == verdict
    assert found["distance"] == (distance if distance is None else pytest.approx(distance, rel=0.1))
    assert len(found["details"]) >= len(details)
    assert all(line.startswith(start) for line, start in zip(found["details"], details, strict=False))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernel is one of OpenBLAS for x86-64")
@pytest.mark.parametrize(("method", "dtype"), [("svd", "f64"), ("svd", "bf16"), ("tsv", "f64"), ("ties_svd", "f64")])
def test_another_blas_kernel_is_told_and_gives_the_same_delta_within_the_bound(
    make_task: Callable[..., Path], tmp_path: Path, method: str, dtype: str
):
    task = make_task(linear={f"layers.{i}.q_proj": (96, 160) for i in range(3)}, method=method, rank=3, dtype=dtype)
    receipt = run(task)[1][-1]["result"]["receipt"]
    stored = tmp_path / "stored"
    (tmp_path / "out").rename(stored)
    compare = {"folder": str(stored), "fingerprint": receipt["fingerprint"]}
    task.write_text(json.dumps({**json.loads(task.read_text(encoding="utf-8")), "compare": compare}), encoding="utf-8")
    found = {}

    for kernel in ({}, {"OPENBLAS_CORETYPE": "Nehalem"}):
        (tmp_path / "out").mkdir()
        result = run(task, **kernel)[1][-1]["result"]
        shutil.rmtree(tmp_path / "out")
        found[result["receipt"]["fingerprint"]["blas_kernel"]] = result["comparison"]

    here = receipt["fingerprint"]["blas_kernel"]
    assert len(found) == 2, "this processor has no other kernel by default: no test"
    assert found[here] == {"verdict": "identical", "distance": 0.0, "details": []}
    assert found["Nehalem"]["verdict"] in {"identical", "equal within bound"}
    assert found["Nehalem"]["distance"] <= 1e-6 + 2 * ROUNDING[dtype.upper()][0]
    if dtype == "f64":  # a narrower type rounds the difference away, mostly
        assert found["Nehalem"]["verdict"] == "equal within bound", "both kernels give the same bits: no test"


def rewrite(path: Path, scaled: Mapping[str, float], metadata: Mapping[str, str]) -> None:
    """The same file with tensors of float32 times a factor each, or with other metadata."""
    header, stored = read_header(path), bytearray(path.read_bytes())
    values = {
        entry.key: np.frombuffer(stored, "<f4", (entry.end - entry.begin) // 4, entry.begin).reshape(entry.shape)
        for entry in header.tensors
    }
    for key, by in scaled.items():
        values[key] *= np.float32(by)
    if metadata:
        tensors = {key: ("F32", array) for key, array in values.items()}
        path.write_bytes(safetensors_bytes(tensors, {**header.metadata, **metadata}))
        return
    path.write_bytes(stored)


def test_a_task_of_an_unknown_kind_is_an_error_of_ours(tmp_path: Path):
    task = tmp_path / "task.json"
    task.write_text('{"kind": "dance"}')

    code, lines, _ = run(task)

    assert (code, lines[-1]["error"]["code"]) == (1, "invalid_input")


def test_a_disk_that_is_full_is_said_to_be(make_task: Callable[..., Path], tmp_path: Path):
    task = make_task()

    done = subprocess.run(
        ["/bin/sh", "-c", f'ulimit -f 4; exec "$@" > {tmp_path}/said', "sh", *COMMAND, str(task)], timeout=60
    )

    assert done.returncode == 1
    assert json.loads((tmp_path / "said").read_text().splitlines()[-1])["error"]["code"] == "unavailable"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def started(make_task: Callable[..., Path]) -> Iterator[subprocess.Popen[str]]:
    """A child in the middle of a merge of 400 modules."""
    process = subprocess.Popen([*COMMAND, str(make_task(linear=MANY, method="svd"))], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "progress" in process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_sigterm_stops_between_modules_and_leaves_no_half_file(started: subprocess.Popen[str], tmp_path: Path):
    started.send_signal(signal.SIGTERM)

    said, _ = started.communicate(timeout=60)
    assert started.returncode == 1
    assert json.loads(said.splitlines()[-1])["error"]["code"] == "job_cancelled"
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("point", ["child.started", "child.module", "child.written"])
def test_a_child_can_be_made_to_die_where_tests_need_it(make_task: Callable[..., Path], tmp_path: Path, point: str):
    code, lines, _ = run(make_task(), ADAPTERCTL_CRASH_AT=point)

    assert code == -signal.SIGKILL
    assert not any("result" in line or "error" in line for line in lines)
    assert (tmp_path / "out" / WEIGHTS).exists() == (point == "child.written")


def test_a_child_dies_with_its_parent(make_task: Callable[..., Path], tmp_path: Path):
    """The parent starts a child, tells its process id, and is killed while the child works."""
    task = make_task(linear=MANY, method="svd")
    starter = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({[*COMMAND, str(task)]!r}, stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())

    parent.kill()
    parent.communicate()

    deadline = time.monotonic() + 30
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """Whether the process is alive; one that nobody has waited for yet counts as ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"

"""How fast, how small and how exact merges are: against copying the same bytes, against PEFT, against the optimum."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from adapters import WEIGHTS_FILE, WIDTH, factors, plan, write_pair, write_task
from measure import Figure, bench, exponent, run_process, take_turns
from threadpoolctl import threadpool_limits

from adapterctl.registry.domain.plan import MergePlan, output_tensors
from adapterctl.registry.merging.blas import one_thread
from adapterctl.registry.merging.core import truncate
from adapterctl.registry.merging.grams import Block, Grams, gram
from adapterctl.registry.merging.make import wider
from adapterctl.registry.merging.method import find_method
from adapterctl.registry.merging.tensors import TensorReader, TensorWriter
from adapterctl.workers import engine

ROUNDS = 15
THREADS = 2
RANK = 16


def _against_copy(room: Path, method: str, dtype: str) -> Figure:
    folders = write_pair(room, dtype=dtype)
    files = [folder / WEIGHTS_FILE for folder in folders]
    sides: dict[str, Callable[[], None]] = {}
    for name, weights in (("weighted", (0.7, 0.3)), ("unweighted", (1.0, 1.0))):
        merge_plan = plan(folders, method, weights=weights)
        sides[name] = partial(_merge, merge_plan, files, room / "merged")
    sides["copy"] = partial(_copy, files, merge_plan.size_bytes, room / "copy")
    rounds = take_turns(sides, ROUNDS)
    return Figure(
        rounds.ratio("weighted", "copy"),
        f"{rounds.median('weighted'):.3f} s against {rounds.median('copy'):.3f} s,"
        f" {rounds.cpu_ratio('weighted', 'copy'):.1f}× in CPU-seconds on {THREADS} threads; with both weights 1:"
        f" {rounds.ratio('unweighted', 'copy'):.2f}×, {rounds.cpu_ratio('unweighted', 'copy'):.1f}× in CPU-seconds",
    )


_WHERE_TIME_GOES = (
    "[a decision](decisions/0008-merge-in-float64-grams.md) tells where its time goes, and what was tried"
)
for _method, _limit in (("cat", 1.5), ("svd", 2.0)):
    for _suffix, _dtype in (("", "BF16"), ("_fp32", "F32")):
        bench(
            f"{_method}_vs_copy{_suffix}",
            f"`{_method}` of a Llama-2-7B q,k,v,o pair (r=16, {_dtype.lower()}), weights 0.7 and 0.3, file to file,"
            " against reading and writing as many bytes",
            unit="×",
            at_most=_limit,
            limit=_WHERE_TIME_GOES,
        )(partial(_against_copy, method=_method, dtype=_dtype))


def _against_floor(room: Path, dtype: str) -> Figure:
    """Of rank 64 each; no merge can do without the copy, and none by way of Gram matrices without the arithmetic."""
    folders = write_pair(room, dtype=dtype, rank=64)
    files = [folder / WEIGHTS_FILE for folder in folders]
    merge_plan = plan(folders, "svd")
    wide = wider(dtype)
    rng = np.random.default_rng(0)
    factors_and_maps = [
        rng.standard_normal(shape).astype(wide) for shape in ((128, WIDTH), (WIDTH, 128), (64, 128), (128, 64))
    ]
    rounds = take_turns(
        {
            "merge": partial(_merge, merge_plan, files, room / "merged"),
            "copy": partial(_copy, files, merge_plan.size_bytes, room / "copy"),
            "arithmetic": partial(_arithmetic, *factors_and_maps, modules=len(merge_plan.modules)),
        },
        ROUNDS,
    )
    floor = max(("copy", "arithmetic"), key=rounds.median)
    return Figure(
        rounds.ratio("merge", floor),
        f"{rounds.median('merge'):.3f} s against {rounds.median('arithmetic'):.3f} s of arithmetic and"
        f" {rounds.median('copy'):.3f} s of copying, each on {THREADS} threads but the copy",
    )


def _arithmetic(a: np.ndarray, b: np.ndarray, map_a: np.ndarray, map_b: np.ndarray, *, modules: int) -> None:
    """What BLAS and LAPACK have to do for one SVD from Gram matrices, so many times, in memory that is in the cache."""
    core = (a @ a.T).astype(np.float64)

    def decompose(_: int) -> None:
        for left, right in ((a, a.T), (b.T, b), (map_a, a), (b, map_b)):
            left @ right
        np.linalg.eigh(core)

    with one_thread(), ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(decompose, range(modules)))


for _suffix, _dtype in (("", "BF16"), ("_fp32", "F32")):
    bench(
        f"svd_r128_vs_floor{_suffix}",
        f"`svd` of a Llama-2-7B q,k,v,o pair of rank 64 ({_dtype.lower()}, R = 128), file to file, against what takes"
        " longer: reading and writing as many bytes, or the four products with the factors and one eigenproblem of the"
        " core in BLAS and LAPACK",
        unit="×",
        at_most=3.0,
    )(partial(_against_floor, dtype=_dtype))


def _against_peft(room: Path, method: str, repeats: int, **options: float) -> Figure:
    """One module of one layer, made by PEFT once between two runs of ours."""
    # deferred: only this needs torch and PEFT in this process
    import torch
    from peft import LoraConfig, get_peft_model

    folders = write_pair(room, layers=1, dtype="F32")
    merge_plan = plan(folders, method, rank=RANK)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False)), LoraConfig(r=RANK, target_modules=["0"]), "p0"
    )
    model.add_adapter("p1", LoraConfig(r=RANK, target_modules=["0"]))
    layer = model.base_model.model[0]
    for parent in range(2):
        a, b = factors(0, parent, RANK)
        layer.lora_A[f"p{parent}"].weight.data = torch.from_numpy(a)
        layer.lora_B[f"p{parent}"].weight.data = torch.from_numpy(b)

    ours = [_one_module(merge_plan, folders, room, repeats)]
    wall, start = time.perf_counter(), time.process_time()
    model.add_weighted_adapter(["p0", "p1"], [0.7, 0.3], "merged", combination_type=method, svd_rank=RANK, **options)
    theirs, wall = time.process_time() - start, time.perf_counter() - wall
    ours.append(_one_module(merge_plan, folders, room, repeats))

    mine = statistics.median(ours)
    return Figure(
        theirs / mine,
        f"CPU-seconds: PEFT {theirs:.1f} ({wall:.1f} s of wall time, once), ours {mine * 1e3:.3g} ms, reading the"
        f" parents' tensors to writing the child's, median of {2 * repeats * len(merge_plan.modules)}",
    )


for _method, _limit, _repeats, _options in (("svd", 10_000, 50, {}), ("ties_svd", 50, 2, {"density": 0.5})):
    bench(
        f"{_method}_vs_peft",
        f"`{_method}` of one 4096×4096 module, r=16, two parents, float32, in CPU-seconds against PEFT",
        unit="×",
        at_least=_limit,
        limit="PEFT's dense decomposition takes half as long again on one processor as on another; ours does not",
    )(partial(_against_peft, method=_method, repeats=_repeats, **_options))


def _one_module(merge_plan: MergePlan, folders: list[Path], room: Path, repeats: int) -> float:
    method = find_method(merge_plan.recipe.method)
    readers = [TensorReader(folder / WEIGHTS_FILE) for folder in folders]
    seconds = []
    with (
        TensorWriter(room / "one.safetensors", output_tensors(merge_plan), {}) as writer,
        threadpool_limits(limits=1, user_api="blas"),
    ):
        for module in merge_plan.modules * repeats:
            start = time.thread_time()
            engine.merge_module(module, method, merge_plan, readers, writer)
            seconds.append(time.thread_time() - start)
    return statistics.median(seconds)


COLD_MERGE = """
import json, sys
from pathlib import Path
from adapterctl.registry.domain.plan import MergePlan
from adapterctl.registry.wire import from_json
from adapterctl.workers import engine
task = json.loads(Path(sys.argv[1]).read_text())
files = [Path(parent["folder"]) / engine.WEIGHTS_FILE for parent in task["parents"]]
engine.merge(from_json(json.dumps(task["plan"]), MergePlan), files, Path(task["out"]), threads=task["threads"])
"""

COLD_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig()).to(torch.bfloat16)
model.to_empty(device="cpu")  # untouched memory: the base costs PEFT nothing here
model = PeftModel.from_pretrained(model, sys.argv[1], adapter_name="p0")
model.load_adapter(sys.argv[2], adapter_name="p1")
model.add_weighted_adapter(["p0", "p1"], [0.7, 0.3], "merged", combination_type="cat")
model.save_pretrained(sys.argv[3], selected_adapters=["merged"])
"""


@bench(
    "cold_cat_cpu_vs_peft",
    "`cat` of a Llama-2-7B q,k,v,o pair in a cold process, CPU-seconds, against PEFT (whose base is free here)",
    unit="×",
    at_least=80,
    limit="a cold process has to start Python, import numpy, and read and write 130 MB; with nothing else it would be"
    " about twice as far. The goal was set where PEFT's side took 17.8 CPU-seconds",
)
def cold_cat_cpu_vs_peft(room: Path) -> Figure:
    folders = write_pair(room)
    task = _task(plan(folders, "cat"), folders, room)
    peft = run_process([sys.executable, "-c", COLD_PEFT, *map(str, folders), str(room / "peft")])
    mine = min(run_process([sys.executable, "-c", COLD_MERGE, str(task)]).cpu_s for _ in range(5))
    child = min(run_process([sys.executable, "-m", "adapterctl.workers.runner", str(task)]).cpu_s for _ in range(3))
    least = min(run_process([sys.executable, "-c", "import numpy"]).cpu_s for _ in range(5))
    return Figure(
        peft.cpu_s / mine,
        f"PEFT {peft.cpu_s:.1f} CPU-s and {peft.peak_bytes / 1e6:.0f} MB (once), ours {mine:.2f} CPU-s, of them"
        f" {least:.2f} CPU-s to import numpy;"
        f" with digests checked, receipt and measuring: {child:.2f} CPU-s, {peft.cpu_s / child:.0f}×",
    )


@bench("peak_mb", "peak memory of a merge child, less 12·d·R bytes a worker", unit=" MB", at_most=64)
def peak_mb(room: Path) -> Figure:
    peaks = {}
    for layers in (8, 80):
        folders = write_pair(room, layers=layers)
        task = _task(plan(folders, "svd"), folders, room)
        ended = run_process([sys.executable, "-m", "adapterctl.workers.runner", str(task)])
        peaks[layers] = (ended.peak_bytes - THREADS * 12 * WIDTH * 2 * RANK) / 1e6
    return Figure(max(peaks.values()), ", ".join(f"{layers} layers: {peak:.0f} MB" for layers, peak in peaks.items()))


@bench("peak_growth", "peak memory of a merge child with 224 modules against one with 32", unit="×", at_most=1.05)
def peak_growth(room: Path) -> Figure:
    peaks = {}
    for layers in (8, 56):
        folders = write_pair(room, layers=layers)
        task = _task(plan(folders, "svd"), folders, room)
        ended = [run_process([sys.executable, "-m", "adapterctl.workers.runner", str(task)]) for _ in range(3)]
        peaks[4 * layers] = statistics.median(each.peak_bytes for each in ended) / 1e6
    return Figure(peaks[224] / peaks[32], ", ".join(f"{modules} modules: {mb:.1f} MB" for modules, mb in peaks.items()))


def _growth(room: Path, sizes: Sequence[int], setting: str, method: str) -> Figure:
    """Slope of log CPU-seconds of one module over log size, in the upper half of them: calls cost least there."""
    seconds = {}
    for size in sizes:
        place = room / str(size)
        place.mkdir()
        asked = {"rank": 16, "width": WIDTH, "parents": 2, setting: size}
        folders = write_pair(place, layers=1, dtype="F32", **asked)
        weights = (0.7, *[0.3] * (asked["parents"] - 1))
        rank = asked["rank"] if method == "svd" else None
        seconds[size] = _one_module(plan(folders, method, rank=rank, weights=weights), folders, place, 5)
        shutil.rmtree(place)
    upper = sizes[len(sizes) // 2 :]
    slope = exponent({size: seconds[size] for size in upper})
    return Figure(slope, ", ".join(f"{size}: {s * 1e3:.2f} ms" for size, s in seconds.items()))


_WIDTHS, _PARENTS = (512, 1024, 2048, 4096, 8192, 16384), (2, 4, 8, 16, 32, 64)
# svd costs O(d R²) + O(R³): of 64 parents of rank 16, R is a quarter of the width and both terms are seen
for _method, _setting, _sizes, _theory, _limit in (
    ("svd", "width", _WIDTHS, "1", 1.5),
    ("svd", "rank", (4, 16, 64, 128, 256), "2", 2.5),
    ("svd", "parents", _PARENTS, "2 to 3", 3.0),
    ("cat", "parents", _PARENTS, "1", 1.5),
):
    bench(
        f"{_method}_growth_{_setting}",
        f"exponent of the CPU time of `{_method}` in the {_setting} (theory: {_theory}), float32,"
        f" {_sizes[0]} to {_sizes[-1]}" + ("" if _setting == "parents" else ", two parents"),
        at_most=_limit,
    )(partial(_growth, sizes=_sizes, setting=_setting, method=_method))


@bench(
    "error_vs_optimum", "distance of `svd` (float32 out) from the float64 optimum, relative to the sum", at_most=3e-7
)
def error_vs_optimum(room: Path) -> Figure:
    errors = {}
    for name, (a, b) in _hard_cases().items():
        c = np.repeat([0.7, 0.3], RANK)
        maps = truncate(Grams(gram(a), gram(b.T), c, (Block(0, 0, RANK), Block(1, RANK, 2 * RANK))), RANK)
        made_a = (maps.a @ a.astype(np.float64)).astype(np.float32).astype(np.float64)
        made_b = (b.astype(np.float64) @ maps.b).astype(np.float32).astype(np.float64)
        best_b, best_a, norm = _optimum(a, b, c)
        # the norm of a difference of two products of rank 16, from a thin QR: nothing cancels
        left = np.linalg.qr(np.hstack([made_b, -best_b]), mode="r")
        right = np.linalg.qr(np.vstack([made_a, best_a]).T, mode="r")
        errors[name] = float(np.linalg.norm(left @ right.T)) / norm
    worst = max(errors.values())
    return Figure(worst, ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))


def _hard_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    (a0, b0), (a1, b1) = factors(0, 0, RANK), factors(0, 1, RANK)
    grades = np.geomspace(1, 1e12, RANK).astype(np.float32)
    near = (a0 + 1e-6 * a1).astype(np.float32)
    return {
        "usual": (np.vstack([a0, a1]), np.hstack([b0, b1])),
        "rows from 1 to 1e12": (np.vstack([a0 * grades[:, None], a1]), np.hstack([b0 / grades, b1])),
        "parents alike to 1e-6": (np.vstack([a0, near]), np.hstack([b0, b0])),
        "one parent twice": (np.vstack([a0, a0]), np.hstack([b0, b0])),
    }


def _optimum(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The best rank-16 factors in float64 by thin QR of both sides and an SVD between them, and the norm of the sum."""
    q_b, r_b = np.linalg.qr(b.astype(np.float64) * c)
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)
    u, sigma, vt = np.linalg.svd(r_b @ r_a.T)
    return q_b @ (u[:, :RANK] * sigma[:RANK]), vt[:RANK] @ q_a.T, float(np.linalg.norm(sigma))


def _merge(merge_plan: MergePlan, files: list[Path], out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    engine.merge(merge_plan, files, out, threads=THREADS)


def _copy(files: list[Path], size: int, out: Path) -> None:
    """Read every input byte, write as many as the merge does, make them durable, rename: what no merge can avoid."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    block = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    with (out / "partial").open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(memoryview(block)[: size - start])
        os.fsync(file.fileno())
    (out / "partial").rename(out / WEIGHTS_FILE)


def _task(merge_plan: MergePlan, folders: list[Path], room: Path) -> Path:
    out = room / f"out-{merge_plan.recipe.method}-{len(merge_plan.modules)}"
    return write_task(merge_plan, folders, out, threads=THREADS)

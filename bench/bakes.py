"""What it costs to bake an adapter into its base: against copying the base, and in memory."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from adapters import WEIGHTS_FILE, WIDTH, facts_of, write_pair
from measure import Figure, bench, run_process, take_turns

from adapterctl.registry.domain.bake_plan import BaseTensor, plan_bake
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.merging.bake import bake
from adapterctl.registry.merging.tensors import TensorWriter, encode

ROUNDS = 5
THREADS = 2
VOCABULARY = 32_000
SHARD_BYTES = 5_000_000_000
BASE_FILE = "model.safetensors"


def _write_base(path: Path, layers: int) -> None:
    """q, k, v and o of `layers` layers of Llama 2 7B, and its embedding, in bfloat16."""
    names = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(layers) for name in "qkvo"]
    tensors = [("model.embed_tokens.weight", "BF16", (VOCABULARY, WIDTH))]
    tensors += [(name, "BF16", (WIDTH, WIDTH)) for name in names]
    draw = np.random.default_rng(0)
    with TensorWriter(path, tensors, {"format": "pt"}) as writer:
        for key, dtype, shape in tensors:
            writer.write(key, encode(draw.standard_normal(shape, np.float32) * np.float32(0.02), dtype))


@bench(
    "bake_vs_copy",
    "baking an adapter (r=16, on q, k, v, o) into a base of 1.07 GB in bfloat16, three quarters of it adapted, with"
    " digests and proof, against copying the base",
    unit="×",
    at_most=4,
    limit="SHA-256 of all that is read and of all that is written, and the sum in float64, take 4 CPU-seconds a GB",
)
def bake_vs_copy(room: Path) -> Figure:
    base = room / BASE_FILE
    _write_base(base, layers=6)
    folder = write_pair(room, layers=6, parents=1)[0]
    sides = {"bake": partial(_bake, folder, base, room / "baked"), "copy": partial(_copy, base, room / "copied")}
    rounds = take_turns(sides, ROUNDS)
    return Figure(
        rounds.ratio("bake", "copy"),
        f"{rounds.median('bake'):.2f} s against {rounds.median('copy'):.2f} s,"
        f" {rounds.cpu_ratio('bake', 'copy'):.1f}× in CPU-seconds on {THREADS} threads",
    )


ALONE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bakes
bakes._bake(*map(Path, sys.argv[2:]))
"""


@bench("bake_peak_growth", "peak memory of baking into a base of 1.07 GB against one of 0.4 GB", unit="×", at_most=1.05)
def bake_peak_growth(room: Path) -> Figure:
    peaks = {}
    for layers in (1, 6):
        place = room / str(layers)
        place.mkdir()
        _write_base(place / BASE_FILE, layers)
        folder = write_pair(place, layers=layers, parents=1)[0]
        words = [str(Path(__file__).parent), str(folder), str(place / BASE_FILE), str(place / "baked")]
        peaks[layers] = run_process([sys.executable, "-c", ALONE, *words]).peak_bytes / 1e6
        shutil.rmtree(place)
    return Figure(peaks[6] / peaks[1], ", ".join(f"{layers} layers: {mb:.0f} MB" for layers, mb in peaks.items()))


def _bake(folder: Path, base: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tensors = [BaseTensor(0, entry) for entry in read_header(base).tensors]
    plan = plan_bake(facts_of(folder), {"architectures": ["LlamaForCausalLM"]}, tensors)
    weights = folder / WEIGHTS_FILE
    bake(plan, weights, [base], out, shard_bytes=SHARD_BYTES, threads=THREADS, on_progress=lambda done, total: None)


def _copy(base: Path, out: Path) -> None:
    """Byte for byte, durable, renamed: what a copy costs that a crash cannot tear."""
    partial_file = out.with_suffix(".partial")
    shutil.copyfile(base, partial_file)
    with partial_file.open("rb") as file:
        os.fsync(file.fileno())
    partial_file.replace(out)

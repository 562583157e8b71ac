"""A merge of adapters of a 70B model under a limit on its address space: does one module a worker really suffice?

    python bench/large.py [--layers 48] [--rank 256] [--method svd] [--limit-mb 512] [--room DIR]

Two adapters on all linear modules of as many layers of Llama 2 70B (48 layers of rank 256 are 4 GB in bfloat16) are
merged by the child process of a worker, with `RLIMIT_AS` set; then its files are held against float64 on some modules,
by thin QR. Needs three to four times their size on the disk. Prints what it cost; docs/merging.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from adapters import WEIGHTS_FILE, facts_of, plan, write_task
from measure import run_process

from adapterctl.registry.merging.tensors import TensorReader, TensorWriter, encode

#: (d_out, d_in) of the modules of a layer of Llama 2 70B.
SHAPES = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
WEIGHTS = (0.7, 0.3)
#: One rounding of both factors to bfloat16, relative.
ROUNDING = 2 * 2.0**-8


def main() -> int:
    parser = argparse.ArgumentParser(description="merge large adapters in little memory")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--method", choices=("svd", "cat"), default="svd")
    parser.add_argument("--limit-mb", type=int, default=512)
    parser.add_argument("--room", type=Path, default=None, help="where the files go (default: a temporary folder)")
    asked = parser.parse_args()
    of_parent = asked.layers * asked.rank * sum(map(sum, SHAPES.values())) * 2
    needed = of_parent * (4 if asked.method == "cat" else 3) * 1.05
    with tempfile.TemporaryDirectory(prefix="large-", dir=asked.room) as name:
        room = Path(name)
        free = shutil.disk_usage(room).free
        if free < needed:
            parser.error(f"{room} has {free / 1e9:.0f} GB free, this needs {needed / 1e9:.0f}: choose a --room")
        folders = [write_adapter(room / f"p{parent}", parent, asked.layers, asked.rank) for parent in range(2)]
        print(f"two parents of {of_parent / 1e9:.2f} GB, {asked.layers * len(SHAPES)} modules", flush=True)
        return report(folders, room, asked)


def report(folders: list[Path], room: Path, asked: argparse.Namespace) -> int:
    merge_plan = plan(folders, asked.method, rank=asked.rank if asked.method == "svd" else None, weights=WEIGHTS)
    out = room / "out"
    task = write_task(merge_plan, folders, out, threads=1)
    child = [sys.executable, "-m", "adapterctl.workers.runner", str(task)]
    limited = ["sh", "-c", f'ulimit -v {asked.limit_mb * 1024}; exec "$@"', "sh", *child]
    # a second thread of BLAS would reserve address space of its own, and is not used
    ended = run_process(limited, {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    moved = sum((folder / WEIGHTS_FILE).stat().st_size for folder in (*folders, out))
    print(
        f"`{asked.method}` of rank {merge_plan.recipe.rank} under {asked.limit_mb} MB of address space:"
        f" peak {ended.peak_bytes / 1e6:.0f} MB resident, {ended.wall_s:.0f} s, {ended.cpu_s:.0f} CPU-s,"
        f" {moved / 1e6 / ended.cpu_s:.0f} MB a CPU-second read and written, with digests, receipt and measuring"
    )
    worst = 0.0
    for module, error, optimum in check(folders, out):
        print(f"{module}: {error:.4%} from the exact sum, least possible {optimum:.4%}")
        worst = max(worst, error - optimum)
    print(f"at most {worst:.1e} above the optimum, one rounding to bfloat16 explains {ROUNDING:.1e}")
    return 0 if worst <= ROUNDING else 1


def write_adapter(folder: Path, parent: int, layers: int, rank: int) -> Path:
    """Factors are drawn once for each kind of module and shifted from layer to layer, which takes no time."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "meta-llama/Llama-2-70b-hf",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(name.partition(".")[2] for name in SHAPES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = []
    for layer in range(layers):
        for name, (d_out, d_in) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors.append((f"{key}.lora_A.weight", "BF16", (rank, d_in)))
            tensors.append((f"{key}.lora_B.weight", "BF16", (d_out, rank)))
    strength = 0.02 * np.arange(1, rank + 1, dtype=np.float32) ** -0.7
    with TensorWriter(folder / WEIGHTS_FILE, tensors, {"format": "pt"}) as writer:
        for kind, (name, (d_out, d_in)) in enumerate(SHAPES.items()):
            random = np.random.default_rng([kind, parent])
            a = encode(random.standard_normal((rank, d_in), np.float32) / np.sqrt(d_in, dtype=np.float32), "BF16")
            b = encode(random.standard_normal((d_out, rank), np.float32) * strength, "BF16")
            for layer in range(layers):
                key = f"base_model.model.model.layers.{layer}.{name}"
                writer.write(f"{key}.lora_A.weight", np.roll(a, 5 * layer, axis=1))
                writer.write(f"{key}.lora_B.weight", np.roll(b, 3 * layer, axis=0))
    return folder


def check(folders: list[Path], out: Path) -> Iterator[tuple[str, float, float]]:
    """Of some modules: distance of the child from the exact sum, and the least one that its rank allows; both relative.

    float64, from thin QR of the factors of both sides; no Gram matrix is involved.
    """
    facts = [facts_of(folder) for folder in (*folders, out)]
    last = max(int(module.name.split(".")[2]) for module in facts[2].modules)
    chosen = {
        f"model.layers.{layer}.{name}" for layer, name in zip((0, last // 2, last), list(SHAPES)[::3], strict=True)
    }
    readers = [TensorReader(folder / WEIGHTS_FILE) for folder in (*folders, out)]
    for module in facts[2].modules:
        if module.name not in chosen:
            continue
        same = [next(each for each in fact.modules if each.name == module.name) for fact in facts]
        a = [reader.read(each.a).astype(np.float64) for reader, each in zip(readers, same, strict=True)]
        b = [reader.read(each.b).astype(np.float64) for reader, each in zip(readers, same, strict=True)]
        for side, (weight, each) in enumerate(zip(WEIGHTS, same, strict=False)):
            b[side] *= weight * each.scaling
        sigma = np.linalg.svd(core(a[:2], b[:2]), compute_uv=False)
        norm = np.linalg.norm(sigma)
        yield (
            module.name,
            float(np.linalg.norm(core(a, [*b[:2], -b[2]])) / norm),
            float(np.linalg.norm(sigma[module.rank :]) / norm),
        )


def core(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    """A small matrix with the singular values of the sum of b @ a."""
    left = np.linalg.qr(np.hstack(b), mode="r")
    right = np.linalg.qr(np.vstack(a).T, mode="r")
    return left @ right.T


if __name__ == "__main__":
    sys.exit(main())

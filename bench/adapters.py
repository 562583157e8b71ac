"""Synthetic adapters with the shapes of Llama 2 7B, for timing: trained-looking spectra, a shared part, no download.

Two adapters of one base overlap: 30 % of each B comes from a common draw. Columns of B decay like those of trained
adapters, rows of A look like PEFT's start. The values decide nothing about time; they keep the linear algebra honest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adapterctl.registry.domain.adapter import AdapterFacts, read_facts
from adapterctl.registry.domain.digest import file_digest
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.domain.plan import MergePlan, build_plan
from adapterctl.registry.domain.recipe import MergeRequest
from adapterctl.registry.domain.refs import ParentRef, Ref
from adapterctl.registry.merging.method import resolve
from adapterctl.registry.merging.tensors import TensorWriter, encode
from adapterctl.registry.wire import to_builtins

WIDTH = 4096
WEIGHTS_FILE = "adapter_model.safetensors"


def write_pair(
    root: Path, *, layers: int = 32, rank: int = 16, dtype: str = "BF16", width: int = WIDTH, parents: int = 2
) -> list[Path]:
    """Two adapters (or `parents` of them) on q, k, v and o of `layers` layers; each module is width x width."""
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(layers) for name in ("q", "k", "v", "o")]
    folders = []
    for parent in range(parents):
        folder = root / f"{dtype.lower()}-r{rank}-{layers}-{parent}"
        folder.mkdir(parents=True)
        folders.append(folder)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = []
        for name in names:
            tensors.append((f"base_model.model.{name}.lora_A.weight", dtype, (rank, width)))
            tensors.append((f"base_model.model.{name}.lora_B.weight", dtype, (width, rank)))
        with TensorWriter(folder / WEIGHTS_FILE, tensors, {"format": "pt"}) as writer:
            for place, name in enumerate(names):
                a, b = factors(place, parent, rank, width)
                writer.write(f"base_model.model.{name}.lora_A.weight", encode(a, dtype))
                writer.write(f"base_model.model.{name}.lora_B.weight", encode(b, dtype))
    return folders


def factors(module: int, parent: int, rank: int, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """A (rank, width) and B (width, rank), float32."""
    own, shared = np.random.default_rng([module, 1 + parent]), np.random.default_rng([module, 0])
    a = own.uniform(-1, 1, (rank, width)).astype(np.float32) / np.float32(np.sqrt(width))
    b = 0.7 * own.standard_normal((width, rank)) + 0.3 * shared.standard_normal((width, rank))
    return a, (b * 0.02 * np.arange(1, rank + 1) ** -0.7).astype(np.float32)


def facts_of(folder: Path) -> AdapterFacts:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return read_facts(config, read_header(folder / WEIGHTS_FILE))


def plan(
    folders: list[Path], method: str, *, rank: int | None = None, weights: tuple[float, ...] = (0.7, 0.3)
) -> MergePlan:
    """A plan as the preflight makes it; the parents' digests decide no time and are left out."""
    facts = [facts_of(folder) for folder in folders]
    parents = tuple(ParentRef(Ref(f"p{i}"), weight) for i, weight in enumerate(weights))
    recipe = resolve(MergeRequest(parents, method=method, rank=rank), facts, [f"{i:064x}" for i in range(len(folders))])
    return build_plan(recipe, facts)


def write_task(plan: MergePlan, folders: Sequence[Path], out: Path, *, threads: int) -> Path:
    """The task of the child that merges these parents into `out`, which is made; the file is beside it."""
    out.mkdir()
    task = {
        "kind": "merge",
        "plan": to_builtins(plan),
        "parents": [
            {"folder": str(folder), "sha256": {WEIGHTS_FILE: file_digest(folder / WEIGHTS_FILE)}} for folder in folders
        ],
        "out": str(out),
        "threads": threads,
    }
    path = out.with_name(f"{out.name}.task.json")
    path.write_text(json.dumps(task), encoding="utf-8")
    return path

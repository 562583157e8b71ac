"""Merges of tiny adapters from end to end, without a process or a registry: what laws, unit tests and the oracle share.

`run_merge(folders, ...)` resolves, plans, merges and proves as the child process does, and gives everything back.
Tests import from `tiny_merge`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny import encode, safetensors_bytes

from adapterctl.registry.domain.adapter import AdapterFacts, read_facts
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.domain.plan import MergePlan, build_plan, check_parents
from adapterctl.registry.domain.recipe import MergeRequest, OptionValue
from adapterctl.registry.domain.refs import ParentRef, Ref
from adapterctl.registry.merging.method import resolve
from adapterctl.registry.merging.tensors import TensorReader, measure
from adapterctl.workers import engine, receipt

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Merged:
    """A finished merge: its plan, folder, receipt and the facts of the child."""

    plan: MergePlan
    folder: Path
    receipt: Mapping[str, Any]
    facts: AdapterFacts


def facts_of(folder: Path, *, assume_converted: bool = False) -> AdapterFacts:
    """Facts of an adapter folder, by the rules of intake."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return read_facts(config, read_header(folder / WEIGHTS), assume_converted=assume_converted)


def plan_of(
    folders: Sequence[Path],
    *,
    weights: Sequence[float] | None = None,
    method: str = "sum",
    rank: int | None = None,
    dtype: str | None = None,
    options: Mapping[str, OptionValue] | None = None,
) -> MergePlan:
    """The plan of merging the adapters in these folders; parents that do not fit are a failed test."""
    facts = [facts_of(folder) for folder in folders]
    labels = [folder.name for folder in folders]
    digests = [measure(folder / WEIGHTS, f).content_digest for folder, f in zip(folders, facts, strict=True)]
    parents = tuple(ParentRef(Ref(f"p{i}"), w) for i, w in enumerate(weights or [1.0] * len(folders)))
    request = MergeRequest(parents, method=method, rank=rank, dtype=dtype, options=dict(options or {}))
    assert check_parents(facts, labels) == []
    return build_plan(resolve(request, facts, digests), facts)


def run_merge(folders: Sequence[Path], out: Path, *, threads: int = 1, **asked: Any) -> Merged:
    """Merge the adapters in these folders into the new folder `out`; see `plan_of` for what can be asked."""
    plan = plan_of(folders, **asked)
    out.mkdir(parents=True)
    files = [folder / WEIGHTS for folder in folders]
    outcomes = engine.merge(plan, files, out, threads=threads)
    proven = receipt.prove(plan, files, out, outcomes, threads=threads)
    return Merged(plan, out, proven.receipt, proven.facts)


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """Module name to scaling * B @ A, dense, float64: (d_out, d_in...) flattened to two axes."""
    result = {}
    with TensorReader(folder / WEIGHTS) as reader:
        for module in facts_of(folder).modules:
            a = reader.read(module.a).astype(np.float64).reshape(module.rank, -1)
            b = reader.read(module.b).astype(np.float64).reshape(-1, module.rank)
            result[module.name] = module.scaling * b @ a
    return result


def exact_sum(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """The weighted sum of dense deltas; a module that a parent lacks counts as zero there."""
    total: dict[str, np.ndarray] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(folder).items():
            total[name] = total[name] + weight * delta if name in total else weight * delta
    return total


def distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """||one - other|| / ||other|| over all modules."""
    assert one.keys() == other.keys()
    difference = sum(float(np.sum((one[name] - other[name]) ** 2)) for name in other)
    size = sum(float(np.sum(other[name] ** 2)) for name in other)
    return float(np.sqrt(difference / size)) if size else float(np.sqrt(difference))


def write_factors(
    folder: Path, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], *, dtype: str = "F64", scaling: float = 1.0
) -> Path:
    """An adapter of exactly these factors: module name to (A, B); their number of rows may differ by module."""
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny/base",
        "r": 1,
        "lora_alpha": scaling,
        "rank_pattern": ranks,
        "alpha_pattern": {name: scaling * rank for name, rank in ranks.items()},
        "target_modules": sorted(ranks),
    }
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (dtype, encode(a, dtype))
        tensors[f"base_model.model.{name}.lora_B.weight"] = (dtype, encode(b, dtype))
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors))
    return folder

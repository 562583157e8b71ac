"""Every method as a merge runs it, from files to files, against its formula on dense float64 deltas: 200 cases each.

The references share no code with the methods. Those of test_dense.py take the weighted deltas and use numpy's SVD and
inverse; PEFT's and mergekit's rules stand here and go element by element. Parents are written from values that are
drawn here, their scaling is worked out here, and the child is read with safetensors' own library.

A case says nothing where its formula jumps: two singular values meet at the cut, or two elements at a threshold. Such a
case is drawn again: it is one whose formula moves by a fifth of what is allowed when its input moves in the last bits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import encode, safetensors_bytes
from tiny_merge import WEIGHTS, facts_of

from adapterctl.registry.domain.plan import build_plan
from adapterctl.registry.domain.recipe import LayerWeights, Recipe, RecipeParent
from adapterctl.registry.merging.method import MethodSpec, find_method, methods, sum_of_ranks
from adapterctl.workers import engine, receipt

CASES = 200
TOLERANCE = 1e-6
#: Unit roundoff of each type, and half of its smallest number.
UNITS = {
    "F64": (2.0**-53, 0.0),
    "F32": (2.0**-24, 2.0**-150),
    "F16": (2.0**-11, 2.0**-25),
    "BF16": (2.0**-8, 2.0**-134),
}
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

Array = np.ndarray


@dataclass(frozen=True)
class Share:
    """One parent's part of a module: its factors flattened to (r, d_in) and (d_out, r), `s` its scaling."""

    place: int
    module: str
    a: Array
    b: Array
    s: float
    weight: float

    @property
    def delta(self) -> Array:
        return self.s * self.b @ self.a

    @property
    def c(self) -> float:
        return self.weight * self.s


@dataclass(frozen=True)
class Case:
    """Parents as module to (A, B, scaling), and what is asked for; `traits` are what the case is a case of."""

    parents: tuple[Mapping[str, tuple[Array, Array, float]], ...]
    configs: tuple[Mapping[str, Any], ...]
    stored: tuple[str, ...]
    weights: tuple[float, ...]
    layers: tuple[LayerWeights, ...]
    rank: int
    dtype: str
    seed: int
    options: Mapping[str, Any]
    traits: frozenset[str]

    def shares(self, module: str) -> list[Share]:
        weights = self.weights
        for layer in self.layers:  # one part of the path, in these cases
            if layer.pattern in module.split("."):
                weights = layer.weights
                break
        return [
            Share(place, module, _rows(a), _columns(b), scaling, weights[place])
            for place, (a, b, scaling) in (
                (i, parent[module]) for i, parent in enumerate(self.parents) if module in parent
            )
        ]


def _rows(a: Array) -> Array:
    return a.reshape(len(a), -1)


def _columns(b: Array) -> Array:
    return b.reshape(len(b), -1)


# What PEFT does with elements, one by one.

Rule = Callable[[Sequence[Array], Sequence[float]], Array]
Prune = Callable[[Array, str], Array]


def add(values: Sequence[Array], weights: Sequence[float]) -> Array:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def elect(majority: str) -> Rule:
    def rule(values: Sequence[Array], weights: Sequence[float]) -> Array:
        merged = []
        for column in zip(*(value.ravel() for value in values), strict=True):
            agreeing = agree(column, column if majority == "total" else np.sign(column))
            merged.append(sum(weights[i] * column[i] for i in agreeing) / max(1, len(agreeing)))
        return np.reshape(merged, values[0].shape)

    return rule


def elect_weighted(majority: str) -> Rule:
    def rule(values: Sequence[Array], weights: Sequence[float]) -> Array:
        merged = []
        for column in zip(
            *(weight * value.ravel() for weight, value in zip(weights, values, strict=True)), strict=True
        ):
            agreeing = agree(column, column if majority == "total" else np.sign(column))
            total = sum(weights[i] for i in agreeing)
            merged.append(sum(column[i] for i in agreeing) / (total if abs(total) >= 1e-8 else 1))
        return np.reshape(merged, values[0].shape)

    return rule


def mean_of_the_elected(values: Sequence[Array], weights: Sequence[float]) -> Array:
    merged = []
    for column in zip(*(weight * value.ravel() for weight, value in zip(weights, values, strict=True)), strict=True):
        agreeing = [value for value in column if value * sum(column) > 0]
        merged.append(sum(agreeing) / max(1, len(agreeing)))
    return np.reshape(merged, values[0].shape)


def agree(column: Sequence[float], votes: Sequence[float]) -> list[int]:
    sign = 1 if sum(votes) >= 0 else -1
    return [i for i, value in enumerate(column) if value * sign > 0]


def trimmed(density: float) -> Prune:
    def prune(values: Array, name: str) -> Array:
        flat = values.ravel()
        order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
        largest = set(order[: int(density * flat.size)])
        return np.reshape([value if i in largest else 0.0 for i, value in enumerate(flat)], values.shape)

    return prune


def draws(name: str, seed: int, count: int, bits: int) -> list[float]:
    """Philox, keyed by the name of the matrix: 53 bits for an element of a factor, 32 for one of a delta."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    raw = [int(word) for word in np.random.Philox(key=key).random_raw(count)]
    if bits == 53:
        return [(word >> 11) / 2.0**53 for word in raw]
    return [half / 2.0**32 for word in raw for half in (word & 0xFFFFFFFF, word >> 32)][:count]


def dropped(density: float, seed: int, bits: int) -> Prune:
    def prune(values: Array, name: str) -> Array:
        chances = draws(name, seed, values.size, bits)
        left = [x / density if chance < density else 0.0 for x, chance in zip(values.ravel(), chances, strict=True)]
        return np.reshape(left, values.shape)

    return prune


def dropped_by_rank(density: float, epsilon: float, seed: int) -> Prune:
    def prune(values: Array, name: str) -> Array:
        if density >= 1:
            return values
        chances, left = np.reshape(draws(name, seed, values.size, 32), values.shape), np.zeros(values.shape)
        for i, row in enumerate(values):
            order = sorted(range(len(row)), key=lambda j, row=row: (-abs(row[j]), j))
            for place, j in enumerate(order):
                stays = density + epsilon / 2 - place * epsilon / len(row)
                left[i, j] = row[j] / stays if chances[i, j] < stays else 0.0
        return left

    return prune


def kept(values: Array, name: str) -> Array:
    return values


def on_factors(shares: Sequence[Share], prune: Prune, rule: Rule) -> Array:
    roots = [math.sqrt(abs(share.c)) for share in shares]
    signed = [-root if share.c < 0 else root for share, root in zip(shares, roots, strict=True)]
    a = rule([prune(share.a, f"{share.place}/{share.module}/A") for share in shares], signed)
    return rule([prune(share.b, f"{share.place}/{share.module}/B") for share in shares], roots) @ a


def on_deltas(shares: Sequence[Share], rank: int, prune: Prune, rule: Rule) -> Array:
    pruned = [prune(share.delta, f"{share.place}/{share.module}/BA") for share in shares]
    return best(rule(pruned, [share.weight for share in shares]), rank)


def best(matrix: Array, rank: int) -> Array:
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def total(shares: Sequence[Share]) -> Array:
    return sum(share.weight * share.delta for share in shares)


Reference = Callable[..., Array]
#: Shares, rank, seed and options to the merged delta.
REFERENCES: dict[str, Reference] = {
    "cat": lambda shares, rank: total(shares),
    "sum": lambda shares, rank: best(total(shares), rank),
    "svd": lambda shares, rank: best(total(shares), rank),
    "resize": lambda shares, rank: best(total(shares), rank),
    "peft_linear": lambda shares, rank: on_factors(shares, kept, add),
    "magnitude_prune": lambda shares, rank, density: on_factors(shares, trimmed(density), add),
    "ties": lambda shares, rank, density, majority_sign_method: on_factors(
        shares, trimmed(density), elect(majority_sign_method)
    ),
    "dare_linear": lambda shares, rank, density, seed: on_factors(shares, dropped(density, seed, 53), add),
    "dare_ties": lambda shares, rank, density, majority_sign_method, seed: on_factors(
        shares, dropped(density, seed, 53), elect(majority_sign_method)
    ),
    "magnitude_prune_svd": lambda shares, rank, density: on_deltas(shares, rank, trimmed(density), add),
    "ties_svd": lambda shares, rank, density, majority_sign_method: on_deltas(
        shares, rank, trimmed(density), elect(majority_sign_method)
    ),
    "dare_linear_svd": lambda shares, rank, density, seed: on_deltas(shares, rank, dropped(density, seed, 32), add),
    "dare_ties_svd": lambda shares, rank, density, majority_sign_method, seed: on_deltas(
        shares, rank, dropped(density, seed, 32), elect(majority_sign_method)
    ),
    "della": lambda shares, rank, density, epsilon, scale, seed: (
        scale * on_deltas(shares, rank, dropped_by_rank(density, epsilon, seed), mean_of_the_elected)
    ),
    "ties_mergekit": lambda shares, rank, density, majority_sign_method: on_deltas(
        shares, rank, trimmed(density), elect_weighted(majority_sign_method)
    ),
}


@pytest.fixture(scope="module")
def references() -> Mapping[str, Reference]:
    """Those above, and those of test_dense.py at their default options, for which a parent at weight 0 is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import test_dense

    def on_weighted(formula: Callable[[Sequence[Array], int], Array]) -> Reference:
        def reference(shares: Sequence[Share], rank: int) -> Array:
            present = [share.weight * share.delta for share in shares if share.weight]
            if not present:
                return np.zeros(shares[0].delta.shape)
            return best(present[0], rank) if formula in of_several and len(present) == 1 else formula(present, rank)

        return reference

    of_several = {test_dense.slerp, test_dense.karcher, test_dense.model_stock}
    return {**{name: on_weighted(formula) for name, formula in test_dense.REFERENCES.items()}, **REFERENCES}


def test_every_method_has_a_reference(references: Mapping[str, Reference]):
    assert methods().keys() - references.keys() == set(), "add it to those here, or to those of test_dense.py"


@pytest.mark.parametrize("name", list(methods()))
def test_the_files_hold_what_the_dense_formula_gives(name: str, references: Mapping[str, Reference]):
    method, random = find_method(name), np.random.default_rng(0)
    checked, drawn, seen = 0, 0, set()
    while checked < CASES:
        drawn += 1
        assert drawn < 3 * CASES, "most cases say nothing"
        case = draw(random, method, references[name])
        with tempfile.TemporaryDirectory(dir=MEMORY) as room:
            made = merged(method, case, Path(room))
        checked += check(references[name], method, case, made, f"{name}, draw {drawn}")
        seen |= case.traits

    wanted = {
        "linear",
        "embedding",
        "conv",
        "rslora",
        "layers",
        "negative",
        *UNITS,
        *(f"to {dtype}" for dtype in UNITS),
    }
    counts = range(method.min_parents if method.max_parents == 1 else 1, (method.max_parents or 5) + 1)
    wanted |= {f"{count} parents" for count in counts}
    wanted |= {"missing"} if method.max_parents != 1 else set()
    wanted |= {"ranks differ"} if method.max_parents != 1 and not method.equal_ranks else set()
    assert wanted - seen == set()


KINDS = {
    "layers.0.q_proj": "linear",
    "layers.1.q_proj": "linear",
    "layers.1.experts.3.w1": "linear",
    "words": "embedding",
    "stem": "conv",
}


def draw(random: np.random.Generator, method: MethodSpec, reference: Reference) -> Case:
    count = int(random.integers(1, (method.max_parents or 5) + 1))
    names = [str(name) for name in random.choice(list(KINDS), size=2, replace=False)]
    sizes = {name: (int(random.integers(3, 9)), int(random.integers(3, 9))) for name in names}
    kernel = tuple(int(k) for k in random.integers(1, 3, size=random.integers(1, 4)))
    even = int(random.integers(1, 5))
    parents, configs, stored = [], [], []
    for _ in range(count):
        dtype = str(random.choice(list(UNITS)))
        own = [name for name in names if random.random() < 0.75] or names[:1]
        ranks = {name: even if method.equal_ranks else int(random.integers(1, 5)) for name in own}
        rslora, alpha = bool(random.random() < 0.3), float(random.choice((1, 3, 8)))
        parent = {}
        for name, r in ranks.items():
            d_out, d_in = sizes[name]
            shape = (d_in, *kernel) if KINDS[name] == "conv" else (d_in,)
            a = random.normal(size=(r, *shape)) * random.choice((0.3, 1.0, 3.0))
            b = random.normal(size=(d_out, r, *(1 for _ in shape[1:])))
            parent[name] = (_rounded(a, dtype), _rounded(b, dtype), alpha / (math.sqrt(r) if rslora else r))
        parents.append(parent)
        configs.append({"use_rslora": rslora, "lora_alpha": alpha, "rank_pattern": ranks})
        stored.append(dtype)
    weights = tuple(float(w) for w in random.choice((0.3, 1.0, 2.0, -0.5), size=count))
    layers = ()
    if random.random() < 0.3:
        there = [float(w) for w in random.choice((0.0, 0.7, -1.5), size=count)]
        there[int(random.integers(count))] = 0.4
        layers = (LayerWeights(names[0].split(".")[-1], tuple(there)),)
    present = set().union(*parents)
    full = max(sum(parent[name][0].shape[0] for parent in parents if name in parent) for name in present)
    if method.equal_ranks:
        rank = even
    else:
        rank = full if method.form == "factors" else int(random.integers(1, full + 1))
    dtype = str(random.choice(list(UNITS)))
    ranks_of = [{parent[name][0].shape[0] for parent in parents if name in parent} for name in present]
    traits = {KINDS[name] for name in present} | set(stored) | {f"to {dtype}", f"{count} parents"}
    traits |= {"rslora"} if any(config["use_rslora"] for config in configs) else set()
    traits |= {"layers"} if layers else set()
    traits |= {"negative"} if min(weights) < 0 else set()
    traits |= {"missing"} if any(len(parent) < len(present) for parent in parents) else set()
    traits |= {"ranks differ"} if any(len(ranks) > 1 for ranks in ranks_of) else set()
    return Case(
        tuple(parents), tuple(configs), tuple(stored), weights, layers, rank, dtype, int(random.integers(100)),
        _options(random, method, reference), frozenset(traits),
    )  # fmt: skip


def _options(random: np.random.Generator, method: MethodSpec, reference: Reference) -> dict[str, Any]:
    """Drawn where the reference takes them, else the default ones."""
    drawn = {"density": float(random.choice((0.3, 0.5, 0.8, 1.0)))}
    drawn |= {"majority_sign_method": str(random.choice(("total", "frequency")))}
    drawn |= {"epsilon": float(random.choice((0.0, 0.14, 0.4))), "scale": float(random.choice((0.5, 1.0, 2.0)))}
    known = taken(reference)
    return {option.name: drawn[option.name] if option.name in known else option.default for option in method.options}


def taken(reference: Reference) -> set[str]:
    return set(inspect.signature(reference).parameters)


def _rounded(values: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (encode(values, dtype).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return encode(values, dtype).astype(np.float64)


def merged(method: MethodSpec, case: Case, room: Path) -> dict[str, tuple[Array, Array]]:
    """Module to the child's (A, B), flattened, after the engine wrote and proved it."""
    parents = zip(case.parents, case.configs, case.stored, strict=True)
    folders = [write(room / f"p{place}", *parent) for place, parent in enumerate(parents)]
    facts = [facts_of(folder) for folder in folders]
    rank = case.rank
    if method.form == "choice":
        chosen, rank = method.function(sum_of_ranks(facts), case.rank)
        method = find_method(chosen)
    recipe = Recipe(
        method.name, method.rev, tuple(RecipeParent("0" * 64, weight) for weight in case.weights), rank, case.dtype,
        seed=case.seed if method.seeded else None, options=case.options, layers=case.layers,
    )  # fmt: skip
    plan = build_plan(recipe, facts)
    files, out = [folder / WEIGHTS for folder in folders], room / "out"
    out.mkdir()
    outcomes = engine.merge(plan, files, out)
    receipt.prove(plan, files, out, outcomes)
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (rank, rank, False, {})
    tensors = {key: tensor.to(torch.float64).numpy() for key, tensor in load_file(out / WEIGHTS).items()}
    made = {module: tuple(tensors.pop(key) for key in keys_of(module)) for module in set().union(*case.parents)}
    assert not tensors
    return {module: (_rows(a), _columns(b)) for module, (a, b) in made.items()}


def keys_of(module: str) -> tuple[str, str]:
    stem = f"base_model.model.{module}.lora_"
    if KINDS[module] == "embedding":
        return f"{stem}embedding_A", f"{stem}embedding_B"
    return f"{stem}A.weight", f"{stem}B.weight"


def write(
    folder: Path, parent: Mapping[str, tuple[Array, Array, float]], config: Mapping[str, Any], dtype: str
) -> Path:
    tensors = {}
    for name, (a, b, _) in parent.items():
        tensors |= {key: (dtype, encode(side, dtype)) for key, side in zip(keys_of(name), (a, b), strict=True)}
    fields = {"peft_type": "LORA", "base_model_name_or_path": "tiny/base", "target_modules": list(parent), **config}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors))
    return folder


def check(
    reference: Reference, method: MethodSpec, case: Case, made: Mapping[str, tuple[Array, Array]], where: str
) -> bool:
    """Hold every module against its formula; False where a formula jumps, and nothing can be said."""
    unit, tiny = UNITS[case.dtype]
    narrow = case.dtype in {"F16", "BF16"} or (method.form == "deltas" and case.dtype == "F32")
    options = {name: value for name, value in {**case.options, "seed": case.seed}.items() if name in taken(reference)}
    random = np.random.default_rng(1)
    for module, (a, b) in made.items():
        shares = case.shares(module)
        expected = reference(shares, case.rank, **options)
        parts = sum(abs(share.weight) * float(np.linalg.norm(share.delta)) for share in shares)
        size = max(float(np.linalg.norm(expected)), 1e-3 * parts)
        norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)
        rounding = (2 * unit + unit**2) * float(norm_a @ norm_b)
        rounding += tiny * float(math.sqrt(a.shape[1]) * norm_b.sum() + math.sqrt(len(b)) * norm_a.sum())
        allowed = TOLERANCE * size + rounding
        for _ in range(2):
            moved = [_moved(random, share, 1e-7 if narrow else 1e-10) for share in shares]
            if np.linalg.norm(reference(moved, case.rank, **options) - expected) > 0.2 * allowed:
                return False
        distance = float(np.linalg.norm(b @ a - expected))
        assert distance <= allowed, f"{where}, {module}: {distance / size:.1e}, {allowed / size:.1e} allowed"
    return True


def _moved(random: np.random.Generator, share: Share, by: float) -> Share:
    a, b = (side * (1 + by * random.normal(size=side.shape)) for side in (share.a, share.b))
    return replace(share, a=a, b=b)

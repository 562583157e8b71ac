"""From a recipe and the facts of its parents to a plan that a worker can follow without asking anything, or to every
reason why it cannot be merged exactly. Pure: reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .adapter import AdapterFacts, LoraModule, ModuleKind, TensorEntry
from .digest import canonical_json
from .errors import Problem
from .header import DTYPE_BYTES
from .recipe import Recipe

_TRANSFORMERS = re.compile(r"transformers(\.[A-Za-z0-9_]+)+")
_NUMBER = re.compile(r"(?:^|\.)(\d{1,6})(?=\.)")


@dataclass(frozen=True, slots=True)
class Part:
    """One parent's share of a module: its factors in parent file `parent`, times `coefficient` = weight * scaling."""

    parent: int
    rank: int
    weight: float
    scaling: float
    a: TensorEntry
    b: TensorEntry
    bias: TensorEntry | None = None

    @property
    def coefficient(self) -> float:
        return self.weight * self.scaling


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One output module; `a_shape` and `b_shape` are those of the written tensors, at the plan's rank."""

    name: str
    kind: ModuleKind
    a_key: str
    b_key: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    parts: tuple[Part, ...]
    bias_key: str | None = None

    @property
    def delta_shape(self) -> tuple[int, int]:
        """(d_out, d_in), axes beyond the second flattened."""
        return self.b_shape[0], prod(self.a_shape[1:])

    @property
    def full_rank(self) -> int:
        """R, the sum of its parents' ranks."""
        return sum(part.rank for part in self.parts)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All that the engine needs besides the parents' files. `config` is the output's adapter_config.json."""

    recipe: Recipe
    modules: tuple[ModulePlan, ...]
    config: Mapping[str, Any]
    max_loss: float | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the output's tensors, without header and biases."""
        values = sum(prod(module.a_shape) + prod(module.b_shape) for module in self.modules)
        return values * DTYPE_BYTES[self.recipe.dtype]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a method would give for these parents: `loss` is ||merged - exact sum|| / ||exact sum||.

    `cpu_s` and `memory_bytes` are estimates of what it takes: seconds of one core, and memory of one thread.
    """

    method: str
    rank: int
    size_bytes: int
    loss: float | None
    note: str = ""
    cpu_s: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """How two parents meet: `cosine` and `norm_ratio` (first / second, at their weights) over all modules, overlap of
    row and column spaces (0..1) as an average over the shared ones.
    """

    first: str
    second: str
    shared_modules: int
    cosine: float
    row_overlap: float
    column_overlap: float
    norm_ratio: float


@dataclass(frozen=True, slots=True)
class Interference:
    """How two parents meet in one layer (the first number in the names of its modules), or in `all` of them together.

    `sign_conflict` is the share of the elements of the deltas at which the two have opposite signs, 0.5 where they have
    nothing to do with each other; the others are those of `Pair`.
    """

    first: str
    second: str
    layer: str
    cosine: float
    row_overlap: float
    column_overlap: float
    sign_conflict: float


def place_of(module: str) -> tuple[int | None, str]:
    """Its layer, which is the first number in its name (None: it has none), and what stands behind it, its kind."""
    found = _NUMBER.search(module)
    return (None, module) if found is None else (int(found[1]), module[found.end() + 1 :])


def check_parents(facts: Sequence[AdapterFacts], labels: Sequence[str]) -> list[Problem]:
    """Every reason why these adapters have no exact sum in one adapter; empty when they have.

    Whether they share a base is decided by base ids, above this floor.
    """
    problems = []
    for name, shares in sorted(_by_module(facts).items()):
        place, first = shares[0]
        for parent, module in shares[1:]:
            problems += _module_problems(name, first, labels[place], module, labels[parent])
    if any(m.bias for f in facts for m in f.modules) and any(m.kind == "embedding" for f in facts for m in f.modules):
        problems.append(
            Problem(
                "bias_with_embedding",
                "one parent has lora_bias, one adapts an embedding; PEFT loads no adapter with both",
                "merge parents of one sort",
            )
        )
    return problems


def build_plan(recipe: Recipe, facts: Sequence[AdapterFacts]) -> MergePlan:
    """The merge, spelled out tensor by tensor. `facts` are those of `recipe.parents`, in order.

    Every output module has the recipe's rank; a module whose parents have less is filled with zeros, which is exact.
    """
    by_module = _by_module(facts)
    with_bias = any(m.bias is not None for f in facts for m in f.modules)
    modules = tuple(_module_plan(name, by_module[name], recipe, with_bias=with_bias) for name in sorted(by_module))
    return MergePlan(recipe, modules, _config(recipe, facts, with_bias=with_bias))


def output_tensors(plan: MergePlan) -> list[tuple[str, str, tuple[int, ...]]]:
    """Key, dtype and shape of every tensor of the child, in file order."""
    dtype = plan.recipe.dtype
    tensors = []
    for module in plan.modules:
        tensors.append((module.a_key, dtype, module.a_shape))
        tensors.append((module.b_key, dtype, module.b_shape))
        if module.bias_key:
            tensors.append((module.bias_key, dtype, module.b_shape[:1]))
    return tensors


def header_metadata(plan: MergePlan) -> dict[str, str]:
    """Provenance inside the weights file: enough to find the parents and to run the recipe again."""
    return {
        "format": "pt",
        "adapterctl.recipe": canonical_json(plan.recipe.to_json()).decode(),
        "adapterctl.recipe_digest": plan.recipe.digest,
    }


def parent_warnings(facts: Sequence[AdapterFacts], labels: Sequence[str]) -> tuple[str, ...]:
    """What a caller should know of these parents, although they can be merged."""
    warnings = []
    tasks = {f.task_type for f in facts if f.task_type}
    if len(tasks) > 1:
        listed = ", ".join(f"{label} {f.task_type}" for label, f in zip(labels, facts, strict=True))
        warnings.append(f"the parents were trained for different task types: {listed}")
    names = [{m.name for m in f.modules} for f in facts]
    for i, label in enumerate(labels):
        others = set().union(*(n for j, n in enumerate(names) if j != i))
        if others and not names[i] & others:
            warnings.append(f"{label} shares no module with another parent")
    if len(set(labels)) < len(labels):
        warnings.append("a parent is named twice: its weights add up")
    return tuple(warnings)


def _by_module(facts: Sequence[AdapterFacts]) -> dict[str, list[tuple[int, LoraModule]]]:
    """Module name to the parents that adapt it, in the order of the parents."""
    shares: dict[str, list[tuple[int, LoraModule]]] = {}
    for parent, adapter in enumerate(facts):
        for module in adapter.modules:
            shares.setdefault(module.name, []).append((parent, module))
    return shares


def _module_problems(name: str, one: LoraModule, label: str, other: LoraModule, other_label: str) -> list[Problem]:
    if one.kind != other.kind:
        text = f"{name} is {one.kind} in {label} and {other.kind} in {other_label}"
        return [Problem("kind_differs", text, "their bases differ: pick parents of one base")]
    theirs, ours = (other.d_out, *other.a.shape[1:]), (one.d_out, *one.a.shape[1:])
    if theirs != ours:
        text = f"{name} is (out, in...) {ours} in {label} and {theirs} in {other_label}"
        return [Problem("shape_differs", text, "their bases differ: pick parents of one base")]
    return []


def _module_plan(name: str, shares: Sequence[tuple[int, LoraModule]], recipe: Recipe, *, with_bias: bool) -> ModulePlan:
    first = shares[0][1]
    stem = f"base_model.model.{name}"
    embedding = first.kind == "embedding"
    weights = recipe.weights_in(name)
    return ModulePlan(
        name=name,
        kind=first.kind,
        a_key=f"{stem}.lora_embedding_A" if embedding else f"{stem}.lora_A.weight",
        b_key=f"{stem}.lora_embedding_B" if embedding else f"{stem}.lora_B.weight",
        a_shape=(recipe.rank, *first.a.shape[1:]),
        b_shape=(first.d_out, recipe.rank, *first.b.shape[2:]),
        parts=tuple(Part(parent, m.rank, weights[parent], m.scaling, m.a, m.b, m.bias) for parent, m in shares),
        # PEFT gives every module a bias or none
        bias_key=f"{stem}.lora_B.bias" if with_bias else None,
    )


def _config(recipe: Recipe, facts: Sequence[AdapterFacts], *, with_bias: bool) -> dict[str, Any]:
    revision = {f.base_revision for f in facts}
    return lora_config(
        rank=recipe.rank,
        base_name=facts[0].base_name,
        base_revision=facts[0].base_revision if len(revision) == 1 else None,
        # one flag for all modules, which PEFT sets anew by the type of each layer; it saves that of the last layer that
        # it came to, so parents of one base may differ where GPT-2's Conv1D meets its linear head
        fan_in_fan_out=all(f.fan_in_fan_out for f in facts),
        lora_bias=with_bias,
        target_modules=target_modules([([m.name for m in f.modules], f.config) for f in facts]),
        task_type=next((f.task_type for f in facts if f.task_type), None),
        auto_mapping=auto_mapping([f.config for f in facts]),
    )


def lora_config(
    *,
    rank: int,
    base_name: str | None,
    base_revision: str | None,
    target_modules: list[str],
    task_type: str | None,
    auto_mapping: Mapping[str, str] | None = None,
    fan_in_fan_out: bool = False,
    lora_bias: bool = False,
) -> dict[str, Any]:
    """adapter_config.json of an output: one rank, alpha = rank, nothing that a reader has to resolve.

    vLLM reads `r`, `lora_alpha` and `use_rslora` and ignores patterns, so there are none. `auto_mapping` is what PEFT's
    AutoPeftModel finds the base's class by where there is no task type.
    """
    mapped = {"auto_mapping": dict(auto_mapping)} if auto_mapping and task_type is None else {}
    return {
        **mapped,
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_bias": lora_bias,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": base_revision,
        "target_modules": target_modules,
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def auto_mapping(configs: Sequence[Mapping[str, Any]]) -> Mapping[str, str] | None:
    """The class of the base that these configs name, if they name one, and one of transformers: PEFT imports it."""
    named = [config["auto_mapping"] for config in configs if isinstance(config.get("auto_mapping"), dict)]
    found = [{key: str(each.get(key)) for key in ("base_model_class", "parent_library")} for each in named]
    if not found or any(each != found[0] for each in found):
        return None
    known = _TRANSFORMERS.fullmatch(found[0]["parent_library"]) and found[0]["base_model_class"].isidentifier()
    return found[0] if known else None


def target_modules(adapters: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> list[str]:
    """Names that PEFT resolves to exactly the modules of the output, sorted; of each adapter its modules and config.

    PEFT selects a module whose path is a listed name or ends with `.` and one, and we do not see the base. The short
    names of the parents are kept where they are known to be right: each parent selected by a plain list alone, and
    each list, held against the modules of all parents, selects that parent's own modules and no other. Each list then
    selects the same in the base, and the union selects the union. Else every module is listed by its full path.
    """
    everything = sorted({name for modules, _ in adapters for name in modules})
    short: set[str] = set()
    for modules, config in adapters:
        listed = config.get("target_modules")
        narrowed = any(config.get(field) for field in ("exclude_modules", "modules_to_save", "layers_pattern"))
        if not isinstance(listed, list) or narrowed or config.get("layers_to_transform") is not None:
            return everything
        names, own = {str(name) for name in listed}, set(modules)
        if any(_selects(names, name) != (name in own) for name in everything):
            return everything
        short |= names
    return sorted(short)


def _selects(listed: Collection[str], module: str) -> bool:
    """PEFT's rule for a list (`check_target_module_exists`), by walking up the path instead of down the list."""
    parts = module.split(".")
    return any(".".join(parts[start:]) in listed for start in range(len(parts)))

"""From a recipe and the facts of its parents to a plan that a worker can follow without asking anything, or to every
reason why it cannot be merged exactly. Pure: reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .adapter import ModuleKind, TensorEntry
from .recipe import Recipe


@dataclass(frozen=True, slots=True)
class Part:
    """One parent's share of a module: its factors in parent file `parent`, times `coefficient` = weight * scaling."""

    parent: int
    rank: int
    coefficient: float
    a: TensorEntry
    b: TensorEntry
    bias: TensorEntry | None = None


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


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All that the engine needs besides the parents' files. `config` is the output's adapter_config.json."""

    recipe: Recipe
    modules: tuple[ModulePlan, ...]
    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    max_loss: float | None = None

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


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a method would give for these parents: `loss` is ||merged - exact sum|| / ||exact sum||."""

    method: str
    rank: int
    size_bytes: int
    loss: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """How two parents meet, averaged over shared modules: cosine of the deltas, overlap of row and column spaces."""

    first: str
    second: str
    shared_modules: int
    cosine: float
    row_overlap: float
    column_overlap: float
    norm_ratio: float

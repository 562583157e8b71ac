"""What a merge does, pinned: the request as asked for, and the recipe that it resolves to.

A recipe names its parents by content digest, in order, so it means the same in every registry. It holds what changes
the output and nothing else: no name, host, time, job or engine version. `method_rev` is raised only when a method's
output changes. The SHA-256 of its canonical JSON is the *recipe digest*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .digest import json_digest
from .refs import ParentRef

#: `sum` keeps the exact factors (`cat`) up to this rank and compresses (`svd`) to it beyond.
SUM_RANK_LIMIT = 64

OptionValue = float | int | str | bool


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """A merge as the caller asks for it. Unset fields are resolved by the preflight; nothing is looked up here.

    `suites` are evaluation suites to run on the child, `max_loss` the largest accepted relative loss (0..1).
    """

    parents: tuple[ParentRef, ...]
    into: str | None = None
    method: str = "sum"
    rank: int | None = None
    dtype: str | None = None
    seed: int | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    suites: tuple[str, ...] = ()
    max_loss: float | None = None

    @property
    def target(self) -> str:
        """The adapter that gets a new version: the one that was named, or the parents' names joined with `-`."""
        return self.into or "-".join(dict.fromkeys(parent.ref.name for parent in self.parents))


@dataclass(frozen=True, slots=True)
class RecipeParent:
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """The pinned form. `rank` is the output rank of every module, `dtype` a safetensors dtype name."""

    method: str
    method_rev: int
    parents: tuple[RecipeParent, ...]
    rank: int
    dtype: str
    seed: int | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The canonical object: what is digested, stored, and written into the header of the merged file."""
        return {
            "v": 1,
            "method": self.method,
            "method_rev": self.method_rev,
            "parents": [{"digest": p.digest, "weight": p.weight} for p in self.parents],
            "rank": self.rank,
            "dtype": self.dtype,
            "seed": self.seed,
            "options": dict(self.options),
        }

    @property
    def digest(self) -> str:
        return json_digest(self.to_json())


def recipe_from_json(value: Mapping[str, Any]) -> Recipe:
    """Read a recipe that `Recipe.to_json` wrote. Raises `KeyError` or `TypeError` on anything else."""
    return Recipe(
        method=value["method"],
        method_rev=value["method_rev"],
        parents=tuple(RecipeParent(p["digest"], float(p["weight"])) for p in value["parents"]),
        rank=value["rank"],
        dtype=value["dtype"],
        seed=value["seed"],
        options=dict(value["options"]),
    )

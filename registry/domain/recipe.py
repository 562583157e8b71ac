"""What a merge does, pinned: the request as asked for, and the recipe that it resolves to.

A recipe names its parents by content digest, in order, so it means the same in every registry. It holds what changes
the output and nothing else: no name, host, time, job or engine version. `method_rev` is raised only when a method's
output changes. The SHA-256 of its canonical JSON is the *recipe digest*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .digest import json_digest
from .errors import InvalidInput
from .refs import ParentRef, Ref

#: `sum` keeps the exact factors (`cat`) up to this rank and compresses (`svd`) to it beyond.
SUM_RANK_LIMIT = 64
#: The method of recipes with one parent, which is made smaller.
RESIZE = "resize"

#: Between these a weight decides something: outside, sums in 16 or 32 bits vanish or overflow.
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6

OptionValue = float | int | str | bool


def is_weight(value: float) -> bool:
    """Whether a parent may have this weight; not so for 0, with which it would be no parent."""
    return LEAST_WEIGHT <= abs(value) <= LARGEST_WEIGHT


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of all parents, in order, in the modules that `pattern` selects; written `PATTERN=W,W,...`.

    A pattern is a run of parts of a module's path: `layers.3`, `q_proj`, `layers.0-15.mlp`; `*` is any one part, `0-15`
    a number from 0 to 15. It selects every module whose path holds such a run.
    """

    pattern: str
    weights: tuple[float, ...]

    def selects(self, module: str) -> bool:
        path, wanted = module.split("."), self.pattern.split(".")
        return any(
            all(_is_part(one, part) for one, part in zip(wanted, path[start:], strict=False))
            for start in range(len(path) - len(wanted) + 1)
        )

    def __str__(self) -> str:
        return f"{self.pattern}={','.join(map(repr, self.weights))}"


def parse_layer_weights(text: str) -> LayerWeights:
    """Read `layers.0-15=0.7,0.3`."""
    pattern, _, weights = text.rpartition("=")
    try:
        values = tuple(float(weight) for weight in weights.split(","))
    except ValueError:
        values = ()
    if not values or not all(pattern.split(".")) or not all(is_weight(value) or value == 0 for value in values):
        raise InvalidInput(
            f"layer weights {text[:80]!r} are not PATTERN=W,W,...",
            hint="write parts of module names and for every parent 0 or a weight of size"
            f" {LEAST_WEIGHT:g} to {LARGEST_WEIGHT:g}, such as layers.0-15=0.7,0.3",
        )
    return LayerWeights(pattern, values)


def _is_part(wanted: str, part: str) -> bool:
    if wanted in {"*", part}:
        return True
    first, _, last = wanted.partition("-")
    numbers = all(text.isascii() and text.isdigit() and len(text) < 10 for text in (first, last, part))
    return numbers and int(first) <= int(part) <= int(last)


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """A merge as the caller asks for it. Unset fields are resolved by the preflight; nothing is looked up here.

    `suites` are evaluation suites to run on the child, `max_loss` the largest accepted relative loss (0..1).
    `expect` holds the recipe digest and the content digest that the child must have, for who has its file already.
    `tags` go to a new version; one that exists keeps its own.
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
    layers: tuple[LayerWeights, ...] = ()
    expect: tuple[str, str] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The adapter that gets a new version: the one that was named, or the parents' names joined with `-`."""
        return self.into or "-".join(dict.fromkeys(parent.ref.name for parent in self.parents))


@dataclass(frozen=True, slots=True)
class ResizeRequest:
    """A version at a smaller rank, as the caller asks for it: by one of `rank`, `energy` and `size_bytes`.

    `energy` (0..1) is the share of ||delta||² over all modules that is kept, by the smallest rank that does;
    `size_bytes` bounds the weights file, and the largest rank that fits is taken. `into` is the version's own adapter
    unless another one is named.
    """

    ref: Ref
    rank: int | None = None
    energy: float | None = None
    size_bytes: int | None = None
    into: str | None = None
    dtype: str | None = None
    suites: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return self.into or self.ref.name

    def check(self) -> None:
        """Raises `InvalidInput` for what no version could satisfy."""
        if sum(wish is not None for wish in (self.rank, self.energy, self.size_bytes)) != 1:
            raise InvalidInput(
                f"{self.ref} can be resized to a rank, to a share of its energy or to a size",
                hint="give one of --rank 8, --energy 0.99 and --size 20MB",
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InvalidInput(f"energy {self.energy} is no share", hint="write one above 0, at most 1: --energy 0.99")


def request_again(
    recipe: Recipe, parents: Sequence[Ref], *, into: str, expect: tuple[str, str] | None = None
) -> MergeRequest:
    """The request that resolves to `recipe` over these versions, in the order of its parents.

    Where they are others than those that it was made of, what follows from them (the rank of a `cat`) follows anew.
    """
    return MergeRequest(
        parents=tuple(ParentRef(ref, parent.weight) for ref, parent in zip(parents, recipe.parents, strict=True)),
        into=into,
        method=recipe.method,
        # the rank of a cat is the sum of its parents'
        rank=None if recipe.method == "cat" else recipe.rank,
        dtype=recipe.dtype,
        seed=recipe.seed,
        options=recipe.options,
        layers=recipe.layers,
        expect=expect,
    )


@dataclass(frozen=True, slots=True)
class RecipeParent:
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """The pinned form. `rank` is the output rank of every module, `dtype` a safetensors dtype name.

    The first of `layers` that selects a module decides its weights; where none does, those of the parents hold.
    """

    method: str
    method_rev: int
    parents: tuple[RecipeParent, ...]
    rank: int
    dtype: str
    seed: int | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    layers: tuple[LayerWeights, ...] = ()

    def weights_in(self, module: str) -> tuple[float, ...]:
        """Weight of each parent in this module."""
        chosen = next((layer.weights for layer in self.layers if layer.selects(module)), None)
        return chosen or tuple(parent.weight for parent in self.parents)

    def to_json(self) -> dict[str, Any]:
        """The canonical object: what is digested, stored, and written into the header of the merged file."""
        # a recipe without layers has no such field, so that it has the digest that it always had
        layers = {"layers": [{"pattern": x.pattern, "weights": list(x.weights)} for x in self.layers]}
        return {
            **(layers if self.layers else {}),
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
        layers=tuple(LayerWeights(x["pattern"], tuple(map(float, x["weights"]))) for x in value.get("layers", ())),
    )

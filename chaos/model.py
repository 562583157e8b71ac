"""What a piece of chaos asks for, and what must come of it: made from a seed, in plain Python, before anything runs.

The bytes of every merge are computed here too, in this process, by the engine alone: no queue, no database, no MLflow,
no fault. Whatever happens to the real registry, its files must be those.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiny import write_tiny_adapter
from tiny_merge import run_merge

from adapterctl.registry.domain.digest import file_digest

PARENTS = ("ada", "bob", "cyd", "dee")
#: What the child process writes and no clock, name or identifier goes into.
SAME_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Wanted:
    """One merge: `parents` are labels with weights; a label of the form `wanted N` stands for another merge."""

    number: int
    into: str
    parents: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Model:
    """Everything that is asked for, and the SHA-256 that each file of each merge must have."""

    wanted: Sequence[Wanted]
    digests: Mapping[int, Mapping[str, str]]

    def label(self, parent: str) -> str:
        """A parent as the registry names it; a merge that others are made of is alone in its adapter."""
        return f"{self.wanted[int(parent.split()[1])].into}:v1" if parent.startswith("wanted ") else f"{parent}:v1"


def make_parents(folder: Path) -> dict[str, Path]:
    """The adapters that everything is made of."""
    return {
        name: write_tiny_adapter(folder / name, seed=seed, rank=2 + seed % 2)
        for seed, name in enumerate(PARENTS, start=1)
    }


def make_model(seed: int, jobs: int, parents: Mapping[str, Path], folder: Path) -> Model:
    """`jobs` different merges: most share a few names, some are alone in theirs and are parents of later ones."""
    dice = random.Random(seed)
    wanted: list[Wanted] = []
    single: list[int] = []
    for number in range(jobs):
        chosen: list[str] = dice.sample(PARENTS, dice.choice((2, 2, 3)))
        if single and dice.random() < 0.2:
            chosen[-1] = f"wanted {dice.choice(single)}"
        weights = [round(dice.uniform(0.1, 2.0), 4) + number / 1e7 for _ in chosen]  # no recipe twice
        alone = dice.random() < 0.2
        into = f"alone-{number}" if alone else f"shared-{dice.randrange(max(2, jobs // 8))}"
        if alone:
            single.append(number)
        wanted.append(Wanted(number, into, tuple(zip(chosen, weights, strict=True))))
    folders = dict(parents)
    digests = {}
    for each in wanted:
        out = folder / str(each.number)
        run_merge([folders[name] for name, _ in each.parents], out, weights=[weight for _, weight in each.parents])
        folders[f"wanted {each.number}"] = out
        digests[each.number] = {name: file_digest(out / name) for name in SAME_FILES}
    return Model(wanted, digests)


def share_out(model: Model, clients: int, seed: int) -> list[list[int]]:
    """Who asks for what, in order: each merge once, and two in five again by another client."""
    dice = random.Random(f"clients of {seed}")
    lists: list[list[int]] = [[] for _ in range(clients)]
    for each in model.wanted:
        first = dice.randrange(clients)
        lists[first].append(each.number)
        if clients > 1 and dice.random() < 0.4:
            lists[(first + 1) % clients].append(each.number)
    return lists

"""What a merge would give, before it is made: the loss of each method and how the parents meet; and how far apart two
adapters are. Reads the parents' factors once, keeps only Gram matrices, and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..domain.adapter import AdapterFacts
from ..domain.errors import IncompatibleParents
from ..domain.plan import Forecast, MergePlan, Pair, Part
from .core import spectrum
from .grams import Array, block_products
from .method import methods
from .pairs import meet, pairs
from .stack import load_stack
from .tensors import TensorReader

#: Ranks that servers are commonly set up for (vLLM's max_lora_rank takes these); each is forecast while it is below R.
USUAL_RANKS = (8, 16, 32, 64, 128, 256)
#: A loss of which people say that nothing is lost: one percent.
SMALL_LOSS = 0.01


def forecast(
    plan: MergePlan, files: Sequence[Path], labels: Sequence[str]
) -> tuple[tuple[Forecast, ...], tuple[Pair, ...]]:
    """The loss of every method and rank worth considering, and one `Pair` for every two parents.

    Args:
        plan: of the merge that was asked for; its rank is among the forecasts.
        files: the weights file of each parent. labels: what to call each one.
    """
    full_rank = max(sum(part.rank for part in module.parts) for module in plan.modules)
    energy = np.zeros(full_rank)
    meetings = []
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(path)) for path in files]
        for module in plan.modules:
            grams = load_stack(module.parts, readers).grams()
            energy[: grams.rank] += spectrum(grams) ** 2
            meetings.append(meet(grams))
    weights = [parent.weight for parent in plan.recipe.parents]
    return _forecasts(energy, plan), pairs(meetings, weights, labels)


def compare(first: AdapterFacts, first_file: Path, second: AdapterFacts, second_file: Path) -> tuple[float, float]:
    """(cosine, distance) of two adapters over all modules: distance is ||first - second|| / ||first||, 0 when equal.

    Biases are left out. Where `first` is zero the distance is ||second||. Raises `IncompatibleParents` where a module
    has another shape in the other adapter, as adapters of different bases have.
    """
    squares = [0.0, 0.0]
    product = difference = 0.0
    with TensorReader(first_file) as one, TensorReader(second_file) as other:
        for parts in _differences(first, second):
            products = block_products(load_stack(parts, (one, other)).grams())
            for place, part in enumerate(parts):
                squares[part.parent] += float(products[place, place])
            if len(parts) == 2:
                product -= float(products[0, 1])
            difference += float(products.sum())
    sizes = [math.sqrt(max(0.0, square)) for square in squares]
    distance = math.sqrt(max(0.0, difference))
    cosine = product / (sizes[0] * sizes[1]) if sizes[0] * sizes[1] > 0 else 0.0
    return cosine, (distance / sizes[0] if sizes[0] > 0 else distance)


def _differences(first: AdapterFacts, second: AdapterFacts) -> Iterator[list[Part]]:
    """The parts of `first - second`, module by module."""
    modules: dict[str, list[Part]] = {}
    for place, (adapter, sign) in enumerate(((first, 1.0), (second, -1.0))):
        for m in adapter.modules:
            modules.setdefault(m.name, []).append(Part(place, m.rank, sign * m.scaling, m.a, m.b))
    for name, parts in modules.items():
        if len({(part.a.shape[1:], part.b.shape[:1]) for part in parts}) > 1:
            raise IncompatibleParents(
                f"{name} has another shape in each adapter: their bases differ", hint="compare adapters of one base"
            )
        yield parts


def _forecasts(energy: Array, plan: MergePlan) -> tuple[Forecast, ...]:
    losses, full_rank, row_bytes = _losses(energy), len(energy), plan.size_bytes // plan.recipe.rank
    enough = int(np.argmax(losses <= SMALL_LOSS)) + 1
    default = max(part.rank for module in plan.modules for part in module.parts)
    notes: dict[int, list[str]] = {rank: [] for rank in (*USUAL_RANKS, plan.recipe.rank)}
    notes.setdefault(default, []).append("the largest parent rank, svd's default")
    notes.setdefault(enough, []).append(f"the smallest that loses at most {SMALL_LOSS:.0%}")
    rows = [Forecast("cat", full_rank, full_rank * row_bytes, 0.0, "exact")]
    rows += [
        Forecast("svd", rank, rank * row_bytes, float(losses[rank - 1]), "; ".join(notes[rank]))
        for rank in sorted(notes)
        if rank < full_rank
    ]
    rows += [
        Forecast(method.name, default, default * row_bytes, None, "loss is not forecast")
        for method in methods().values()
        if method.name not in {"cat", "svd"} and method.form != "choice"
    ]
    return tuple(rows)


def _losses(energy: Array) -> Array:
    """Relative loss of the best adapter of uniform rank 1, 2, ... R."""
    tails: Array = np.append(np.cumsum(energy[::-1])[::-1][1:], 0.0)
    total = float(energy.sum())
    losses: Array = np.sqrt(tails / total) if total > 0 else np.zeros_like(tails)
    return losses

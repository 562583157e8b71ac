"""How far apart two adapters are, module by module and in all, from Gram matrices of their factors alone.

Reads each file once and holds one module of both at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..domain.adapter import AdapterFacts
from ..domain.errors import IncompatibleParents
from ..domain.plan import Part
from .grams import Grams, block_products, exact_norm, overlaps
from .stack import load_stack
from .tensors import TensorReader


@dataclass(frozen=True, slots=True)
class ModuleDistance:
    """One module: ||first||², ||second||², their inner product, ||first - second||², and how far their row and column
    spaces are the same (0..1, of the smaller one). A side without the module counts as zero, and nothing is `shared`
    then. What float64 Grams cannot tell from nothing, beside the parts that cancel there, is 0.
    """

    module: str
    shared: bool
    squares: tuple[float, float]
    product: float
    difference: float
    row_overlap: float
    column_overlap: float

    @property
    def norms(self) -> tuple[float, float]:
        return math.sqrt(self.squares[0]), math.sqrt(self.squares[1])

    @property
    def cosine(self) -> float:
        """0 where either is zero."""
        return _cosine(self.product, *self.norms)

    @property
    def distance(self) -> float | None:
        """||first - second|| / ||first||, 0 when equal. None where only the second is not zero."""
        return _relative(self.difference, self.squares[0])


def distances(
    first: AdapterFacts, first_file: Path, second: AdapterFacts, second_file: Path, *, spaces: bool = True
) -> Iterator[ModuleDistance]:
    """Every module of either, by name. Biases are left out. Without `spaces`, a third of the time, the overlaps are 0.

    Raises `IncompatibleParents` where a module has another shape in the other adapter, as adapters of different bases
    have.
    """
    with TensorReader(first_file) as one, TensorReader(second_file) as other:
        for name, parts in _differences(first, second):
            grams = load_stack(parts, (one, other)).grams()
            products, shared = block_products(grams), len(parts) == 2
            compared = shared and spaces
            squares = [0.0, 0.0]
            for place, part in enumerate(parts):
                squares[part.parent] = _told(float(products[place, place]), grams.of(grams.blocks[place]))
            yield ModuleDistance(
                module=name,
                shared=shared,
                squares=(squares[0], squares[1]),
                product=-float(products[0, 1]) if shared else 0.0,
                difference=_told(float(products.sum()), grams),
                row_overlap=float(overlaps(grams.a, grams.blocks)[0, 1]) if compared else 0.0,
                column_overlap=float(overlaps(grams.b, grams.blocks)[0, 1]) if compared else 0.0,
            )


def in_all(found: Iterable[ModuleDistance]) -> tuple[float, float | None]:
    """(cosine, distance) over all modules: distance is ||first - second|| / ||first||, 0 when equal, None where only
    the second is not zero.
    """
    found = list(found)
    squares = [math.fsum(each.squares[side] for each in found) for side in (0, 1)]
    cosine = _cosine(math.fsum(each.product for each in found), *map(math.sqrt, squares))
    return cosine, _relative(math.fsum(each.difference for each in found), squares[0])


def _told(square: float, grams: Grams) -> float:
    """`square`, the squared norm that `grams` give, or 0 where it is rounding of parts that cancel."""
    return max(0.0, square) if exact_norm(grams) > 0 else 0.0


def _relative(difference: float, square: float) -> float | None:
    if difference == 0:
        return 0.0
    return math.sqrt(difference) / math.sqrt(square) if square > 0 else None


def _cosine(product: float, first: float, second: float) -> float:
    """Rounding may lead beyond 1."""
    return max(-1.0, min(1.0, product / (first * second))) if first * second > 0 else 0.0


def _differences(first: AdapterFacts, second: AdapterFacts) -> Iterator[tuple[str, list[Part]]]:
    """The parts of `first - second`, module by module."""
    modules: dict[str, list[Part]] = {}
    for place, (adapter, sign) in enumerate(((first, 1.0), (second, -1.0))):
        for m in adapter.modules:
            modules.setdefault(m.name, []).append(Part(place, m.rank, sign, m.scaling, m.a, m.b))
    for name, parts in sorted(modules.items()):
        if len({(part.a.shape[1:], part.b.shape[:1]) for part in parts}) > 1:
            shapes = " and ".join(str([part.b.shape[0], *part.a.shape[1:]]) for part in parts)
            raise IncompatibleParents(
                f"{name} has another shape in each adapter, {shapes}: their bases differ",
                hint="compare adapters of one base",
            )
        yield name, parts

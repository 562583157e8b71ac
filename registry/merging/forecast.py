"""What a merge would give, before it is made: the loss of each method and how the parents meet; and how far apart two
adapters are. Reads the parents' factors once, keeps only Gram matrices, and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from ..domain.adapter import AdapterFacts, LoraModule
from ..domain.header import DTYPE_BYTES
from ..domain.plan import Forecast, Pair, Part
from .core import spectrum
from .grams import Array, Grams, block_products, exact_squared_norm, overlap
from .method import methods, output_dtype, sum_of_ranks
from .stack import load_stack
from .tensors import TensorReader

#: Ranks that servers are commonly set up for (vLLM's max_lora_rank takes these); each is forecast while it is below R.
USUAL_RANKS = (8, 16, 32, 64, 128, 256)
#: A loss of which people say that nothing is lost: one percent.
SMALL_LOSS = 0.01


@dataclass(slots=True)
class _Tally:
    """Sums over modules, filled module by module so that memory does not grow with their number."""

    energy: Array
    pairs: dict[tuple[int, int], list[tuple[float, float]]] = field(default_factory=dict)
    products: dict[tuple[int, int], float] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)


def forecast(
    facts: Sequence[AdapterFacts],
    files: Sequence[Path],
    weights: Sequence[float],
    labels: Sequence[str],
    *,
    ranks: Sequence[int] = (),
    dtype: str | None = None,
) -> tuple[tuple[Forecast, ...], tuple[Pair, ...]]:
    """The loss of every method and rank worth considering, and one `Pair` for every two parents.

    Args:
        files: the weights file of each parent. weights: of each parent. labels: what to call each one.
        ranks: further ranks to forecast, e.g. the one that was asked for.
        dtype: safetensors name of the output type; None is the widest parent's.
    """
    full_rank = sum_of_ranks(facts)
    tally = _Tally(np.zeros(full_rank))
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(path)) for path in files]
        for parts in _modules(facts, weights):
            _count(tally, load_stack(parts, readers).grams(), np.sign(weights))
    width = DTYPE_BYTES[dtype or output_dtype([d for f in facts for d in f.dtypes])]
    row_bytes = width * sum(m.d_in + m.d_out for m in {m.name: m for f in facts for m in f.modules}.values())
    default = max(f.max_rank for f in facts)
    return _forecasts(tally.energy, full_rank, default, row_bytes, ranks), _pairs(tally, labels)


def compare(first: AdapterFacts, first_file: Path, second: AdapterFacts, second_file: Path) -> tuple[float, float]:
    """(cosine, distance) of two adapters over all modules: distance is ||first - second|| / ||first||, 0 when equal.

    Biases are left out. Where `first` is zero the distance is ||second||.
    """
    product = first_square = second_square = difference = 0.0
    with TensorReader(first_file) as one, TensorReader(second_file) as other:
        for parts in _modules((first, second), (1.0, -1.0)):
            grams = load_stack(parts, (one, other)).grams()
            products = dict(zip(((b.parent) for b in grams.blocks), block_products(grams).diagonal(), strict=True))
            first_square += products.get(0, 0.0)
            second_square += products.get(1, 0.0)
            difference += exact_squared_norm(grams)
            if len(grams.blocks) == 2:
                product -= float(block_products(grams)[0, 1])
    size = math.sqrt(first_square * second_square)
    distance = math.sqrt(difference)
    return (product / size if size > 0 else 0.0), (distance / math.sqrt(first_square) if first_square > 0 else distance)


def _modules(facts: Sequence[AdapterFacts], weights: Sequence[float]) -> Iterator[list[Part]]:
    shares: dict[str, list[tuple[int, LoraModule]]] = {}
    for parent, adapter in enumerate(facts):
        for module in adapter.modules:
            shares.setdefault(module.name, []).append((parent, module))
    for name in sorted(shares):
        yield [Part(i, m.rank, weights[i] * m.scaling, m.a, m.b, m.bias) for i, m in shares[name]]


def _count(tally: _Tally, grams: Grams, signs: Array) -> None:
    """Add one module. `signs` of the weights are taken out of the products: a pair describes the adapters."""
    sigma = spectrum(grams)
    tally.energy[: len(sigma)] += sigma**2
    products = block_products(grams)
    for j, second in enumerate(grams.blocks):
        tally.squares[second.parent] = tally.squares.get(second.parent, 0.0) + float(products[j, j])
        for i, first in enumerate(grams.blocks[:j]):
            pair = (first.parent, second.parent)
            product = float(products[i, j] * signs[first.parent] * signs[second.parent])
            tally.products[pair] = tally.products.get(pair, 0.0) + product
            tally.pairs.setdefault(pair, []).append((overlap(grams.a, first, second), overlap(grams.b, first, second)))


def _forecasts(
    energy: Array, full_rank: int, default: int, row_bytes: int, ranks: Sequence[int]
) -> tuple[Forecast, ...]:
    losses = _losses(energy)
    enough = int(np.argmax(losses <= SMALL_LOSS)) + 1
    notes: dict[int, str] = {}
    for rank in (*USUAL_RANKS, *ranks):
        if 0 < rank < full_rank:
            notes[rank] = ""
    if enough < full_rank:
        notes[enough] = f"smallest rank that loses at most {SMALL_LOSS:.0%}"
    if default < full_rank:
        notes[default] = "the largest parent rank, svd's default"
    rows = [Forecast("cat", full_rank, full_rank * row_bytes, 0.0, "exact")]
    rows += [Forecast("svd", rank, rank * row_bytes, float(losses[rank - 1]), notes[rank]) for rank in sorted(notes)]
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


def _pairs(tally: _Tally, labels: Sequence[str]) -> tuple[Pair, ...]:
    rows = []
    for i, j in combinations(range(len(labels)), 2):
        overlaps = tally.pairs.get((i, j), [])
        norms = [math.sqrt(max(0.0, tally.squares.get(parent, 0.0))) for parent in (i, j)]
        rows.append(
            Pair(
                first=labels[i],
                second=labels[j],
                shared_modules=len(overlaps),
                cosine=tally.products.get((i, j), 0.0) / (norms[0] * norms[1]) if norms[0] * norms[1] > 0 else 0.0,
                row_overlap=float(np.mean([row for row, _ in overlaps])) if overlaps else 0.0,
                column_overlap=float(np.mean([column for _, column in overlaps])) if overlaps else 0.0,
                norm_ratio=norms[0] / norms[1] if norms[1] > 0 else 0.0,
            )
        )
    return tuple(rows)

"""What a merge takes: seconds of one core, and memory of one thread, estimated from the shapes of its modules alone.

Fitted to merges and their proofs of 2 to 8 parents of rank 16 to 64 on modules of 512 x 4096 to 11008 x 4096, on one
core of a Xeon with AVX-512: there they are right within a factor of two. A slower core takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..domain.plan import ModulePlan
from .deltas import BAND, KEPT_BYTES, SMALL, SPARE, TOGETHER
from .make import arithmetic
from .method import MethodSpec

#: Multiplications in a second, of the sizes that occur.
PER_S = 1e12 / 60
#: Seconds for one value of a factor to be read, widened, multiplied once, rounded, written and read again; and to be
#: sorted, where a rule looks at the elements of factors.
VALUE_S, SORTED_VALUE_S = 16e-9, 115e-9
#: Of form `deltas`, but never forms one.
ON_FACTORS = frozenset({"knots_ties"})


@dataclass(frozen=True, slots=True)
class Cost:
    """`cpu_s` of the whole merge and its proof; `memory_bytes` of one thread, beside the 50 MB of the process."""

    cpu_s: float
    memory_bytes: int


def cost(modules: Sequence[ModulePlan], method: MethodSpec, rank: int, dtype: str) -> Cost:
    """Of these modules merged by `method` to `rank`, whatever their plan says of rank and method."""
    found = [_of(module, method, rank, arithmetic(method, dtype)) for module in modules]
    return Cost(math.fsum(each.cpu_s for each in found), max(each.memory_bytes for each in found))


def _of(module: ModulePlan, method: MethodSpec, rank: int, wide: type[np.floating]) -> Cost:
    rows, columns = module.delta_shape
    full, width = module.full_rank, rows + columns
    # the proof: parents and child in one stack, in float64
    both = full + min(rank, full)
    values = both * width
    work, memory = width * both**2 + 3.0 * both**3, 11.0 * values + 40.0 * both**2
    seconds = VALUE_S * values
    if method.form == "grams":
        work += method.work * (width * full**2 + 12.0 * full**3)
    elif method.form == "elements":
        seconds += SORTED_VALUE_S * full * width
        memory = 30.0 * values
    elif method.name in ON_FACTORS:
        seconds += SORTED_VALUE_S * shared_values(module)
        memory = max(memory, 30.0 * shared_values(module))
    elif method.form == "deltas":
        work += work_on_delta(module, method)
        size, small = rows * columns, min(rows, columns)
        if small <= max(SMALL, 2 * (max(rank, full) + SPARE)):  # decomposed as it is
            work += 10.0 * small * size
            memory += 50.0 * size
        else:
            bytes_of = np.dtype(wide).itemsize
            memory += min(size * bytes_of, KEPT_BYTES) + 4.0 * BAND * TOGETHER * bytes_of
    return Cost(seconds + work / PER_S, int(memory))


def shared_values(module: ModulePlan) -> float:
    """Values of all parents, each in the space of R directions that they share, by the columns of the delta."""
    return float(len(module.parts) * module.full_rank * module.delta_shape[1])


def work_on_delta(module: ModulePlan, method: MethodSpec) -> float:
    """Multiplications for a rule on deltas: its passes, and the cut to a rank by iteration."""
    size = math.prod(module.delta_shape)
    return method.work * size * (100.0 * len(module.parts) + 10.0 * module.full_rank)

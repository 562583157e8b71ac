"""What a merge would give, before it is made: the loss of each method and how the parents meet.

Reads the parents' factors once, keeps only Gram matrices, and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..domain.errors import Refused
from ..domain.plan import Forecast, Interference, MergePlan, ModulePlan, Pair
from ..domain.recipe import RESIZE, OptionValue
from .core import spectrum
from .cost import ON_FACTORS, PER_S, SORTED_VALUE_S, cost, shared_values, work_on_delta
from .grams import Array, Grams, error_squared
from .make import arithmetic, promise
from .method import find_method, methods
from .pairs import SIGN_ROWS, compare_signs, interference, meet, pairs
from .stack import load_stack
from .tensors import TensorReader

#: Ranks that servers are commonly set up for (vLLM's max_lora_rank takes these); each is forecast while it is below R.
USUAL_RANKS = (8, 16, 32, 64, 128, 256)
#: A loss of which people say that nothing is lost: one percent.
SMALL_LOSS = 0.01
NOT_FORECAST = "loss is forecast where this method is asked for"
TOO_MUCH = "too much work to forecast here; the receipt of a merge tells the loss, --max-loss holds it to a limit"
#: Said of the methods whose aim is another one: their distance from the sum is no measure of how good they are.
NOT_THE_SUM = "aims at something else than the sum"


def forecast(
    plan: MergePlan, files: Sequence[Path], labels: Sequence[str], *, most_work: float = math.inf
) -> tuple[tuple[Forecast, ...], tuple[Pair, ...], tuple[Interference, ...]]:
    """The loss of every method and rank worth considering; and how every two parents meet, in all and in each layer.

    Args:
        plan: of the merge that was asked for; its rank is among the forecasts.
        files: the weights file of each parent. labels: what to call each one.
        most_work: in multiplications, estimated. The loss of a rule on the deltas is left out where it takes more.

    Raises `Refused`, before a file is read, where all else takes more.
    """
    energy = _no_energy(plan)
    others = _other_methods(plan, len(energy))
    on_grams = [method.work for method in map(find_method, others) if method.form == "grams"]
    _check_work(plan, 1 + sum(on_grams), most_work)
    # only Grams are cheap: the other forms work through every element
    forms = {"grams": list(others), "elements": [plan.recipe.method], "deltas": [plan.recipe.method]}
    errors = {name: 0.0 for name in others if name in forms.get(find_method(name).form, ())}
    left_out = _work_on_deltas(plan) > most_work and errors.pop(plan.recipe.method, None) is not None
    meetings, signs = [], []
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(path)) for path in files]
        for module in plan.modules:
            loaded = load_stack(module.parts, readers)
            grams = loaded.grams()
            _add_energy(energy, grams)
            meetings.append(meet(grams, [part.weight for part in module.parts]))
            signs.append(compare_signs(loaded))
            for name in errors:
                errors[name] += _error_squared(name, *others[name], module, grams, plan, readers)
    total = float(energy.sum())
    losses = {name: math.sqrt(error / total) if total > 0 else 0.0 for name, error in errors.items()}
    ranks = {name: rank for name, (rank, _) in others.items()}
    by_layer = interference([module.name for module in plan.modules], meetings, signs, labels)
    notes = {plan.recipe.method: TOO_MUCH} if left_out else {}
    return _forecasts(energy, plan, ranks, losses, notes), pairs(meetings, labels), by_layer


def rank_for_energy(plan: MergePlan, files: Sequence[Path], share: float, *, most_work: float = math.inf) -> int:
    """The smallest uniform rank at which the best adapter keeps `share` of ||delta||² over all modules.

    Raises `Refused` as `forecast` does.
    """
    energy = _no_energy(plan)
    _check_work(plan, 1, most_work)
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(path)) for path in files]
        for module in plan.modules:
            _add_energy(energy, load_stack(module.parts, readers).grams())
    held = np.cumsum(energy)
    # all of it is less than float64 can add up
    return int(np.searchsorted(held, share * (1 - 1e-12) * held[-1])) + 1 if held[-1] > 0 else 1


def _check_work(plan: MergePlan, methods_on_grams: float, most_work: float) -> None:
    """Raises `Refused` where Grams, signs and so many methods take more multiplications.

    An estimate to refuse by, as is `_work_on_deltas`. Their factors were measured at a width of 4096, R from 32 to 1024
    and 2 to 64 parents: one core does 1e12 in about a minute.
    """
    needed = 0.0
    for module in plan.modules:
        rank, count = module.full_rank, len(module.parts)
        rows, columns = module.delta_shape
        needed += 12.0 * methods_on_grams * rank**3 + (rows + columns) * rank**2
        needed += min(SIGN_ROWS, rows) * columns * (rank + count**2)
    if needed > most_work:
        raise Refused(
            f"a forecast takes {needed / most_work:.1f} times the work that is done for one question here",
            hint="ask for fewer parents; or merge: the receipt tells the loss, and --max-loss holds it to a limit",
        )


def _work_on_deltas(plan: MergePlan) -> float:
    """Multiplications for the rule on deltas that was asked for, if one was: its passes, and the cut to a rank."""
    method = find_method(plan.recipe.method)
    if method.form != "deltas":
        return 0.0
    if method.name not in ON_FACTORS:
        return sum(work_on_delta(module, method) for module in plan.modules)
    return SORTED_VALUE_S * PER_S * sum(map(shared_values, plan.modules))


def _no_energy(plan: MergePlan) -> Array:
    """A zero for every direction of the largest module: the sum of its parents' ranks."""
    return np.zeros(max(module.full_rank for module in plan.modules))


def _add_energy(energy: Array, grams: Grams) -> None:
    """Add what each direction of one module holds of ||delta||², the strongest first."""
    energy[: grams.rank] += spectrum(grams) ** 2


def _error_squared(
    name: str,
    rank: int,
    options: Mapping[str, OptionValue],
    module: ModulePlan,
    grams: Grams,
    plan: MergePlan,
    readers: Sequence[TensorReader],
) -> float:
    method = find_method(name)
    if method.form == "grams":
        return error_squared(grams, method.function(grams, rank=min(rank, grams.rank), **options))
    # the one that was asked for
    stack = load_stack(module.parts, readers, arithmetic(method, plan.recipe.dtype))
    return promise(module, method, stack, plan.recipe)[0]


def _other_methods(plan: MergePlan, full_rank: int) -> dict[str, tuple[int, Mapping[str, OptionValue]]]:
    """Rank and options of each method beside `cat` and `svd` that can take these parents: those of the recipe for the
    method that was asked for, the default ones for the rest.
    """
    recipe = plan.recipe
    parts = [part for module in plan.modules for part in module.parts]
    even = all(len({part.rank for part in module.parts}) == 1 for module in plan.modules)
    default = max(part.rank for part in parts)
    found: dict[str, tuple[int, Mapping[str, OptionValue]]] = {}
    for method in methods().values():
        count = len(recipe.parents)
        fits = method.min_parents <= count and (method.max_parents is None or count <= method.max_parents)
        if (
            method.form == "choice"
            or method.name in {"cat", "svd", RESIZE}
            or not fits
            or (method.equal_ranks and not even)
        ):
            continue
        asked = method.name == recipe.method
        options = dict(recipe.options) if asked else {option.name: option.default for option in method.options}
        if method.seeded:
            options["seed"] = recipe.seed or 0
        rank = full_rank if method.form == "factors" else default
        found[method.name] = (recipe.rank if asked else rank, options)
    return found


def _forecasts(
    energy: Array, plan: MergePlan, ranks: Mapping[str, int], losses: Mapping[str, float], said: Mapping[str, str]
) -> tuple[Forecast, ...]:
    """`said` is the note of methods whose loss is missing for a reason of its own."""
    best, full_rank, row_bytes = _losses(energy), len(energy), plan.size_bytes // plan.recipe.rank
    enough = int(np.argmax(best <= SMALL_LOSS)) + 1
    default = max(part.rank for module in plan.modules for part in module.parts)
    resized = plan.recipe.method == RESIZE
    notes: dict[int, list[str]] = {
        rank: [] for rank in (*USUAL_RANKS, plan.recipe.rank, *((1, 2, 4) if resized else ()))
    }
    if resized:
        for rank in notes.keys() & range(1, full_rank):
            notes[rank].append(f"keeps {1 - best[rank - 1] ** 2:.1%} of the energy")
    else:
        notes.setdefault(default, []).append("the largest parent rank, svd's default")
    notes.setdefault(enough, []).append(f"the smallest that loses at most {SMALL_LOSS:.0%}")
    exact, cut = (RESIZE, RESIZE) if resized else ("cat", "svd")
    rows = [Forecast(exact, full_rank, full_rank * row_bytes, 0.0, "exact")]
    rows += [
        Forecast(cut, rank, rank * row_bytes, float(best[rank - 1]), "; ".join(notes[rank]))
        for rank in sorted(notes)
        if rank < full_rank
    ]
    rows += [
        Forecast(
            name,
            rank,
            rank * row_bytes,
            losses.get(name),
            NOT_THE_SUM if name in losses else said.get(name, NOT_FORECAST),
        )
        for name, rank in ranks.items()
    ]
    return tuple(_with_cost(row, plan) for row in rows)


def _with_cost(row: Forecast, plan: MergePlan) -> Forecast:
    taken = cost(plan.modules, find_method(row.method), row.rank, plan.recipe.dtype)
    return replace(row, cpu_s=float(f"{taken.cpu_s:.2g}"), memory_bytes=taken.memory_bytes)


def _losses(energy: Array) -> Array:
    """Relative loss of the best adapter of uniform rank 1, 2, ... R."""
    tails: Array = np.append(np.cumsum(energy[::-1])[::-1][1:], 0.0)
    total = float(energy.sum())
    losses: Array = np.sqrt(tails / total) if total > 0 else np.zeros_like(tails)
    return losses

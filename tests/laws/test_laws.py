"""Laws of merging, held against every registered method through the real engine: plan, files, receipt.

Parents are float64 files, so that a law is seen to about 1e-7 of the parents' size (below that a Gram matrix in float64
cannot tell a direction from rounding). A method that breaks a law declares it; one that declares too much fails here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_merge import WEIGHTS, deltas, facts_of, write_factors

from adapterctl.registry.domain.plan import build_plan
from adapterctl.registry.domain.recipe import Recipe, RecipeParent
from adapterctl.registry.merging.method import LAWS, find_method, methods, sum_of_ranks
from adapterctl.workers import engine, receipt

Factors = dict[str, tuple[np.ndarray, np.ndarray]]
TOLERANCE = 1e-6
#: Methods that give a parent's weakest direction as much say as its strongest. Where a gauge makes the factors 1e4
#: times larger than their product, Gram matrices in float64 know the weak ones no more: left out for these.
EVERY_DIRECTION = {"core_ties", "ctm", "iso_c", "knots_ties", "tsv"}
#: Laws about several parents, of which a method for one knows nothing.
SEVERAL = {"parent_order", "absent", "cancellation"}
#: Thousands of small folders: in memory where there is such a place, else where temporary files go.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Case:
    """Parents in memory, their weights, and the output rank that is asked for (None: the sum of the ranks)."""

    parents: tuple[Factors, ...]
    weights: tuple[float, ...]
    rank: int | None = None


@dataclass(frozen=True)
class Result:
    delta: dict[str, np.ndarray]
    loss: float
    predicted: float
    bound: float
    files: dict[str, bytes]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = {
        f"m{i}": tuple(draw(st.tuples(st.integers(2, 9), st.integers(2, 9)))) for i in range(draw(st.integers(1, 3)))
    }
    count = draw(st.integers(2, 3))
    parents = []
    for _ in range(count):
        names = draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
        graded = draw(st.sampled_from((1.0, 1e-2, 1e4)))
        parents.append(
            {name: _factors(random, *shapes[name], draw(st.integers(1, 4)), graded) for name in sorted(names)}
        )
    weight = st.sampled_from((-1.5, -0.3, 0.05, 0.5, 1.0, 2.0))
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    return Case(tuple(parents), tuple(weights), draw(st.sampled_from((None, 1, 2, 3))))


def _factors(
    random: np.random.Generator, d_out: int, d_in: int, rank: int, graded: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of A from size 1 to `graded`, columns of B the other way: each rank-one part weighs about the same."""
    grades = np.geomspace(1, graded, rank)
    return random.normal(size=(rank, d_in)) * grades[:, None], random.normal(size=(d_out, rank)) / grades


def merge(name: str, case: Case, *, threads: int = 1, dtype: str = "F64", stored: str = "F64") -> Result:
    """Run `name` on the case; weights of 0 and single parents, which a request may not hold, are allowed here."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        root = Path(temporary)
        folders = [
            write_factors(root / f"p{i}", parent, dtype=stored, scaling=1.0) for i, parent in enumerate(case.parents)
        ]
        facts = [facts_of(folder) for folder in folders]
        full = sum_of_ranks(facts)
        method, rank = find_method(name), case.rank or full
        if method.form == "choice":
            chosen, rank = method.function(full, case.rank)
            method = find_method(chosen)
        if method.form == "factors":
            rank = full
        if method.equal_ranks:
            rank = max(adapter.max_rank for adapter in facts)
        recipe = Recipe(
            method.name,
            method.rev,
            tuple(RecipeParent("0" * 64, weight) for weight in case.weights),
            min(rank, full),
            dtype,
            seed=0 if method.seeded else None,
            options={option.name: option.default for option in method.options},
        )
        plan = build_plan(recipe, facts)
        files, out = [folder / WEIGHTS for folder in folders], root / "out"
        out.mkdir()
        outcomes = engine.merge(plan, files, out, threads=threads)
        proof = receipt.prove(plan, files, out, outcomes).receipt
        contents = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
        return Result(deltas(out), proof["loss"], proof["predicted_loss"], proof["loss_bound"], contents)


def fit(name: str, case: Case) -> Case:
    """The case as the method takes it: no more parents than it can have, of one rank in each module if need be."""
    method = find_method(name)
    parents, weights = case.parents[: method.max_parents], case.weights[: method.max_parents]
    if method.equal_ranks:
        parents = tuple(
            {m: _filled(factors, max(len(p[m][0]) for p in parents if m in p)) for m, factors in parent.items()}
            for parent in parents
        )
    return replace(case, parents=parents, weights=weights)


def _filled(factors: tuple[np.ndarray, np.ndarray], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The same factors with rows and columns drawn again until there are `rank`; A and B of one size, for float16 has
    to hold sums and multiples of them here.
    """
    a, b = factors
    again = np.arange(rank) % len(a)
    balance = np.sqrt(np.abs(a).max() / np.abs(b).max())
    return a[again] / balance, b[:, again] * balance


def dense(case: Case) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for parent, weight in zip(case.parents, case.weights, strict=True):
        for name, (a, b) in parent.items():
            total[name] = total.get(name, 0) + weight * (b @ a)
    return total


def at_its_rank(case: Case) -> Case:
    """The case at the rank that it gets, the sum of its ranks at most: more rows must not mean more rank."""
    ranks: dict[str, int] = {}
    for parent in case.parents:
        for name, (a, _) in parent.items():
            ranks[name] = ranks.get(name, 0) + len(a)
    full = max(ranks.values())
    return replace(case, rank=min(case.rank or full, full))


def size(case: Case) -> float:
    """Sum of the norms of all rank-one parts: what rounding is relative to, also where parts cancel out."""
    return sum(
        abs(weight) * float(np.linalg.norm(a, axis=1) @ np.linalg.norm(b, axis=0))
        for parent, weight in zip(case.parents, case.weights, strict=True)
        for a, b in parent.values()
    )


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], scale: float) -> None:
    for name in one.keys() | other.keys():
        zero = np.zeros(1)
        difference = float(np.linalg.norm(one.get(name, zero) - other.get(name, zero)))
        assert difference <= TOLERANCE * scale, f"{name}: {difference / scale:.2e}"


def assume_clear_cut(case: Case) -> None:
    """Where two singular values meet at the cut, which of them is kept is anybody's choice: such cases say nothing."""
    if case.rank is None:
        return
    for delta in dense(case).values():
        sigma = np.linalg.svd(delta, compute_uv=False)
        if case.rank < len(sigma) and sigma[case.rank - 1] > 1e-9 * sigma[0]:
            assume(sigma[case.rank - 1] - sigma[case.rank] > 1e-3 * sigma[0])


def identity(name: str, case: Case) -> None:
    parent = Case(case.parents[:1], (1.0,))

    assert_same(merge(name, parent).delta, dense(parent), size(parent))


def parent_order(name: str, case: Case) -> None:
    assume_clear_cut(case)
    turned = replace(case, parents=case.parents[::-1], weights=case.weights[::-1])

    assert_same(merge(name, case).delta, merge(name, turned).delta, size(case))


def gauge(name: str, case: Case) -> None:
    assume_clear_cut(case)
    random = np.random.default_rng(7)
    parents = []
    for parent in case.parents:
        changed = {}
        for module, (a, b) in parent.items():
            turn = np.linalg.qr(random.normal(size=(len(a), len(a))))[0] * random.uniform(0.5, 2, len(a))
            changed[module] = (turn @ a, b @ np.linalg.inv(turn))
        parents.append(changed)

    turned = replace(case, parents=tuple(parents))
    if name in EVERY_DIRECTION:
        assume(size(turned) < 100 * size(case))

    assert_same(merge(name, case).delta, merge(name, turned).delta, size(case) + size(turned))


def homogeneity(name: str, case: Case) -> None:
    assume_clear_cut(case)
    larger = replace(case, weights=tuple(3 * weight for weight in case.weights))

    thrice = {module: 3 * delta for module, delta in merge(name, case).delta.items()}

    assert_same(merge(name, larger).delta, thrice, size(larger))


def absent(name: str, case: Case) -> None:
    assume_clear_cut(case)
    if find_method(name).max_parents == len(case.parents):
        case = replace(case, parents=case.parents[:-1], weights=case.weights[:-1])
    case = at_its_rank(case)
    ghost = {module: (a + 1, b - 1) for module, (a, b) in case.parents[0].items()}
    with_ghost = replace(case, parents=(*case.parents, ghost), weights=(*case.weights, 0.0))

    assert_same(merge(name, with_ghost).delta, merge(name, case).delta, size(case))


def cancellation(name: str, case: Case) -> None:
    nothing = Case((case.parents[0], case.parents[0]), (1.0, -1.0), case.rank)

    result = merge(name, nothing)

    assert_same(result.delta, {module: np.zeros(1) for module in result.delta}, size(nothing))


def padding(name: str, case: Case) -> None:
    assume_clear_cut(case)
    case = at_its_rank(case)
    padded = tuple(
        {m: (np.pad(a, ((0, 2), (0, 0))), np.pad(b, ((0, 0), (0, 2)))) for m, (a, b) in parent.items()}
        for parent in case.parents
    )

    assert_same(merge(name, replace(case, parents=padded)).delta, merge(name, case).delta, size(case))


def monotone(name: str, case: Case) -> None:
    exact = dense(case)
    losses = []
    for rank in range(1, 6):
        made = merge(name, replace(case, rank=rank)).delta
        losses.append(float(np.sqrt(sum(np.sum((made[m] - exact[m]) ** 2) for m in exact))))

    assert all(later <= earlier + TOLERANCE * size(case) for earlier, later in pairwise(losses))


def full_rank(name: str, case: Case) -> None:
    assert_same(merge(name, replace(case, rank=None)).delta, dense(case), size(case))


LAW_TESTS: dict[str, Callable[[str, Case], None]] = {
    law.__name__: law
    for law in (identity, parent_order, gauge, homogeneity, absent, cancellation, padding, monotone, full_rank)
}


def kept(names: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (name, law)
        for name in names
        for law in LAWS
        if law not in methods()[name].breaks and (law not in SEVERAL or methods()[name].max_parents != 1)
    ]


def test_every_law_has_a_test():
    assert tuple(LAW_TESTS) == LAWS


def test_every_law_can_be_broken():
    """By a method that declares it, and is seen to: no law holds for whatever is computed."""
    assert set().union(*(method.breaks for method in methods().values())) == set(LAWS)


@pytest.mark.parametrize(("name", "law"), kept(list(methods())))
@settings(max_examples=25)
@given(case=cases())
def test_method_keeps_law(name: str, law: str, case: Case):
    LAW_TESTS[law](name, fit(name, case))


@pytest.mark.parametrize(
    ("name", "law"), [(method.name, law) for method in methods().values() for law in sorted(method.breaks)]
)
def test_a_law_that_is_declared_broken_is_broken(name: str, law: str):
    """Two parents of one shape that nearly oppose each other, or nearly agree, break whatever can be broken."""
    random = np.random.default_rng(5)
    a, b = _factors(random, 7, 8, 3, 1.0)
    near = (a + 0.1 * random.normal(size=a.shape), b)
    other = _factors(random, 7, 8, 3, 1.0)
    witnesses = [
        Case(({"m": (a, b)}, {"m": second}), weights)
        for second in (near, other)
        for weights in ((1.0, 1.0), (1.0, -1.0), (0.5, 2.0))
    ]

    assert any(fails(LAW_TESTS[law], name, case) for case in witnesses), f"{name} keeps {law}: do not declare it"


def fails(law: Callable[[str, Case], None], name: str, case: Case) -> bool:
    try:
        law(name, fit(name, case))
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", list(methods()))
@settings(max_examples=10)
@given(case=cases(), everywhere=st.booleans())
def test_a_module_that_training_left_at_zero_stays_there(name: str, case: Case, everywhere: bool):
    """PEFT begins with B = 0, and a module without a gradient is stored so: by the first parent or by all of them."""
    case = fit(name, case)
    a, b = np.ones((2, 4)), np.zeros((3, 2))
    other = b if everywhere else b + 1
    with_it = [{**parent, "silent": (a, b if not i else other)} for i, parent in enumerate(case.parents)]

    result = merge(name, replace(case, parents=tuple(with_it)))

    assert all(np.isfinite(delta).all() for delta in result.delta.values())
    if everywhere or len(case.parents) == 1:
        assert not result.delta["silent"].any()


@pytest.mark.parametrize("name", list(methods()))
@settings(max_examples=25)
@given(case=cases(), dtype=st.sampled_from(("F64", "F32", "F16", "BF16")))
def test_what_was_predicted_is_what_is_measured(name: str, case: Case, dtype: str):
    case = fit(name, case)

    result = merge(name, case, dtype=dtype)

    exact = dense(case)
    distance = float(np.sqrt(sum(np.sum((result.delta[m] - exact[m]) ** 2) for m in exact)))
    norm = float(np.sqrt(sum(np.sum(delta**2) for delta in exact.values())))
    assert abs(result.loss - result.predicted) <= result.bound + 1e-6
    assert distance == pytest.approx(result.loss * norm, rel=1e-4, abs=1e-6 * size(case))


@pytest.mark.parametrize("name", list(methods()))
@settings(max_examples=10)
@given(case=cases(), stored=st.sampled_from(("BF16", "F32")))
def test_bytes_do_not_depend_on_the_number_of_threads(name: str, case: Case, stored: str):
    case = fit(name, case)

    alone = merge(name, case, threads=1, dtype=stored, stored=stored)
    together = merge(name, case, threads=4, dtype=stored, stored=stored)

    assert alone.files == together.files

"""Proves a merge from what lies on the disk: reads the child again and holds it against the parents and the plan.

The error is measured against the exact weighted sum without forming it: with the child's factors appended to the stack
of the parents' at coefficient -1, the norm of the difference is one more norm from Gram matrices, in float64. A norm
alone hides much: of 256 directions one may be missing, and the distance from the sum hardly changes. The same matrices
therefore hold every row of A' and every column of B' against the parents and against what was promised for it, each to
one rounding to the output type, whatever the rank; and every tensor has to have the checksum of what went out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..registry.domain.adapter import AdapterFacts, LoraModule, read_facts
from ..registry.domain.errors import InvalidAdapter, Problem, ReceiptFailed, raise_all
from ..registry.domain.header import Header, read_header, strict_json_object
from ..registry.domain.plan import MergePlan, ModulePlan, Part, header_metadata, output_tensors
from ..registry.merging.blas import computed_with
from ..registry.merging.core import spectrum
from ..registry.merging.grams import (
    GRAM_FLOOR,
    Array,
    Grams,
    block_products,
    exact_norm,
    gram_in_blocks,
    inverse_root,
    left_of,
    retained,
    size_of_parts,
)
from ..registry.merging.make import Outcome, Parts
from ..registry.merging.method import find_method
from ..registry.merging.pairs import Meeting, meet, pairs
from ..registry.merging.stack import Stack, load_stack
from ..registry.merging.tensors import TensorReader, checksum
from .engine import CONFIG_FILE, WEIGHTS_FILE, Stop, for_each_module, never

#: Relative and absolute rounding error of one stored value (unit roundoff, half of the smallest subnormal number).
ROUNDING: Mapping[str, tuple[float, float]] = {
    "BF16": (2.0**-8, 2.0**-134),
    "F16": (2.0**-11, 2.0**-25),
    "F32": (2.0**-24, 2.0**-150),
    "F64": (2.0**-53, 0.0),
}
#: Two of 64 parents can be chosen in 2,016 ways, which would take half a megabyte of the ledger.
MOST_PAIRS = 64
#: Share of the sum that values below the smallest normal number may cost: as much as rounding both factors to bfloat16
#: may cost at most where it adds up in quadrature. That type has the range of float32, and is closer beyond this.
MOST_UNDERFLOW = 2.0**-7
ENERGY_SHARES = (0.9, 0.99, 0.999)


Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found in one module; `error`, `norm`, `bound` and `child_norm` are Frobenius norms, not relative;
    `bound` leaves out what values below the smallest normal number lose, which is loss.

    `with_child` holds the product of the child's delta with each weighted parent's, `kept` how much of each parent lies
    in the child's row and column spaces, `sigma` the singular values of the exact sum.
    """

    error: float
    bound: float
    norm: float
    child_norm: float
    sigma: Array
    with_child: Array
    kept: Array
    meeting: Meeting


@dataclass(frozen=True, slots=True)
class Proven:
    """`receipt` as plain JSON values, `facts` of the child as a stranger would read them, and the Frobenius norm of
    each module's delta.
    """

    receipt: dict[str, Any]
    facts: AdapterFacts
    norms: Mapping[str, float]


def prove(
    plan: MergePlan,
    parent_files: Sequence[Path],
    out_dir: Path,
    outcomes: Mapping[str, Outcome],
    *,
    threads: int = 1,
    should_stop: Stop = never,
) -> Proven:
    """Read the child and its parents and hold them against the plan and what was promised and written.

    Raises `ReceiptFailed` with everything that is wrong.
    """
    facts = _reread(plan, out_dir)
    children = {module.name: module for module in facts.modules}
    with ExitStack() as files:
        readers = [files.enter_context(TensorReader(path)) for path in parent_files]
        child = files.enter_context(TensorReader(out_dir / WEIGHTS_FILE))

        def work(module: ModulePlan) -> Proof | list[Problem]:
            return _prove_module(module, children[module.name], outcomes[module.name], plan, [*readers, child])

        findings = for_each_module(plan, work, threads=threads, should_stop=should_stop)
    problems = [problem for found in findings.values() if isinstance(found, list) for problem in found]
    raise_all(
        ReceiptFailed,
        f"{len(problems)} checks of the merged files failed:",
        problems[:20],
        hint="nothing was registered; merge again with --dtype f32, and check the memory and disk of this machine",
    )
    proofs = {name: found for name, found in findings.items() if isinstance(found, Proof)}
    norms = {name: proof.child_norm for name, proof in proofs.items()}
    made = _receipt(plan, outcomes, proofs)
    raise_all(ReceiptFailed, "the output type is too narrow for this merge:", _range_problems(made))
    return Proven(made, facts, norms)


def fingerprint() -> dict[str, Any]:
    """What decides the last bits of the output besides the recipe: equal fingerprints give equal bytes."""
    return {"adapterctl": __version__, **computed_with()}


def _reread(plan: MergePlan, out_dir: Path) -> AdapterFacts:
    """Facts of the child by the rules of intake; key set, shapes, types and provenance are those of the plan."""
    try:
        header = read_header(out_dir / WEIGHTS_FILE)
        config = strict_json_object((out_dir / CONFIG_FILE).read_bytes(), what=CONFIG_FILE)
        facts = read_facts(config, header)
    except InvalidAdapter as error:
        raise ReceiptFailed(f"the merged files do not read as an adapter: {error}", problems=error.problems) from error
    raise_all(ReceiptFailed, "the merged files are not those of the plan:", _differences(plan, header, facts))
    return facts


def _differences(plan: MergePlan, header: Header, facts: AdapterFacts) -> list[Problem]:
    expected = {key: (dtype, shape) for key, dtype, shape in output_tensors(plan)}
    written = {entry.key: (entry.dtype, entry.shape) for entry in header.tensors}
    problems = [
        Problem("tensor_differs", f"{key} is {written.get(key)}, planned {expected.get(key)}")
        for key in sorted(expected.keys() | written.keys())
        if expected.get(key) != written.get(key)
    ]
    problems += [
        Problem("metadata_differs", f"{key} in the header is not what the plan says")
        for key, value in header_metadata(plan).items()
        if header.metadata.get(key) != value
    ]
    problems += [
        Problem("scaling_differs", f"{module.name} has scaling {module.scaling}, expected 1")
        for module in facts.modules
        if module.scaling != 1
    ]
    return problems


def _prove_module(
    module: ModulePlan, child: LoraModule, outcome: Outcome, plan: MergePlan, readers: Sequence[TensorReader]
) -> Proof | list[Problem]:
    """Everything that is wrong with the module, or what was measured. The last reader is the child's."""
    part = Part(len(readers) - 1, child.rank, -1.0, 1.0, child.a, child.b)
    parts = [*module.parts, part]
    # float32 holds every value of the narrower types, in half the memory; their products are float64
    wide = any("F64" in {part.a.dtype, part.b.dtype} for part in parts)
    stack = load_stack(parts, readers, np.float64 if wide else np.float32)
    rank = len(stack.c) - child.rank
    grams = Grams(gram_in_blocks(stack.a), gram_in_blocks(stack.b.T), stack.c, stack.blocks)
    problems = _value_problems(module, stack, grams, rank, plan)
    if module.bias_key:
        problems += _bias_problems(module, child, plan, readers)
    copied = _copied(module, stack, rank, plan)
    if not problems and _touched(stack, rank, copied):
        problems = [Problem("copy_differs", f"{module.name}: factors that should be the parents' bytes are not")]
    if problems:
        return problems
    parents = Grams(grams.a[:rank, :rank], grams.b[:rank, :rank], grams.c[:rank], grams.blocks[:-1])
    sigma = spectrum(parents)
    error, promised = exact_norm(grams), math.sqrt(outcome.error_squared)
    own = _Own(_norms(grams.a, child.rank), _norms(grams.b, child.rank), _alike(grams, child.rank))
    unit, tiny = ROUNDING[plan.recipe.dtype]
    lost = (tiny * math.sqrt(stack.a.shape[1]), tiny * math.sqrt(stack.b.shape[0]))
    rounded = _bound(own, _moved(own, copied, outcome.parts, unit, (0.0, 0.0)))
    moved = _moved(own, copied, outcome.parts, unit, lost)
    unsure = outcome.unsure + left_of(error, GRAM_FLOOR * size_of_parts(grams))
    bound = _bound(own, moved) + unsure
    problems = _row_problems(module, grams, outcome.parts, plan, moved)
    if outcome.parts is not None:
        problems += _promise_problems(module, grams, outcome.parts, moved, own, float(sigma[0]))
    if not abs(error - promised) <= bound:
        text = f"is {error:.3g} away from the exact sum, {promised:.3g} was promised, rounding explains {bound:.3g}"
        problems.append(Problem("error_differs", f"{module.name} {text}"))
    problems = problems or _byte_problems(child, outcome, readers[-1])
    if problems:
        return problems
    products = block_products(grams)
    return Proof(
        error=error,
        bound=rounded + unsure,
        norm=exact_norm(parents),
        child_norm=math.sqrt(max(0.0, products[-1, -1])),
        sigma=sigma,
        with_child=-products[-1, :-1],  # the child stands at coefficient -1 in the stack
        kept=retained(grams),
        meeting=meet(parents, [part.weight for part in module.parts]),
    )


@dataclass(frozen=True, slots=True)
class _Own:
    """Norms of the child's rows of A' and columns of B', (r,) each, and how much alike either are: `_alike`."""

    a: Array
    b: Array
    alike: tuple[float, float]


def _moved(
    own: _Own, copied: tuple[Mask, Mask], parts: Parts | None, unit: float, lost: tuple[float, float]
) -> tuple[Array, Array]:
    """How far each row of A' and each column of B' may be from what the method made exactly, (r,) each: by one rounding
    and by the products before it; not at all where it was copied.

    An element x was rounded to y with |y - x| <= unit |x| + tiny, and |x| <= |y| / (1 - unit) beyond tiny; `lost` is
    what tiny comes to over a row of A' and a column of B'.
    """
    moved_a, moved_b = (
        np.where(same, 0.0, (unit * norms + few) * (1 + 4 * unit))
        for same, norms, few in zip(copied, (own.a, own.b), lost, strict=True)
    )
    if parts is not None:
        moved_a[: len(parts.a)] += parts.product * parts.size_a
        moved_b[: len(parts.b)] += parts.product * parts.size_b
    return moved_a, moved_b


def _bound(own: _Own, moved: tuple[Array, Array]) -> float:
    """Bound of ||B'A' - B A|| (Frobenius) where row k of A is within `moved[0][k]` of A', column k of B within
    `moved[1][k]` of B'.

    With E = A' - A and D = diag(|b'_k|), ||B'E|| = ||(B' D⁻¹)(D E)|| <= ||B' D⁻¹||₂ ||D E||. The second factor is the
    root of Σ (|b'_k| moved[0][k])². The first is the largest singular value of columns of length one: 1 where they are
    orthogonal, so that roundings add up in quadrature, and √r where they are all the same, so that equal values, which
    are rounded alike, add up in line. E of B counts alike, and what both do together, of second order, by its sum.
    Nothing in it is random, so no value and no pattern of values breaks it.
    """
    of_a = own.alike[1] * float(np.linalg.norm(own.b * moved[0]))
    of_b = own.alike[0] * float(np.linalg.norm(own.a * moved[1]))
    return of_a + of_b + float(moved[0] @ moved[1])


def _alike(grams: Grams, rank: int) -> tuple[float, float]:
    """Bound of the largest singular value of the last `rank` rows of A, and columns of B, at length one.

    It is the root of the largest eigenvalue of their Gram matrix, which is no larger than the largest sum of the sizes
    in one of its rows (Gershgorin 1931).
    """
    bounds = []
    for square in (grams.a[-rank:, -rank:], grams.b[-rank:, -rank:]):
        norms = np.sqrt(square.diagonal())
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        bounds.append(math.sqrt(float(np.max(inverse * (np.abs(square) @ inverse)))))
    return bounds[0], bounds[1]


def _norms(square: Array, count: int) -> Array:
    """Norms of the last `count` vectors of a Gram matrix."""
    norms: Array = np.sqrt(square.diagonal()[-count:])
    return norms


def _row_problems(
    module: ModulePlan, grams: Grams, parts: Parts | None, plan: MergePlan, moved: tuple[Array, Array]
) -> list[Problem]:
    """Rows of A' and columns of B' that are not made of the parents'.

    A method that scales factors has every one known from the plan. One that works on Gram matrices combines them, so
    that what lies outside their span is rounding. Nothing is known here of methods that work on elements.
    """
    method, rank = find_method(plan.recipe.method), len(moved[0])
    if method.form not in {"factors", "grams"}:
        return []
    factors = method.function(grams.c[:-rank]) if method.form == "factors" else None
    # it may be made of directions of the span that are too weak to be told from rounding
    sizes = [np.zeros(rank)] * 2 if parts is None else [_filled(size, rank) for size in (parts.size_a, parts.size_b)]
    weak = GRAM_FLOOR * math.sqrt(len(grams.c) - rank)
    problems = []
    for key, what, square, bound, scale, size in (
        (module.a_key, "row", grams.a, moved[0], None if factors is None else factors.a, sizes[0]),
        (module.b_key, "column", grams.b, moved[1], None if factors is None else factors.b, sizes[1]),
    ):
        apart, floor = _apart(square, rank, scale)
        problems += _too_far(f"{key}: {what}", apart, bound + floor + weak * size, "away from what the parents' give")
    return problems


def _promise_problems(
    module: ModulePlan, grams: Grams, parts: Parts, moved: tuple[Array, Array], own: _Own, largest: float
) -> list[Problem]:
    """Rows, columns and rank-one parts that are not as promised; `largest` is the exact sum's largest singular value.

    Rounding moves a norm by no more than the vector, and <b_k a_k, Δ> by |E_b| |Δ a_k| + |E_a| |Δᵀ b_k| and less.
    """
    rank, count = len(moved[0]), len(parts.a)
    problems = []
    for what, found, promised, size, bound in (
        (f"{module.a_key}: row", own.a, parts.a, parts.size_a, moved[0]),
        (f"{module.b_key}: column", own.b, parts.b, parts.size_b, moved[1]),
    ):
        # known to (floor size)² in its square: see `left_of`
        floor = parts.floor * size
        unsure = floor * floor / np.maximum(np.maximum(promised, floor), np.finfo(float).tiny)
        apart = np.abs(found - _filled(promised, rank))
        problems += _too_far(what, apart, bound + _filled(unsure, rank), "longer or shorter than promised")
    inner = (grams.a[-rank:, :-rank] * grams.b[-rank:, :-rank]) @ grams.c[:-rank]
    known = GRAM_FLOOR**2 * own.a * own.b
    known[:count] += parts.floor**2 * parts.size_a * parts.size_b
    bound = largest * (moved[0] * own.b + moved[1] * own.a + moved[0] * moved[1]) + 4 * known * size_of_parts(grams)
    apart = np.abs(inner - _filled(parts.inner, rank))
    return problems + _too_far(f"{module.name}: part", apart, bound, "off in its product with the exact sum")


def _filled(values: Array, rank: int) -> Array:
    """With zeros for the rows that fill a module up to the rank of the others."""
    filled = np.zeros(rank)
    filled[: len(values)] = values
    return filled


def _apart(square: Array, rank: int, scale: Array | None) -> tuple[Array, Array]:
    """How far each of the last `rank` vectors of a Gram matrix is from the span of the others, or from the k-th of them
    times scale[k], (r,); and what float64 leaves of that.
    """
    first = len(square) - rank
    parents, child = square[:first, :first], square[first:, :first]
    if scale is None:
        root = inverse_root(parents)
        fit = (child @ root.T) @ root
    else:
        fit = np.eye(rank, first) * scale
    squared = square.diagonal()[first:] + np.sum((fit @ parents - 2 * child) * fit, axis=1)
    floor = GRAM_FLOOR * (_norms(square, rank) + np.abs(fit) @ _norms(parents, first))
    return np.sqrt(np.maximum(squared, 0.0)), floor


def _too_far(what: str, apart: Array, bound: Array, how: str) -> list[Problem]:
    wrong = np.flatnonzero(~(apart <= bound))
    if not len(wrong):
        return []
    k = int(wrong[np.argmax(apart[wrong])])
    text = f"{what} {k} is {apart[k]:.3g} {how}, rounding explains {bound[k]:.3g} ({len(wrong)} of {len(apart)} are so)"
    return [Problem("factors_differ", text)]


def _byte_problems(child: LoraModule, outcome: Outcome, reader: TensorReader) -> list[Problem]:
    """Tensors that read back as other bytes than went out; a rest that was not written was found to be zeros."""
    entries = {entry.key: entry for entry in (child.a, child.b, child.bias) if entry is not None}
    return [
        Problem("bytes_differ", f"{was.key} does not read back as it was written: check disk and memory")
        for was in outcome.written
        if checksum(reader.raw(entries[was.key])[: was.size]) != was.checksum
    ]


def _value_problems(module: ModulePlan, stack: Stack, grams: Grams, rank: int, plan: MergePlan) -> list[Problem]:
    a, b = stack.a[rank:], stack.b[:, rank:]
    for key, square, values in ((module.a_key, grams.a, a), (module.b_key, grams.b, b)):
        # a finite sum of squares has finite values; only large ones in float64 make another one
        if not (np.isfinite(square.diagonal()[rank:]).all() or np.isfinite(values).all()):
            return [_not_finite(key)]
    # what is made of the deltas' elements has directions that no parent has
    of_parents = find_method(plan.recipe.method).form != "deltas"
    if of_parents and (np.any(a[rank:]) or np.any(b[:, rank:])):
        return [Problem("padding_not_zero", f"{module.name} has values beyond the sum of its parents' ranks")]
    return []


def _not_finite(key: str) -> Problem:
    hint = "its values are too large for the output type: use --dtype f32"
    return Problem("not_finite", f"{key} holds values that are not finite", hint)


def _copied(module: ModulePlan, stack: Stack, rank: int, plan: MergePlan) -> tuple[Mask, Mask]:
    """Which rows of A' and columns of B' a method that keeps factors should only have copied; `rank` of the parents."""
    method, of_child = find_method(plan.recipe.method), len(stack.c) - rank
    masks = np.zeros((2, of_child), bool)
    if method.form == "factors":
        factors = method.function(stack.c[:rank])
        for part, block in zip(module.parts, stack.blocks, strict=False):
            own = slice(block.start, block.stop)
            kept = plan.recipe.dtype in {part.a.dtype, "F64"} and part.a.dtype == part.b.dtype
            masks[:, own] = kept & (np.stack([factors.a[own], factors.b[own]]) == 1)
    return masks[0], masks[1]


def _touched(stack: Stack, rank: int, copied: tuple[Mask, Mask]) -> bool:
    """Whether anything that should only have been copied was changed.

    Values are compared, not bytes: the stack holds every stored value exactly.
    """
    for same, side in zip(copied, (stack.a, stack.b.T), strict=True):
        own, parents = side[rank:], side[:rank]
        if same.any():
            rows = slice(rank) if same[:rank].all() else np.flatnonzero(same)  # one look at all is faster than at parts
            if not np.array_equal(own[rows], parents[rows]):
                return True
    return False


def _bias_problems(
    module: ModulePlan, child: LoraModule, plan: MergePlan, readers: Sequence[TensorReader]
) -> list[Problem]:
    assert child.bias is not None  # read_facts refuses a module without, where the config says lora_bias
    exact = np.zeros(child.d_out)
    size = np.zeros(child.d_out)
    for part in module.parts:
        if part.bias is not None:
            share = part.coefficient * readers[part.parent].read(part.bias).astype(np.float64)
            exact += share
            size += np.abs(share)
    written = readers[-1].read(child.bias)
    if not np.isfinite(written).all():
        return [_not_finite(child.bias.key)]
    unit, tiny = ROUNDING[plan.recipe.dtype]
    difference = np.abs(written - exact)
    if np.all(difference <= unit * np.abs(exact) + tiny + 1e-12 * size):
        return []
    return [Problem("bias_differs", f"{module.bias_key} is not the weighted sum of the parents' biases")]


def _receipt(plan: MergePlan, outcomes: Mapping[str, Outcome], proofs: Mapping[str, Proof]) -> dict[str, Any]:
    values = list(proofs.values())
    norm = _root_sum(proof.norm for proof in values)
    error = _root_sum(proof.error for proof in values)
    promised = math.sqrt(math.fsum(outcome.error_squared for outcome in outcomes.values()))
    return {
        "v": 1,
        "passed": True,
        "loss": _short(relative(error, norm)),
        "predicted_loss": _short(relative(promised, norm)),
        "loss_bound": _short(relative(_root_sum(proof.bound for proof in values), norm)),
        "norm": _short(norm),
        "norm_ratio": _short(relative(_root_sum(proof.child_norm for proof in values), norm)),
        "modules": len(values),
        "rank": plan.recipe.rank,
        "dtype": plan.recipe.dtype,
        "checks": [
            "key set, shapes and types are those of the plan",
            "the recipe stands in the header",
            "every module has scaling 1",
            "every value is finite",
            "padding is zero",
            "factors that are only copied are unchanged",
            "every row of A and column of B is the promised one within rounding",
            "the measured error is the promised one within rounding, module by module",
            "every tensor reads back as it was written",
        ],
        "parents": _parents(plan, values, norm),
        "pairs": _pairs(plan, values),
        "spectrum": _spectrum(plan, values),
        "layers": _layers(plan, outcomes, proofs),
        "fingerprint": fingerprint(),
    }


def _range_problems(receipt: Mapping[str, Any]) -> list[Problem]:
    """Whether more was lost than rounding explains: module by module it was found to be underflow at most."""
    lost = receipt["loss"] - receipt["predicted_loss"] - receipt["loss_bound"]
    if receipt["norm"] == 0 or lost <= MOST_UNDERFLOW:
        return []
    text = f"values below the range of {receipt['dtype']} cost {receipt['loss']:.3g} of the exact sum"
    return [Problem("underflow", text, "use --dtype f32, or --method svd, which makes both factors of one size")]


def relative(error: float, norm: float) -> float:
    """error / norm; where the parents cancel out and nothing is left to compare with, the error itself."""
    return error / norm if norm > 0 else error


def _layers(plan: MergePlan, outcomes: Mapping[str, Outcome], proofs: Mapping[str, Proof]) -> dict[str, Any]:
    """Every module in a column each, in the plan's order: what a heat map of the merge shows, at three digits.

    `cosine`, `row_overlap` and `column_overlap` are means over all pairs of parents, null where one parent alone has
    the module. `retention` has a list for every parent, null where it lacks the module; `dominant` is the parent (its
    place in the recipe) with the largest norm there, `dominance` that norm as a share of the sum of all.
    """
    values = list(proofs.values())
    held = [_energy(proof.sigma) for proof in values]
    meetings = [proof.meeting for proof in values]
    norms = [np.sqrt(np.maximum(meeting.products.diagonal(), 0.0)) for meeting in meetings]
    places = range(len(plan.recipe.parents))
    promised = [math.sqrt(outcomes[name].error_squared) for name in proofs]
    return {
        "module": list(proofs),
        "norm": [_brief(proof.norm) for proof in values],
        "norm_ratio": [_brief(relative(proof.child_norm, proof.norm)) for proof in values],
        "loss": [_brief(relative(proof.error, proof.norm)) for proof in values],
        "predicted_loss": [_brief(relative(p, proof.norm)) for p, proof in zip(promised, values, strict=True)],
        "stable_rank": [_brief(_stable_rank(proof.sigma)) for proof in values],
        "energy_at_rank": [_brief(float(energy[min(plan.recipe.rank, len(energy)) - 1])) for energy in held],
        "rank_for_99": [int(np.searchsorted(energy, 0.99 * (1 - 1e-12)) + 1) for energy in held],
        "cosine": [_mean_of_pairs(_cosines(meeting.products)) for meeting in meetings],
        "row_overlap": [_mean_of_pairs(meeting.rows) for meeting in meetings],
        "column_overlap": [_mean_of_pairs(meeting.columns) for meeting in meetings],
        "retention": [
            [_brief(float(p.kept[p.meeting.parents.index(i)])) if i in p.meeting.parents else None for p in values]
            for i in places
        ],
        "dominant": [m.parents[int(np.argmax(n))] for m, n in zip(meetings, norms, strict=True)],
        "dominance": [_brief(float(n.max() / n.sum())) if n.any() else 0.0 for n in norms],
    }


def _cosines(products: Array) -> Array:
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    sizes = np.outer(norms, norms)
    cosines: Array = np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 0)
    return cosines


def _mean_of_pairs(square: Array) -> float | None:
    """The mean above the diagonal of a (parents, parents) matrix."""
    count = len(square)
    return _brief(float(np.mean(square[np.triu_indices(count, 1)]))) if count > 1 else None


def _parents(plan: MergePlan, proofs: Sequence[Proof], norm: float) -> list[dict[str, Any]]:
    """How much of each parent is in the sum, and how much of it the child's row and column spaces still hold."""
    child = _root_sum(proof.child_norm for proof in proofs)
    rows = []
    for place, parent in enumerate(plan.recipe.parents):
        found = [(p, p.meeting.parents.index(place)) for p in proofs if place in p.meeting.parents]
        norms = [math.sqrt(max(0.0, proof.meeting.products[i, i])) for proof, i in found]
        whole = _root_sum(norms)
        kept = _root_sum(size * proof.kept[i] for size, (proof, i) in zip(norms, found, strict=True))
        product = math.fsum(proof.with_child[i] for proof, i in found)
        rows.append(
            {
                "digest": parent.digest,
                "weight": parent.weight,
                "modules": len(found),
                "norm": _short(whole),
                "share": _short(relative(whole, norm)),
                "cosine": _short(product / (whole * child)) if whole * child > 0 else 0.0,
                "retention": _short(kept / whole) if whole > 0 else 1.0,
            }
        )
    return rows


def _pairs(plan: MergePlan, proofs: Sequence[Proof]) -> list[dict[str, Any]]:
    """`Pair` of every two parents as JSON, each called by its digest; of many the `MOST_PAIRS` of the largest
    cosines, of either sign.
    """
    digests = [parent.digest for parent in plan.recipe.parents]
    found = pairs([proof.meeting for proof in proofs], digests)
    if len(found) > MOST_PAIRS:
        found = tuple(sorted(found, key=lambda pair: -abs(pair.cosine))[:MOST_PAIRS])
    rows = [asdict(pair) for pair in found]
    return [{key: _short(v) if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def _spectrum(plan: MergePlan, proofs: Sequence[Proof]) -> dict[str, Any]:
    """Energy of the exact sum that the best adapter of a uniform rank can hold, over all modules."""
    width = max(len(proof.sigma) for proof in proofs)
    energy = np.zeros(width)
    for proof in proofs:
        energy[: len(proof.sigma)] += proof.sigma**2
    held = _energy(np.sqrt(energy))
    return {
        "energy_at_rank": _short(float(held[min(plan.recipe.rank, width) - 1])),
        "rank_for": {f"{share:g}": int(np.searchsorted(held, share * (1 - 1e-12)) + 1) for share in ENERGY_SHARES},
        "stable_rank": _short(float(np.median([_stable_rank(proof.sigma) for proof in proofs]))),
    }


def _energy(sigma: Array) -> Array:
    """Share of the energy that the largest 1, 2, ... singular values hold."""
    energy = np.cumsum(sigma**2)
    return energy / energy[-1] if energy[-1] > 0 else np.ones_like(energy)


def _stable_rank(sigma: Array) -> float:
    return float(np.sum(sigma**2) / sigma[0] ** 2) if sigma[0] > 0 else 0.0


def _root_sum(norms: Iterable[float]) -> float:
    return math.sqrt(math.fsum(norm**2 for norm in norms))


def _short(value: float) -> float:
    """Six digits: more would be noise, and receipts are stored with every merge."""
    return float(f"{value:.6g}")


def _brief(value: float) -> float:
    """Three digits: what the colour of one field of a heat map can show."""
    return float(f"{value:.3g}")

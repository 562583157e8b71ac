"""Resize: a version at a smaller rank, as a recipe of one parent. What is asked for (a rank, a share of the energy, a
size) becomes a rank here, before the recipe is hashed; from there on it is a merge, with all that follows one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace

from ..api import PlanView, Submitted
from ..domain.errors import InvalidInput, Refused
from ..domain.plan import build_plan, header_metadata, output_tensors
from ..domain.recipe import RESIZE, MergeRequest, ResizeRequest
from ..domain.refs import ParentRef, Ref
from ..ports import Doorbell, Folders, Ledger
from .merge import Preflight, plan_merge, preflight, request_merge
from .register import WEIGHTS_FILE
from .resolve import resolve


def request_resize(
    ledger: Ledger, folders: Folders, bell: Doorbell, request: ResizeRequest, *, actor: str
) -> Submitted:
    """Commit the job and ring; or return the version, or the live job, that the same recipe has already."""
    return request_merge(ledger, bell, _as_merge(ledger, folders, request), actor=actor)


def plan_resize(ledger: Ledger, folders: Folders, request: ResizeRequest, *, most_work: float = math.inf) -> PlanView:
    """What it would give, at this rank and at others; writes nothing. Raises `Refused` as `plan_merge` does."""
    merge = _as_merge(ledger, folders, request, most_work=most_work)
    return plan_merge(ledger, folders, merge, most_work=most_work)


def _as_merge(ledger: Ledger, folders: Folders, request: ResizeRequest, *, most_work: float = math.inf) -> MergeRequest:
    """Raises `InvalidInput` unless one of rank, energy and size is asked for, and makes sense for this version."""
    request.check()
    version = resolve(ledger, request.ref)
    whole = version.summary.rank
    merge = MergeRequest(
        parents=(ParentRef(Ref(version.name, number=version.number)),),
        into=request.into or version.name,
        method=RESIZE,
        rank=whole,
        dtype=request.dtype,
        suites=request.suites,
    )
    if request.rank is not None:
        if request.rank > whole:
            raise InvalidInput(
                f"{version.label} has rank {whole}, {request.rank} is more",
                hint=f"a larger rank holds nothing new: --rank {whole} at most",
            )
        return replace(merge, rank=request.rank)
    ready = preflight(ledger, merge)
    if request.energy is None:
        return replace(merge, rank=_rank_for_size(ready, request.size_bytes or 0))
    # deferred: numpy is only needed when factors are read
    from ..merging.forecast import rank_for_energy

    with folders(version) as folder:
        rank = rank_for_energy(ready.plan(), [folder / WEIGHTS_FILE], request.energy, most_work=most_work)
    return replace(merge, rank=rank)


def _rank_for_size(ready: Preflight, size_bytes: int) -> int:
    """The largest rank whose weights file, header included, has this size at most."""
    # deferred: see _as_merge
    from ..merging.tensors import file_size

    def size_at(rank: int) -> int:
        plan = build_plan(replace(ready.recipe, rank=rank), ready.facts)
        return file_size(output_tensors(plan), header_metadata(plan))

    fitting = bisect_right(range(1, ready.recipe.rank + 1), size_bytes, key=size_at)
    if fitting == 0:
        raise Refused(
            f"{ready.labels[0]} does not fit into {size_bytes:,} bytes: at rank 1 it has {size_at(1):,}",
            hint="allow more, or store less with --dtype bf16",
        )
    return fitting

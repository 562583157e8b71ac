"""One adapter at a smaller rank: which rank a wish becomes, and that it is a merge from then on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_adapter
from tiny_merge import WEIGHTS, deltas, distance

from adapterctl.registry.domain.errors import InvalidInput, Refused
from adapterctl.registry.domain.recipe import MergeRequest, ResizeRequest
from adapterctl.registry.domain.refs import parse_parent, parse_ref
from adapterctl.registry.services.local import LocalRegistry

OLD = "translate:v1"


def asked(ref: str = OLD, **wish: object) -> ResizeRequest:
    return ResizeRequest(parse_ref(ref), **wish)


def made(registry: LocalRegistry, request: ResizeRequest) -> str:
    *_, job = registry.follow(registry.resize(request).job.id, timeout_s=120)
    assert job.error is None
    return registry.ledger.versions_by_id([job.result["version_id"]])[job.result["version_id"]].label


def energy_at(folder: Path) -> np.ndarray:
    """Share of the squared norm that the best uniform rank 1, 2, ... keeps, by dense decompositions."""
    squares = [np.linalg.svd(delta, compute_uv=False) ** 2 for delta in deltas(folder).values()]
    held = np.cumsum(sum(np.pad(square, (0, 16))[:16] for square in squares))
    return held / held[-1]


@pytest.fixture(scope="module")
def source(two_parents: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pulled") / "old"
    two_parents.pull(parse_ref(OLD), folder)
    return folder


def test_energy_becomes_the_smallest_rank_that_keeps_it(two_parents: LocalRegistry, source: Path):
    held = energy_at(source)

    ranks = {share: two_parents.plan_resize(asked(energy=share)).rank for share in (0.01, 0.5, 0.8, 0.95, 1.0)}

    assert ranks == {share: 1 + int(np.argmax(held >= share - 1e-12)) for share in ranks}


def test_a_size_becomes_the_largest_rank_whose_file_fits_to_the_byte(two_parents: LocalRegistry, tmp_path: Path):
    label = made(two_parents, asked(rank=2, into="two"))
    two_parents.pull(parse_ref(label), tmp_path / "two")
    size = (tmp_path / "two" / WEIGHTS).stat().st_size

    assert [two_parents.plan_resize(asked(size_bytes=size + more)).rank for more in (-1, 0, 10**9)] == [1, 2, 4]
    with pytest.raises(Refused, match="at rank 1 it has"):
        two_parents.plan_resize(asked(size_bytes=100))


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({}, "can be resized to a rank, to a share"),
        ({"rank": 2, "energy": 0.9}, "can be resized to a rank, to a share"),
        ({"rank": 5}, "has rank 4, 5 is more"),
        ({"rank": 0}, "rank 0 is not a positive number"),
        ({"energy": 0.0}, "is no share"),
        ({"energy": float("nan")}, "is no share"),
        ({"rank": 2, "dtype": "int8"}, "dtype 'int8' is unknown"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_in_words(two_parents: LocalRegistry, wish: dict[str, object], words: str):
    with pytest.raises(InvalidInput, match=words):
        two_parents.resize(asked(**wish))


def test_a_smaller_version_is_the_best_one_and_follows_its_parent(
    two_parents: LocalRegistry, source: Path, tmp_path: Path
):
    label = made(two_parents, asked(rank=3))
    two_parents.pull(parse_ref(label), tmp_path / "three")
    shown = two_parents.version(parse_ref(label))

    lost = np.sqrt(1 - energy_at(source)[2])
    assert distance(deltas(tmp_path / "three"), deltas(source)) == pytest.approx(lost, abs=1e-5)
    assert shown.receipt["loss"] == pytest.approx(lost, abs=1e-5)
    assert shown.receipt["spectrum"]["energy_at_rank"] == pytest.approx(1 - lost**2, abs=1e-5)
    assert len(shown.receipt["layers"]["energy_at_rank"]) == shown.modules
    assert (shown.name, shown.method, shown.rank) == ("translate", "resize", 3)
    assert [(parent.ref, parent.weight) for parent in shown.parents] == [(OLD, 1.0)]
    assert two_parents.verify(parse_ref(label)).recipe == "identical"
    assert label in two_parents.recall(parse_ref(OLD), reason="leaked").descendants
    two_parents.undo_recall(parse_ref(OLD), reason="it was not")


def test_a_family_is_rebuilt_through_a_smaller_version(two_parents: LocalRegistry, tmp_path: Path):
    newer = two_parents.register(str(write_tiny_adapter(tmp_path / "newer", seed=60)), name="translate").version
    made(two_parents, asked(rank=1, into="small"))
    merged = two_parents.merge(MergeRequest(tuple(map(parse_parent, ("small:v1", "chat:v1"))), into="omni"))
    list(two_parents.follow(merged.job.id, timeout_s=120))

    job = two_parents.rebuild(parse_ref(OLD), parse_ref(newer.ref), until=parse_ref("omni:v1")).job
    *_, first = two_parents.follow(job.id, timeout_s=120)
    *_, second = two_parents.follow(first.result["jobs"][0], timeout_s=120)

    assert second.error is None
    small = two_parents.version(parse_ref("small:v2"))
    assert ([parent.ref for parent in small.parents], small.rank, small.method) == ([newer.ref], 1, "resize")
    assert two_parents.version(parse_ref("omni:v2")).parents[0].ref == "small:v2"

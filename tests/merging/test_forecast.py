"""What a plan promises is what the merge then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LINEAR, write_tiny_adapter
from tiny_merge import WEIGHTS, deltas, plan_of, run_merge, write_factors

from adapterctl.registry.domain.errors import Refused
from adapterctl.registry.merging.forecast import TOO_MUCH, forecast, rank_for_energy
from adapterctl.registry.merging.method import methods


def test_a_forecast_is_what_the_merge_then_loses(tmp_path: Path):
    folders = [write_tiny_adapter(tmp_path / f"p{i}", rank=8, seed=i) for i in range(2)]
    plan = plan_of(folders, weights=(1.0, 0.4), method="svd", rank=5)

    forecasts, *_ = forecast(plan, [folder / WEIGHTS for folder in folders], ["a", "b"])

    assert {row.rank for row in forecasts if row.method == "svd"} >= {5, 8}, "the asked rank and the default"
    works_on_elements = {method.name for method in methods().values() if method.form in {"elements", "deltas"}}
    assert {row.method for row in forecasts if row.loss is None} == works_on_elements
    for row in forecasts:
        merged = run_merge(
            folders, tmp_path / f"{row.method}{row.rank}", weights=(1.0, 0.4), method=row.method, rank=row.rank
        )
        assert row.loss is None or row.loss == pytest.approx(merged.receipt["loss"], abs=2e-6)
        assert row.size_bytes == merged.plan.size_bytes


def test_only_methods_that_can_take_the_parents_are_forecast(tmp_path: Path):
    folders = [write_tiny_adapter(tmp_path / f"p{i}", rank=3 + i, seed=i) for i in range(3)]

    forecasts, *_ = forecast(plan_of(folders), [folder / WEIGHTS for folder in folders], ["a", "b", "c"])

    named = {row.method for row in forecasts}
    assert {"cat", "svd", "tsv", "model_stock"} <= named
    assert not {"slerp", "ties", "peft_linear"} & named, "slerp takes two parents, the others equal ranks"


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "slerp", "options": {"t": 0.1}, "rank": 3},
        {"method": "ties", "options": {"density": 0.8}},
        {"method": "ties_svd", "options": {"density": 0.8}, "rank": 3},
    ],
    ids=["grams", "elements", "deltas"],
)
def test_the_forecast_of_the_method_that_was_asked_for_has_its_options(tmp_path: Path, asked: dict[str, Any]):
    folders = [write_tiny_adapter(tmp_path / f"p{i}", seed=i) for i in range(2)]

    forecasts, *_ = forecast(plan_of(folders, **asked), [folder / WEIGHTS for folder in folders], ["a", "b"])

    (row,) = (row for row in forecasts if row.method == asked["method"])
    merged = run_merge(folders, tmp_path / "out", **asked)
    assert row.loss == pytest.approx(merged.receipt["loss"], abs=2e-6)
    assert row.rank == merged.plan.recipe.rank


def test_the_smallest_rank_with_a_small_loss_is_named(tmp_path: Path):
    random = np.random.default_rng(0)
    sizes = np.array([1.0, 0.5, 1e-3, 1e-3])
    folders = [
        write_factors(
            tmp_path / f"p{i}", {"m": (random.normal(size=(4, 30)) * sizes[:, None], random.normal(size=(30, 4)))}
        )
        for i in range(2)
    ]

    forecasts, *_ = forecast(plan_of(folders), [folder / WEIGHTS for folder in folders], ["a", "b"])

    named = [row for row in forecasts if "at most 1%" in row.note]
    assert [row.rank for row in named] == [4]
    assert named[0].loss is not None
    assert named[0].loss <= 0.01


def test_a_pair_describes_the_adapters_whatever_the_signs_of_their_weights(tmp_path: Path):
    linear = dict(list(LINEAR.items())[:2])
    folders = [
        write_tiny_adapter(tmp_path / "p0", seed=0),
        write_tiny_adapter(tmp_path / "p1", seed=1, linear=linear),
    ]
    first, second = (deltas(folder) for folder in folders)
    norms = [np.sqrt(sum(np.sum(d**2) for d in side.values())) for side in (first, second)]
    cosine = sum(float(np.sum(first[name] * second[name])) for name in linear) / (norms[0] * norms[1])

    for weights in ((1.0, 1.0), (2.0, -1.0)):
        plan = plan_of(folders, weights=weights)
        _, (pair,), _ = forecast(plan, [folder / WEIGHTS for folder in folders], ["a", "b"])

        assert (pair.first, pair.second, pair.shared_modules) == ("a", "b", 2)
        assert pair.cosine == pytest.approx(cosine)
        assert pair.norm_ratio == pytest.approx(abs(weights[0] / weights[1]) * norms[0] / norms[1])


def test_interference_is_told_for_all_and_for_each_layer_that_two_parents_share(tmp_path: Path):
    shared = {name: shape for name, shape in LINEAR.items() if "layers.1" not in name or "q_proj" in name}
    folders = [
        write_tiny_adapter(tmp_path / "p0", seed=0, linear=LINEAR | {"lm_head": (12, 16)}),
        write_tiny_adapter(tmp_path / "p1", seed=1, linear=shared | {"lm_head": (12, 16)}),
    ]
    first, second = (deltas(folder) for folder in folders)

    _, (pair,), found = forecast(plan_of(folders, weights=(1.0, -2.0)), [f / WEIGHTS for f in folders], ["a", "b"])

    groups = {
        "all": list(second),
        "0": [name for name in shared if "layers.0" in name],
        "1": [name for name in shared if "layers.1" in name],
        "-": ["lm_head"],
    }
    assert [(each.first, each.second, each.layer) for each in found] == [("a", "b", layer) for layer in groups]
    for each, names in zip(found, groups.values(), strict=True):
        one, other = (np.concatenate([side[name].ravel() for name in names]) for side in (first, second))
        assert each.sign_conflict == pytest.approx(np.mean(one * other < 0))
        alone = [
            d for name, d in first.items() if each.layer == "all" or f"layers.{each.layer}." in name or name in names
        ]
        norm = np.sqrt(sum(np.sum(d**2) for d in alone))  # of everything that the parent has there
        assert each.cosine == pytest.approx(one @ other / (norm * np.linalg.norm(other)))
    assert (found[0].cosine, found[0].row_overlap) == (pair.cosine, pair.row_overlap)


def test_signs_of_a_tall_module_are_counted_on_some_of_its_rows(tmp_path: Path):
    tall = {"layers.0.up": (4000, 8)}
    folders = [write_tiny_adapter(tmp_path / f"p{i}", seed=i, linear=tall) for i in range(2)]
    whole = np.prod([deltas(folder)["layers.0.up"] for folder in folders], axis=0)

    *_, found = forecast(plan_of(folders), [folder / WEIGHTS for folder in folders], ["a", "b"])
    *_, same = forecast(plan_of(folders[:1] * 2), [folders[0] / WEIGHTS] * 2, ["a", "a"])

    # rows are alike here: 128 x 8 elements of independent rows, one standard deviation is below 0.03
    assert found[0].sign_conflict == pytest.approx(np.mean(whole < 0), abs=0.1)
    assert [each.sign_conflict for each in same] == [0.0, 0.0]


def test_an_adapter_overlaps_itself_wholly(tmp_path: Path):
    folder = write_tiny_adapter(tmp_path / "p")

    _, (pair,), _ = forecast(plan_of([folder, folder]), [folder / WEIGHTS] * 2, ["a", "a"])

    assert (pair.cosine, pair.row_overlap, pair.column_overlap) == pytest.approx((1, 1, 1))


def test_where_work_is_limited_a_rule_on_deltas_has_no_loss_and_too_much_on_grams_is_refused(tmp_path: Path):
    folders = [write_tiny_adapter(tmp_path / f"p{i}", seed=i, linear={"q_proj": (512, 64)}) for i in range(2)]
    files, labels = [folder / WEIGHTS for folder in folders], ["a", "b"]
    dense, plain = plan_of(folders, method="ties_svd", rank=3), plan_of(folders, method="svd", rank=3)
    grams_alone = 5e6

    limited, *others = forecast(dense, files, labels, most_work=grams_alone)
    whole, *same = forecast(dense, files, labels)

    assert [(row.loss, row.note) for row in limited if row.method == "ties_svd"] == [(None, TOO_MUCH)]
    assert [row for row in limited if row.method != "ties_svd"] == [row for row in whole if row.method != "ties_svd"]
    assert others == same
    on_factors = plan_of(folders, method="knots_ties", rank=3)  # of the same form, but it forms no delta
    assert forecast(on_factors, files, labels, most_work=grams_alone) == forecast(on_factors, files, labels)
    assert forecast(plain, files, labels, most_work=grams_alone) == forecast(plain, files, labels)
    with pytest.raises(Refused, match="times the work"):
        forecast(plan_of(folders * 32, method="svd", rank=3), files * 32, labels * 32, most_work=grams_alone)
    with pytest.raises(Refused, match="times the work"):
        rank_for_energy(plain, files, 0.9, most_work=1)

"""Carrying out a plan: which files appear, what stops it, and what stays untouched."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import encode, write_tiny_adapter
from tiny_merge import WEIGHTS, deltas, distance, exact_sum, facts_of, plan_of, run_merge, write_factors

from adapterctl.registry.domain.errors import Corrupt, JobCancelled, Refused
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.domain.plan import build_plan
from adapterctl.registry.domain.recipe import LayerWeights, recipe_from_json
from adapterctl.workers import engine, receipt


@pytest.fixture
def parents(tmp_path: Path) -> list[Path]:
    return [write_tiny_adapter(tmp_path / f"p{i}", seed=i, rank=2 + i, alpha=3) for i in range(2)]


def files_of(folders: list[Path]) -> list[Path]:
    return [folder / WEIGHTS for folder in folders]


def test_the_folder_holds_three_files_and_nothing_else(parents: list[Path], tmp_path: Path):
    merged = run_merge(parents, tmp_path / "out")

    assert sorted(path.name for path in merged.folder.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


def test_the_header_holds_a_recipe_that_gives_its_digest(parents: list[Path], tmp_path: Path):
    merged = run_merge(parents, tmp_path / "out", weights=(0.25, 2.0))

    metadata = read_header(merged.folder / WEIGHTS).metadata
    recipe = recipe_from_json(json.loads(metadata["adapterctl.recipe"]))
    assert recipe == merged.plan.recipe
    assert metadata["adapterctl.recipe_digest"] == recipe.digest
    assert metadata["format"] == "pt"


def test_the_same_recipe_gives_the_same_bytes_in_every_folder(parents: list[Path], tmp_path: Path):
    one = run_merge(parents, tmp_path / "here" / "out", method="svd")
    other = run_merge(parents, tmp_path / "there" / "elsewhere", method="svd", threads=3)

    for path in one.folder.iterdir():
        assert path.read_bytes() == (other.folder / path.name).read_bytes()


def test_the_model_card_names_method_weights_and_parents_by_digest(parents: list[Path], tmp_path: Path):
    merged = run_merge(parents, tmp_path / "out", weights=(0.25, 2.0))

    card = (merged.folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "tiny/base"\nbase_model_relation: adapter\nlibrary_name: peft\n')
    for parent in merged.plan.recipe.parents:
        assert f"| {parent.weight} | `sha256:{parent.digest}` |" in card
    assert "p0" not in card


def test_cat_copies_bytes_where_weight_times_scaling_is_one(tmp_path: Path):
    parents = [write_tiny_adapter(tmp_path / f"p{i}", seed=i, rank=4, alpha=4, dtype="BF16") for i in range(2)]

    merged = run_merge(parents, tmp_path / "out", method="cat")

    child = (merged.folder / WEIGHTS).read_bytes()
    for module in facts_of(parents[1]).modules:
        rows = (parents[1] / WEIGHTS).read_bytes()[module.a.begin : module.a.end]
        assert rows in child


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_cat_leaves_b_alone_and_scales_a(tmp_path: Path, dtype: str):
    parents = [write_tiny_adapter(tmp_path / f"p{i}", seed=i, dtype=dtype) for i in range(2)]

    merged = run_merge(parents, tmp_path / "out", weights=(0.3, -0.7), method="cat")

    assert (
        distance(deltas(merged.folder), exact_sum(parents, (0.3, -0.7)))
        <= {"F32": 6e-8, "BF16": 4e-3, "F16": 5e-4}[dtype]
    )


@pytest.mark.parametrize(("dtype", "wanted"), [("BF16", "BF16"), ("F16", "F16"), ("BF16", "F16"), ("F16", "F32")])
def test_cat_rounds_every_product_of_16_bits_once(tmp_path: Path, dtype: str, wanted: str):
    every = np.arange(1 << 16, dtype=np.uint16)
    values = (every.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else every.view(np.float16)
    limit = 6e4 if "F16" in {dtype, wanted} else 3e38
    values = np.where(np.abs(values) <= limit, values, 0).astype(np.float32).reshape(4, -1)  # NaN is not below it
    b = np.ones((3, 4))
    parents = [write_factors(tmp_path / f"p{i}", {"m": (values, b)}, dtype=dtype) for i in range(2)]
    plan, out = plan_of(parents, weights=(0.3, -0.7), method="cat", dtype=wanted.lower()), tmp_path / "out"
    out.mkdir()

    engine.merge(plan, files_of(parents), out)

    wide = np.float32 if wanted in {"BF16", "F16"} else np.float64
    scaled = np.concatenate([values.astype(wide) * wide(weight) for weight in (0.3, -0.7)])
    rows = facts_of(out).modules[0].a
    assert (out / WEIGHTS).read_bytes()[rows.begin : rows.end] == encode(scaled, wanted).tobytes()


def test_modules_of_one_parent_alone_are_kept(tmp_path: Path):
    random = np.random.default_rng(0)
    parents = [
        write_factors(tmp_path / f"p{i}", {name: (random.normal(size=(2, 5)), random.normal(size=(4, 2)))})
        for i, name in enumerate("ab")
    ]

    merged = run_merge(parents, tmp_path / "out", weights=(1.0, 0.5))

    assert distance(deltas(merged.folder), exact_sum(parents, (1.0, 0.5))) == 0


@pytest.mark.parametrize("method", ["tsv", "ties", "peft_linear", "dare_linear", "ties_svd"])
def test_the_loss_is_known_before_anything_is_written(tmp_path: Path, method: str):
    parents = [write_tiny_adapter(tmp_path / f"p{i}", seed=i) for i in range(2)]

    predicted = engine.predict_loss(plan_of(parents, method=method), files_of(parents))

    assert predicted == pytest.approx(run_merge(parents, tmp_path / "out", method=method).receipt["loss"], rel=1e-5)


def test_another_seed_gives_another_merge(tmp_path: Path):
    parents = [write_tiny_adapter(tmp_path / f"p{i}", seed=i) for i in range(2)]
    plan = plan_of(parents, method="dare_linear")
    made = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(made)}"
        out.mkdir()
        engine.merge(replace(plan, recipe=replace(plan.recipe, seed=seed)), files_of(parents), out)
        made.append(deltas(out))

    assert distance(made[1], made[0]) == 0
    assert distance(made[2], made[0]) > 0.1


def test_merging_a_merge_is_merging_its_parents(parents: list[Path], tmp_path: Path):
    third = write_tiny_adapter(tmp_path / "p2", seed=2, rank=5, config={"use_rslora": True})
    pair = run_merge(parents, tmp_path / "pair", weights=(0.5, -2.0))

    nested = run_merge([pair.folder, third], tmp_path / "nested", weights=(3.0, 0.25))

    flat = run_merge([*parents, third], tmp_path / "flat", weights=(1.5, -6.0, 0.25))
    assert nested.facts.max_rank == flat.facts.max_rank
    assert distance(deltas(nested.folder), deltas(flat.folder)) <= 2e-7


def test_a_merge_that_is_told_to_stop_leaves_no_weights(parents: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()

    with pytest.raises(JobCancelled, match="stopped after 1 of 4 modules"):
        engine.merge(plan_of(parents), files_of(parents), out, should_stop=lambda: True)

    assert list(out.iterdir()) == []


def test_a_parent_that_was_cut_short_is_corrupt_and_leaves_nothing(parents: list[Path], tmp_path: Path):
    plan, out = plan_of(parents), tmp_path / "out"
    out.mkdir()
    weights = parents[1] / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])

    with pytest.raises(Corrupt, match="ends inside"):
        engine.merge(plan, files_of(parents), out, threads=2)

    assert list(out.iterdir()) == []


def test_progress_counts_every_module_once_and_in_the_calling_thread(parents: list[Path], tmp_path: Path):
    seen: list[tuple[int, int, str]] = []
    out = tmp_path / "out"
    out.mkdir()

    engine.merge(
        plan_of(parents),
        files_of(parents),
        out,
        threads=3,
        on_progress=lambda done, total: seen.append((done, total, threading.current_thread().name)),
    )

    assert seen == [(done, 4, threading.current_thread().name) for done in range(1, 5)]


def test_the_largest_modules_begin_first_and_results_keep_the_order_of_the_plan(tmp_path: Path):
    sizes = {"model.layers.0.q": (8, 8), "model.layers.0.up": (32, 8), "model.layers.1.q": (8, 8), "lm_head": (64, 8)}
    parents = [write_tiny_adapter(tmp_path / f"p{i}", seed=i, linear=sizes) for i in range(2)]
    plan, begun = plan_of(parents), []

    results = engine.for_each_module(plan, lambda module: begun.append(module.name) or module.name)

    assert begun == ["lm_head", "model.layers.0.up", "model.layers.0.q", "model.layers.1.q"]
    assert list(results) == [module.name for module in plan.modules]


def test_the_predicted_loss_is_the_loss(parents: list[Path], tmp_path: Path):
    predicted = engine.predict_loss(plan_of(parents, method="svd", rank=2), files_of(parents))

    merged = run_merge(parents, tmp_path / "out", method="svd", rank=2)
    assert predicted == pytest.approx(merged.receipt["loss"], rel=1e-5)
    assert engine.predict_loss(plan_of(parents, method="cat"), files_of(parents)) == 0


def test_a_recipe_of_another_revision_of_the_method_is_refused(parents: list[Path], tmp_path: Path):
    plan = plan_of(parents)
    older = replace(plan, recipe=replace(plan.recipe, method_rev=99))

    with pytest.raises(Refused, match="names revision 99 of cat, this adapterctl has revision 1"):
        engine.merge(older, files_of(parents), tmp_path)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_weights_by_layer_hold_in_their_modules_only(parents: list[Path], tmp_path: Path, method: str):
    plan = plan_of(parents, weights=(1.0, 0.5), method=method, rank=None)
    layers = (LayerWeights("layers.1", (0.0, 2.0)), LayerWeights("q_proj", (-1.0, 1.0)))
    recipe = replace(plan.recipe, layers=layers, rank=sum(facts_of(parent).max_rank for parent in parents))
    plan, out = build_plan(recipe, [facts_of(parent) for parent in parents]), tmp_path / "out"
    out.mkdir()

    outcomes = engine.merge(plan, files_of(parents), out)
    proof = receipt.prove(plan, files_of(parents), out, outcomes).receipt

    first, second, made = deltas(parents[0]), deltas(parents[1]), deltas(out)
    expected = {}
    for name in made:
        weights = (0.0, 2.0) if "layers.1" in name else (-1.0, 1.0) if "q_proj" in name else (1.0, 0.5)
        expected[name] = weights[0] * first[name] + weights[1] * second[name]
    assert distance(made, expected) <= 1e-6
    assert proof["loss"] <= 1e-6
    assert recipe_from_json(json.loads(read_header(out / WEIGHTS).metadata["adapterctl.recipe"])) == recipe

"""Rules that PEFT applies to the factors: here PEFT's own results are the oracle, whatever one may think of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from tiny_merge import deltas, distance, exact_sum, run_merge

from adapterctl.registry.merging.elements import Elements, chance
from adapterctl.registry.merging.method import find_method

# PEFT says that density 1 prunes nothing
pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("peft_linear", {}),
    "ties": ("ties", {"density": 0.3}),
    "ties by frequency": ("ties", {"density": 0.7, "majority_sign_method": "frequency"}),
    "ties without trimming": ("ties", {"density": 1.0}),
    "magnitude_prune": ("magnitude_prune", {"density": 0.4}),
    "dare_linear that drops nothing": ("dare_linear", {"density": 1.0}),
    "dare_ties that drops nothing": ("dare_ties", {"density": 1.0}),
    "ties_svd": ("ties_svd", {"density": 0.4}),
    "ties_svd by frequency": ("ties_svd", {"density": 0.8, "majority_sign_method": "frequency"}),
    "magnitude_prune_svd": ("magnitude_prune_svd", {"density": 0.6}),
    "dare_ties_svd that drops nothing": ("dare_ties_svd", {"density": 1.0}),
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "embedder": ["words", "head"],
}


@pytest.mark.parametrize("weights", [(0.7, 1.2, 0.4), (1.0, -0.5, 2.0)])
@pytest.mark.parametrize("base", list(TARGETS))
@pytest.mark.parametrize("case", list(CASES))
def test_the_files_hold_what_peft_computes(
    case: str, base: str, weights: tuple[float, ...], bench: Any, tmp_path: Path
):
    method, options = CASES[case]
    folders = [
        bench.save_adapter(base, tmp_path / f"p{i}", seed=i, target_modules=TARGETS[base], lora_alpha=3 + i)
        for i in range(3)
    ]
    model = PeftModel.from_pretrained(bench.base(base), str(folders[0]), adapter_name="p0")
    for i in (1, 2):
        model.load_adapter(str(folders[i]), adapter_name=f"p{i}")
    combination = case.partition(" ")[0]
    model.add_weighted_adapter(["p0", "p1", "p2"], list(weights), "all", combination_type=combination, **options)
    model.save_pretrained(str(tmp_path / "peft"), selected_adapters=["all"], save_embedding_layers=False)

    merged = run_merge(folders, tmp_path / "ours", weights=weights, method=method, options=options)

    ours = deltas(merged.folder)
    # PEFT cuts in float32 what has no low rank
    assert distance(ours, deltas(tmp_path / "peft" / "all")) <= (1e-4 if method.endswith("_svd") else 1e-5)
    assert merged.receipt["loss"] == pytest.approx(distance(ours, exact_sum(folders, weights)), rel=1e-4)
    assert merged.receipt["loss"] > 0.1, "the rule gives the sum: no test"


def test_dare_linear_svd_that_drops_nothing_is_svd(bench: Any, tmp_path: Path):
    folders = [bench.save_adapter("llama", tmp_path / f"p{i}", seed=i, target_modules=["q_proj"]) for i in range(2)]

    dare = run_merge(folders, tmp_path / "dare", method="dare_linear_svd", options={"density": 1.0})

    assert distance(deltas(dare.folder), deltas(run_merge(folders, tmp_path / "svd", method="svd").folder)) <= 1e-6


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_random_masks_are_distributed_as_those_of_peft(name: str):
    random, draws, density = np.random.default_rng(0), 1500, 0.3
    a, b = random.normal(size=(2, 3, 6)), random.normal(size=(2, 5, 3))
    weights = torch.tensor([0.8, 1.5], dtype=torch.float64)
    elements = Elements(a, b, weights.numpy() ** 2, ("0/m", "1/m"))
    tensors = [torch.from_numpy(one) for one in a]
    torch.manual_seed(0)

    ours = np.stack([find_method(name).function(elements, seed=seed, density=density)[0] for seed in range(draws)])
    theirs = np.stack([getattr(merge_utils, name)(tensors, weights, density).numpy() for _ in range(draws)])

    # six standard errors of the difference of two means; a variance is itself known to a few percent
    error = 6 * np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / draws)
    assert np.all(np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= error)
    assert ours.var(axis=0) == pytest.approx(theirs.var(axis=0), rel=0.35)
    assert ours.var() == pytest.approx(theirs.var(), rel=0.05)


def test_masks_of_parents_modules_factors_and_seeds_have_nothing_to_do_with_each_other():
    ones = np.ones((60, 60))

    masks = [chance(0.5, seed)(ones, name) > 0 for seed in (1, 2) for name in ("0/m/A", "0/m/B", "1/m/A", "0/n/A")]

    together = np.corrcoef([mask.ravel() for mask in masks])
    assert np.abs(together - np.eye(len(masks))).max() < 0.09, "five standard errors of 3600 draws"

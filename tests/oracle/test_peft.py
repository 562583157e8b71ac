"""The oracle: a base with the merged files must say what PEFT says with all parents active at their weights.

PEFT's own merging is wrong for many of these configurations; its forward pass is not, so that is what we are held to.
Tolerance: float32 throughout, so outputs agree to rounding of the model itself (seen: up to 4e-7 relative).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_merge import deltas, distance, exact_sum, facts_of, plan_of, run_merge

from adapterctl.registry.domain.errors import InvalidAdapter, Refused
from adapterctl.registry.merging.method import find_method

# PEFT's own words about the flag of one of two kinds of layers
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")

TOLERANCE = 1e-5
ATTENTION = ["q_proj", "v_proj"]
EVERY_RANK = 10_000


@dataclass(frozen=True)
class Setup:
    """Parents as keyword arguments of LoraConfig, for one base."""

    parents: tuple[dict[str, Any], ...]
    weights: tuple[float, ...] = (0.7, 1.2)
    base: str = "llama"


def pair(first: dict[str, Any], second: dict[str, Any] | None = None, **rest: Any) -> Setup:
    """Two parents on q_proj and v_proj where they do not say otherwise; the second is plain by default."""
    usual = {"target_modules": ATTENTION}
    return Setup(({**usual, **first}, {**usual, **(second or {})}), **rest)


SETUPS = {
    "plain": pair({}),
    "ranks differ": pair({"r": 2}, {"r": 6}),
    "rank above the width": pair({"r": 40, "lora_alpha": 10}, {"r": 3}),
    "alpha is no multiple": pair({"r": 3, "lora_alpha": 7}, {"r": 5, "lora_alpha": 1}),
    "weights are large and small": pair({}, weights=(3.0, 0.01)),
    "a weight is negative": pair({}, weights=(1.0, -0.5)),
    "targets differ": pair({}, {"target_modules": ["k_proj", "o_proj"]}),
    "targets overlap": pair({}, {"target_modules": ["v_proj", "down_proj"]}),
    "mlp": pair({"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "all-linear": pair({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "all-linear and two": pair({"target_modules": "all-linear"}),
    "target is a regular expression": pair({"target_modules": r".*\.layers\.1\..*(q|k)_proj"}),
    "target is a longer suffix": pair({"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}),
    "target is a full path": pair({"target_modules": ["model.layers.1.self_attn.q_proj"]}),
    "lm_head": pair({"target_modules": ["lm_head", "q_proj"]}),
    "embedding": pair({"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding in both": pair({"target_modules": ["embed_tokens"], "r": 3}, {"target_modules": ["embed_tokens"]}),
    "use_rslora": pair({"use_rslora": True}, {"use_rslora": True, "r": 8}),
    "adapter 0 rslora, adapter 1 not": pair({"use_rslora": True, "r": 8}),
    "adapter 1 rslora, adapter 0 not": pair({}, {"use_rslora": True, "r": 8}),
    "layers_to_transform on adapter 0": pair({"layers_to_transform": [0]}),
    "layers disjoint": pair({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
    "layers_pattern": pair({"layers_to_transform": 1, "layers_pattern": "layers"}),
    "exclude_modules on adapter 0": pair({"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "exclude_modules as a regular expression": pair({"exclude_modules": r".*layers\.1.*q_proj"}),
    "rank_pattern": pair({"rank_pattern": {"v_proj": 7}}, {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
    "alpha_pattern": pair({"alpha_pattern": {"q_proj": 3}}, {"alpha_pattern": {r"layers\.0.*v_proj": 32}}),
    "patterns and rslora": pair(
        {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
        {"rank_pattern": {"^model.layers.1.self_attn.v_proj": 1}},
    ),
    "dropout": pair({"lora_dropout": 0.5}, {"lora_dropout": 0.3}),
    "gaussian start": pair({"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}),
    "three parents": Setup(
        (
            {"target_modules": ATTENTION},
            {"target_modules": ["q_proj", "up_proj"], "r": 2},
            {"target_modules": ["v_proj"], "use_rslora": True},
        ),
        (0.5, 1.0, -0.25),
    ),
    "lora_bias": pair({"lora_bias": True}, {"lora_bias": True}, base="llama_bias"),
    "lora_bias in one": pair({"lora_bias": True}, {"target_modules": ["q_proj", "up_proj"]}, base="llama_bias"),
    "fan_in_fan_out": Setup(
        (
            {"target_modules": ["c_attn"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 2},
        ),
        base="gpt2",
    ),
    "fan_in_fan_out in one": Setup(
        (
            # PEFT stores the flag as the last layer has it: the head, which is linear
            {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 2},
        ),
        base="gpt2_untied",
    ),
    "conv1d": Setup(({"target_modules": ["first", "second"]}, {"target_modules": ["first"], "r": 2}), base="conv1d"),
    "conv2d": Setup(({"target_modules": ["first", "second"]}, {"target_modules": ["second"], "r": 2}), base="conv2d"),
    "conv3d": Setup(({"target_modules": ["first"]}, {"target_modules": ["second"], "r": 2}), base="conv3d"),
    "embedding outside a transformer": Setup(
        ({"target_modules": ["words", "head"]}, {"target_modules": ["words"], "r": 2}), base="embedder"
    ),
}


@pytest.fixture(scope="module", params=list(SETUPS))
def made(request: pytest.FixtureRequest, bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One setup: its parents' folders, and the output of PEFT with all of them active."""
    setup = SETUPS[request.param]
    root = tmp_path_factory.mktemp("oracle")
    folders = [
        bench.save_adapter(setup.base, root / f"p{i}", seed=i + 1, **config) for i, config in enumerate(setup.parents)
    ]
    return setup, root, folders, bench.together(setup.base, folders, setup.weights)


@pytest.mark.parametrize("method", ["cat", "sum", "svd"])
def test_merged_files_compute_what_all_parents_compute_together(made: Any, method: str, bench: Any):
    setup, root, folders, expected = made

    # svd is asked for more rank than there is, which gives it the sum of the ranks: enough to be exact
    rank = EVERY_RANK if method == "svd" else None
    merged = run_merge(folders, root / method, weights=setup.weights, method=method, rank=rank)

    output, modules = bench.merged(setup.base, merged.folder)
    assert modules == {module.name for module in merged.plan.modules}
    assert relative(output, expected) <= TOLERANCE
    assert relative(bench.plain(setup.base), expected) > 100 * TOLERANCE, "the adapters change nothing: no test"


def test_svd_below_full_rank_is_the_float64_optimum(made: Any):
    setup, root, folders, _ = made
    exact = exact_sum(folders, setup.weights)

    merged = run_merge(folders, root / "low", weights=setup.weights, method="svd", rank=3)

    optimum = {name: best(delta, 3) for name, delta in exact.items()}
    difference = sum(float(np.sum((delta - optimum[name]) ** 2)) for name, delta in deltas(merged.folder).items())
    norm = sum(float(np.sum(delta**2)) for delta in exact.values())
    assert np.sqrt(difference / norm) <= 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parents_give_an_exact_sum_in_float32(dtype: torch.dtype, bench: Any, tmp_path: Path):
    folders = [
        bench.save_adapter("llama", tmp_path / f"p{i}", seed=i, dtype=dtype, target_modules=ATTENTION) for i in (1, 2)
    ]

    merged = run_merge(folders, tmp_path / "out", weights=(0.7, 1.2), dtype="f32")

    output, _ = bench.merged("llama", merged.folder)
    assert relative(output, bench.together("llama", folders, (0.7, 1.2))) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_svd_keeps_the_half_precision_that_peft_doubles(dtype: torch.dtype, bench: Any, tmp_path: Path):
    folders = [
        bench.save_adapter("llama", tmp_path / f"p{i}", seed=i, dtype=dtype, target_modules=ATTENTION) for i in (1, 2)
    ]

    merged = run_merge(folders, tmp_path / "out", method="svd", rank=4)

    assert merged.facts.dtypes == ("BF16" if dtype is torch.bfloat16 else "F16",)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_peft_agrees_where_its_own_merging_is_right(combination: str, bench: Any, tmp_path: Path):
    from peft import PeftModel

    folders = [bench.save_adapter("llama", tmp_path / f"p{i}", seed=i, target_modules=ATTENTION) for i in (1, 2)]
    model = PeftModel.from_pretrained(bench.base("llama"), str(folders[0]), adapter_name="p0")
    model.load_adapter(str(folders[1]), adapter_name="p1")
    rank = {"svd_rank": 5} if combination == "svd" else {}
    model.add_weighted_adapter(["p0", "p1"], [0.7, 1.2], "both", combination_type=combination, **rank)
    model.save_pretrained(str(tmp_path / "peft"), selected_adapters=["both"])

    merged = run_merge(folders, tmp_path / "ours", weights=(0.7, 1.2), method=combination, rank=rank.get("svd_rank"))

    assert distance(deltas(merged.folder), deltas(tmp_path / "peft" / "both")) <= 1e-5


def named(folder: Path, base: Path, **fields: Any) -> Path:
    """The same adapter, with another base and other fields in its config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base), **fields}))
    return folder


def test_automodels_of_peft_load_a_merge_of_parents_without_a_task_type(bench: Any, tmp_path: Path):
    from peft import AutoPeftModel, AutoPeftModelForCausalLM

    base = bench.save_base("llama", tmp_path / "base")
    folders = [
        named(bench.save_adapter("llama", tmp_path / f"p{i}", seed=i, target_modules=ATTENTION), base) for i in (1, 2)
    ]

    merged = run_merge(folders, tmp_path / "out")

    expected, _ = bench.merged("llama", merged.folder)
    for kind in (AutoPeftModel, AutoPeftModelForCausalLM):
        with torch.no_grad():
            output = kind.from_pretrained(merged.folder).eval()(bench.inputs("llama")).logits
        assert relative(output, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}}, {"auto_mapping": None}),
        ({"auto_mapping": {"base_model_class": "GPT2Model", "parent_library": "transformers.models.gpt2"}}, {}),
        ({"task_type": "CAUSAL_LM"}, {}),
    ],
    ids=["another library", "two classes", "a task type"],
)
def test_a_merge_names_no_class_but_one_of_transformers_that_is_needed(
    first: dict[str, Any], second: dict[str, Any], bench: Any, tmp_path: Path
):
    folders = [
        named(bench.save_adapter("llama", tmp_path / f"p{i}", seed=i, target_modules=ATTENTION), tmp_path, **fields)
        for i, fields in enumerate((first, second))
    ]

    assert "auto_mapping" not in plan_of(folders).config


# Cases that PEFT 0.21 merges wrongly without a word, and whose sum is no plain LoRA adapter: refused, by name.
REFUSED = {
    "use_dora": ("dora", {"use_dora": True}),
    "modules_to_save": ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    "trainable_token_indices": ("trainable_tokens", {"trainable_token_indices": {"embed_tokens": [1, 2]}}),
    'bias="all"': ("bias", {"bias": "all"}),
    'bias="lora_only"': ("bias", {"bias": "lora_only"}),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_has_no_exact_sum_is_refused(case: str, bench: Any, tmp_path: Path):
    code, config = REFUSED[case]
    folder = bench.save_adapter("llama", tmp_path / "p", seed=1, target_modules=ATTENTION, **config)

    with pytest.raises(InvalidAdapter) as refused:
        facts_of(folder)

    assert code in {problem.code for problem in refused.value.problems}


def test_modules_to_save_in_the_second_parent_alone_is_not_dropped(bench: Any, tmp_path: Path):
    first = bench.save_adapter("llama", tmp_path / "p0", seed=1, target_modules=ATTENTION)
    second = bench.save_adapter("llama", tmp_path / "p1", seed=2, target_modules=ATTENTION, modules_to_save=["lm_head"])

    with pytest.raises(InvalidAdapter):
        plan_of([first, second])


def test_linear_which_peft_computes_with_cross_terms_is_refused():
    with pytest.raises(Refused, match="cross terms"):
        find_method("linear")


def test_an_adapter_merged_with_itself_at_halves_is_itself(bench: Any, tmp_path: Path):
    folder = bench.save_adapter("llama", tmp_path / "p", seed=1, target_modules=ATTENTION)

    merged = run_merge([folder, folder], tmp_path / "out", weights=(0.5, 0.5))

    assert distance(deltas(merged.folder), deltas(folder)) <= 1e-7


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def best(delta: np.ndarray, rank: int) -> np.ndarray:
    u, sigma, vt = np.linalg.svd(delta, full_matrices=False)
    truncated: np.ndarray = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    return truncated

"""Which parents have an exact sum, and what the plan of a merge spells out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import LINEAR, write_tiny_adapter
from tiny_merge import facts_of, plan_of

from adapterctl.registry.domain.plan import MergePlan, check_parents, parent_warnings
from adapterctl.registry.wire import from_json, to_json

LABELS = ["translate:v1", "chat:v2"]
Q = "model.layers.0.self_attn.q_proj"


def codes(*folders: Path) -> list[str]:
    return [problem.code for problem in check_parents([facts_of(folder) for folder in folders], LABELS)]


def targets(*folders: Path) -> list[str]:
    listed: list[str] = plan_of(folders).config["target_modules"]
    return listed


def test_parents_with_the_same_shapes_fit(tmp_path: Path):
    assert codes(*(write_tiny_adapter(tmp_path / f"p{i}", seed=i, rank=2 + i) for i in range(2))) == []


def test_a_module_of_another_shape_is_told_with_both_parents(tmp_path: Path):
    one = write_tiny_adapter(tmp_path / "p0")
    other = write_tiny_adapter(tmp_path / "p1", linear={Q: (16, 24)})

    (problem,) = check_parents([facts_of(one), facts_of(other)], LABELS)

    assert problem.code == "shape_differs"
    assert problem.message == f"{Q} is (out, in...) (16, 16) in translate:v1 and (16, 24) in chat:v2"


def test_kernels_of_convolutions_must_agree(tmp_path: Path):
    one = write_tiny_adapter(tmp_path / "p0", linear={}, conv={"c": (8, 4, 3, 3)})
    other = write_tiny_adapter(tmp_path / "p1", linear={}, conv={"c": (8, 4, 1, 9)})

    assert codes(one, other) == ["shape_differs"]


def test_a_linear_layer_is_no_embedding(tmp_path: Path):
    one = write_tiny_adapter(tmp_path / "p0", linear={"m": (8, 8)})
    other = write_tiny_adapter(tmp_path / "p1", linear={}, embedding={"m": (8, 8)})

    assert codes(one, other) == ["kind_differs"]


def test_the_flag_of_the_orientation_may_differ(tmp_path: Path):
    """Factors are the same either way; tests/oracle has a pair as PEFT saves it for GPT-2."""
    one = write_tiny_adapter(tmp_path / "p0")
    other = write_tiny_adapter(tmp_path / "p1", config={"fan_in_fan_out": True})

    assert codes(one, other) == []
    assert [plan_of(pair).config["fan_in_fan_out"] for pair in ([one, other], [other, other])] == [False, True]


def test_biases_and_embeddings_do_not_go_together(tmp_path: Path):
    one = write_tiny_adapter(tmp_path / "p0", lora_bias=True)
    other = write_tiny_adapter(tmp_path / "p1", linear={}, embedding={"model.embed_tokens": (32, 16)})

    assert codes(one, other) == ["bias_with_embedding"]


def test_the_output_has_one_rank_and_nothing_to_resolve(tmp_path: Path):
    folders = [
        write_tiny_adapter(tmp_path / "p0", ranks={Q: 7}, config={"use_rslora": True, "lora_dropout": 0.3}),
        write_tiny_adapter(tmp_path / "p1", config={"alpha_pattern": {"v_proj": 3}}),
    ]

    plan = plan_of(folders)

    assert plan.recipe.rank == 11
    assert {module.a_shape[0] for module in plan.modules} == {11}
    wanted = {"r": 11, "lora_alpha": 11, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    assert {key: plan.config[key] for key in wanted} == wanted
    assert (plan.config["inference_mode"], plan.config["lora_dropout"], plan.config["lora_bias"]) == (True, 0.0, False)


def test_coefficients_are_weight_times_scaling(tmp_path: Path):
    folders = [write_tiny_adapter(tmp_path / f"p{i}", rank=4, alpha=alpha) for i, alpha in enumerate((8, 2))]

    plan = plan_of(folders, weights=(0.5, -3.0))

    assert [part.coefficient for part in plan.modules[0].parts] == [1.0, -1.5]


def test_a_plan_names_no_label_and_is_the_same_every_time(tmp_path: Path):
    folders = [write_tiny_adapter(tmp_path / f"p{i}", seed=i) for i in range(2)]

    assert to_json(plan_of(folders)) == to_json(plan_of(folders))
    assert "p0" not in json.dumps(dict(plan_of(folders).config))


def test_a_plan_survives_the_wire(tmp_path: Path):
    plan = plan_of([write_tiny_adapter(tmp_path / f"p{i}", seed=i, lora_bias=True) for i in range(2)])

    assert from_json(to_json(plan), MergePlan) == plan


def test_short_target_names_are_kept_where_they_select_exactly_the_parents_modules(tmp_path: Path):
    folders = [write_tiny_adapter(tmp_path / f"p{i}", seed=i) for i in range(2)]

    assert targets(*folders) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ".*q_proj"},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["lm_head"]},
    ],
)
def test_full_paths_are_listed_where_short_names_may_select_more(tmp_path: Path, config: dict[str, Any]):
    one = write_tiny_adapter(tmp_path / "p0", linear={Q: (16, 16)}, config=config)
    other = write_tiny_adapter(tmp_path / "p1", linear={Q: (16, 16)})

    assert targets(one, other) == [Q]


def test_full_paths_are_listed_where_a_short_name_of_one_parent_selects_modules_of_the_other(tmp_path: Path):
    """The first parent adapts layer 0 alone though its list says q_proj: its file was cut by hand."""
    one = write_tiny_adapter(tmp_path / "p0", linear={Q: (16, 16)})
    other = write_tiny_adapter(tmp_path / "p1")

    assert targets(one, other) == sorted(LINEAR)


def test_what_deserves_a_look_is_a_warning(tmp_path: Path):
    one = write_tiny_adapter(tmp_path / "p0", linear={"a": (8, 8)})
    other = write_tiny_adapter(tmp_path / "p1", linear={"b": (8, 8)}, config={"task_type": "SEQ_CLS"})

    warnings = parent_warnings([facts_of(one), facts_of(other)], ["p0", "p1"])

    assert any("different task types" in warning for warning in warnings)
    assert "p0 shares no module with another parent" in warnings
    assert any("named twice" in warning for warning in parent_warnings([facts_of(one)] * 2, ["p0", "p0"]))


def test_the_size_is_that_of_the_tensors_that_will_be_written(tmp_path: Path):
    plan = plan_of([write_tiny_adapter(tmp_path / f"p{i}", dtype="BF16") for i in range(2)], method="svd")

    assert plan.size_bytes == 2 * 4 * sum(d_in + d_out for d_out, d_in in LINEAR.values())

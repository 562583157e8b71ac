"""What an adapter's two files say together, and everything for which they are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LINEAR, write_tiny_adapter

from adapterctl.registry.domain.adapter import AdapterFacts, canonical_name, carried_name, read_facts
from adapterctl.registry.domain.errors import InvalidAdapter
from adapterctl.registry.domain.header import read_header
from adapterctl.registry.domain.lora_config import FIELD_ROLES, Findings, read_config

Q0 = "model.layers.0.self_attn.q_proj"


def facts_of(folder: Path, **options: Any) -> AdapterFacts:
    config = json.loads((folder / "adapter_config.json").read_text())
    return read_facts(config, read_header(folder / "adapter_model.safetensors"), **options)


def codes_of(folder: Path) -> set[str]:
    with pytest.raises(InvalidAdapter) as caught:
        facts_of(folder)
    return {problem.code for problem in caught.value.problems}


def scaling_of(config: dict[str, Any], module: str) -> tuple[int, float]:
    findings = Findings()
    read = read_config({"peft_type": "LORA", "target_modules": ["x"], **config}, findings, modules=1)
    assert not findings.problems()
    assert read is not None
    return read.rank(module), read.scaling(module)


def test_modules_come_sorted_with_rank_scaling_and_shapes(tmp_path):
    folder = write_tiny_adapter(tmp_path, rank=4, alpha=8, dtype="BF16")

    facts = facts_of(folder)

    assert [m.name for m in facts.modules] == sorted(LINEAR)
    assert {m.scaling for m in facts.modules} == {2.0}
    assert (facts.modules[1].d_out, facts.modules[1].d_in) == LINEAR[facts.modules[1].name]
    assert (facts.base_name, facts.task_type, facts.dtypes, facts.max_rank) == ("tiny/base", "CAUSAL_LM", ("BF16",), 4)


def test_embeddings_and_convolutions_of_any_dimension_are_read(tmp_path):
    folder = write_tiny_adapter(
        tmp_path,
        embedding={"model.embed_tokens": (32, 16)},
        conv={"one": (4, 3, 5), "two": (4, 3, 3, 2), "three": (4, 3, 2, 2, 2)},
        ranks={"two": 2},
    )

    kinds = {m.name: (m.kind, m.rank, m.d_in) for m in facts_of(folder).modules}

    assert kinds["model.embed_tokens"] == ("embedding", 4, 32)
    assert kinds["one"] == ("conv", 4, 15)
    assert kinds["two"] == ("conv", 2, 18)
    assert kinds["three"] == ("conv", 4, 24)


def test_the_name_of_an_adapter_in_the_keys_is_no_part_of_the_canonical_name(tmp_path):
    facts = facts_of(write_tiny_adapter(tmp_path, adapter_name="default", embedding={"emb": (8, 4)}))

    assert carried_name(facts.modules[0].a.key) == "default"
    assert canonical_name(facts.modules[0].a.key) == "emb.lora_embedding_A"
    assert canonical_name(facts.modules[1].b.key) == f"{Q0}.lora_B.weight"


def test_lora_bias_is_read_where_the_config_sets_it(tmp_path):
    facts = facts_of(write_tiny_adapter(tmp_path, lora_bias=True))

    assert all(m.bias is not None and m.bias.shape == (m.d_out,) for m in facts.modules)


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        ({"r": 4, "lora_alpha": 8}, Q0, (4, 2.0)),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, Q0, (4, 4.0)),
        ({"r": 4, "lora_alpha": 6.5}, Q0, (4, 1.625)),
        ({"r": 4, "lora_alpha": -4}, Q0, (4, -1.0)),
        ({}, Q0, (8, 1.0)),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}}, Q0, (2, 4.0)),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"self_attn.q_proj": 16}}, Q0, (4, 4.0)),
        ({"r": 4, "rank_pattern": {"k_proj": 1, "q_proj": 2, Q0: 3}}, Q0, (2, 4.0)),
        ({"r": 4, "lora_alpha": 4, "rank_pattern": {"proj": 2}}, Q0, (4, 1.0)),
        ({"r": 4, "lora_alpha": 4, "rank_pattern": {"layers.0": 2}}, Q0, (4, 1.0)),
    ],
)
def test_scaling_follows_the_config_per_module(config, module, expected):
    assert scaling_of(config, module) == expected


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        Q0,
        "^" + Q0,
        "layers.0.self_attn.q_proj",
        "layersX0",
        r"model\.layers\.[01]\.self_attn\.q_proj",
        r"layers\.\d+\..*q_proj",
        r".*\.(q|v)_proj",
        "(?:q|k)_proj",
        "q_proj|k_proj",
        "q_pro.",
        "[qk]_proj",
        r"layers.\d{1,2}.self_attn.[^v]_proj",
        "q_proj$",
        "q_pro(j)?",
        "self_attn",
        "a)|(model.*",
    ],
)
@pytest.mark.parametrize("module", [Q0, "model.layers.0.self_attn.v_proj", "q_proj", "model-layers.0.self_attn.q_proj"])
def test_patterns_match_as_in_peft(key, module):
    expected = 2 if re.match(rf"(.*\.)?({key})$", module) else 4  # peft.utils.other.get_pattern_key

    assert scaling_of({"r": 4, "rank_pattern": {key: 2}}, module)[0] == expected


@pytest.mark.parametrize(
    "key",
    [
        "",
        "(",
        "(?=q)q_proj",
        "(?i)Q_PROJ",
        "(?P<a>q)_proj",
        r"(q)\1",
        "q{,3}",
        "[[:alpha:]]",
        r"\pL",
        r"\Qq\E",
        "q proj",
        "q\n",
        "((a{999}){999}){999}",
        "a" * 1000,
    ],
)
def test_patterns_outside_the_common_ground_of_both_engines_are_refused(tmp_path, key):
    folder = write_tiny_adapter(tmp_path, config={"rank_pattern": {key: 4}})

    assert codes_of(folder) == {"bad_pattern"}


def test_a_pattern_that_explodes_under_backtracking_is_answered_at_once(tmp_path):
    folder = write_tiny_adapter(tmp_path, config={"alpha_pattern": {"(a+)+(a+)+(a+)+b": 4, "(.*.*)*x": 4}})
    facts_of(folder)  # loads RE2
    began = time.perf_counter()

    facts_of(folder)

    assert time.perf_counter() - began < 0.1


def test_a_text_as_target_is_not_run_as_a_regular_expression(tmp_path):
    folder = write_tiny_adapter(tmp_path, config={"target_modules": "(a+)+(a+)+$", "exclude_modules": "(a+)+$"})

    assert len(facts_of(folder).modules) == len(LINEAR)


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": 1},
        {"layers_to_transform": [1, 7], "layers_pattern": "layers"},
        {"layers_to_transform": [0], "layers_pattern": ["experts"]},
        {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": [0], "layers_pattern": ["experts", "layers"]},
        {"layers_to_transform": [0], "target_modules": ["model.layers.1.experts.0.q_proj", "q_proj"]},
        {"layers_to_transform": []},
        {"exclude_modules": ["layers.1.experts.0.q_proj"]},
        {"target_modules": ["proj", "experts.0.q_proj"]},
    ],
)
@pytest.mark.parametrize(
    "module",
    ["model.layers.0.q_proj", "model.layers.1.experts.0.q_proj", "layers.0.q_proj", "q_proj", "h.0.x.1.q_proj"],
)
def test_modules_are_targeted_as_in_peft(config, module):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    given = {"peft_type": "LORA", "target_modules": ["q_proj"], **config}
    read = read_config(given, Findings(), modules=1)
    theirs = check_target_module_exists(peft.LoraConfig(**{k: v for k, v in given.items() if k != "peft_type"}), module)

    assert read is not None
    assert read.is_targeted(module) == (isinstance(theirs, bool) and theirs)


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "ADALORA"},
        {"use_dora": True},
        {"kasa_config": {"a": 1}},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"monteclora_config": {"a": 1}},
        {"arrow_config": {"a": 1}},
        {"layer_replication": [[0, 4]]},
        {"use_bdlora": {"a": 1}},
        {"target_parameters": ["x"]},
        {"bias": "all"},
        {"ensure_weight_tying": True},
        {"megatron_core": "os"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "surprise"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_is_no_sum_of_deltas_is_refused_with_its_value_the_reason_and_a_way_out(tmp_path, config):
    [(field, value)] = config.items()

    with pytest.raises(InvalidAdapter) as caught:
        facts_of(write_tiny_adapter(tmp_path, config=config))

    [problem] = caught.value.problems
    assert problem.message.startswith(f"{field} is {value!r}")
    assert len(problem.message) > len(f"{field} is {value!r}: ")
    assert problem.hint


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_accepted(tmp_path, value):
    facts_of(write_tiny_adapter(tmp_path, config={"init_lora_weights": value}))


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_need_the_callers_word(tmp_path, value):
    folder = write_tiny_adapter(tmp_path, config={"init_lora_weights": value})

    assert codes_of(folder) == {"unconverted_init"}
    assert len(facts_of(folder, assume_converted=True).modules) == len(LINEAR)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"peft_type": "LOHA"}, "not_lora"),
        ({"peft_type": None}, "not_lora"),
        ({"use_dora": True}, "dora"),
        ({"kasa_config": {"a": 1}}, "kasa"),
        ({"alora_invocation_tokens": [1, 2]}, "alora"),
        ({"use_qalora": True}, "qalora"),
        ({"monteclora_config": {"a": 1}}, "monteclora"),
        ({"arrow_config": {"a": 1}}, "arrow"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"use_bdlora": {"a": 1}}, "bdlora"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"ensure_weight_tying": True}, "tied_weights"),
        ({"megatron_config": {"a": 1}}, "megatron"),
        ({"megatron_core": "os"}, "megatron"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_tokens"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_tokens"),
        ({"init_lora_weights": "surprise"}, "unknown_init"),
        ({"init_lora_weights": ["pissa"]}, "unknown_init"),
        ({"from_the_future": 1}, "unknown_field"),
        ({"from_the_future": False}, "unknown_field"),
        ({"r": 0}, "bad_rank"),
        ({"r": -4}, "bad_rank"),
        ({"r": 4.0}, "bad_rank"),
        ({"r": True}, "bad_rank"),
        ({"r": 10**6}, "bad_rank"),
        ({"r": "4"}, "bad_rank"),
        ({"rank_pattern": {"q_proj": 10**9}}, "bad_rank"),
        ({"lora_alpha": 0}, "bad_alpha"),
        ({"lora_alpha": math.inf}, "bad_alpha"),
        ({"lora_alpha": math.nan}, "bad_alpha"),
        ({"lora_alpha": 10**400}, "bad_alpha"),
        ({"lora_alpha": True}, "bad_alpha"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "bad_alpha"),
        ({"rank_pattern": [1]}, "bad_config"),
        ({"use_rslora": "yes"}, "bad_config"),
        ({"fan_in_fan_out": 1}, "bad_config"),
        ({"base_model_name_or_path": "a\u202eb"}, "bad_config"),
        ({"base_model_name_or_path": ["a"]}, "bad_config"),
        ({"target_modules": None}, "no_targets"),
        ({"target_modules": ""}, "no_targets"),
        ({"target_modules": [1]}, "bad_config"),
        ({"target_modules": {"q_proj": 1}}, "bad_config"),
        ({"target_modules": []}, "not_targeted"),
        ({"target_modules": ["q_proj", "proj"]}, "not_targeted"),
        ({"exclude_modules": ["v_proj"]}, "not_targeted"),
        ({"layers_to_transform": [0]}, "not_targeted"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, "not_targeted"),
        ({"layers_to_transform": ["0"]}, "bad_config"),
        ({"layers_to_transform": 0, "layers_pattern": "(a+)+"}, "bad_pattern"),
        ({"r": 8}, "rank_mismatch"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_mismatch"),
        ({"lora_bias": True}, "missing_lora_bias"),
    ],
)
def test_each_refusal_of_a_config_has_its_code(tmp_path, config, code):
    folder = write_tiny_adapter(
        tmp_path, config={k: v for k, v in config.items() if v == v or not isinstance(v, float)}
    )
    given = {**json.loads((folder / "adapter_config.json").read_text()), **config}

    with pytest.raises(InvalidAdapter) as caught:
        read_facts(given, read_header(folder / "adapter_model.safetensors"))

    assert {problem.code for problem in caught.value.problems} == {code}
    assert code in caught.value.message


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("lm_head.weight", "unknown_tensors"),
        ("base_model.model.lm_head.weight", "unknown_tensors"),
        ("base_model.model.model.layers.0.mlp.gate_proj.weight", "unknown_tensors"),
        (f"base_model.model.{Q0}.base_layer.weight", "unknown_tensors"),
        (f"base_model.model.{Q0}.lora_magnitude_vector", "unknown_tensors"),
        (f"base_model.model.{Q0}.lora_A.bias", "unknown_tensors"),
        (f"{Q0}.lora_A.weight", "unknown_tensors"),
        ("base_model.model..q_proj.lora_A.weight", "unknown_tensors"),
        ("base_model.model." + "a." * 70 + "q_proj.lora_A.weight", "unknown_tensors"),
        (f"base_model.model.{Q0}.lora_B.bias", "unexpected_lora_bias"),
        ("base_model.model.x.q_proj.lora_A.weight", "missing_lora_b"),
        ("base_model.model.x.q_proj.lora_B.weight", "missing_lora_a"),
        (f"base_model.model.{Q0}.lora_embedding_A", "mixed_kinds"),
        (f"base_model.model.{Q0}.lora_A.other.weight", "duplicate_tensor"),
        ("base_model.model.x.q_proj.lora_B.other.weight", "several_adapters"),
    ],
)
def test_every_tensor_must_be_accounted_for(tmp_path, key, code):
    folder = write_tiny_adapter(tmp_path, extra={key: np.zeros(16, np.float32)})

    assert code in codes_of(folder)


@pytest.mark.parametrize(
    ("a", "b", "code"),
    [
        ((4, 8), (8, 3), "shape_mismatch"),
        ((4,), (8, 4), "shape_mismatch"),
        ((4, 3, 3, 3), (8, 4), "shape_mismatch"),
        ((4, 3, 3, 3), (8, 4, 3, 3), "shape_mismatch"),
        ((4, 3, 3, 3), (8, 2, 1, 1), "conv_groups"),
    ],
)
def test_shapes_that_disagree_are_refused(tmp_path, a, b, code):
    pair = {
        "base_model.model.x.q_proj.lora_A.weight": np.zeros(a, np.float32),
        "base_model.model.x.q_proj.lora_B.weight": np.zeros(b, np.float32),
    }

    assert codes_of(write_tiny_adapter(tmp_path, extra=pair)) == {code}


def test_experts_in_one_parameter_are_refused_by_that_alone(tmp_path):
    """As PEFT saves them: the rank of all experts together, and the second parameter under the wrapper of the first."""
    experts = {"model.layers.0.mlp.experts": (8, 8), "model.layers.0.mlp.experts.base_layer": (8, 8)}
    config = {
        "target_parameters": ["gate_up_proj", "down_proj"],
        "r": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {},
    }

    assert codes_of(write_tiny_adapter(tmp_path, linear=experts, rank=12, config=config)) == {"target_parameters"}


def test_weights_that_are_no_floats_are_refused(tmp_path):
    folder = write_tiny_adapter(tmp_path, dtype="F32")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))

    assert codes_of(folder) == {"bad_dtype"}


def test_an_adapter_without_tensors_is_refused(tmp_path):
    assert codes_of(write_tiny_adapter(tmp_path, linear={}, config={"target_modules": ["q_proj"]})) == {"no_tensors"}


def test_all_problems_are_told_at_once_and_many_alike_are_counted(tmp_path):
    extra = {f"lm_head.{i}": np.zeros(1, np.float32) for i in range(50)}
    folder = write_tiny_adapter(tmp_path, config={"use_dora": True, "bias": "all", "r": 8}, extra=extra)

    with pytest.raises(InvalidAdapter) as caught:
        facts_of(folder)

    assert {p.code for p in caught.value.problems} == {"dora", "bias", "rank_mismatch", "unknown_tensors"}
    assert "and 47 more of the same kind" in caught.value.message


def test_too_many_patterns_for_the_modules_are_refused_before_they_are_tried(tmp_path):
    linear = {f"layers.{i}.q_proj": (2, 2) for i in range(1100)}
    many = {f"x{i}": 4 for i in range(8000)}
    in_parts = {"." * 500 + str(i): 4 for i in range(100)}  # each of the parts is compared

    for number, patterns in enumerate((many, in_parts)):
        folder = write_tiny_adapter(tmp_path / str(number), linear=linear, config={"rank_pattern": patterns})
        assert codes_of(folder) == {"too_many_patterns"}


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_lora": None, "merge_weights": False, "lora_dropout": 0.05},
        {"layers_pattern": None, "layers_to_transform": None, "init_lora_weights": True, "revision": None},
    ],
    ids=["PEFT 0.2", "PEFT 0.4"],
)
def test_configs_of_old_releases_lack_most_fields_and_are_read(tmp_path, fields):
    folder = write_tiny_adapter(tmp_path)
    old = {"base_model_name_or_path": "x", "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    old |= {"lora_alpha": 16, "modules_to_save": None, "peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM"}
    old |= {"target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**old, **fields}))

    assert facts_of(folder).scaling == dict.fromkeys(sorted(LINEAR), 4.0)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("base_model.model.model.embed_tokens.weight", "where it is the base's own, save with"),
        ("base_model.model.lm_head.base_layer.weight", "save_embedding_layers=False"),
        (f"{Q0}.lora_A.weight", "tensors of PEFT begin with base_model.model."),
        (f"base_model.model.{Q0}.lora_magnitude_vector", "this is DoRA"),
    ],
)
def test_a_tensor_that_is_not_lora_comes_with_what_to_do(tmp_path, key, hint):
    with pytest.raises(InvalidAdapter) as caught:
        facts_of(write_tiny_adapter(tmp_path, extra={key: np.zeros(16, np.float32)}))

    [problem] = caught.value.problems
    assert (problem.code, hint in problem.hint) == ("unknown_tensors", True)


def test_every_field_of_the_installed_peft_has_a_role():
    peft = pytest.importorskip("peft")

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}

    assert fields - FIELD_ROLES.keys() == set()


def test_a_config_as_peft_saves_it_is_accepted(tmp_path):
    peft = pytest.importorskip("peft")
    saved = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in saved.to_dict().items()}
    folder = write_tiny_adapter(tmp_path, config={**config, "peft_type": "LORA"})

    assert facts_of(folder).scaling == dict.fromkeys(sorted(LINEAR), 2.0)

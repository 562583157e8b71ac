"""What MLflow shows of a version: bounded, nothing that a caller could make it render, names that it takes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given
from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

from adapterctl.registry.domain.version import Placement
from adapterctl.registry.ports import Parent
from adapterctl.registry.stores.mlflow_layers import layers_picture
from adapterctl.registry.stores.mlflow_pages import (
    CHILDREN_SHOWN,
    MLFLOW_LIMIT,
    describe,
    describe_adapter,
    escape,
    figures,
    lineage_page,
    lineage_record,
    mlflow_key,
    outputs_page,
    with_children,
    with_recall,
)

HOSTILE = "<img src=x onerror=alert(1)>\n# [x](javascript:alert(1)) ![y](http://z) | `a` *b*\x00\u202e"


@pytest.fixture
def parent_named(spec_of, recorded):
    def make(name: str, weight: float | None = 0.5) -> Parent:
        at = Placement(7, f"m-{name}", f"run-{name}", "file:///nowhere", ())
        return Parent(recorded(spec_of(name, name), f"id-{name}", at), weight)

    return make


def test_a_merge_is_described_by_its_method_its_parents_as_links_and_its_loss(spec_of, parent_named):
    spec = spec_of("both", "b", kind="merge", recipe={"method": "svd"}, receipt={"loss": 0.125, "modules": 90})

    text = describe(spec, [parent_named("translate", 0.6), parent_named("chat", 0.4)])

    assert text.startswith("svd merge of translate:v7 + chat:v7.\n")
    assert "\n- [translate:v7](#/models/translate/versions/7) × 0.6\n" in text
    assert "\n- [chat:v7](#/models/chat/versions/7) × 0.4\n" in text
    assert "\n- receipt/loss: 0.125" in text
    assert "modules" not in text


def test_an_import_is_described_by_its_source(spec_of):
    text = describe(spec_of("chat", "c", source="hf://org/repo@main"), [])

    assert text.startswith("Imported from hf://org/repo@main.\n")
    assert "parent" not in text


def test_the_description_of_a_large_family_stays_below_mlflows_limit(spec_of, parent_named):
    parents = [parent_named("n" * 120 + f"{number:03}") for number in range(2000)]
    metrics = {f"metric {number} {HOSTILE}": float(number) for number in range(300)}
    spec = spec_of("both", "b", kind="merge", recipe={"method": "cat"}, metrics=metrics, dataset=HOSTILE * 100)

    text = describe(spec, parents)

    assert len(text) < 5000
    assert text.startswith("cat merge of ")
    assert text.endswith("More on the page of the source run.")


def test_a_version_with_a_number_shows_its_picture_which_leads_to_its_page(spec_of):
    spec = spec_of("translate", "t")

    assert "](adapters/translate/v3/lineage.svg)](adapters/translate/v3)" in describe(spec, [], 3)
    assert "](adapters/translate/lineage.svg)](adapters/translate)" in describe_adapter("translate", spec.base)


@pytest.mark.parametrize("count", [1, CHILDREN_SHOWN, 10_000])
def test_children_are_one_line_that_follows_them_and_leaves_the_rest_alone(parent_named, count: int):
    version = parent_named("translate").version
    children = [parent_named(f"child{number}").version for number in range(min(count, 40))]
    people = "Made by hand.\n\n- a list"

    first = with_children(people, version, children[:1], 1)
    more = with_children(f"{first}\n\nWritten later.", version, children, count)

    assert first == f"{people}\n\n**Children** [child0:v7](#/models/child0/versions/7)"
    assert more.startswith(people)
    assert more.endswith("\n\nWritten later.")
    assert more.count("#/models/child") == min(count, CHILDREN_SHOWN)
    assert (f"[all {count}](adapters/translate/v7?direction=down)" in more) == (count > CHILDREN_SHOWN)
    assert with_children(more, version, [], 0) == f"{people}\n\n\n\nWritten later."


def test_everything_about_a_large_family_stays_below_mlflows_limit(spec_of, parent_named):
    parents = [parent_named("n" * 120 + f"{number:03}") for number in range(2000)]
    spec = spec_of("both", "b", kind="merge", recipe={"method": "cat"}, dataset=HOSTILE * 100, license=HOSTILE * 100)
    spec = replace(spec, base=replace(spec.base, name=HOSTILE * 100))
    version = parent_named("m" * 128).version

    text = with_children(describe(spec, parents, 7), version, [parent.version for parent in parents], 10_000)
    recalled = with_recall(text, ("n" * 128 + ":v7", HOSTILE * 500))
    later = with_children(recalled, version, [parent.version for parent in parents[1:]], 10_001)

    assert "**Children** [" in text
    adapter = describe_adapter("m" * 128, spec.base)
    assert max(map(len, (text, recalled, later, adapter))) <= MLFLOW_LIMIT
    full = "y" * MLFLOW_LIMIT
    assert with_children(full, version, [parents[0].version], 1) == full


def test_the_layers_of_a_merge_are_drawn_from_its_receipt():
    modules = [f"model.layers.{layer}.mlp.{kind}_proj" for layer in range(3) for kind in ("up", "down")] + [HOSTILE]
    layers = {
        "module": modules,
        "norm": [1.0] * 7,
        "loss": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.25],
        "stable_rank": [1] * 7,
    }

    root = ET.fromstring(layers_picture({"loss": 0.3, "rank": 4, "modules": 7, "layers": layers}))

    told = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "model.layers.2.mlp.down_proj: 0.5" in told
    assert len(told) == 1 + 2 * 7
    assert {element.tag.rpartition("}")[2] for element in root.iter()} == {"svg", "title", "style", "rect", "text"}
    assert layers_picture(None) is layers_picture({"loss": 0.1}) is None


def test_a_merge_that_lost_nothing_says_so():
    drawn = layers_picture({"layers": {"module": ["a"], "norm": [2.0], "loss": [1e-9], "stable_rank": [1]}})

    assert "nothing lost" in drawn


def test_what_a_caller_wrote_is_shown_as_text(spec_of, parent_named):
    base = replace(spec_of("x", "x").base, name=HOSTILE)
    spec = spec_of(
        "chat", "c", base=base, source=HOSTILE, dataset=HOSTILE, license=HOSTILE, metrics={HOSTILE: 1.0}, kind="train"
    )

    text = (
        describe(spec, [])
        + lineage_page(spec, [], experiment_id="1", model_id="m", run_id="r", layers=True)
        + outputs_page("t", [{"o": HOSTILE}])
    )

    assert "<img" not in text
    assert "](javascript" not in text
    assert "![" not in text
    assert "\x00" not in text
    assert "\u202e" not in text


@given(st.text(max_size=300))
def test_escaped_text_is_one_line_without_tags_or_table_borders(text):
    escaped = escape(text)

    assert "\n" not in escaped
    assert "<" not in escaped
    assert "|" not in escaped.replace("\\|", "")


@given(st.text(max_size=400))
def test_any_text_becomes_a_name_that_mlflow_takes(text):
    key = mlflow_key(text)

    _validate_metric_name(key)
    _validate_param_name(key)
    _validate_tag_name(key)


def test_a_name_that_mlflow_takes_is_kept():
    assert mlflow_key("fr-en/nll_per token.v2") == "fr-en/nll_per token.v2"
    assert mlflow_key("chrf,none") == "chrf_none"
    assert mlflow_key("../../etc/passwd") == "etc/passwd"


def test_the_loss_of_a_receipt_does_not_hide_a_metric_of_the_caller(spec_of):
    spec = spec_of("both", "b", metrics={"loss": 2.0}, receipt={"loss": 0.1, "predicted_loss": None})

    assert figures(spec) == {"loss": 2.0, "receipt/loss": 0.1}


def test_the_lineage_page_links_versions_models_and_runs_in_the_same_tab(spec_of, parent_named):
    spec = spec_of("both", "b", kind="merge", recipe={"method": "cat"}, recipe_digest="abc")

    page = lineage_page(
        spec, [parent_named("chat", 0.4)], experiment_id="3", model_id="m-both", run_id="r", layers=True
    )

    assert "[both](#/experiments/3/models/m-both)" in page
    assert "[chat:v7](#/models/chat/versions/7) | 0.4 | [files](#/experiments/3/models/m-chat)" in page
    assert "[import](#/experiments/3/runs/run-chat)" in page
    assert "Recipe `abc`" in page
    assert "[What was lost in each layer](#/experiments/3/runs/r/artifacts/layers.svg)" in page


def test_the_lineage_record_keeps_the_order_of_parents(spec_of, parent_named):
    spec = spec_of("both", "b", kind="merge", recipe={"method": "cat"})

    record = lineage_record(spec, [parent_named("b", 1.0), parent_named("a", -0.5)], version_id="v")

    assert [(p["position"], p["ref"], p["weight"]) for p in record["parents"]] == [(0, "b:v7", 1.0), (1, "a:v7", -0.5)]
    assert json.loads(json.dumps(record)) == record


def test_long_outputs_are_cut_with_a_word_on_the_rest():
    page = outputs_page("chat", [{"prompt": "p", "answer": "x" * 1000}] * 3, limit=2)

    assert page.count("| p | xxx") == 2
    assert "1 more are in outputs.json." in page
    assert "x" * 400 not in page

"""Weights by layer: what a pattern selects, and that recipes without them stay what they were."""

from __future__ import annotations

import pytest

from adapterctl.registry.domain.errors import InvalidInput
from adapterctl.registry.domain.recipe import LayerWeights, Recipe, RecipeParent, parse_layer_weights, recipe_from_json

MODULE = "model.layers.12.self_attn.q_proj"


def recipe(*layers: LayerWeights) -> Recipe:
    return Recipe("svd", 1, (RecipeParent("a" * 64, 1.0), RecipeParent("b" * 64, 0.5)), 8, "BF16", layers=layers)


@pytest.mark.parametrize(
    "pattern", ["q_proj", "layers.12", "layers.0-15", "layers.12-12.self_attn", "layers.*.self_attn", "*", MODULE]
)
def test_a_run_of_parts_selects_the_module(pattern: str):
    assert LayerWeights(pattern, (1.0,)).selects(MODULE)


@pytest.mark.parametrize("pattern", ["q", "layers.1", "layers.13-20", "layers.self_attn", "12-", "layers.*.q_proj"])
def test_other_parts_do_not(pattern: str):
    assert not LayerWeights(pattern, (1.0,)).selects(MODULE)


def test_the_first_that_selects_a_module_decides():
    found = recipe(LayerWeights("layers.12", (0.0, 2.0)), LayerWeights("*", (3.0, 3.0)))

    assert found.weights_in(MODULE) == (0.0, 2.0)
    assert found.weights_in("model.layers.13.mlp") == (3.0, 3.0)
    assert recipe().weights_in(MODULE) == (1.0, 0.5)


def test_a_recipe_without_layers_has_the_digest_that_it_always_had():
    assert recipe().to_json().keys() == {"v", "method", "method_rev", "parents", "rank", "dtype", "seed", "options"}
    assert recipe().digest == "46ff61b96632365527793096fe4f969999d3ed7ce9da22f5c1c9e03ed32b0525"


def test_layers_and_their_order_are_in_the_digest_and_come_back():
    one, other = LayerWeights("q_proj", (1.0, 0.0)), LayerWeights("layers.0-3", (0.25, 2.0))

    assert len({recipe().digest, recipe(one).digest, recipe(one, other).digest, recipe(other, one).digest}) == 4
    assert recipe_from_json(recipe(one, other).to_json()) == recipe(one, other)


def test_what_is_written_is_what_is_read():
    assert parse_layer_weights("layers.0-15=0.7,-3e-1") == LayerWeights("layers.0-15", (0.7, -0.3))
    assert parse_layer_weights(str(LayerWeights("q_proj", (0.1, 1e-5)))) == LayerWeights("q_proj", (0.1, 1e-5))


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        "=1,2",
        "q_proj=",
        "q_proj=1,x",
        "q_proj=1,nan",
        "q_proj=1,1e-30",
        "q_proj=1,1e7",
        "a..b=1,2",
        "q_proj=inf",
    ],
)
def test_other_text_is_refused_with_an_example(text: str):
    with pytest.raises(InvalidInput) as refused:
        parse_layer_weights(text)

    assert "layers.0-15=0.7,0.3" in refused.value.hint

"""What a request resolves to, and how a method describes itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_tiny_adapter
from tiny_merge import facts_of

from adapterctl.registry.domain.errors import InvalidInput, Misconfigured, NotFound, Refused
from adapterctl.registry.domain.recipe import LayerWeights, MergeRequest, Recipe
from adapterctl.registry.domain.refs import parse_parent
from adapterctl.registry.merging import method as method_module
from adapterctl.registry.merging.grams import Grams, Maps
from adapterctl.registry.merging.method import find_method, merge_method, methods, resolve


@pytest.fixture
def resolved(tmp_path: Path) -> Any:
    """Resolve a merge of two tiny adapters (ranks and dtypes as given) with the request's fields."""

    def run(
        *parents: str, ranks: tuple[int, int] = (4, 6), dtypes: tuple[str, str] = ("F32", "F32"), **ask: Any
    ) -> Recipe:
        facts = [
            facts_of(write_tiny_adapter(tmp_path / f"p{i}", rank=rank, dtype=dtype, seed=i))
            for i, (rank, dtype) in enumerate(zip(ranks, dtypes, strict=True))
        ]
        request = MergeRequest(tuple(parse_parent(p) for p in parents or ("a", "b")), **ask)
        return resolve(request, facts, ["a" * 64, "b" * 64][: len(request.parents)])

    return run


@pytest.fixture
def noisy() -> Iterator[str]:
    """A method with options and a seed, registered for one test."""

    @merge_method("noisy", form="grams", rev=3, exact=False, when="never", cost="none", breaks=("identity",))
    def noisy_sum(grams: Grams, *, rank: int, seed: int, density: float = 0.5, sign: str = "total") -> Maps:
        """Keep a part of each.

        Args:
            grams: of the module.
            density: share of the values
                that is kept.
        """
        return Maps(np.zeros((rank, grams.rank)), np.zeros((grams.rank, rank)))

    methods.cache_clear()
    yield "noisy"
    del method_module._registered["noisy"]
    methods.cache_clear()


def test_sum_keeps_the_factors_while_the_ranks_add_up_to_the_limit(resolved: Any):
    assert (resolved().method, resolved().rank) == ("cat", 10)


def test_sum_compresses_to_the_limit_beyond_it(resolved: Any):
    recipe = resolved(ranks=(40, 40))

    assert (recipe.method, recipe.rank) == ("svd", 64)


@pytest.mark.parametrize(("rank", "expected"), [(8, ("svd", 8)), (10, ("cat", 10)), (16, ("cat", 10))])
def test_sum_takes_the_rank_that_is_asked_for_as_its_limit(resolved: Any, rank: int, expected: tuple[str, int]):
    recipe = resolved(rank=rank)

    assert (recipe.method, recipe.rank) == expected


def test_the_choice_is_made_before_hashing(resolved: Any):
    assert resolved(method="sum").digest == resolved(method="cat").digest


def test_svd_has_the_largest_parent_rank_by_default(resolved: Any):
    assert resolved(method="svd").rank == 6


def test_a_rank_beyond_the_sum_of_ranks_is_reduced_to_it(resolved: Any):
    assert resolved(method="svd", rank=500).rank == 10


def test_cat_refuses_a_rank_that_cannot_hold_the_factors(resolved: Any):
    with pytest.raises(InvalidInput, match="keeps all 10 ranks"):
        resolved(method="cat", rank=8)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("BF16", "BF16"), "BF16"),
        (("F16", "F16"), "F16"),
        (("BF16", "F16"), "F32"),
        (("BF16", "F32"), "F32"),
        (("F32", "F64"), "F64"),
    ],
)
def test_the_output_type_is_the_narrowest_that_holds_every_parent(
    resolved: Any, dtypes: tuple[str, str], expected: str
):
    assert resolved(dtypes=dtypes).dtype == expected


def test_an_output_type_is_taken_in_every_usual_spelling(resolved: Any):
    assert {resolved(dtype=spelling).dtype for spelling in ("bf16", "bfloat16", "BF16")} == {"BF16"}


def test_weights_and_order_of_parents_are_in_the_recipe(resolved: Any):
    recipe = resolved("a=0.5", "b=-2")

    assert [(parent.digest[0], parent.weight) for parent in recipe.parents] == [("a", 0.5), ("b", -2.0)]


def test_every_problem_of_a_request_is_told_at_once(resolved: Any):
    with pytest.raises(InvalidInput) as caught:
        resolved("a=0", "b", method="svd", rank=0, dtype="int8", seed=1, options={"density": 0.5}, max_loss=2.0)

    assert {problem.code for problem in caught.value.problems} == {
        "bad_weight",
        "bad_rank",
        "bad_dtype",
        "no_seed",
        "unknown_option",
        "bad_max_loss",
    }


def test_weights_by_layer_are_in_the_recipe(resolved: Any):
    layers = (LayerWeights("layers.0", (0.0, 2.0)),)

    assert resolved(layers=layers).layers == layers


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        (LayerWeights("layers.0", (1.0,)), "bad_layer_weights"),
        (LayerWeights("layers.0", (0.0, 0.0)), "bad_layer_weights"),
        (LayerWeights("layers.77", (1.0, 2.0)), "no_such_layer"),
    ],
)
def test_weights_by_layer_are_held_against_the_parents(resolved: Any, layer: LayerWeights, code: str):
    with pytest.raises(InvalidInput) as refused:
        resolved(layers=(layer,))

    assert [problem.code for problem in refused.value.problems] == [code]


def test_one_parent_is_no_merge(tmp_path: Path):
    facts = [facts_of(write_tiny_adapter(tmp_path / "p"))]

    with pytest.raises(InvalidInput, match="at least two parents"):
        resolve(MergeRequest((parse_parent("a"),)), facts, ["a" * 64])


def test_linear_is_refused_because_it_means_two_things():
    with pytest.raises(Refused) as caught:
        find_method("linear")

    assert "use sum (exact)" in caught.value.hint


def test_an_unknown_method_gets_a_suggestion_and_the_list():
    with pytest.raises(NotFound, match="did you mean svd") as caught:
        find_method("svdd")

    assert caught.value.hint.startswith("known methods: cat, ")


def test_options_come_from_the_signature_and_their_help_from_the_docstring(noisy: str):
    density, sign = find_method(noisy).options

    assert (density.name, density.type, density.default, density.help) == (
        "density",
        "float",
        0.5,
        "share of the values that is kept.",
    )
    assert (sign.name, sign.help) == ("sign", "")


def test_defaults_of_options_and_seed_are_in_the_recipe(noisy: str, resolved: Any):
    recipe = resolved(method=noisy, options={"density": 1})

    assert dict(recipe.options) == {"density": 1.0, "sign": "total"}
    assert (recipe.seed, recipe.method_rev) == (0, 3)


@pytest.mark.parametrize("value", ["much", True, float("nan")])
def test_an_option_of_the_wrong_type_is_a_problem(noisy: str, resolved: Any, value: Any):
    with pytest.raises(InvalidInput, match="expected float"):
        resolved(method=noisy, options={"density": value})


@pytest.mark.parametrize(("value", "fits"), [(0, True), (0.3, True), (1.0, True), (-0.1, False), (1.5, False)])
def test_a_share_is_from_0_to_1(resolved: Any, value: float, fits: bool):
    if fits:
        assert resolved(method="slerp", options={"t": value}).options["t"] == value
        return
    with pytest.raises(InvalidInput, match="expected float from 0 to 1"):
        resolved(method="slerp", options={"t": value})


@pytest.mark.parametrize(
    ("density", "epsilon", "fits"),
    [(0.5, 1.0, True), (1.0, 0.0, True), (0.07, 0.14, True), (0.05, 0.14, False), (0.95, 0.14, False)],
)
def test_options_that_depend_on_each_other_are_held_together(resolved: Any, density: float, epsilon: float, fits: bool):
    options = {"density": density, "epsilon": epsilon}
    if fits:
        assert resolved(method="della", options=options).options["epsilon"] == epsilon
        return
    with pytest.raises(InvalidInput, match=f"density {density} and epsilon 0.14 keep .*, expected 0 to 1") as caught:
        resolved(method="della", options=options)
    assert [problem.hint for problem in caught.value.problems] == ["with this density epsilon is at most 0.1"]


def test_rules_on_factors_need_parents_of_one_rank_and_keep_it(resolved: Any):
    with pytest.raises(InvalidInput, match=r"the ranks of .* are 4 and 6"):
        resolved(method="ties")
    with pytest.raises(InvalidInput, match="ties has the rank of its parents, 4, not 2"):
        resolved(method="ties", ranks=(4, 4), rank=2)

    assert resolved(method="ties", ranks=(4, 4)).rank == 4


def test_an_option_of_several_words_takes_no_other(resolved: Any):
    with pytest.raises(InvalidInput, match="expected total or frequency"):
        resolved(method="ties", ranks=(4, 4), options={"majority_sign_method": "weight"})


def test_a_random_method_has_its_seed_in_the_recipe(resolved: Any):
    assert resolved(method="dare_ties", ranks=(4, 4), seed=7).seed == 7


def test_slerp_has_two_ends(tmp_path: Path):
    facts = [facts_of(write_tiny_adapter(tmp_path / f"p{i}", seed=i)) for i in range(3)]
    request = MergeRequest(tuple(parse_parent(p) for p in "abc"), method="slerp")

    with pytest.raises(InvalidInput, match="slerp takes 2 parents, not 3"):
        resolve(request, facts, ["a" * 64, "b" * 64, "c" * 64])


def test_two_methods_cannot_share_a_name():
    find_method("svd")  # it is known once its file was read, which a test before this one may not have done

    with pytest.raises(Misconfigured, match="two merge methods are named svd"):

        @merge_method("svd", form="grams", rev=1, exact=False, when="", cost="")
        def other(grams: Grams, *, rank: int) -> Maps:
            raise AssertionError


def test_a_method_can_only_break_laws_that_exist():
    with pytest.raises(ValueError, match="unknown laws"):
        merge_method("odd", form="grams", rev=1, exact=False, when="", cost="", breaks=("gravity",))


def test_an_option_needs_a_default_and_a_simple_type():
    with pytest.raises(TypeError, match="option table needs"):

        @merge_method("odd", form="grams", rev=1, exact=False, when="", cost="")
        def odd(grams: Grams, *, rank: int, table: dict[str, int]) -> Maps:
            raise AssertionError


def test_methods_of_other_packages_come_in_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "theirs.py").write_text(
        "from adapterctl.registry.merging.method import merge_method\n"
        "@merge_method('theirs', form='factors', rev=1, exact=False, when='', cost='')\n"
        "def theirs(c): ...\n"
    )
    package = tmp_path / "theirs-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[adapterctl.merge_methods]\ntheirs = theirs:theirs\nbroken = theirs:missing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    methods.cache_clear()

    with pytest.raises(Misconfigured, match="merge method broken of theirs:missing cannot be loaded"):
        methods()
    (package / "entry_points.txt").write_text("[adapterctl.merge_methods]\ntheirs = theirs:theirs\n")

    assert find_method("theirs").name == "theirs"
    del method_module._registered["theirs"]
    methods.cache_clear()

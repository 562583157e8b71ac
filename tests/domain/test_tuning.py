"""The rules of a search: how samples are halved, who goes on, who is on the front, and what is said of the winner."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from adapterctl.registry.domain.errors import InvalidInput
from adapterctl.registry.domain.evals import MEASURES, Interval
from adapterctl.registry.domain.recipe import LayerWeights
from adapterctl.registry.domain.suite import Row, SuiteTask
from adapterctl.registry.domain.tuning import (
    Finding,
    HeldOut,
    Margin,
    Trial,
    advice,
    by_layer,
    choose_finalists,
    explain,
    front,
    goes_on,
    layer_groups,
    margin,
    share,
    split,
)


def _task(count: int, *, seed: int = 0) -> SuiteTask:
    rows = tuple(Row(f"r{i}", f"prompt {i}", " target") for i in range(count))
    return SuiteTask(
        "t", "rows.jsonl", "0" * 64, "{{ prompt }}", "{{ target }}", ("nll",), "nll", 8, (), count, seed, rows
    )


def _trial(number: int, *shares: float, complete: bool = True, kind: int = 0) -> Trial:
    rungs = (min(shares),) * (3 if complete else 1)
    return Trial(number, kind, (1.0, 1.0 + number / 100), 10, shares, rungs)


def _beyond(*numbers: int) -> Callable[[Trial], Margin]:
    return lambda trial: Margin(trial.number, 0, None, trial.number in numbers)


def _looks(count: int, factor: float, noise: float, *, seed: int = 1) -> list[dict[str, float]]:
    """Likelihoods of some samples of unlike difficulty; a candidate's differ by a factor and by chance."""
    difficulty, chance = random.Random(0), random.Random(seed)
    return [
        {"nll": difficulty.uniform(5, 40) * factor * (1 + chance.gauss(0, noise)), "tokens": 10.0} for _ in range(count)
    ]


def test_every_sample_is_a_tuning_sample_or_a_held_out_one():
    tuning, heldout = split(_task(21), None)

    assert (len(tuning), len(heldout)) == (11, 10)
    assert {row.id for row in (*tuning, *heldout)} == {f"r{i}" for i in range(21)}


def test_the_halves_do_not_follow_the_order_of_the_file():
    tuning, _ = split(_task(40), None)

    assert {row.id for row in tuning} != {f"r{i}" for i in range(20)}


def test_too_few_samples_are_not_halved():
    with pytest.raises(InvalidInput, match="has 7 samples"):
        split(_task(20), 7)


@pytest.mark.parametrize(
    ("stem", "layers", "count", "patterns"),
    [
        ("model.layers.{}.mlp.up_proj", range(30), 2, ("layers.0-14", "layers.15-29")),
        ("model.layers.{}.mlp.experts.9.w1", range(3), 3, ("layers.0", "layers.1", "layers.2")),
        ("transformer.h.{}.attn", (4, 5, 9), 2, ("h.4", "h.5-9")),
        ("{}.attn", range(4), 2, ("0-1", "2-3")),
        ("model.layers.{}.mlp", range(5), 1, ()),
    ],
)
def test_layers_are_cut_into_runs_that_a_recipe_can_name(stem: str, layers: range, count: int, patterns: tuple[str]):
    assert layer_groups([*map(stem.format, layers), "lm_head"], count) == patterns


def test_encoder_and_decoder_are_cut_alike():
    modules = [f"{part}.{i}.up" for part in ("encoder.block", "decoder.layer") for i in range(4)]

    assert layer_groups(modules, 2) == ("*.0-1", "*.2-3")


def test_layers_that_no_pattern_tells_apart_are_not_cut():
    with pytest.raises(InvalidInput, match="have 3 layers, which make no 4 groups"):
        layer_groups([f"layers.{i}.up" for i in range(3)], 4)
    with pytest.raises(InvalidInput, match="belongs to no one group"):
        layer_groups([f"{i}.experts.{j}.up" for i in range(4) for j in range(4)], 2)


def test_only_layers_with_weights_of_their_own_are_in_the_recipe():
    groups = ("layers.0-1", "layers.2-3", "layers.4-5")

    assert by_layer((0.5, 1.0), ()) == ((0.5, 1.0), ())
    assert by_layer((0.5, 1.0) * 3, groups) == ((0.5, 1.0), ())
    assert by_layer((0.5, 1.0, 0.5, 1.0, 0.5, 0.2), groups) == (
        (0.5, 1.0),
        (LayerWeights("layers.4-5", (0.5, 0.2)),),
    )


def test_a_share_reads_the_same_where_lower_and_where_higher_is_better():
    worse_nll = share(MEASURES["nll"], [{"nll": 1.0, "tokens": 1.0}], [{"nll": 2.0, "tokens": 1.0}])
    fewer_hits = share(MEASURES["exact_match"], [{"exact": 1.0}, {"exact": 1.0}], [{"exact": 1.0}, {"exact": 0.0}])

    assert worse_nll == fewer_hits == 0.5
    assert share(MEASURES["exact_match"], [{"exact": 0.0}], [{"exact": 1.0}]) == 0.0


def test_about_half_of_the_candidates_go_on_and_the_best_one_always_does():
    rng = random.Random(3)
    seen: list[float] = []
    went_on = 0
    for _ in range(400):
        value = rng.random()
        best = not seen or value > max(seen)
        on = goes_on(value, seen)
        assert on or not best
        went_on += on
        seen.append(value)

    assert 160 <= went_on <= 240


def test_the_front_is_what_nothing_beats_on_every_task_at_once():
    trials = [_trial(0, 0.9, 0.9), _trial(1, 0.95, 0.8), _trial(2, 0.89, 0.9), _trial(3, 0.99, 0.99, complete=False)]

    assert front(trials) == [0, 1]
    assert choose_finalists(trials, [8], 2, _beyond(1, 2, 3)) == ([0, 1], [])
    assert choose_finalists(trials, [8], 9, _beyond(1, 2, 3)) == ([0, 1, 2], [])


def test_of_equal_candidates_the_smaller_adapter_wins():
    trials = [_trial(0, 0.8, 0.8), _trial(1, 0.9, 0.9, kind=0), _trial(2, 0.9, 0.9, kind=1)]

    assert choose_finalists(trials, [8, 4], 1, _beyond(1, 2))[0] == [2]


def test_the_winner_is_the_best_of_those_that_beat_the_plain_sum_beyond_the_interval():
    trials = [_trial(0, 0.8, 0.9), _trial(1, 0.95, 0.95), _trial(2, 0.85, 0.85), _trial(3, 0.88, 0.9)]

    def asked(*beyond: int) -> tuple[list[int], list[int]]:
        finalists, margins = choose_finalists(trials, [8], 4, _beyond(*beyond))
        return finalists, [each.trial for each in margins]

    assert asked(1, 2, 3) == ([1, 3, 2, 0], [1])
    assert asked(2, 3) == ([3, 1, 2, 0], [1, 3])
    assert asked(2) == ([2, 1, 3, 0], [1, 3, 2])
    assert asked() == ([0, 1, 3, 2], [1, 3, 2])


def test_a_candidate_that_is_better_by_luck_loses_to_the_plain_sum_and_one_that_is_better_wins():
    nll, base, plain = MEASURES["nll"], _looks(16, 2.0, 0.0), _looks(16, 1.0, 0.0)
    looks = {1: _looks(16, 1.0, 0.15, seed=2), 2: _looks(16, 0.97, 0.02)}
    shares = {number: share(nll, plain, found) for number, found in looks.items()}
    trials = [_trial(0, 1.0), _trial(1, shares[1]), _trial(2, shares[2])]

    def against_plain(trial: Trial) -> Margin:
        return margin(trial.number, 0, nll, base, plain, looks[trial.number])

    assert shares[1] > shares[2] > 1  # luck leads
    assert choose_finalists(trials[:2], [8], 1, against_plain)[0] == [0]
    finalists, (lucky, better) = choose_finalists(trials, [8], 1, against_plain)
    assert finalists == [2]
    assert (lucky.trial, lucky.beyond, better.trial, better.beyond) == (1, False, 2, True)


def test_where_the_plain_sum_scores_nothing_a_candidate_wins_that_scores_beyond_chance():
    exact = MEASURES["exact_match"]
    nothing = [{"exact": 0.0}] * 16

    def beyond(hits: int) -> bool:
        found = [{"exact": float(i < hits)} for i in range(16)]
        return margin(1, 0, exact, nothing, nothing, found).beyond

    assert not beyond(1)
    assert beyond(8)


def test_the_explanation_names_winner_runner_up_plain_sum_and_the_held_out_verdict():
    trials = (_trial(0, 0.8, 0.9), _trial(1, 0.92, 0.91), _trial(2, 0.85, 0.99), _trial(3, 0.5, 0.5, complete=False))
    rows = tuple(
        HeldOut(trial, task, "nll", 6.0, 2.0, 2.2, Interval(value, value - 0.02, value + 0.02), None)
        for trial, values in ((1, (0.9, 0.88)), (0, (0.81, 0.9)))
        for task, value in enumerate(values)
    )
    against = (Interval(1.1, 1.05, 1.15), Interval(0.99, 0.97, 1.01))
    margins = (Margin(1, 0, Interval(1.14, 1.04, 1.2), beyond=True),)
    finding = Finding(trials, (1, 2), (1,), (0, 1), rows, against, 7.25, margins)

    text = "\n".join(explain(finding, ["a:v1", "b:v1"], ["cat r8"], ["one", "two"]))

    assert "4 candidates were tried for 7.2 full evaluations; 1 were dropped early" in text
    assert "trial 1 (cat r8, a:v1=1 b:v1=1.01) keeps at least 91.0% of every task, the most of all" in text
    assert "it is two that holds it there" in text
    assert "the next is trial 2" in text
    assert "the plain sum (cat r8, a:v1=1 b:v1=1) keeps 80.0%" in text
    assert "trial 1 keeps 88.0% [86.0%, 90.0%] of two, its least" in text
    assert "one better (1.100 [1.050, 1.150]), two not told apart" in text
    assert "beats it by more than the tuning samples leave open: one 1.140 [1.040, 1.200]" in text


@pytest.mark.parametrize(
    ("less", "said"),
    [
        (Interval(0.02, 0.01, 0.03), "is better than the plain sum: +2.0 points [+1.0, +3.0] in the smallest share"),
        (Interval(0.02, -0.01, 0.03), "is not told apart from equal weights: +2.0 points [-1.0, +3.0]"),
        (Interval(-0.02, -0.03, -0.01), "is worse than the plain sum: -2.0 points [-3.0, -1.0]"),
    ],
)
def test_the_reader_is_told_whether_the_winner_is_worth_having(less: Interval, said: str):
    trials = (_trial(0, 0.8, 0.9), _trial(1, 0.92, 0.91))
    won, plain = (Finding(trials, (1,), (winner,), (0, 1), (), (), 7.25, (), less) for winner in (1, 0))

    assert said in advice(won)[0]
    assert advice(plain) == []


def test_a_winner_is_said_not_to_be_comparable_where_its_parents_score_nothing():
    rows = tuple(HeldOut(1, task, "exact_match", 0.0, 0.0, 0.2, None, None) for task in (0, 1))
    finding = Finding((_trial(0, 0.8), _trial(1, 0.92)), (1,), (1,), (0, 1), rows, (), 7.25)
    kept_some = replace(rows[1], retention=Interval(0.9, 0.8, 0.95))

    assert "cannot be compared with the plain sum" in advice(finding)[0]
    assert advice(replace(finding, heldout=(rows[0], kept_some))) == []  # found before the two were compared


def test_the_explanation_says_why_a_candidate_that_keeps_more_did_not_win():
    trials = (_trial(0, 0.8, 0.9), _trial(1, 0.92, 0.91), _trial(2, 0.85, 0.99))
    rows = tuple(HeldOut(0, task, "nll", 6.0, 2.0, 2.2, Interval(0.9, 0.8, 0.95), None) for task in (0, 1))
    margins = tuple(Margin(n, 0, Interval(1.14, 0.99, 1.2), beyond=False) for n in (1, 2))
    finding = Finding(trials, (1, 2), (0,), (0, 1), rows, (None, None), 7.25, margins)

    text = "\n".join(explain(finding, ["a:v1", "b:v1"], ["cat r8"], ["one", "two"]))

    assert "trial 0 (cat r8, a:v1=1 b:v1=1) keeps at least 80.0% of every task; it is one" in text
    assert (
        "trial 1 (cat r8, a:v1=1 b:v1=1.01) keeps 91.0%, the most of all, but is not told apart from the plain sum "
        "where that keeps least: one 1.140 [0.990, 1.200], nor are 1 more"
    ) in text
    assert "no candidate is told apart from the plain sum on the tuning samples: leave the weights at 1" in text

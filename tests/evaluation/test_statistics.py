"""The figures of an evaluation: equal to the reference implementation, and intervals that hold what they promise."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
import sacrebleu

from adapterctl.registry.domain.errors import InvalidInput
from adapterctl.registry.domain.evals import (
    BEHAVIOUR,
    LEAST_SAMPLES,
    MEASURES,
    answer_statistics,
    behaviour_note,
    kept,
    least_difference,
    loops,
    share_interval,
    spread,
    switched,
    task_result,
    unseen,
)

NLL, EXACT, CHRF = (MEASURES[name] for name in ("nll", "exact_match", "chrf"))
Samples = list[Mapping[str, float]]


def _nll_samples(mean: float, *, seed: int, difficulty: list[float]) -> Samples:
    """Samples of 10 tokens that share their difficulty with every other subject, as real ones do."""
    rng = random.Random(seed)
    return [{"nll": 10 * (mean + hard + rng.gauss(0, 0.1)), "tokens": 10.0} for hard in difficulty]


def _three(base: float, parent: float, child: float, *, count: int = 60, seed: int = 0) -> tuple[Samples, ...]:
    rng = random.Random(1000 + seed)
    difficulty = [rng.gauss(0, 0.5) for _ in range(count)]
    means = (base, parent, child)
    return tuple(_nll_samples(m, seed=3 * seed + i, difficulty=difficulty) for i, m in enumerate(means))


@pytest.mark.parametrize(
    "answers",
    [
        ["the cat sat on the mat", "two dogs", "été indien"],
        ["", "x", "a much longer answer than anybody asked for, much longer"],
        ["The cat sat.", " two  dogs ", "hiver"],
    ],
)
def test_chrf_equals_sacrebleu(answers: list[str]):
    references = ["The cat sat on the mat.", "two dogs", "été"]

    samples = [answer_statistics(a, r, ended=True) for a, r in zip(answers, references, strict=True)]

    expected = sacrebleu.corpus_chrf(answers, [references]).score
    assert MEASURES["chrf"].score(samples) == pytest.approx(expected, abs=1e-9)


def test_nll_is_divided_by_tokens_and_not_by_samples():
    samples = [{"nll": 1.0, "tokens": 1.0}, {"nll": 9.0, "tokens": 9.0}]

    assert NLL.score(samples) == 1.0


def test_an_identical_child_keeps_exactly_everything():
    base, parent, _ = _three(6.0, 2.0, 2.0)

    result = kept(NLL, base, parent, parent)

    for interval in (result.retention, result.gain_kept):
        assert interval is not None
        assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_the_smallest_shares_of_two_children_are_compared_whichever_tasks_they_are_of():
    exact = MEASURES["exact_match"]
    parent, half, most = ([{"exact": float(i % 8 < hits)} for i in range(64)] for hits in (8, 4, 6))

    same = least_difference([(exact, (parent, half, half)), (exact, (parent, most, most))])
    turned = least_difference([(exact, (parent, half, most)), (exact, (parent, most, half))])
    better = least_difference([(exact, (parent, most, half)), (exact, (parent, most, most))])

    assert same is not None
    assert turned is not None
    assert better is not None
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert turned.value == 0.0
    assert turned.low < 0 < turned.high
    assert better.value == pytest.approx(0.25)
    assert better.low > 0


def test_a_task_does_not_count_in_draws_in_which_its_parent_scores_nothing():
    exact = MEASURES["exact_match"]
    nothing, rarely = ([{"exact": float(i < hits)} for i in range(16)] for hits in (0, 1))
    always, often, half = ([{"exact": float(i % 16 < hits)} for i in range(16)] for hits in (16, 12, 8))
    better = (exact, (always, often, half))

    alone = least_difference([better])
    in_all_draws = least_difference([better, (exact, (nothing, half, half))])
    in_some_draws = least_difference([better, (exact, (rarely, always, always))])
    only_in_some = least_difference([(exact, (rarely, rarely, nothing))])

    assert alone is not None
    assert alone.low > 0
    assert in_all_draws == alone
    assert in_some_draws == alone  # a share of 0 for both would have made "no better" of a third of the draws
    assert only_in_some is not None
    assert (only_in_some.value, only_in_some.low, only_in_some.high) == (1.0, 1.0, 1.0)
    assert least_difference([(exact, (nothing, half, nothing))]) is None


def test_a_child_like_the_base_kept_none_of_the_gain():
    base, parent, _ = _three(6.0, 2.0, 2.0)

    result = kept(NLL, base, parent, base)

    assert result.gain_kept is not None
    assert (result.gain_kept.value, result.gain_kept.low, result.gain_kept.high) == (0.0, 0.0, 0.0)
    assert result.retention is not None
    assert result.retention.value < 0.5


def test_retention_reads_the_same_where_lower_and_where_higher_is_better():
    by_nll = kept(NLL, *_three(6.0, 2.0, 2.5))
    texts = [("", "abcdef"), ("abcdef", "abcdef"), ("abczzz", "abcdef")]
    exact = [[answer_statistics(a, r, ended=True)] * 4 for a, r in texts]
    by_chrf = kept(MEASURES["chrf"], *exact)

    assert by_nll.retention is not None
    assert by_nll.retention.value == pytest.approx(2.0 / 2.5, rel=0.05)
    assert by_chrf.retention is not None
    assert 0 < by_chrf.retention.value < 1


def test_gain_is_undefined_where_the_parent_does_not_beat_the_base():
    result = kept(NLL, *_three(2.01, 2.0, 2.5))

    assert result.gain_kept is None
    assert "does not beat the base" in result.note
    assert result.retention is not None


def test_retention_is_undefined_where_it_would_divide_by_zero():
    right, wrong = ([{"exact": value}] * 5 for value in (1.0, 0.0))

    result = kept(MEASURES["exact_match"], right, wrong, right)

    assert result.retention is None
    assert result.gain_kept is None


def test_unpaired_samples_are_refused():
    base, parent, child = _three(6.0, 2.0, 2.5)

    with pytest.raises(InvalidInput):
        kept(NLL, base, parent, child[:-1])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = 2.0 / 2.2
    rounds, hits = 500, 0
    for seed in range(rounds):
        interval = kept(NLL, *_three(6.0, 2.0, 2.2, count=40, seed=seed), draws=200, seed=seed).retention
        assert interval is not None
        hits += interval.low <= truth <= interval.high

    # 90 % promised; over 500 rounds one standard deviation is 1.3 points
    assert 0.85 <= hits / rounds <= 0.95


def test_from_the_least_number_of_samples_on_the_interval_covers_nearly_as_often():
    rounds, hits = 500, 0
    for seed in range(rounds):
        three = _three(6.0, 2.0, 2.2, count=LEAST_SAMPLES, seed=seed)
        interval = kept(NLL, *three, draws=200, seed=seed).retention
        assert interval is not None
        hits += interval.low <= 2.0 / 2.2 <= interval.high

    # theory says 85 of 100; over 500 rounds two standard deviations are 3.2 points
    assert 0.81 <= hits / rounds <= 0.95


@pytest.mark.parametrize("count", [1, 2, 10, 20, 60])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_the_interval_of_a_share_covers_every_truth_at_least_as_often_as_it_says(count: int, confidence: float):
    intervals = [share_interval(hits, count, confidence) for hits in range(count + 1)]

    for truth in (0.001, 0.02, 0.1, 0.3, 0.5, 0.7, 0.95, 0.99, 0.9999):
        covered = sum(
            math.comb(count, hits) * truth**hits * (1 - truth) ** (count - hits)
            for hits, interval in enumerate(intervals)
            if interval.low <= truth <= interval.high
        )
        assert covered >= confidence


def test_the_interval_of_a_share_is_that_of_the_tables():
    eight = share_interval(8, 10, 0.95)

    assert (eight.value, eight.low, eight.high) == (
        0.8,
        pytest.approx(0.44390, abs=1e-5),
        pytest.approx(0.97479, abs=1e-5),
    )
    assert share_interval(20, 20).low == pytest.approx(0.05 ** (1 / 20))
    assert share_interval(0, 20).high == pytest.approx(unseen(20))
    assert share_interval(9_999, 10_000).high < 1


def test_outcomes_that_are_all_equal_are_no_certainty():
    right, wrong = ([{"exact": value, "loop": value}] * 20 for value in (1.0, 0.0))
    perfect, lost = ([answer_statistics(text, "a cat", ended=True)] * 20 for text in ("a cat", "xyz"))

    assert spread(EXACT, right, confidence=0.99).low == pytest.approx(0.005 ** (1 / 20))
    assert spread(BEHAVIOUR["loops"], wrong).high == pytest.approx(0.139, abs=1e-3)
    assert spread(CHRF, perfect).low == pytest.approx(86.1, abs=0.1)
    assert (spread(CHRF, lost).low, spread(CHRF, lost).high) == (0, pytest.approx(13.9, abs=0.1))
    for metric, base, parent in ((EXACT, wrong, right), (CHRF, lost, perfect)):
        same = kept(metric, base, parent, parent)
        assert same.retention is not None
        assert same.gain_kept is not None
        assert same.retention.value == same.gain_kept.value == 1
        assert max(same.retention.low, same.gain_kept.low) == pytest.approx(0.05 ** (1 / 20))
        assert min(same.retention.high, same.gain_kept.high) == pytest.approx(1 / (1 - unseen(20)))


@pytest.mark.parametrize(("count", "loses"), [(10, 0.3), (20, 0.01), (20, 0.2), (60, 0.05)])
def test_what_was_kept_of_a_share_is_covered_though_most_pairs_are_equal(count: int, loses: float):
    rounds, too_high, too_low = 500, 0, 0
    rng = random.Random(17)
    for _ in range(rounds):
        parent = [{"exact": float(rng.random() < 0.9)} for _ in range(count)]
        child = [{"exact": row["exact"] * (rng.random() >= loses)} for row in parent]
        interval = kept(EXACT, [{"exact": 0.0}] * count, parent, child, draws=200).retention
        assert interval is not None
        too_high += interval.low > 1 - loses
        too_low += interval.high < 1 - loses

    # 5 of 100 at each end is what 90 % promise; a gate goes by the low end
    assert too_high / rounds <= 0.09
    assert (too_high + too_low) / rounds <= 0.15


def test_pairing_sees_a_loss_that_unpaired_samples_hide():
    result = kept(NLL, *_three(6.0, 2.0, 2.14))

    assert result.retention is not None
    assert result.retention.high < 1.0  # the spread between samples (0.5) is far larger than this loss (0.14)


@pytest.mark.parametrize(
    "text", ["I am. I am. I am. I am.", "x\n\n###>\n\n###>\n\n###>", "answer is: answer is: answer is: ans"]
)
def test_an_endless_repetition_is_a_loop(text: str):
    assert loops(text)


@pytest.mark.parametrize(
    "text",
    ["", "wait...", "ha ha ha", "def f():\n            return 1", "no no no, that is something else", "1, 2, 3, 4, 5"],
)
def test_ordinary_endings_are_no_loops(text: str):
    assert not loops(text)


def test_behaviour_comes_along_where_answers_are_generated():
    samples = [
        {"nll": 1.0, "tokens": 2.0, **answer_statistics(" a cat", " a cat sat", ended=True)},
        {"nll": 1.0, "tokens": 2.0, **answer_statistics("no no. no no. no no. no no.", " yes", ended=False)},
    ]

    result = task_result("t", ["nll", "chrf"], "nll", samples)

    assert set(result.metrics) == {"nll", "chrf", "length_ratio", "ended", "loops", "short"}
    assert (result.metrics["ended"], result.metrics["loops"], result.direction) == (0.5, 0.5, "lower")


def test_answers_in_another_parents_manner_are_counted():
    own, other = ["a red house", "two cats", "yes"], ["Hello there!", "two cats", "Hi!"]

    assert switched(["a red horse", "two cats", "Hi"], own, [other]) == 0.5  # the second tells nothing
    assert switched(own, own, [other]) == 0.0
    assert switched(own, own, [own]) is None


def test_a_change_of_behaviour_is_told_in_words():
    parent = {"length_ratio": 0.9, "ended": 1.0, "loops": 0.0}

    assert behaviour_note(parent, parent) == ""
    assert "short" in behaviour_note(parent, parent | {"length_ratio": 0.5})
    assert "run on" in behaviour_note(parent, parent | {"ended": 0.6})
    assert "repeat" in behaviour_note(parent, parent | {"loops": 0.4})
    assert behaviour_note({}, {}) == ""

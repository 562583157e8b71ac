"""Gates: what a file may say, and that a verdict never passes with a condition that did not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterctl.registry.domain.errors import InvalidInput
from adapterctl.registry.domain.evals import Interval
from adapterctl.registry.domain.gate import GATE_KEYS, Gate, check_gates, conditions_for, parse_condition
from adapterctl.registry.domain.signature import read_public_key
from adapterctl.registry.domain.verdict import (
    Decision,
    Evidence,
    Figure,
    Judged,
    Receipt,
    Retained,
    Signed,
    decide,
    record_digest,
)

NOTHING = Evidence(
    ref="both:v1", version_id="1", content_digest="c", is_merge=True, has_parents=True, changed={}, tags={}
)


def figure(name: str, value: float, *, spread: float | None = 0.01, confidence: float = 0.9) -> Figure:
    low, high = (None, None) if spread is None else (value - spread, value + spread)
    return Figure(name, confidence, value, low, high, "suite translate", True)


def kept(task: str, value: float, spread: float = 0.01, **changes: Any) -> Retained:
    interval = Interval(value, value - spread, value + spread)
    row = Retained(task, task, "nll", True, f"{task}:v3", 0.9, interval, interval, "", True)
    return replace(row, **changes)


def judge(line: str, **facts: Any) -> Judged:
    (judged,) = decide([parse_condition(line)], replace(NOTHING, **facts)).conditions
    return judged


# what a file may say

KEY = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="

COMPLETE = {
    "gates": [
        {
            "stage": "production",
            "adapters": ["translate*", "chat"],
            "require": [
                "bleu >= 0.3",
                "translate/loops <= 0.05 @ estimate",
                "retention.min >= 95% @ 90% confidence",
                "gain_kept.min > 0.8 on suite chat metric chrf @ 99.5% confidence",
                "retention.min >= .9 on owner translate",
                "receipt.loss <= 5%",
                "approvals >= 2",
                "version.age <= 30d",
                "evaluation.age < 36h",
            ],
            "receipt": "passed",
            "fresh": ["suite", "base"],
            "evaluated_here": True,
            "signatures": {"at_least": 1, "keys": {"release": KEY}},
            "tags": {"reviewed": "yes", "team": ["mt", "chat"], "owner": []},
            "license": ["apache-2.0", "mit"],
        },
        {"stage": "staging", "tags": ["owner"]},
    ]
}


def test_a_complete_file_is_read_with_bounds_confidences_and_places():
    production, staging = check_gates(COMPLETE, stages=("staging", "production"))

    by_text = {condition.text: condition for condition in production.conditions}
    assert len(by_text) == 18
    assert by_text["bleu >= 0.3"].confidence == 0.9
    assert not by_text["bleu >= 0.3"].strict
    assert by_text["translate/loops <= 0.05 @ estimate"].confidence is None
    assert by_text["retention.min >= 95% @ 90% confidence"].bound == 0.95
    gain = by_text["gain_kept.min > 0.8 on suite chat metric chrf @ 99.5% confidence"]
    assert (gain.confidence, gain.places) == (0.995, (("suite", "chat"), ("metric", "chrf")))
    assert by_text["version.age <= 30d"].bound == 720
    assert [condition.text for condition in staging.conditions] == ["tag owner"]
    assert conditions_for([production, staging], "other", "production")[1:] == ()
    assert len(conditions_for([production, staging], "translate-chat", "production")) == 19


@pytest.mark.parametrize(("text", "share"), [("50", 0.5), ("99.9", 0.999), ("99.90", 0.999)])
def test_the_bounds_of_a_confidence_belong_to_it(text: str, share: float):
    gates = check_gates(
        {"gates": [{"stage": "staging", "require": [f"bleu >= 0.3 @ {text}% confidence"]}]}, stages=("staging",)
    )

    assert [each.confidence for each in gates[0].conditions if each.text.startswith("bleu")] == [share]


BAD_LINES = {
    "bleu => 0.3": "is 'bleu => 0.3', expected 'SUBJECT >= NUMBER'",
    "bleu >= a lot": "expected 'SUBJECT",
    "bleu >= many": "has the bound 'many', expected a number",
    "bleu >= nan": "has the bound 'nan', expected a number",
    "bleu >= 1e999": "has the bound",
    "bleu >= 30%": "has the bound '30%', expected a number",
    "bleu == 0.3": "expected 'SUBJECT",
    "retention >= 0.9": "asks for 'retention', expected a metric or one of retention.min",
    "retention.max >= 0.9": "asks for 'retention.max'",
    "retention.min <= 0.9": "asks for retention.min <=, expected >= or >",
    "retention.min >= 0.9 @ 30% confidence": "has a confidence of 30 %, expected 50 to 99.9",
    "retention.min >= 0.9 on planet mars": "says 'on planet mars', expected each of suite, task, owner, metric once",
    "retention.min >= 0.9 on task a task b": "once at most",
    "bleu >= 0.3 on task a": "says where for bleu",
    "receipt.loss >= 0.1": "asks for receipt.loss >=, expected <= or <",
    "approvals >= 0": "has the bound 0, expected 1 to 64 approvals",
    "approvals >= 1.5": "has the bound 1.5",
    "approvals >= 2 @ 90% confidence": "expected none: it is counted, not measured",
    "version.age <= 30": "has the bound '30', expected an age such as 36h, 30d or 2w",
    "evaluation.age >= 1d": "asks for evaluation.age >=",
    7: "is a whole number, expected",
    None: "is empty, expected",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_cannot_be_read_is_told_with_what_was_expected(line: Any):
    with pytest.raises(InvalidInput) as refused:
        parse_condition(line)

    assert BAD_LINES[line] in refused.value.message


def test_every_problem_of_a_file_is_told_with_its_place():
    file = {
        "gates": [
            {"stage": "prod", "require": ["bleu => 1"], "recieved": "yes"},
            {"stage": "production", "adapters": ["A B"], "receipt": "failed", "fresh": ["data"], "license": []},
            {"stage": "latest", "tags": {"reviewed": True}, "evaluated_here": False},
            {"stage": "staging", "signatures": {"keys": {"a": KEY, "b": KEY, 3: KEY, "c": "x", "d": 1}, "at_least": 9}},
            {"stage": "staging", "signatures": {"keys": {}, "of": 1}},
            {"stage": "staging", "signatures": [KEY]},
            {"stage": "staging", "signatures": {"keys": [KEY]}},
            {"stage": "staging"},
            "nothing",
        ],
        "version": 2,
    }

    with pytest.raises(InvalidInput, match="these are no gates:") as refused:
        check_gates(file)

    told = {(problem.code, problem.message.partition(",")[0]) for problem in refused.value.problems}
    assert told >= {
        ("version", "is no key of a gate file"),
        ("gates[0].recieved", "is no key of a gate"),
        ("gates[0].require[0]", "is 'bleu => 1'"),
        ("gates[1].adapters", "is 'A B'"),
        ("gates[1].receipt", "is 'failed'"),
        ("gates[1].fresh", "names 'data'"),
        ("gates[1].license", "is []"),
        ("gates[2].stage", "is 'latest'"),
        ("gates[2].tags", "has 'reviewed': True"),
        ("gates[2].evaluated_here", "is False"),
        ("gates[3].signatures.keys.b", "is the key of a"),
        ("gates[3].signatures.keys.3", "is no name"),
        ("gates[3].signatures.keys.c", "is 'x'"),
        ("gates[3].signatures.keys.d", "is '1'"),
        ("gates[3].signatures.at_least", "is 9"),
        ("gates[4].signatures.of", "is no key of signatures"),
        ("gates[4].signatures.keys", "is 0 keys"),
        ("gates[5].signatures", "is a list"),
        ("gates[6].signatures.keys", "is a list"),
        ("gates[7].require", "is missing"),
        ("gates[8]", "is a text"),
    }
    with pytest.raises(InvalidInput, match=r"gates\[0\]\.stage: is 'prod', expected one of staging, production"):
        check_gates(file, stages=("staging", "production"))


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.sampled_from(["bleu >= 1", "production", "passed", "suite"]),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["gates", *GATE_KEYS]), inner, max_size=4)
        ),
        max_leaves=8,
    )
)
def test_whatever_a_file_holds_it_is_gates_or_refused(value: Any):
    try:
        found: Any = check_gates(value)
    except InvalidInput as refused:
        found = refused.problems
        gates = ()
    else:
        gates = found

    assert all(isinstance(gate, Gate) for gate in gates)
    assert found or value == {"gates": []}


# how a condition is decided


def test_a_figure_passes_on_the_bound_of_its_interval_and_not_on_the_estimate():
    assert judge("bleu >= 0.3", figures=(figure("bleu", 0.32),)).verdict == "passed"
    across = judge("bleu >= 0.3", figures=(figure("bleu", 0.305),))
    below = judge("bleu >= 0.3", figures=(figure("bleu", 0.28),))

    assert (across.verdict, round(across.distance, 3)) == ("inconclusive", -0.005)
    assert across.reason == "bleu is 0.305 [0.295, 0.315], across the bound: the gate asks for at least 0.3"
    assert (below.verdict, round(below.distance, 3)) == ("failed", -0.03)
    assert judge("nll <= 2", figures=(figure("nll", 1.995),)).verdict == "inconclusive"
    assert judge("nll <= 2 @ estimate", figures=(figure("nll", 1.995),)).verdict == "passed"


def test_a_figure_without_samples_is_taken_as_it_is_unless_a_confidence_is_asked_for():
    bare = (figure("bleu", 0.29, spread=None),)

    assert judge("bleu >= 0.30", figures=bare).reason == "bleu is 0.29, the gate asks for at least 0.3"
    assert judge("bleu >= 0.2", figures=bare).verdict == "passed"
    assert judge("bleu >= 0.2 @ 90% confidence", figures=bare).verdict == "inconclusive"
    assert judge("chrf >= 0.2", figures=bare).found == "not measured"


def test_no_gate_passes_on_a_handful_of_samples_or_on_samples_that_are_all_alike():
    one = judge("retention.min >= 0.95 @ 99% confidence", kept=(kept("chat", 0.99, 0.0, confidence=0.99, samples=1),))
    alike = replace(figure("nll", 2.0, spread=0.0), samples=20)

    assert (one.verdict, one.value, one.distance) == ("inconclusive", 0.99, None)
    assert one.reason == (
        "retention of chat:v3 on chat by nll is 0.99 on 1 sample, an interval takes 10 at least: "
        "evaluate more, with a higher --limit or more rows"
    )
    for count, verdict in ((2, "inconclusive"), (9, "inconclusive"), (10, "passed")):
        few = replace(figure("bleu", 0.32), samples=count)
        assert judge("bleu >= 0.3", figures=(few,)).verdict == verdict
        assert judge("bleu >= 0.3 @ estimate", figures=(few,)).verdict == "passed"
    assert judge("nll <= 3", figures=(alike,)).verdict == "inconclusive"
    assert "which are all alike" in judge("nll <= 3", figures=(alike,)).reason
    assert judge("retention.min >= 0.95", kept=(kept("chat", 0.99, 0.0, samples=20),)).verdict == "inconclusive"
    for name in ("length_ratio", "length_ratio.nf4"):  # of short labels, all are as long as they should be
        exact = replace(figure(name, 1.0, spread=0.0), samples=20)
        assert judge(f"{name} >= 0.8", figures=(exact,)).verdict == "passed"


def test_what_equals_its_parent_on_every_sample_has_kept_everything():
    assert judge("retention.min >= 0.95", kept=(kept("chat", 1.0, 0.0, samples=20),)).verdict == "passed"
    assert judge("gain_kept.min >= 0.95", kept=(kept("chat", 0.0, 0.0, samples=20),)).verdict == "failed"


def test_the_worst_task_decides_what_was_kept():
    rows = (kept("translate", 0.99), kept("chat", 0.955), kept("chat", 0.2, metric="chrf", primary=False))

    worst = judge("retention.min >= 0.95 @ 90% confidence", kept=rows)

    assert (worst.verdict, worst.value) == ("inconclusive", 0.955)
    assert worst.reason.startswith("retention of chat:v3 on chat by nll is 0.955")
    assert judge("retention.min >= 0.95 on suite translate", kept=rows).verdict == "passed"
    assert judge("retention.min >= 0.95 on owner chat:v3 metric chrf", kept=rows).verdict == "failed"
    assert judge("retention.min >= 0.95 @ 99% confidence", kept=rows).reason == "retention: no such task was evaluated"


def test_what_was_not_evaluated_fails_and_what_has_no_parents_loses_nothing():
    rows = (kept("translate", 0.99),)

    assert judge("retention.min >= 0.9", kept=rows, missing=("chat",)).verdict == "failed"
    assert judge("retention.min >= 0.9 on suite translate", kept=rows, missing=("chat",)).verdict == "passed"
    assert judge("retention.min >= 0.9", has_parents=False).verdict == "passed"
    nothing_to_keep = kept("chat", 1.0, gain_kept=None, note="the parent does not beat the base beyond its interval")
    assert judge("gain_kept.min >= 0.8", kept=(nothing_to_keep,)).verdict == "inconclusive"


def test_facts_that_are_counted_are_exact():
    assert judge("receipt.loss <= 5%", receipt=Receipt(True, 0.05)).verdict == "passed"
    assert judge("receipt.loss <= 5%", receipt=None).reason == "its receipt tells no loss"
    approved = judge("approvals >= 2", approvals=("ada",))
    assert (approved.found, approved.reason) == ("ada", "the number of approvals is 1, the gate asks for at least 2")
    assert judge("version.age <= 2d", version_age=49.0).distance == -1
    assert judge("evaluation.age <= 2d").reason == "it was not evaluated"


KEYS = {
    "stage": "production",
    "receipt": "passed",
    "fresh": ["suite"],
    "evaluated_here": True,
    "signatures": {"keys": {"release": KEY}},
    "tags": {"reviewed": "yes"},
    "license": ["mit"],
}


def test_keys_of_a_gate_ask_for_facts():
    (gate,) = check_gates({"gates": [KEYS]})
    release = (Signed(read_public_key(KEY).id, ""),)
    shown = {"receipt": Receipt(True, 0.0), "evaluated_here": 2, "tags": {"reviewed": "yes"}, "license": "MIT"}
    good = replace(NOTHING, signatures=release, **shown)
    bad = replace(
        NOTHING, receipt=Receipt(False, 0.0), changed={"suite": ("chat",)}, tags={"reviewed": "no"}, license="gpl"
    )

    assert decide(gate.conditions, good).passed
    assert decide(gate.conditions, bad).reasons == [
        "its receipt failed",
        "suite chat is not what was evaluated",
        "this registry has not evaluated it",
        "its tag reviewed is 'no', expected yes",
        "its license is gpl, expected mit",
        "the number of signatures is 0, the gate asks for at least 1: release did not sign",
    ]
    imported = replace(figure("bleu", 0.3), here=False, source="results.json")
    assert decide(gate.conditions, replace(good, figures=(imported,))).reasons == [
        "not evaluated by this registry: bleu (results.json)"
    ]


def test_what_was_recalled_passes_nowhere():
    verdict = decide(conditions_for([], "both", "production"), replace(NOTHING, recalled=("chat:v3",)))

    assert verdict.reasons == ["it is made of chat:v3, which was recalled"]


# twenty conditions at once

SPOTS = st.floats(0, 2).map(lambda value: round(value, 3))
LINES = [
    *(f"m{i} >= 1 @ 90% confidence" for i in range(6)),
    *(f"m{i} <= 1" for i in range(6, 9)),
    *(f"retention.min >= 0.9 on task t{i}" for i in range(4)),
    *(f"gain_kept.min >= 0.9 on task t{i}" for i in range(2)),
    "retention.min >= 0.5",
    "approvals >= 2",
    "receipt.loss <= 0.1",
    "version.age <= 10d",
    "evaluation.age <= 10d",
]


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    spread = draw(st.sampled_from([0.0, 0.01, 0.3]))
    samples = draw(st.sampled_from([None, 1, 20]))
    present = draw(st.sets(st.integers(0, 8)))
    return replace(
        NOTHING,
        figures=tuple(replace(figure(f"m{i}", draw(SPOTS), spread=spread), samples=samples) for i in sorted(present)),
        kept=tuple(kept(f"t{i}", draw(SPOTS), spread, samples=samples) for i in range(draw(st.integers(0, 4)))),
        approvals=tuple("abc"[: draw(st.integers(0, 3))]),
        receipt=draw(st.none() | st.builds(Receipt, st.booleans(), SPOTS)),
        version_age=draw(st.floats(0, 500)),
        evaluation_age=draw(st.none() | st.floats(0, 500)),
    )


@given(evidences())
def test_a_verdict_of_twenty_conditions_passes_only_when_each_of_them_does(evidence: Evidence):
    conditions = [parse_condition(line) for line in LINES]
    assert len(conditions) == 20

    verdict = decide(conditions, evidence)

    alone = [decide([condition], evidence) for condition in conditions]
    assert verdict.passed == all(each.passed for each in alone)
    assert verdict.reasons == [reason for each in alone for reason in each.reasons]
    assert len(verdict.reasons) == sum(not each.passed for each in alone)
    assert [judged.condition for judged in verdict.conditions] == LINES
    outcomes = {judged.verdict for judged in verdict.conditions}
    assert verdict.outcome == next(o for o in ("failed", "inconclusive", "passed") if o in outcomes)
    for judged in verdict.conditions:
        assert judged.distance is None or (judged.distance >= 0) == (judged.verdict == "passed")
        assert bool(judged.reason) >= (judged.verdict != "passed")


@given(evidences())
def test_a_decision_is_kept_as_what_its_digest_is_of(evidence: Evidence):
    verdict = decide([parse_condition(line) for line in LINES], evidence)
    decision = Decision("production", "g", evidence, verdict)

    assert record_digest(decision.record()) == record_digest(Decision("production", "g", evidence, verdict).record())
    other = Decision("staging", "g", evidence, verdict)
    assert record_digest(decision.record()) != record_digest(other.record())

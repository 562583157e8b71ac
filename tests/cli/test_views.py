"""How answers read as text, where the real registry of the other tests shows no such case."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from adapterctl.cli import views
from adapterctl.cli.diff_text import diff_text
from adapterctl.cli.output import Output
from adapterctl.registry.api import (
    DiffView,
    LayerDiff,
    MethodView,
    PlanView,
    RecallImpact,
    RetentionRow,
    RetentionView,
    VersionView,
)
from adapterctl.registry.domain.evals import Interval
from adapterctl.registry.domain.job import Job, JobState, Progress
from adapterctl.registry.domain.plan import Pair

JOB = Job(
    id="j1", kind="merge", key="k", title="merge a b", spec={}, state=JobState.RUNNING, attempt=1, max_attempts=3,
    created_by="me", created_at=0.0, updated_at=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0"), (9e-7, "0"), (1e-6, "1.0e-06"), (0.0974, "9.74%"), (1.5, "150.00%")],
)
def test_losses_read_as_shares(value: float | None, shown: str):
    assert views.loss(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0, "0 B"), (999, "999 B"), (1_546_084, "1.5 MB"), (2**50, "1125.9 TB")])
def test_sizes_read_in_powers_of_a_thousand(value: int, shown: str):
    assert views.size(value) == shown


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "running"),
        ({"progress": Progress("merge", 3, 90)}, "merge 3/90"),
        ({"progress": Progress("merge", 3, 90), "cancel_requested": True}, "running, cancel requested"),
        ({"progress": Progress("merge", 90, 90), "state": JobState.SUCCEEDED}, "succeeded"),
    ],
)
def test_a_job_shows_how_far_it_is(changes: dict[str, Any], shown: str):
    rows = views.jobs_table([dataclasses.replace(JOB, **changes)], Output()).splitlines()

    assert rows[1].split("  ")[1].strip() == shown


def test_a_failed_job_shows_its_error_and_what_to_do():
    failed = dataclasses.replace(JOB, state=JobState.FAILED, error={"message": "disk full", "hint": "make room"})

    text = views.job_text(failed, Output())

    assert "error       disk full" in text
    assert "hint        make room" in text


def test_retention_marks_the_owner_and_keeps_what_cannot_be_said_apart():
    row = RetentionRow(
        suite="s", task="translate", metric="nll", direction="lower", owner="translate:v3", samples=20, base=6.1,
        parents={"translate:v3": 1.7, "chat:v5": 4.9}, child=1.9, retention=Interval(0.894, 0.87, 0.921),
        gain_kept=None, note="not beyond its interval",
    )  # fmt: skip

    text = views.retention_text(
        RetentionView("both:v1", (row,), missing=("both:v1 on chat",), notes=("shipped",)), Output()
    )

    assert text.splitlines() == [
        "both:v1",
        "TASK       METRIC   N  BASE  translate:v3  chat:v5  THIS  RETENTION     GAIN KEPT",
        "translate  nll ↓   20   6.1          1.7*      4.9   1.9  89% [87, 92]  n/a",
        "  translate: not beyond its interval",
        "  shipped",
        "  not evaluated: both:v1 on chat",
    ]


def test_what_was_not_evaluated_says_so():
    assert views.retention_text(RetentionView("a:v1", ()), Output()).splitlines() == ["a:v1", "  not evaluated yet"]


def test_a_version_that_cannot_be_compared_shows_its_own_figures():
    version = VersionView(
        ref="a:v1", name="a", number=1, id="1", kind="train", state="live", base="base", base_id="b", rank=4,
        dtype="BF16", modules=1, parameters=1, size_bytes=1, content_digest="0", created_at="", created_by="",
        metrics={"bleu": 0.3, "chat/nll": 2.5, "spoken/nll": 3.25}, imported={"chat/nll": "shipped"},
    )  # fmt: skip

    first = views.retention_text(RetentionView("a:v1", ()), Output(), version)
    further = views.retention_text(RetentionView("a:v1", (), missing=("spoken",)), Output(), version)

    assert first.splitlines() == ["a:v1", "  chat/nll = 2.5  (shipped)", "  spoken/nll = 3.25"]
    assert further.splitlines()[1] == "  not compared, its parents are not evaluated on it: spoken"
    assert further.splitlines()[2:] == first.splitlines()[1:]


def test_layers_of_two_merges_are_told_with_what_changed():
    rows = (
        LayerDiff("up", None, 0.25, 0.0, (0.0, 2.0), 0.5, 0.25),
        LayerDiff("down", 0.5, 0.25, 0.9, (2.0, 2.0), 1.0, 1.0, (0.02, 0.05), (0.02, 0.05), {"p:v1": (1.0, 0.75)}),
        LayerDiff("same", 0.0, 0.0, 1.0, (2.0, 2.0), 1.0, 1.0, (0.0, None), (0.0, None), {"q:v1": (1.0, None)}),
    )
    view = DiffView("a:v1", "a:v2", False, {}, ("m1",), (), 0.5, 1.0, layers=rows)

    lines = diff_text(view, Output(), top=2).splitlines()

    assert "  they hold 50.00% of the squared distance, the modules that one alone has the rest" in lines
    assert "  B lost more of its exact sum than A in 1 modules, less in 0" in lines
    assert "  B holds less of p:v1 than A in 1 modules, more in 0" in lines
    assert not any("B holds less of q:v1" in line for line in lines), "B is not made of it"
    assert [line.split() for line in lines if line.startswith(("up", "down", "same"))] == [
        ["up", "-", "25.00%", "0.000", "0", "2", "0.500", "0.250"],
        ["down", "50.00%", "25.00%", "0.900", "2", "2", "1.000", "1.000"],
        ["up", "-", "-", "-", "-", "-"],
        ["down", "2.00%", "5.00%", "+3.00", "2.00%", "5.00%"],
        ["up", "-", "-", "-"],
        ["down", "100.00%", "75.00%", "-25.00"],
    ]
    assert "  cosine of the deltas 0.5000, distance 100.00%" in lines
    assert sum("B - A (pp)" in line for line in lines) == 2
    assert lines[-1] == "1 more modules with --top 3 or -o json"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, ["keeps all\n", "two or more, of any ranks"]),
        ({"breaks": ("parent_order", "gauge"), "equal_ranks": True}, ["all but parent order, gauge", "of one rank in"]),
        ({"max_parents": 2}, ["2 at most, of any ranks"]),
        ({"max_parents": 1}, ["one\n"]),
    ],
)
def test_a_method_tells_its_guarantees_and_what_it_takes(changes: dict[str, Any], shown: list[str]):
    text = views.method_text(MethodView("m", "what", "when", False, "O(d)", "paper", (), **changes), Output())

    assert all(words in text for words in shown)


def test_a_plan_of_many_parents_names_the_pairs_that_have_most_to_do_with_each_other():
    pairs = tuple(Pair(f"a{i}", "b", 1, (-1) ** i * i / 50, 0, 0, 1) for i in range(50))
    plan = PlanView("m", "0" * 64, "svd", 4, "F32", 1000, "base", (), (), pairs, ())

    text = views.plan_text(plan, Output())

    assert [f"a{i} / b" in text for i in (29, 30, 49)] == [False, True, True]
    assert text.index("a49 / b") < text.index("a30 / b")
    assert text.endswith("30 more pairs with -o json")


def test_layers_that_are_equal_are_no_table():
    rows = tuple(LayerDiff(name, 0.0, 0.0, 1.0, (2.0, 2.0), 1.0, 1.0) for name in ("up", "down"))

    lines = diff_text(DiffView("a:v1", "a:v1", True, {}, (), (), 1.0, 0.0, layers=rows), Output()).splitlines()

    assert lines[-2:] == ["A is a:v1, B is a:v1; 2 modules in both", "  the deltas of these modules are equal"]
    assert "  cosine of the deltas 1.0000, distance 0" in lines


def test_a_distance_from_nothing_and_one_next_to_nothing_are_told():
    view = DiffView("a:v1", "a:v2", False, {}, (), (), 0.0, None)

    assert "  the delta of a:v1 is zero" in diff_text(view, Output()).splitlines()
    near = diff_text(dataclasses.replace(view, cosine=1.0, distance=1e-5), Output())
    assert "  cosine of the deltas 1.0000, distance <0.01%" in near.splitlines()


def test_diff_shows_metrics_one_by_one_and_modules_that_one_side_lacks():
    view = DiffView(
        first="a:v1", second="a:v2", same_content=False, only_first=("m1",), only_second=("n1", "n2", "n3", "n4"),
        fields={"metrics": ({"x": 1.0, "same": 2.0}, {"same": 2.0, "y": 0.5}), "stages": ((), ("production",))},
        cosine=None, distance=None,
    )  # fmt: skip

    lines = diff_text(view, Output()).splitlines()

    assert "no module is in both" in diff_text(dataclasses.replace(view, layers=()), Output()).splitlines()
    assert "  1 modules only in a:v1: m1" in lines
    assert "  4 modules only in a:v2: n1, n2, n3, …" in lines
    assert [line.split() for line in lines[-3:]] == [
        ["metrics", "x", "1", "-"],
        ["metrics", "y", "-", "0.5"],
        ["stages", "-", "production"],
    ]


def test_a_recall_that_hits_many_names_a_few_of_them():
    hit = tuple(f"child:v{number}" for number in range(1, 18))

    text = views.recall_text(RecallImpact("a:v1", "recall", "leak", "me", "2026-01-01T00:00:00Z", hit, ()), Output())

    assert "17 descendants: child:v1, child:v2, child:v3, child:v4, child:v5 and 12 more\n" in text + "\n"

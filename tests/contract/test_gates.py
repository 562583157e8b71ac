"""What a gate finds out about a version, on every ledger: figures, retention, freshness, approvals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapterctl.registry.domain.errors import InvalidInput, NotFound, Refused
from adapterctl.registry.domain.eval_plan import BASE, report_key
from adapterctl.registry.domain.evals import EvalReport, task_result
from adapterctl.registry.domain.gate import parse_condition
from adapterctl.registry.domain.suite import Suite, check_suite
from adapterctl.registry.domain.verdict import Evidence, decide
from adapterctl.registry.domain.version import AdapterVersion, Base
from adapterctl.registry.ports import Ledger
from adapterctl.registry.services.gates import (
    check_gate,
    collect,
    decide_on,
    gates_view,
    kept_decision,
    load_gates,
    set_gates,
)
from adapterctl.registry.services.import_results import import_results
from adapterctl.registry.services.suites import add_suite

ROWS = b"\n".join(b'{"prompt": "p%d", "target": " t%d"}' % (i, i) for i in range(12))
ENGINE = {"device": "cpu", "dtype": "float32", "torch": "2"}
AddVersion = Callable[..., AdapterVersion]


def no_mlflow() -> Any:
    raise AssertionError("nothing here asks MLflow")


def suite(name: str, rows: bytes = ROWS) -> Suite:
    tasks = [{"name": name, "data": "rows.jsonl", "metrics": ["nll"]}]
    return check_suite({"name": name, "tasks": tasks}, lambda _: rows)


@dataclass
class Family:
    """Two parents, each with a suite, and their merge; reports are written as an evaluation would."""

    ledger: Ledger
    parents: Sequence[AdapterVersion]
    child: AdapterVersion
    suites: Sequence[Suite]

    def report(self, subject: AdapterVersion | None, on: Suite, nll: float, count: int = 12, **engine: str) -> None:
        """`nll` a token, with a scatter over the samples that is the same for every subject."""
        samples = [{"nll": 3 * nll + 0.1 * (i % 4), "tokens": 3.0} for i in range(count)]
        digest = subject.spec.content_digest if subject is not None else BASE
        base = self.ledger.find_base("tiny")
        assert base is not None
        key = report_key(digest, base, on.digest, [count], {**ENGINE, **engine})
        task = task_result(on.name, ["nll"], "nll", samples)
        report = EvalReport(key, digest, base.id, on.name, on.digest, None, {**ENGINE, **engine}, (task,), 1.0)
        self.ledger.put_report(report)
        if subject is not None:
            self.ledger.set_metrics(subject.id, report.metrics, source=engine.get("source", f"suite {on.name}"))

    def evaluate(self, child: float = 2.02, count: int = 12, **engine: str) -> None:
        for on in self.suites:
            self.report(None, on, 6.0, count)
            for parent, nll in zip(self.parents, (2.0, 2.0), strict=True):
                self.report(parent, on, nll, count)
            self.report(self.child, on, child, count, **engine)

    def evidence(self, *lines: str) -> Evidence:
        return collect(self.ledger, self.child, "production", [parse_condition(line) for line in lines])


@pytest.fixture
def family(ledger: Ledger, add_version: AddVersion) -> Family:
    parents = add_version("translate"), add_version("chat")
    suites = suite("translate"), suite("chat")
    for parent, own in zip(parents, suites, strict=True):
        add_suite(ledger, parent.adapter_id, own)
    receipt = {"passed": True, "loss": 0.02}
    recipe = {"method": "cat"}
    child = add_version("both", parents=parents, recipe_digest="r", recipe=recipe, receipt=receipt, license="mit")
    return Family(ledger, parents, child, suites)


def test_figures_come_with_their_interval_and_what_was_kept_with_its_owner(family: Family):
    family.evaluate()

    found = family.evidence("translate/nll <= 3 @ 80% confidence", "retention.min >= 0.9", "receipt.loss <= 5%")

    (figure,) = found.figures
    assert figure.low < figure.value < figure.high
    assert (figure.source, figure.here) == ("suite translate", True)
    assert [(row.task, row.owner, row.primary) for row in found.kept] == [
        ("translate", "translate:v1", True),
        ("chat", "chat:v1", True),
    ]
    assert found.kept[0].retention.low < found.kept[0].retention.value < found.kept[0].retention.high
    assert found.kept[0].retention.value == pytest.approx(2.05 / 2.07)
    assert (found.missing, found.receipt.passed, found.receipt.loss) == ((), True, 0.02)


def test_an_evaluation_on_a_suite_that_judges_nobody_changes_no_verdict(family: Family):
    family.evaluate()
    before = family.evidence("retention.min >= 0.9")
    everywhere, alone = suite("poems"), suite("sums")
    for subject in (None, *family.parents, family.child):
        family.report(subject, everywhere, 9.0)
    family.report(family.child, alone, 9.0)

    found = family.evidence("retention.min >= 0.9")

    assert (found.kept, found.missing) == (before.kept, before.missing)
    assert len(found.kept) == 2


def test_figures_of_a_base_in_four_bits_decide_only_what_names_them_or_has_no_others(family: Family):
    family.evaluate(child=2.02, dtype="nf4", bitsandbytes="0")  # parents in float32, so nothing can be compared
    nothing = family.evidence("retention.min >= 0.9", "translate/nll <= 3")
    for on in family.suites:
        for subject in (None, *family.parents):
            family.report(subject, on, 6.0 if subject is None else 2.0, dtype="nf4", bitsandbytes="0")
    alone = family.evidence("retention.min >= 0.9", "translate/nll.nf4 <= 3")
    family.evaluate(child=2.5)

    both = family.evidence("retention.min >= 0.9", "translate/nll <= 3", "chat/nll.nf4 <= 3")
    verdict = decide(
        [parse_condition("retention.min >= 0.9 on metric nll.nf4")], family.evidence("retention.min >= 0.9")
    )

    assert (nothing.missing, nothing.figures) == (("translate", "chat"), ())
    assert [(row.metric, row.primary) for row in alone.kept] == [("nll.nf4", True)] * 2
    assert [figure.value for figure in alone.figures] == pytest.approx([2.07])
    assert alone.changed["suite"] == ()
    assert [(row.metric, row.primary, round(row.retention.value, 2)) for row in both.kept] == [
        ("nll", True, 0.80),
        ("nll.nf4", False, 0.99),
    ] * 2
    assert {figure.name: round(figure.value, 2) for figure in both.figures} == {
        "translate/nll": 2.55,
        "chat/nll.nf4": 2.07,
    }
    assert both.evaluated_here == 4
    assert verdict.passed


def test_a_wider_confidence_gives_a_wider_interval(family: Family):
    family.evaluate()

    narrow, wide = family.evidence("chat/nll <= 3 @ 50% confidence", "chat/nll <= 3 @ 99% confidence").figures

    assert wide.low < narrow.low < narrow.high < wide.high


def test_one_sample_opens_no_gate_whatever_it_says(family: Family):
    lines = ["retention.min >= 0.5 @ 99% confidence", "gain_kept.min >= 0.5", "chat/nll <= 9"]
    set_gates(
        family.ledger, {"gates": [{"stage": "production", "require": lines}]}, stages=("production",), actor="ada"
    )

    family.evaluate(count=1)
    one = check_gate(family.ledger, family.child, "production")
    family.evaluate()
    enough = check_gate(family.ledger, family.child, "production")

    assert [judged.verdict for judged in one.conditions] == ["passed", *["inconclusive"] * 3]
    assert all("on 1 sample, an interval takes 10 at least" in judged.reason for judged in one.conditions[1:])
    assert enough.verdict == "passed"


def test_a_child_is_not_compared_with_a_parent_of_another_engine(family: Family):
    family.evaluate(child=2.0)
    before = family.evidence("retention.min >= 0.9")
    for on in family.suites:  # an upgrade, after which the parents alone were evaluated again
        for subject in (None, *family.parents):
            family.report(subject, on, 1.0 if subject else 6.0, torch="3")

    mixed = family.evidence("retention.min >= 0.9")
    for on in family.suites:
        family.report(family.child, on, 4.0, torch="3")
    upgraded = family.evidence("retention.min >= 0.9")

    assert [row.retention.value for row in before.kept] == [1.0, 1.0]
    assert mixed.kept == before.kept  # not a new parent against the old child
    assert all(row.retention.value < 0.3 for row in upgraded.kept)


def test_a_child_of_another_engine_alone_was_not_evaluated(family: Family):
    for on in family.suites:
        for subject in (None, *family.parents):
            family.report(subject, on, 2.0 if subject else 6.0)
        family.report(family.child, on, 2.0, torch="3")

    assert family.evidence("retention.min >= 0.9").missing == ("translate", "chat")


def test_what_was_kept_goes_by_the_most_samples_over_all_tasks(family: Family):
    first, *_ = family.suites
    base = family.ledger.find_base("tiny")
    assert base is not None
    for counts, child in (((30, 12), 2.0), ((12, 60), 4.0), ((20, 20), 3.0)):
        for subject, nll in ((None, 6.0), *((parent, 2.0) for parent in family.parents), (family.child, child)):
            digest = subject.spec.content_digest if subject is not None else BASE
            tasks = tuple(
                task_result(name, ["nll"], "nll", [{"nll": nll + 0.1 * (i % 4), "tokens": 1.0} for i in range(count)])
                for name, count in zip("ab", counts, strict=True)
            )
            key = report_key(digest, base, first.digest, counts, ENGINE)
            report = EvalReport(key, digest, base.id, first.name, first.digest, None, ENGINE, tasks, 1.0)
            family.ledger.put_report(report)

    kept = family.evidence("retention.min >= 0.1").kept

    assert [(row.task, row.samples) for row in kept] == [("a", 12), ("b", 60)]


def test_what_was_not_evaluated_is_missing_and_changed(family: Family):
    found = family.evidence("retention.min >= 0.9", "translate/nll <= 3", "evaluation.age <= 1d")

    assert (found.missing, found.figures, found.evaluation_age) == (("translate", "chat"), (), None)
    assert found.changed == {"suite": ("translate", "chat"), "base": ()}


def test_a_suite_or_base_that_changed_since_is_told(family: Family):
    family.evaluate()
    fresh = family.evidence("evaluation.age <= 1h")

    add_suite(family.ledger, family.parents[1].adapter_id, suite("chat", ROWS[: ROWS.rindex(b"\n")]))
    family.ledger.add_base(Base("base-1", "tiny", config_digest="c" * 64), ["tiny"])
    family.child = family.ledger.version(family.child.id)
    stale = family.evidence("evaluation.age <= 1h")

    assert fresh.changed == {"suite": (), "base": ()}
    assert fresh.evaluated_here == 2
    assert 0 <= fresh.evaluation_age < 0.1
    assert stale.changed == {"suite": ("chat",), "base": ("tiny",)}
    assert stale.evaluated_here == 1


def test_results_from_elsewhere_are_no_evaluation_of_ours(family: Family):
    family.evaluate(source="committed result")
    import_results(family.ledger, family.child, source="lm-eval r", metrics={"bleu": 0.3}, open_versions=no_mlflow)
    import_results(family.ledger, family.child, source="lm-eval r", metrics={"bleu": 0.3}, open_versions=no_mlflow)
    own = {"gates": [{"stage": "production", "evaluated_here": True, "require": ["bleu >= 0.1", "chat/nll <= 9"]}]}
    set_gates(family.ledger, own, stages=("production",), actor="root")

    checked = check_gate(family.ledger, family.child, "production")

    assert [judged.verdict for judged in checked.conditions] == ["passed", "passed", "passed", "failed"]
    assert checked.conditions[-1].reason == (
        "not evaluated by this registry: bleu (imported from lm-eval r), chat/nll (committed result)"
    )
    assert family.ledger.metric_sources(family.child.id)["bleu"] == "imported from lm-eval r"


def test_results_from_elsewhere_never_replace_what_was_measured_here(family: Family):
    family.evaluate()
    before = family.ledger.metrics([family.child.id]), family.ledger.metric_sources(family.child.id)

    with pytest.raises(Refused, match="measured itself, on both:v1: chat/nll"):
        import_results(
            family.ledger, family.child, source="x", metrics={"bleu": 1, "chat/nll": 0.1}, open_versions=no_mlflow
        )

    assert (family.ledger.metrics([family.child.id]), family.ledger.metric_sources(family.child.id)) == before


def test_results_from_elsewhere_replace_others_only_where_that_is_said(family: Family):
    family.evaluate(source="committed result")
    committed = family.ledger.metrics([family.child.id])[family.child.id]["chat/nll"]

    def take(source: str, *, replace: bool = False, **metrics: float) -> dict[str, tuple[float, str]]:
        import_results(
            family.ledger, family.child, source=source, metrics=metrics, replace=replace, open_versions=no_mlflow
        )
        return told()

    def told() -> dict[str, tuple[float, str]]:
        values, sources = family.ledger.metrics([family.child.id])[family.child.id], family.ledger.metric_sources
        return {key: (value, sources(family.child.id)[key]) for key, value in values.items()}

    first = take("a", bleu=0.3)
    with pytest.raises(Refused, match=r"other values already: bleu 0.3 \(imported from a\), now 0.4$"):
        take("b", bleu=0.4, chrf=40)
    with pytest.raises(Refused, match=r"chat/nll .* \(committed result\), now 0.5$"):
        take("b", **{"chat/nll": 0.5})
    refused = told()
    same = take("b", bleu=0.3, chrf=40, **{"chat/nll": committed})
    replaced = take("b", replace=True, bleu=0.4)

    assert refused == first
    assert same == {**first, "chrf": (40, "imported from b")}
    assert replaced == {**same, "bleu": (0.4, "imported from b")}


@pytest.mark.parametrize(
    "metrics", [{}, {"a": float("nan")}, {"a": True}, {"a": "1"}, {"a\nb": 1.0}, {str(i): 1 for i in range(1001)}]
)
def test_results_that_are_no_metrics_are_refused(family: Family, metrics: Any):
    with pytest.raises(InvalidInput, match="cannot be taken"):
        import_results(family.ledger, family.child, source="x", metrics=metrics, open_versions=no_mlflow)


def test_approvals_are_links_of_the_chain_and_move_nothing(family: Family):
    ledger, child = family.ledger, family.child
    for actor, action in itertools.product(("ada", "bob"), ("approve",)):
        ledger.record_approval(
            child.adapter_id, "production", version_id=child.id, action=action, actor=actor, reason="read"
        )

    found = family.evidence("approvals >= 2")

    assert found.approvals == ("ada", "bob")
    assert decide([parse_condition("approvals >= 2")], found).passed
    assert ledger.stage_holder(child.adapter_id, "production") is None
    ledger.remove_version(child.id, actor="ada", reason="")
    with pytest.raises(Refused):
        ledger.record_approval(
            child.adapter_id, "production", version_id=child.id, action="approve", actor="eve", reason=""
        )


def test_the_gates_that_were_set_last_count_and_say_who_set_them(ledger: Ledger):
    first = {"gates": [{"stage": "production", "receipt": "passed"}]}
    assert gates_view(ledger).digest is None

    one = set_gates(ledger, first, stages=("production",), actor="root")
    two = set_gates(ledger, {"gates": []}, stages=("production",), actor="ada")
    three = set_gates(ledger, first, stages=("production",), actor="ada")
    again = set_gates(ledger, first, stages=("production",), actor="bob")

    assert (one.gates, one.set_by) == (tuple(first["gates"]), "root")
    assert two.gates == ()
    assert (three.digest, three.set_by, again) == (one.digest, "ada", three)
    with pytest.raises(InvalidInput, match="expected one of production"):
        set_gates(ledger, {"gates": [{"stage": "staging", "receipt": "passed"}]}, stages=("production",), actor="a")
    assert gates_view(ledger) == again


def test_what_a_move_stood_on_is_kept_under_the_digest_of_its_row(family: Family):
    family.evaluate()
    made = decide_on(family.ledger, family.child, "production")

    event = family.ledger.move_stage(
        family.child.adapter_id,
        "production",
        version_id=family.child.id,
        expected=None,
        action="promote",
        actor="ada",
        reason="",
        decision=made.record(),
    )

    for text in (event.evidence, event.evidence[:12]):
        assert kept_decision(family.ledger, text) == made
    with pytest.raises(NotFound, match="no decision"):
        kept_decision(family.ledger, "0" * 64)


def test_a_gate_file_is_named_with_its_problems(tmp_path: Path):
    path = tmp_path / "gates.yaml"
    path.write_text("gates:\n  - stage: production\n    require: [bleu => 0.3]\n    aproved: 2\n")

    with pytest.raises(InvalidInput, match=r"gates\.yaml holds no gates:\n  gates\[0\]\.aproved: is no key") as refused:
        load_gates(path)

    assert len(refused.value.problems) == 2
    path.write_text("gates: []\ngates: []\n")
    with pytest.raises(InvalidInput, match="used twice"):
        load_gates(path)
    path.write_text("gates: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InvalidInput, match="not plain YAML"):
        load_gates(path)

"""Accept what was done in MLflow behind the ledger's back, as far as it can be: `doctor --adopt`.

Each difference is accepted by a verb that exists: a version is registered, a stage adopted through its gate, one that
is gone becomes a tombstone, which keeps the lineage of what was made of it. Only a rename has no verb of its own, for
it begins in MLflow. What a rule forbids stays as it is and is told with the reason; no rule is weaker here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from ..api import Check, Registered
from ..domain.errors import AdapterctlError, Refused
from ..domain.evals import REGISTERED
from ..domain.job import LIVE
from ..domain.refs import check_name, first_few
from ..domain.version import AdapterVersion, NewVersion, VersionSpec
from ..ports import Ledger, Parent, VersionStore
from .drift import Difference, differences
from .promote import Stages
from .register import tell_parents
from .views import recall_views

REASON = "done in MLflow, accepted by doctor"
#: Names come first, for all else goes by them; versions before the stages that they are to hold.
_ORDER = ("renamed", "deleted", "unknown", "stage", "description")
_ALL_JOBS = 1_000_000


@dataclass(frozen=True, slots=True)
class Adoption:
    """`register` takes in a source under a name; `stages` moves what aliases say, in the name of `actor`."""

    ledger: Ledger
    versions: VersionStore
    stages: Stages
    register: Callable[[str, str], Registered]
    actor: str

    def accept_all(self) -> Iterator[Check]:
        """One check for what was accepted, then one for each difference that is left, with the reason."""
        refused: dict[str, Check] = {}
        found, changed = self._differences(), False
        for kind in _ORDER:
            if changed:
                found, changed = self._differences(), False
            accept = getattr(self, f"_accept_{kind}")
            for difference in found:
                if difference.check.name != kind:
                    continue
                try:
                    for done in accept(difference):
                        changed = True
                        yield Check("adopted", "ok", done)
                except AdapterctlError as error:
                    refused[difference.check.detail] = _refusal(difference, error)
        for difference in self._differences() if changed else found:
            yield refused.pop(difference.check.detail, difference.check)
        # a rename that failed half-way: the difference is gone, the reason is not
        yield from (check for check in refused.values() if check.name == "renamed")

    def _differences(self) -> list[Difference]:
        return list(differences(self.ledger, self.versions, self.stages.names))

    def _accept_renamed(self, difference: Difference) -> Iterator[str]:
        assert difference.model is not None
        adapter_id, former = difference.versions[0].adapter_id, difference.versions[0].name
        name = check_name(difference.model.name)
        for job in self.ledger.jobs(states=sorted(LIVE), limit=_ALL_JOBS):
            if job.spec.get("into") == former:
                raise Refused(f"job {job.id} makes a version of {former}", hint=f"adapterctl jobs wait {job.id}")
        self.ledger.rename_adapter(adapter_id, name, actor=self.actor)
        yield f"{former} is called {name} here, too"
        ids = [version.id for version in difference.versions]
        below = [edge.child_id for version_id in ids for edge in self.ledger.edges_down(version_id, 1)]
        above = [edge.parent_id for edges in self.ledger.parent_edges(ids).values() for edge in edges]
        near = self.ledger.versions_by_id(list(dict.fromkeys([*ids, *below, *above]))).values()
        self.versions.rename_links(former, name, [version for version in near if version.state == "live"])

    def _accept_deleted(self, difference: Difference) -> Iterator[str]:
        held = []
        for version in difference.versions:
            if self.versions.has(version):  # it was seen missing a while ago, and raises where MLflow cannot tell
                continue
            try:
                self.ledger.remove_version(version.id, actor=self.actor, reason=REASON, lost=True)
            except Refused as error:
                held.append(error)
                continue
            yield f"{version.label} is removed here, too{self._left_of(version)}"
            edges = self.ledger.parent_edges([version.id]).get(version.id, ())
            parents = self.ledger.versions_by_id([edge.parent_id for edge in edges]).values()
            tell_parents(self.ledger, self.versions, list(parents))
        if held:
            raise Refused("; ".join(error.message for error in held), hint=difference.check.hint)

    def _left_of(self, version: AdapterVersion) -> str:
        below = self.ledger.versions_by_id(list(self.ledger.descendants([version.id])))
        live = sorted(each.label for each in below.values() if each.state == "live")
        return f"; it stays in the lineage of {first_few(live)}" if live else ""

    def _accept_unknown(self, difference: Difference) -> Iterator[str]:
        assert difference.model is not None
        assert difference.number is not None
        name, number = difference.model.name, difference.number
        registered = self.register(f"models:/{name}/{number}", name)
        version = self.ledger.version(registered.version.id)
        assert version is not None
        if version.number != number:
            self.versions.mark_taken(name, number, version)
        said = f"MLflow's {name} version {number} is {version.label} here"
        yield said + ("" if registered.created else ", which has the same content")

    def _accept_stage(self, difference: Difference) -> Iterator[str]:
        assert difference.model is not None
        name, stage = difference.model.name, difference.stage
        self._check_not_cut_short(difference)
        event = self.stages.adopt(name, stage=stage, reason=REASON)
        yield "; ".join([f"{name}@{stage} is {event.ref or 'empty'}, as MLflow's alias says", *event.warnings])

    def _check_not_cut_short(self, difference: Difference) -> None:
        """An alias that says what was there before our last move may be what a move that was cut short left behind."""
        model, stage = difference.model, difference.stage
        assert model is not None
        assert model.adapter_id is not None
        made = [event for event in self.ledger.stage_history(model.adapter_id, stage) if event.moves]
        if not made:
            return
        last = made[-1]
        before = self.ledger.version(last.previous_id) if last.previous_id is not None else None
        if self.versions.alias(model.name, stage) == (None if before is None else before.number):
            raise Refused(
                f"the alias says what held {stage} before the last {last.action}, which may have been cut short",
                hint=difference.check.hint,
            )

    def _accept_description(self, difference: Difference) -> Iterator[str]:
        assert difference.model is not None
        model, full = difference.model, []
        if not model.described:
            newest = self.ledger.versions(model.name)[-1]
            full += [] if self.versions.describe_adapter(model.name, newest.spec.base) else [model.name]
        recalls = recall_views(self.ledger)
        for version in difference.versions:
            hit = recalls.get(version.id)
            recalled = (hit.ref, hit.reason) if hit is not None else None
            spec, parents = self._as_registered(version)
            if not self.versions.describe(spec, version.number, parents, recalled):
                full.append(version.label)
        tell_parents(self.ledger, self.versions, difference.versions)
        if full:
            raise Refused(f"no room is left in {', '.join(full)}", hint="shorten what is written there, in MLflow")
        yield f"descriptions of {model.name} lead to their lineage again"

    def _as_registered(self, version: AdapterVersion) -> tuple[NewVersion, Sequence[Parent]]:
        """What a version was placed with."""
        detail = self.ledger.detail(version.id)
        sources = self.ledger.metric_sources(version.id)
        metrics = self.ledger.metrics([version.id]).get(version.id, {})
        spec = NewVersion(
            **{field.name: getattr(version.spec, field.name) for field in fields(VersionSpec)},
            facts=detail.facts,
            norms=detail.norms,
            recipe=detail.recipe,
            receipt=detail.receipt,
            metrics={key: value for key, value in metrics.items() if sources[key] == REGISTERED},
        )
        edges = self.ledger.parent_edges([version.id]).get(version.id, ())
        parents = self.ledger.versions_by_id([edge.parent_id for edge in edges])
        return spec, [Parent(parents[edge.parent_id], edge.weight, edge.kind) for edge in edges]


def _refusal(difference: Difference, error: AdapterctlError) -> Check:
    """The difference with why it stays."""
    hint = error.hint
    if difference.check.name == "stage" and difference.versions:  # of what was taken in under another number
        hint = difference.check.hint
    elif difference.check.name == "unknown" and difference.model is not None:
        name = difference.model.name
        by_hand = f"adapterctl register models:/{name}/{difference.number} --name {name} takes options"
        hint = f"{hint}; {by_hand}; or delete it in MLflow"
    return replace(difference.check, detail=f"{difference.check.detail}; not adopted: {error.message}", hint=hint)

"""Accept what was done in MLflow behind the ledger's back, as far as it can be: `doctor --adopt`.

Each difference is accepted by a verb that exists: a version is registered, a stage adopted through its gate, one that
is gone becomes a tombstone, which keeps the lineage of what was made of it. Only a rename has no verb of its own, for
it begins in MLflow. What a rule forbids stays as it is and is told with the reason; no rule is weaker here.

Two things need more than being asked for all at once, namely the name of the adapter: a rename under which other rules
hold, and the loss of versions that looks like an older backup of MLflow. Until the latter is decided, nothing is
adopted: of the rest, too, nobody can tell what was done in MLflow and what was undone by the backup.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace

from ..api import Check, Registered
from ..crashpoints import reached
from ..domain.errors import AdapterctlError, Refused
from ..domain.evals import REGISTERED
from ..domain.job import LIVE
from ..domain.refs import check_name, first_few
from ..domain.version import AdapterVersion, NewVersion, VersionSpec
from ..ports import Ledger, Parent, VersionStore
from .drift import Difference, Rules, differences, grouped
from .promote import Stages
from .recall import MARKS_LOCK, write_marks
from .register import tell_parents
from .tag import tags_lock
from .views import cause, recall_views

REASON = "done in MLflow, accepted by doctor"
#: Names come first, for all else goes by them; versions before the stages that they are to hold; links come last.
_ORDER = ("renamed", "lost", "deleted", "older", "unknown", "stage", "description", "tags")
_ALL_JOBS = 1_000_000


@dataclass(frozen=True, slots=True)
class Adoption:
    """`register` takes in a source under a name; `stages` moves what aliases say, in the name of `actor`.

    `force` are the ids of the adapters for which also that is accepted which needs to be asked for by name.
    """

    ledger: Ledger
    versions: VersionStore
    stages: Stages
    register: Callable[[str, str], Registered]
    actor: str
    rules: Rules
    force: Collection[str] = ()

    def accept_all(self) -> Iterator[Check]:
        """One check for what was accepted, then one for each difference that is left, with the reason."""
        refused: dict[str, Check] = {}
        found, changed = self._differences(), False
        for kind in _ORDER:
            if changed:
                found, changed = self._differences(), False
            if (undecided := self._undecided(found)) is not None:
                refused |= {each.check.detail: _refusal(each, undecided) for each in found if each.check.name == "lost"}
                break
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
            yield refused.get(difference.check.detail, difference.check)

    def _undecided(self, found: Sequence[Difference]) -> Refused | None:
        """Why nothing is adopted: versions are lost of adapters that were not named."""
        for each in found:
            names = {version.name for version in each.versions if version.adapter_id not in self.force}
            if each.check.name == "lost" and names:
                told = f"nothing is adopted before it is decided what became of {first_few(sorted(names))}"
                return Refused(told, hint=each.check.hint)
        return None

    def _differences(self) -> list[Difference]:
        return list(differences(self.ledger, self.versions, self.stages.names, self.rules))

    def _accept_renamed(self, difference: Difference) -> Iterator[str]:
        assert difference.model is not None
        adapter_id, former = difference.versions[0].adapter_id, difference.versions[0].name
        name = check_name(difference.model.name)
        if difference.rules and adapter_id not in self.force:
            raise Refused("a rename that changes rules is asked for by name", hint=difference.check.hint)
        for job in self.ledger.jobs(states=sorted(LIVE), limit=_ALL_JOBS):
            if job.spec.get("into") == former:
                raise Refused(f"job {job.id} makes a version of {former}", hint=f"adapterctl jobs wait {job.id}")
        self.ledger.rename_adapter(adapter_id, name, actor=self.actor, note="; ".join(difference.rules))
        # MLflow's pages still have the former name: that is a difference of its own, seen and accepted after this one
        reached("stage.renamed")
        yield "; ".join([f"{former} is called {name} here, too", *difference.rules])

    def _accept_deleted(self, difference: Difference) -> Iterator[str]:
        held = []
        # it was seen missing a while ago; raises where MLflow cannot tell
        there = {model.name: model.versions for model in self.versions.seen(difference.versions[0].adapter_id)}
        if there and difference.versions[0].name not in there:  # it was renamed meanwhile
            return
        for version in difference.versions:
            if version.number in there.get(version.name, {}):
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

    def _accept_lost(self, difference: Difference) -> Iterator[str]:
        held = []
        for versions in grouped(difference.versions).values():
            try:
                yield from self._accept_deleted(replace(difference, versions=tuple(versions)))
            except Refused as error:
                held.append(error.message)
        if held:
            raise Refused("; ".join(held), hint="adapterctl demote NAME --stage STAGE, then the same again")

    def _left_of(self, version: AdapterVersion) -> str:
        below = self.ledger.versions_by_id(list(self.ledger.descendants([version.id])))
        live = sorted(each.label for each in below.values() if each.state == "live")
        return f"; it stays in the lineage of {first_few(live)}" if live else ""

    def _accept_older(self, difference: Difference) -> Iterator[str]:
        """The adapters, then with their own ids and numbers all versions that the ledger lost, in the order of both."""
        for model in difference.models:
            assert model.adapter_id is not None
            self.ledger.take_back_adapter(check_name(model.name), model.adapter_id)
        making = {job.spec.get("into") for job in self.ledger.jobs(states=sorted(LIVE), limit=_ALL_JOBS)}
        left = {}
        for each in self._differences():
            if each.check.name == "unfinished" and each.model is not None and each.number is not None:
                left[each.model.versions[each.number].version_id or "", each.model.name] = each
        for (_, name), each in sorted(left.items()):
            if name not in making:
                with suppress(AdapterctlError):  # it stays unfinished, and the command that is told of it says why
                    yield from self._accept_unknown(each)

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
        recalls = recall_views(self.ledger)
        ids = [version.id for version in difference.versions]
        above = [edge.parent_id for edges in self.ledger.parent_edges(ids).values() for edge in edges]
        near = self.ledger.versions_by_id(above) if above else {}
        tell_parents(self.ledger, self.versions, [version for version in near.values() if version.state == "live"])
        for version in difference.versions:
            spec, parents = self._as_registered(version)
            if not self.versions.describe(version, spec, parents, cause(recalls.get(version.id))):
                full.append(version.label)
        tell_parents(self.ledger, self.versions, difference.versions)
        if not model.described:
            ((newest, _),) = self.ledger.newest_of_each(model.name)
            full += [] if self.versions.describe_adapter(model.name, newest.spec.base) else [model.name]
        if full:
            raise Refused(f"no room is left in {', '.join(full)}", hint="shorten what is written there, in MLflow")
        yield f"descriptions of {model.name} lead to their lineage again"

    def _accept_tags(self, difference: Difference) -> Iterator[str]:
        for version in difference.versions:
            with self.ledger.exclusive(tags_lock(version.id)):
                current = self.ledger.version(version.id)
                if current is not None and current.state == "live":
                    self.versions.project_tags(current, None)
        with self.ledger.exclusive(MARKS_LOCK):
            write_marks(self.ledger, self.versions, difference.versions)
        yield f"the tags of {first_few([version.label for version in difference.versions])} are ours again"

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

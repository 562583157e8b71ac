"""Which version serves a stage: promote, rollback, demote, adopt, approvals, and the history of it.

The ledger's row decides; MLflow's alias and legacy stage are its projection. So the ledger moves first, by
compare-and-set on the holder that was seen when the verb began, and the projection follows from what the ledger says
then. A process killed between the two leaves an alias that differs, and so does someone who moves it in MLflow's UI:
either is noticed by the next verb, which names both sides and changes nothing until one of them is chosen.

Each way to a stage asks its gate, and what was decided is kept with the row: promotions and adoptions are refused, or
forced and recorded as such; going back is for emergencies, so a rollback is done and the gate's objections are told.
What was recalled goes to no stage by any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ..api import HistoryView, StageEventView
from ..crashpoints import reached
from ..domain.errors import DecisionOutdated, InvalidInput, NotFound, Refused, StageMoved, Unavailable
from ..domain.signature import SIGNED_BY
from ..domain.stage import (
    GENESIS,
    LEGACY_STAGES,
    Head,
    MoveAction,
    StageEvent,
    approvals,
    legacy_stage,
    read_head,
    verify_chain,
    verify_head,
)
from ..domain.verdict import Decision, record_digest
from ..domain.version import AdapterVersion
from ..ports import Folders, Ledger, VersionStore
from .gates import decide_on, require
from .pull import check_intact
from .recall import check_not_recalled
from .resolve import did_you_mean, known_adapter
from .views import iso_time

#: MLflow's word for a version that has left its stages.
_LEFT = "Archived"
#: How often a gate is asked where what it stands on is changed each time before the stage moves.
DECISIONS = 5


def check_stage(ledger: Ledger, versions: VersionStore, name: str, stage: str) -> None:
    """Raise `StageMoved` where MLflow's alias is not where the ledger says; for every verb that goes by a stage."""
    holder = _holder(ledger, known_adapter(ledger, name), stage)
    _check_alias(versions, holder, versions.alias(name, stage), name, stage)


def check_stage_name(stage: str, names: Sequence[str], *, kept: Collection[str] = ()) -> None:
    """Raise `InvalidInput` for a stage that the settings do not name; where one reads, what was `kept` may be, too."""
    if stage not in names and stage not in kept:
        known = f"stages are {', '.join(names)}; settings: ADAPTERCTL_STAGES"
        near = did_you_mean(stage, dict.fromkeys((*names, *kept)))
        raise InvalidInput(f"{stage!r} is no stage", hint=f"{near} {known}".strip())


@dataclass(frozen=True, slots=True)
class Stages:
    """The verbs that move a stage. `names` are the stages of the settings, `folders` opens the files of a version."""

    ledger: Ledger
    versions: VersionStore
    folders: Folders
    names: Sequence[str]
    actor: str

    def promote(self, version: AdapterVersion, *, stage: str, reason: str = "", force: bool = False) -> StageEventView:
        """Let `version` hold `stage`. Its files are compared with the manifest first, then the gate is asked.

        Promoting the holder again moves nothing in the ledger, adds no row, and sets MLflow right.

        Raises:
            Recalled: the version, or one that it is made of, was recalled.
            GateRefused: a condition of the stage is not met, and it was not forced.
            StageMoved: another promotion came between, or the alias in MLflow differs.
            NotFound: MLflow has lost the version.
            Unavailable: MLflow did not follow; where the ledger has moved before that, it says so.
            Corrupt: the stored bytes are not those that were registered.
        """
        holder = self._begin(version.name, version.adapter_id, stage)
        self._verify(version)
        if holder is not None and holder.id == version.id:
            return self._project_again(version, stage)

        def action(decision: Decision) -> MoveAction:
            return "force" if require(decision, force=force, reason=reason) else "promote"

        return self._decide_and_move(version.name, version, stage, action, holder, reason)

    def rollback(self, name: str, *, stage: str, reason: str = "") -> StageEventView:
        """Give `stage` back to the version that held it before the present one (or before it was emptied).

        Rolling back twice therefore ends where it began. A version that was removed since is passed over, to the one
        that held the stage before it; which ones, and what the gate objects to, is among the warnings.
        """
        adapter_id = known_adapter(self.ledger, name)
        holder = self._begin(name, adapter_id, stage)
        version, removed = self._held_before(name, adapter_id, stage, holder)
        self._verify(version)
        event = self._decide_and_move(name, version, stage, lambda _: "rollback", holder, reason)
        passed = tuple(f"{each.label} held {stage} later, but was removed" for each in removed)
        return replace(event, warnings=passed + event.warnings)

    def demote(self, name: str, *, stage: str, reason: str = "") -> StageEventView:
        """Empty `stage`. Where only MLflow has an alias of that name, it is removed, and the row says so.

        Where MLflow has lost the holder, this is the way out.
        """
        adapter_id = known_adapter(self.ledger, name)
        holder = self._begin(name, adapter_id, stage)
        number = self.versions.alias(name, stage)
        if holder is None and number is None:
            raise NotFound(f"nothing holds {stage} of {name}", hint=f"see `adapterctl history {name}`")
        compare = holder is not None and not _is_lost(self.versions, holder, number)
        return self._move(name, adapter_id, stage, "demote", holder, None, reason, compare=compare)

    def adopt(self, name: str, *, stage: str, reason: str = "", force: bool = False) -> StageEventView:
        """Accept where MLflow's alias points now as a change of the stage; the gate is asked as for a promotion."""
        adapter_id = known_adapter(self.ledger, name)
        holder = self._begin(name, adapter_id, stage)
        number = self.versions.alias(name, stage)
        version = self.ledger.version_by_number(name, number) if number is not None else None
        if number is not None and (version is None or version.state != "live"):
            raise Refused(f"MLflow's {name}@{stage} is v{number}, no live version here", hint="promote another version")
        if _number(version) == _number(holder):
            raise Refused(f"{stage} of {name} is {_label(holder)} on both sides", hint="there is nothing to adopt")
        if version is None:
            if _is_lost(self.versions, holder, number):  # its alias went with it: nobody chose to empty the stage
                _check_alias(self.versions, holder, number, name, stage)
            return self._move(name, adapter_id, stage, "adopt", holder, None, reason, compare=False)
        self._verify(version)

        def action(decision: Decision) -> MoveAction:
            return "force" if require(decision, force=force, reason=reason) else "adopt"

        return self._decide_and_move(name, version, stage, action, holder, reason, compare=False)

    def approve(
        self, version: AdapterVersion, *, stage: str, reason: str = "", withdraw: bool = False
    ) -> StageEventView:
        """Record that the actor approves of `version` for `stage`, or no longer does. Approving again adds no row."""
        check_stage_name(stage, self.names)
        _check_live(version)
        events = self.ledger.stage_history(version.adapter_id, stage)
        approves = self.actor in approvals(events, version.id, stage)
        if withdraw and not approves:
            raise Refused(f"{self.actor} does not approve of {version.label} for {stage}", hint="nothing to withdraw")
        if approves and not withdraw:
            mine = [each for each in events if (each.action, each.actor) == ("approve", self.actor)]
            return _views(self.ledger, [each for each in mine if each.version_id == version.id][-1:])[0]
        event = self.ledger.record_approval(
            version.adapter_id,
            stage,
            version_id=version.id,
            action="withdraw" if withdraw else "approve",
            actor=self.actor,
            reason=reason,
        )
        return _views(self.ledger, [event])[0]

    def _begin(self, name: str, adapter_id: str, stage: str) -> AdapterVersion | None:
        """The holder as the caller sees it now; what happens until the move is found by compare-and-set."""
        check_stage_name(stage, self.names)
        return _holder(self.ledger, adapter_id, stage)

    def _verify(self, version: AdapterVersion) -> None:
        _check_live(version)
        check_not_recalled(self.ledger, [version], "promote another version")
        if not self.versions.has(version):
            way_out = (
                "`adapterctl doctor` tells whether it was renamed there; where it is gone, restore MLflow from a"
                " backup, or `adapterctl demote` the stages that it holds, then `adapterctl rm`"
            )
            raise NotFound(f"MLflow has lost {version.label}", hint=way_out)
        with self.folders(version) as folder:
            check_intact(version, folder)

    def _held_before(
        self, name: str, adapter_id: str, stage: str, holder: AdapterVersion | None
    ) -> tuple[AdapterVersion, list[AdapterVersion]]:
        """The newest live `previous` of the history that is not the present holder; and the removed ones after it."""
        present = holder.id if holder else None
        removed: dict[str, AdapterVersion] = {}
        for event in reversed(self.ledger.stage_history(adapter_id, stage)):
            before = self.ledger.version(event.previous_id) if event.previous_id not in (None, present) else None
            if before is not None and before.state == "live":
                return before, list(removed.values())
            if before is not None:
                removed[before.id] = before
        only = f", only {', '.join(each.label for each in removed.values())}, which was removed" if removed else ""
        raise Refused(
            f"nothing held {stage} of {name} before {_label(holder)}{only}", hint=f"see `adapterctl history {name}`"
        )

    def _decide_and_move(
        self,
        name: str,
        version: AdapterVersion,
        stage: str,
        action: Callable[[Decision], MoveAction],
        holder: AdapterVersion | None,
        reason: str,
        *,
        compare: bool = True,
    ) -> StageEventView:
        """Ask the gate and move; where gates, approvals or tags were changed in between, ask it again."""
        for left in reversed(range(DECISIONS)):
            events = self.ledger.stage_history(version.adapter_id)
            # after the history: a tag that was changed before is in what is read now, one changed later is not
            version = self.ledger.version(version.id) or version
            decision = decide_on(self.ledger, version, stage)
            seen = (events[-1].seq if events else 0), decision.gate
            done = action(decision)
            try:
                event = self._move(
                    name, version.adapter_id, stage, done, holder, version, reason, decision, seen=seen, compare=compare
                )
            except DecisionOutdated:
                if not left:
                    raise
            else:
                return _with_objections(event, decision)
        raise AssertionError("unreachable")

    def _move(
        self,
        name: str,
        adapter_id: str,
        stage: str,
        action: MoveAction,
        holder: AdapterVersion | None,
        version: AdapterVersion | None,
        reason: str,
        decision: Decision | None = None,
        *,
        seen: tuple[int, str | None] | None = None,
        compare: bool = True,
    ) -> StageEventView:
        with self.ledger.exclusive(_lock(adapter_id)):
            if compare and _number(_holder(self.ledger, adapter_id, stage)) == _number(holder):
                _check_alias(self.versions, holder, self.versions.alias(name, stage), name, stage)
            event = self.ledger.move_stage(
                adapter_id,
                stage,
                version_id=version.id if version else None,
                expected=holder.id if holder else None,
                action=action,
                actor=self.actor,
                reason=reason,
                decision=decision.record() if decision is not None else None,
                seen=seen,
            )
            reached("stage.recorded")
            try:
                self._project(name, event)
            except Unavailable as error:
                verb = f"promote {version.label} --to {stage}" if version else f"demote {name} --stage {stage}"
                done = f"{stage} of {name} is {_label(version)} in the ledger since now"
                raise error.though(done, hint=f"`adapterctl {verb}` writes it to MLflow") from error
            reached("stage.projected")
        return _views(self.ledger, [event])[0]

    def _project_again(self, version: AdapterVersion, stage: str) -> StageEventView:
        with self.ledger.exclusive(_lock(version.adapter_id)):
            event = [each for each in self.ledger.stage_history(version.adapter_id, stage) if each.moves][-1]
            if event.version_id != version.id:
                raise StageMoved(
                    f"{stage} of {version.name} was moved from {version.label} meanwhile",
                    hint=f"see `adapterctl history {version.name}`, then try again",
                )
            self._project(version.name, event)
        return _views(self.ledger, [event])[0]

    def _project(self, name: str, event: StageEvent) -> None:
        """Make MLflow say what the ledger says after `event`, the last one of its stage. The caller holds the lock."""
        legacy: dict[int, str] = {}
        if event.stage in LEGACY_STAGES:
            holders = self.ledger.stages([event.adapter_id]).get(event.adapter_id, {})
            ids = [each for each in (event.version_id, event.previous_id) if each is not None]
            for version in self.ledger.versions_by_id(ids).values():
                highest = legacy_stage([stage for stage, holder in holders.items() if holder == version.id])
                legacy[version.number] = _LEFT if highest == "None" else highest
        holder = self.ledger.version(event.version_id) if event.version_id else None
        self.versions.project_stage(name, event.stage, number=_number(holder), legacy=legacy)


def history(
    ledger: Ledger,
    name: str,
    *,
    names: Sequence[str] = (),
    stage: str | None = None,
    verify: bool = False,
    head: str | None = None,
) -> HistoryView:
    """Every change of an adapter's stages, every approval and every note of what else was done to it, oldest first.

    `verify` checks the whole chain, whatever `stage` shows of it, and the kept evidence. A history that was cut at its
    end or written anew from its start has no broken link: it is found only against `head`, as it was exported or the
    hash alone, that was kept elsewhere. Raises `InvalidInput` for the head of another history, and for a stage that
    neither `names`, those of the settings, nor a row of this history know.
    """
    kept = None if head is None else read_head(head)
    if isinstance(kept, Head) and (
        kept.registry != ledger.registry_id or name not in (kept.name, ledger.former_names().get(kept.name))
    ):
        raise InvalidInput(f"that head is of {kept.name} in the registry {kept.registry}, not of {name} here")
    events = ledger.stage_history(known_adapter(ledger, name))
    if stage is not None:
        check_stage_name(stage, names, kept={event.stage for event in events})
    findings = None
    if verify:
        findings = verify_chain(events) + _verify_evidence(ledger, events)
        if kept is not None:
            findings += verify_head(events, kept)
    shown = [event for event in events if stage in (None, event.stage)]
    return HistoryView(
        name=name,
        events=tuple(_views(ledger, shown)),
        head=events[-1].hash if events else GENESIS,
        findings=None if findings is None else tuple(findings),
        registry_id=ledger.registry_id,
        rows=len(events),
    )


def _verify_evidence(ledger: Ledger, events: Sequence[StageEvent]) -> list[str]:
    """Rows whose evidence or signature is not there, or whose evidence is not what it was."""
    referred = {event.seq: event.evidence for event in events if event.evidence is not None}
    kept = ledger.decisions(list(referred.values()))
    findings = []
    for seq, digest in referred.items():
        if digest not in kept:
            findings.append(f"the evidence of row {seq} is gone")
        elif record_digest(kept[digest]) != digest:
            findings.append(f"the evidence of row {seq} was edited")
    return findings + _verify_signatures(ledger, events)


def _verify_signatures(ledger: Ledger, events: Sequence[StageEvent]) -> list[str]:
    """A key may have signed twice, as after a rename: each row takes a signature for itself."""
    findings = []
    left: dict[str, list[str]] = {}
    for event in events:
        if event.action == "sign" and event.version_id is not None:
            if event.version_id not in left:
                left[event.version_id] = [each.key.id for each in ledger.signatures(event.version_id)]
            keyid = event.reason.removeprefix(SIGNED_BY)
            if keyid in left[event.version_id]:
                left[event.version_id].remove(keyid)
            else:
                findings.append(f"a signature by the key of row {event.seq} is gone")
    return findings


def _views(ledger: Ledger, events: Sequence[StageEvent]) -> list[StageEventView]:
    ids = {each: None for event in events for each in (event.version_id, event.previous_id) if each is not None}
    labels = {version_id: version.label for version_id, version in ledger.versions_by_id(list(ids)).items()}
    return [
        StageEventView(
            seq=event.seq,
            stage=event.stage,
            action=event.action,
            ref=labels[event.version_id] if event.version_id else None,
            previous=labels[event.previous_id] if event.previous_id else None,
            actor=event.actor,
            reason=event.reason,
            at=iso_time(event.at),
            hash=event.hash,
            evidence=event.evidence,
        )
        for event in events
    ]


def _with_objections(event: StageEventView, decision: Decision) -> StageEventView:
    return replace(event, warnings=tuple(f"the gate of {event.stage}: {each}" for each in decision.verdict.reasons))


def _check_live(version: AdapterVersion) -> None:
    if version.state != "live":
        raise Refused(f"{version.label} was removed", hint="choose another version")


def _is_lost(versions: VersionStore, holder: AdapterVersion | None, alias: int | None) -> bool:
    """Whether a stage has no alias because MLflow has lost the version that holds it."""
    return alias is None and holder is not None and not versions.has(holder)


def _check_alias(
    versions: VersionStore, holder: AdapterVersion | None, alias: int | None, name: str, stage: str
) -> None:
    if _number(holder) == alias:
        return
    if _is_lost(versions, holder, alias):
        raise StageMoved(
            f"{stage} of {name} is {_label(holder)} in the ledger, but MLflow has lost that version",
            hint=f"restore MLflow from a backup, or `adapterctl demote {name} --stage {stage}` empties the stage",
        )
    there = f"v{alias}" if alias is not None else "gone"
    keep = f"promote {holder.label} --to {stage}" if holder else f"demote {name} --stage {stage}"
    raise StageMoved(
        f"{stage} of {name} is {_label(holder)} in the ledger, but MLflow's alias is {there}",
        hint=f"`adapterctl {keep}` sets MLflow right, `adapterctl adopt {name} --stage {stage}` accepts its alias",
    )


def _holder(ledger: Ledger, adapter_id: str, stage: str) -> AdapterVersion | None:
    version_id = ledger.stage_holder(adapter_id, stage)
    return ledger.version(version_id) if version_id else None


def _lock(adapter_id: str) -> str:
    """One mover of an adapter's stages at a time: between ledger and alias, another one would see a difference."""
    return f"stages-{adapter_id}"


def _label(version: AdapterVersion | None) -> str:
    return version.label if version else "nothing"


def _number(version: AdapterVersion | None) -> int | None:
    return version.number if version else None

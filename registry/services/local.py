"""Every verb, in process: `RegistryAPI` over a ledger, MLflow and a doorbell.

Holds no rule of its own: each verb resolves its references and calls one use case. MLflow is opened by the first verb
that needs it, so that `ls`, `show`, `lineage` and `jobs` never import it.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..api import (
    DAY_S,
    AdapterView,
    Check,
    DiffView,
    Direction,
    Drawing,
    EventsView,
    EventView,
    GarbageView,
    GateCheck,
    GatesView,
    HistoryView,
    LineageView,
    Look,
    MethodView,
    NewToken,
    PlanView,
    RebuildView,
    RecallImpact,
    Registered,
    RetentionView,
    SignatureView,
    StageEventView,
    Submitted,
    SuiteView,
    Tagged,
    TuneView,
    Verification,
    VersionView,
)
from ..domain.access import EVERY_NAME, Scope, Token, check_token, new_secret
from ..domain.errors import AdapterctlError, Conflict, InvalidInput, NotFound
from ..domain.evals import EvalReport
from ..domain.job import Job, JobEvent, LogPiece, QueueDepth
from ..domain.recall import RecallAction
from ..domain.recipe import MergeRequest, ResizeRequest
from ..domain.refs import Ref, check_name
from ..domain.signature import Envelope
from ..domain.suite import Suite
from ..domain.tuning import TuneRequest
from ..domain.verdict import Decision
from ..domain.version import Base
from ..domain.worker import Worker
from ..patience import listen_patiently, patiently
from ..ports import Access, Doorbell, Folders, Ledger, VersionStore
from ..settings import Settings
from . import (
    bases,
    browse,
    diff,
    doctor,
    evaluate,
    feed,
    garbage,
    gates,
    import_results,
    merge,
    pull,
    rebuild,
    recall,
    register,
    resize,
    schedule,
    select,
    sign,
    tag,
    trace,
    tune,
    verify,
    views,
    witness,
)
from .locate_base import remember_base
from .promote import Stages, check_stage, check_stage_name
from .promote import history as stage_history
from .reconcile import Adoption
from .resolve import known_adapter, resolve
from .retain import retention_view
from .staging import stage_folder
from .suites import add_suite, find_suite, keep_suite, named_suite, suite_views


class LocalRegistry:
    """The registry of this process. Made by `bootstrap.connect`; safe beside any number of other processes."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        bell: Doorbell,
        access: Access,
        *,
        open_versions: Callable[[], VersionStore],
        folders: Folders,
        open_hub: register.SourceFolder,
        made_on_demand: Mapping[str, str] | None = None,
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self.bell = bell
        self.access = access
        self.folders = folders
        self.made_on_demand = made_on_demand
        self._open_versions = open_versions
        self._open_hub = open_hub
        self._versions: VersionStore | None = None

    @property
    def version_store(self) -> VersionStore:
        """MLflow, opened on first use."""
        if self._versions is None:
            self._versions = self._open_versions()
        return self._versions

    def acting(self, actor: str) -> LocalRegistry:
        """The same registry for another caller: what it changes is recorded under that name."""
        other = copy.copy(self)
        other.settings = replace(self.settings, actor=actor)
        return other

    # register and read

    def register(
        self,
        source: str,
        *,
        name: str,
        base: str | None = None,
        kind: Literal["import", "train"] = "import",
        trained_from: Ref | None = None,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        dataset: str | None = None,
        license: str | None = None,
        suite: str | None = None,
        assume_converted: bool = False,
        files: Path | None = None,
    ) -> Registered:
        registration = register.Registration(
            source=source,
            name=name,
            base=base,
            kind=kind,
            trained_from=resolve(self.ledger, trained_from) if trained_from else None,
            metrics=metrics or {},
            params=params or {},
            tags=tags or {},
            dataset=dataset,
            license=license,
            assume_converted=assume_converted,
            files=files,
        )
        loaded = find_suite(self.ledger, suite) if suite else None
        registered = register.register(
            self.ledger,
            registration,
            open_versions=lambda: self.version_store,
            open_hub=self._open_hub,
            home=self.settings.home,
            created_by=self.settings.actor,
        )
        if loaded is not None:
            add_suite(self.ledger, known_adapter(self.ledger, name), loaded)
        return registered

    def adapters(self, *, after: str | None = None, limit: int | None = None) -> list[AdapterView]:
        with self.ledger.snapshot():
            return views.adapter_views(self.ledger, after=after, limit=limit)

    def adapter(self, name: str) -> AdapterView:
        known_adapter(self.ledger, check_name(name))
        with self.ledger.snapshot():
            found = views.adapter_views(self.ledger, name)
        if not found:
            raise NotFound(f"every version of {name} was removed", hint=f"GET /v1/versions?name={name}&removed=true")
        return found[0]

    def versions(
        self,
        name: str | None = None,
        *,
        base: str | None = None,
        tag: Mapping[str, str] | None = None,
        stage: str | None = None,
        metric: Sequence[str] = (),
        removed: bool = False,
        dataset: str | None = None,
        trained_on: str | None = None,
        descends_from: Ref | None = None,
        after: tuple[str, int] | None = None,
        limit: int | None = None,
    ) -> list[VersionView]:
        with self.ledger.snapshot():
            if stage is not None and stage not in self.settings.stages:
                check_stage_name(stage, self.settings.stages, kept=[stage] if self.ledger.is_held(stage) else ())
            found = select.select(
                self.ledger,
                name,
                base=base,
                tag=tag,
                stage=stage,
                metric=metric,
                removed=removed,
                dataset=dataset,
                trained_on=trained_on,
                descends_from=descends_from,
                after=after,
                limit=limit,
            )
            return views.version_views(self.ledger, found)

    def version(self, ref: Ref, *, agreed: bool = False) -> VersionView:
        if agreed:
            self._check_stage(ref)
        return views.version_view(self.ledger, resolve(self.ledger, ref, removed=True))

    def diff(self, first: Ref, second: Ref, *, layers: bool = False) -> DiffView:
        found = resolve(self.ledger, first), resolve(self.ledger, second)
        return diff.diff(self.ledger, self.folders, *found, layers=layers)

    def pull(self, ref: Ref, folder: Path) -> VersionView:
        self._check_stage(ref)
        version = resolve(self.ledger, ref)
        with self.folders(version) as stored:
            pull.pull(
                version.label,
                version.placement.files,
                folder,
                lambda record, to: shutil.copyfile(stored / record.path, to),
            )
        return views.version_view(self.ledger, version)

    def witness(self, deed: str, said: Mapping[str, Any]) -> None:
        witness.witness(self.ledger, self.settings.stages, deed, said, actor=self.settings.actor)

    def stage(self) -> AbstractContextManager[Path]:
        return stage_folder(self.settings.home)

    def check(self) -> None:
        self.ledger.has_versions()

    @contextmanager
    def files(self, ref: Ref) -> Iterator[tuple[VersionView, Path]]:
        self._check_stage(ref)
        version = resolve(self.ledger, ref)
        with self.folders(version) as stored:
            yield views.version_view(self.ledger, version), stored

    def bases(self) -> list[tuple[Base, tuple[str, ...]]]:
        spellings: dict[str, list[str]] = {}
        for spelling, base_id in self.ledger.base_aliases().items():
            spellings.setdefault(base_id, []).append(spelling)
        return [(base, tuple(sorted(spellings.get(base.id, ())))) for base in self.ledger.bases()]

    def add_base(self, name: str, *, folder: Path | None = None, revision: str | None = None) -> Base:
        pins = bases.fingerprints(folder) if folder is not None else {}
        base = self.pin_base(name, revision=revision, pins=pins)
        if folder is not None:
            remember_base(self.settings.home, base.name, folder)
        return base

    def pin_base(self, name: str, *, revision: str | None, pins: Mapping[str, str]) -> Base:
        return bases.add_base(self.ledger, name, revision=revision, pins=pins)

    def alias_base(self, spelling: str, base: str) -> Base:
        return bases.alias_base(self.ledger, spelling, base)

    def merge_bases(self, keep: str, drop: str) -> Base:
        return bases.merge_bases(self.ledger, keep, drop)

    # merge

    def methods(self) -> list[MethodView]:
        return merge.method_views()

    def plan(self, request: MergeRequest, *, most_work: float = math.inf) -> PlanView:
        self._check_stage(*(parent.ref for parent in request.parents))
        return merge.plan_merge(self.ledger, self.folders, request, most_work=most_work)

    def merge(self, request: MergeRequest) -> Submitted:
        self._check_stage(*(parent.ref for parent in request.parents))
        return merge.request_merge(self.ledger, self.bell, request, actor=self.settings.actor)

    def merge_all(self, asked: Sequence[tuple[str, MergeRequest]]) -> list[Submitted | AdapterctlError]:
        return merge.request_merges(self.ledger, asked)

    def ring(self, job_id: str) -> None:
        self.bell.ring(job_id)

    def plan_resize(self, request: ResizeRequest, *, most_work: float = math.inf) -> PlanView:
        self._check_stage(request.ref)
        return resize.plan_resize(self.ledger, self.folders, request, most_work=most_work)

    def resize(self, request: ResizeRequest) -> Submitted:
        self._check_stage(request.ref)
        return resize.request_resize(self.ledger, self.folders, self.bell, request, actor=self.settings.actor)

    def verify(self, ref: Ref, *, rerun: bool = True) -> Verification:
        started = self.start_verification(ref, rerun=rerun)
        if isinstance(started, Verification):
            return started
        for _ in self.follow(started.id):
            pass
        return self.verification(started.id)

    def start_verification(self, ref: Ref, *, rerun: bool = True) -> Verification | Job:
        version = resolve(self.ledger, ref)
        if not rerun or version.spec.recipe_digest is None:
            return verify.verification(self.ledger, version, verify.check_files(self.folders, version), None)
        new = verify.new_verification(version, actor=self.settings.actor)
        return schedule.ask(self.ledger, self.bell, new)

    def verification(self, job_id: str) -> Verification:
        job = self.job(job_id)
        if job.kind != "verify":
            raise NotFound(f"job {job_id} is no verification", hint="adapterctl jobs ls --kind verify")
        if not job.ended:
            raise Conflict(f"job {job_id} is {job.state}", hint=f"adapterctl jobs wait {job_id}")
        schedule.raise_for(job)
        version = self.ledger.versions_by_id([job.spec["version_id"]])[job.spec["version_id"]]
        findings = verify.check_files(self.folders, version)
        return verify.verification(self.ledger, version, findings, verify.outcome_of(job))

    def remove(self, ref: Ref, *, reason: str) -> VersionView:
        version = resolve(self.ledger, ref, removed=True)
        self.ledger.remove_version(version.id, actor=self.settings.actor, reason=reason)
        # After the tombstone: a crash in between leaves files that nobody refers to, never a version without files.
        self.version_store.remove(version)
        parents = self.ledger.parent_edges([version.id]).get(version.id, ())
        told = self.ledger.versions_by_id([edge.parent_id for edge in parents]).values()
        register.tell_parents(self.ledger, self.version_store, list(told))
        return self.version(Ref(version.name, number=version.number))

    # lineage

    def lineage(self, ref: Ref, *, direction: Direction = "both", depth: int | None = None) -> LineageView:
        return trace.lineage(self.ledger, ref, direction=direction, depth=depth)

    def common_ancestors(self, first: Ref, second: Ref) -> LineageView:
        return trace.common_ancestors(self.ledger, first, second)

    def path(self, first: Ref, second: Ref) -> LineageView:
        return trace.path(self.ledger, first, second)

    def picture(self, ref: Ref, look: Look, *, whole: bool = False) -> Drawing:
        return browse.picture(self.ledger, ref, look, whole=whole)

    def page(self, ref: Ref, look: Look, *, whole: bool, root: str) -> Drawing:
        # an MLflow on another machine has its pages there
        elsewhere = self.ledger.mlflow_uri.startswith(("http://", "https://"))
        mlflow = f"{self.ledger.mlflow_uri.rstrip('/')}/" if elsewhere else root
        return browse.page(self.ledger, ref, look, whole=whole, root=root, mlflow=mlflow)

    def recall(self, ref: Ref, *, reason: str) -> RecallImpact:
        return self._recall(ref, "recall", reason)

    def undo_recall(self, ref: Ref, *, reason: str) -> RecallImpact:
        return self._recall(ref, "undo", reason)

    def rebuild(self, old: Ref, new: Ref, *, until: Ref | None = None, dry_run: bool = False) -> RebuildView:
        self._check_stage(old, new, *([until] if until else []))
        return rebuild.rebuild(
            self.ledger, self.bell, old, new, until=until, dry_run=dry_run, actor=self.settings.actor
        )

    def _recall(self, ref: Ref, action: RecallAction, reason: str) -> RecallImpact:
        version = resolve(self.ledger, ref, removed=True)  # its bytes may live on in a copy
        return recall.recall(self.ledger, self.bell, version, action, actor=self.settings.actor, reason=reason)

    # jobs

    def jobs(
        self, *, state: str | None = None, kind: str | None = None, limit: int = 100, before: str | None = None
    ) -> list[Job]:
        return self.ledger.jobs(states=schedule.parse_states(state), kind=kind, limit=limit, before=before)

    def job(self, job_id: str) -> Job:
        return schedule.find_job(self.ledger, job_id)

    def job_events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        return self.ledger.events(self.job(job_id).id, after)

    def job_log(self, job_id: str, after: int = 0) -> list[LogPiece]:
        return self.ledger.log(self.job(job_id).id, after)

    def workers(self) -> list[Worker]:
        return self.ledger.workers()

    def queue_depths(self) -> list[QueueDepth]:
        return self.ledger.queue_depths()

    def wake(self, job_id: str) -> None:
        self.bell.ring(job_id)

    def wake_for_unattended(self) -> None:
        if self.settings.broker_url:
            return  # its workers do so themselves, and messages for those that are busy would pile up
        job = schedule.unattended(self.ledger, for_s=self.settings.ring_again_s)
        if job is not None:
            self.bell.ring(job.id)

    def follow(
        self, job_id: str, *, timeout_s: float | None = None, tell: Callable[[str], None] | None = None
    ) -> Iterator[Job]:
        found = self.job(job_id).id
        return patiently(
            lambda left: schedule.follow(self.ledger, self.bell, found, timeout_s=left),
            timeout_s=timeout_s,
            known=True,
            tell=tell,
        )

    def cancel(self, job_id: str) -> Job:
        return self.ledger.request_cancel(self.job(job_id).id)

    def retry(self, job_id: str) -> Job:
        return schedule.retry(self.ledger, self.bell, self.job(job_id).id)

    # evaluation

    def evaluate(
        self, refs: Sequence[Ref], *, suites: Sequence[str], limit: int | None = None, base_dtype: str | None = None
    ) -> Job:
        return evaluate.request_evaluation(
            self.ledger,
            self.bell,
            refs,
            suites=suites,
            limit=limit,
            base_dtype=base_dtype,
            settings=self.settings,
            made_on_demand=self.made_on_demand,
        )

    def tune(self, request: TuneRequest) -> Job:
        self._check_stage(*request.parents)
        return tune.request_tune(
            self.ledger, self.bell, request, settings=self.settings, made_on_demand=self.made_on_demand
        )

    def tuned(self, job_id: str) -> TuneView:
        return tune.tune_view(self.ledger, self.job(job_id))

    def set_suite(self, name: str, suite: str) -> None:
        add_suite(self.ledger, known_adapter(self.ledger, check_name(name)), find_suite(self.ledger, suite))

    def retention(self, ref: Ref) -> RetentionView:
        return retention_view(self.ledger, resolve(self.ledger, ref))

    def import_reports(self, folder: Path) -> int:
        return self.take_reports(evaluate.read_reports(folder))

    def take_reports(self, reports: Sequence[EvalReport]) -> int:
        return evaluate.import_reports(self.ledger, reports)

    def import_results(
        self, ref: Ref, *, source: str, metrics: Mapping[str, float] | None = None, replace: bool = False
    ) -> VersionView:
        version = resolve(self.ledger, ref)
        import_results.import_results(
            self.ledger,
            version,
            source=source,
            metrics=metrics,
            replace=replace,
            open_versions=lambda: self.version_store,
        )
        return views.version_view(self.ledger, version)

    def suites(self) -> list[SuiteView]:
        return suite_views(self.ledger)

    def suite(self, suite: str) -> Suite:
        return named_suite(self.ledger, suite)

    def keep_suite(self, suite: Suite) -> SuiteView:
        return SuiteView(suite.name, keep_suite(self.ledger, suite))

    # stages

    def tag(
        self, ref: Ref, *, put: Mapping[str, str] | None = None, remove: Sequence[str] = (), reason: str = ""
    ) -> Tagged:
        self._check_stage(ref)
        version, actor = resolve(self.ledger, ref), self.settings.actor
        return tag.tag(
            self.ledger, self.version_store, version, put=put or {}, remove=remove, actor=actor, reason=reason
        )

    def promote(self, ref: Ref, *, to: str, reason: str = "", force: bool = False) -> StageEventView:
        self._check_stage(ref)
        return self._stages.promote(resolve(self.ledger, ref), stage=to, reason=reason, force=force)

    def rollback(self, name: str, *, stage: str, reason: str = "") -> StageEventView:
        return self._stages.rollback(name, stage=stage, reason=reason)

    def demote(self, name: str, *, stage: str, reason: str = "") -> StageEventView:
        return self._stages.demote(name, stage=stage, reason=reason)

    def adopt(self, name: str, *, stage: str, reason: str = "", force: bool = False) -> StageEventView:
        return self._stages.adopt(name, stage=stage, reason=reason, force=force)

    def approve(self, ref: Ref, *, to: str, reason: str = "", withdraw: bool = False) -> StageEventView:
        self._check_stage(ref)
        return self._stages.approve(resolve(self.ledger, ref), stage=to, reason=reason, withdraw=withdraw)

    def sign(self, ref: Ref, *, envelope: Envelope, key: str) -> SignatureView:
        self._check_stage(ref)
        return sign.sign(self.ledger, resolve(self.ledger, ref), envelope, key, actor=self.settings.actor)

    def history(
        self, name: str, *, stage: str | None = None, verify: bool = False, head: str | None = None
    ) -> HistoryView:
        names = self.settings.stages
        return stage_history(self.ledger, name, names=names, stage=stage, verify=verify, head=head)

    def events(
        self,
        *,
        after: int | None = 0,
        name: str | None = None,
        kind: Sequence[str] = (),
        stage: str | None = None,
        limit: int = 100,
    ) -> EventsView:
        asked = self._events_asked_for(name, kind, stage)
        return feed.events(self.ledger, after, asked, limit=limit)

    def follow_events(
        self,
        *,
        after: int | None = None,
        name: str | None = None,
        kind: Sequence[str] = (),
        stage: str | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Iterator[EventView]:
        asked = self._events_asked_for(name, kind, stage)
        return listen_patiently(lambda place: feed.listen(self.ledger, place, asked), after, known=True, tell=tell)

    def _events_asked_for(self, name: str | None, kind: Sequence[str], stage: str | None) -> feed.Filter:
        return feed.check_filter(self.ledger, feed.read_filter(name, kind, stage), self.settings.stages)

    # gates

    def gates(self) -> GatesView:
        return gates.gates_view(self.ledger)

    def set_gates(self, gates_file: Any) -> GatesView:
        return gates.set_gates(self.ledger, gates_file, stages=self.settings.stages, actor=self.settings.actor)

    def gate_check(self, ref: Ref, *, to: str) -> GateCheck:
        check_stage_name(to, self.settings.stages)
        return gates.check_gate(self.ledger, resolve(self.ledger, ref), to)

    def decision(self, digest: str) -> Decision:
        return gates.kept_decision(self.ledger, digest)

    # tokens

    def tokens(self) -> list[Token]:
        return self.access.tokens()

    def create_token(
        self, name: str, *, scope: Scope, names: Sequence[str] = EVERY_NAME, valid_s: float | None = None
    ) -> NewToken:
        check_token(name, names, valid_s)
        secret = new_secret()
        token = self.access.add_token(
            secret, name=name, scope=scope, names=names, created_by=self.settings.actor, valid_s=valid_s
        )
        return NewToken(token, secret)

    def revoke_token(self, token_id: str) -> Token:
        return self.access.revoke_token(token_id)

    # the registry itself

    def doctor(self, *, adopt: bool = False, force: Sequence[str] = (), abroad: bool = False) -> list[Check]:
        if force and not adopt:
            raise InvalidInput("force without adopt", hint="adapterctl doctor --adopt --force NAME")
        forced = [known_adapter(self.ledger, name) for name in force]
        adoption = partial(self._adoption, forced) if adopt else None
        return doctor.examine(
            self.settings,
            self.ledger,
            self.bell,
            lambda: self.version_store,
            self._rules_changed,
            adoption,
            abroad=abroad,
        )

    def _rules_changed(self, former: str, name: str) -> list[str]:
        return gates.changed_by_name(self.ledger, self.access.tokens(), former, name)

    def _adoption(self, force: Sequence[str]) -> Adoption:
        def take_in(source: str, name: str) -> Registered:
            return self.register(source, name=name)

        return Adoption(
            self.ledger, self.version_store, self._stages, take_in, self.settings.actor, self._rules_changed, force
        )

    def gc(self, *, older_than_s: float = DAY_S, dry_run: bool = False) -> GarbageView:
        return garbage.collect(
            self.ledger, self.version_store, self.settings.home, older_than_s=older_than_s, dry_run=dry_run
        )

    @property
    def _stages(self) -> Stages:
        return Stages(self.ledger, self.version_store, self.folders, self.settings.stages, self.settings.actor)

    def _check_stage(self, *refs: Ref) -> None:
        """A verb that goes by a stage first makes sure that MLflow's alias agrees with the ledger."""
        for ref in refs:
            if ref.alias is not None and self.ledger.stage_holder(known_adapter(self.ledger, ref.name), ref.alias):
                check_stage(self.ledger, self.version_store, ref.name, ref.alias)

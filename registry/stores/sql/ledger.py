"""The ledger in SQL: facts of record, and the rules that hold them together. Knows no database product.

One method is one transaction. What listings show is in `version`, the bulk of a version in `version_detail`. Structured
values that no query looks into are JSON text (`registry/wire.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import uuid6
from sqlalchemy import ColumnElement, Connection, Row, Select, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from ... import wire
from ...crashpoints import reached
from ...domain.errors import (
    Conflict,
    Corrupt,
    DecisionOutdated,
    HasDescendants,
    InvalidInput,
    NotFound,
    Refused,
    StageMoved,
)
from ...domain.evals import REGISTERED, EvalReport
from ...domain.event import RECALLS, EventKind
from ...domain.job import Job, JobState, NewJob
from ...domain.recall import DESCENT, Recall, RecallAction, Recalls
from ...domain.refs import first_few
from ...domain.selection import COMPARE, EVERY, Selection
from ...domain.signature import MAX_SIGNATURES, SIGNED_BY, Envelope, PublicKey, Signature, read_public_key
from ...domain.stage import GENESIS, ApprovalAction, MoveAction, NoteAction, StageAction, StageEvent
from ...domain.verdict import record_digest
from ...domain.version import (
    AdapterVersion,
    Base,
    Edge,
    NewVersion,
    Placement,
    Summary,
    VersionDetail,
    VersionSpec,
    summarise,
)
from ...ports import GateFile, Lock
from .engine import Database, Now, among, has_member, insert_once, rows, these
from .feed import LAST, FeedRows, tell
from .graph import add_recall, check_not_recalled, descend, edges_at, labels, lock_recalls, recalled, walk
from .jobs import JobRows, end_job, held, queue_jobs
from .tables import (
    adapter,
    adapter_suite,
    base,
    base_alias,
    base_assignment,
    decision,
    edge,
    eval_report,
    gate_file,
    meta,
    metric,
    signature,
    stage,
    stage_history,
    suite,
    version,
    version_detail,
    version_live_merge,
)
from .workers import WorkerRows

_WAS, _NOTE = "was ", "; "
#: Details of versions that a process keeps at hand; those of a 7B adapter take half a megabyte.
DETAILS_KEPT = 64
VERSIONS_KEPT = 256


class SqlLedger(JobRows, WorkerRows, FeedRows):
    """`registry.ports.Ledger` on a database whose tables exist (see `migrations.migrate`)."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._meta: Row[Any] | None = None
        self._details: OrderedDict[str, VersionDetail] = OrderedDict()
        self._recalls: tuple[int, Recalls] | None = None

    # the registry itself

    def establish(self, mlflow_uri: str) -> None:
        """Give a new registry its id and its MLflow. An old one keeps what it has."""
        with self._db.read() as connection:
            if connection.execute(select(meta.c.registry_id)).first() is not None:
                return
        # the table holds one row, and no key says so: two processes must not both find it empty
        with self.exclusive("establish"), self._db.write() as connection:
            if connection.execute(select(meta.c.registry_id)).first() is None:
                values = {"registry_id": str(uuid6.uuid7()), "mlflow_uri": mlflow_uri, "created_at": Now()}
                connection.execute(insert(meta).values(values))

    @property
    def registry_id(self) -> str:
        return str(self._read_meta().registry_id)

    @property
    def mlflow_uri(self) -> str:
        """The MLflow that this registry belongs to since it was made."""
        return str(self._read_meta().mlflow_uri)

    def now(self) -> float:
        with self._db.read() as connection:
            return float(connection.execute(select(Now())).scalar_one())

    def exclusive(self, name: str) -> AbstractContextManager[Lock]:
        return self._db.exclusive(name)

    def try_exclusive(self, name: str) -> AbstractContextManager[bool]:
        return self._db.try_exclusive(name)

    def snapshot(self) -> AbstractContextManager[None]:
        return self._db.snapshot()

    def close(self) -> None:
        self._db.close()

    def _read_meta(self) -> Row[Any]:
        if self._meta is None:
            with self._db.read() as connection:
                self._meta = connection.execute(select(meta)).first()
        if self._meta is None:
            raise NotFound("this registry was never established", hint="register an adapter to make one")
        return self._meta

    # bases

    def bases(self) -> list[Base]:
        query = select(*_BASE).where(base.c.merged_into.is_(None)).order_by(base.c.name, base.c.id)
        with self._db.read() as connection:
            return [Base(*row) for row in connection.execute(query)]

    def base_aliases(self) -> dict[str, str]:
        with self._db.read() as connection:
            rows = connection.execute(select(base_alias).order_by(base_alias.c.spelling))
            return {row.spelling: row.base_id for row in rows}

    def find_base(self, spelling: str) -> Base | None:
        with self._db.read() as connection:
            return _find_base(connection, [spelling])

    def add_base(self, new: Base, spellings: Sequence[str]) -> Base:
        with self._db.write() as connection:
            known = _find_base(connection, [new.id, *spellings])
            if known is None:
                # where another writer was first, it is known now
                insert_once(connection, insert(base).values(created_at=Now(), **_base_columns(new)))
                known = _base(connection, new.id)
            # one at a time: of two models, the second must not fill in what the first one left open
            connection.execute(select(base.c.id).where(base.c.id == known.id).with_for_update())
            known = _base(connection, known.id)
            if new.pins.keys() - known.pins.keys() and not known.contrary_pins(new):
                connection.execute(update(base).where(base.c.id == known.id).values(new.pins))
            for spelling in spellings:
                insert_once(connection, insert(base_alias).values(spelling=spelling, base_id=known.id))
            return _base(connection, known.id)

    def alias_base(self, spelling: str, base_id: str) -> None:
        with self._db.write() as connection:
            target = _base(connection, base_id)
            if not insert_once(connection, insert(base_alias).values(spelling=spelling, base_id=target.id)):
                moved = update(base_alias).where(base_alias.c.spelling == spelling).values(base_id=target.id)
                connection.execute(moved)

    def merge_bases(self, keep_id: str, drop_id: str) -> None:
        with self._db.write() as connection:
            # in one order, lest two calls wait for each other; a version that is being added to either waits, too
            both = select(base.c.id).where(base.c.id.in_((keep_id, drop_id))).order_by(base.c.id).with_for_update()
            connection.execute(both)
            keep, drop = _base(connection, keep_id), _base(connection, drop_id)
            if keep.id == drop.id:
                return
            affected = select(version.c.id).where(version.c.base_id == drop.id).order_by(version.c.id)
            for version_id in connection.execute(affected).scalars().all():
                assigned = {"version_id": version_id, "base_id": keep.id, "at": Now()}
                connection.execute(insert(base_assignment).values(assigned))
            try:
                connection.execute(update(version).where(version.c.base_id == drop.id).values(base_id=keep.id))
            except IntegrityError as error:
                raise Refused(
                    f"{keep.name} and {drop.name} cannot be merged: an adapter has the same content on both",
                    hint="remove one of the two versions first: adapterctl ls --base",
                ) from error
            connection.execute(update(base_alias).where(base_alias.c.base_id == drop.id).values(base_id=keep.id))
            same = (base.c.id == drop.id) | (base.c.merged_into == drop.id)
            connection.execute(update(base).where(same).values(merged_into=keep.id))
            if pins := {pin: value for pin, value in drop.pins.items() if pin not in keep.pins}:
                connection.execute(update(base).where(base.c.id == keep.id).values(pins))

    # adapters and versions

    def adapter_id(self, name: str) -> str | None:
        with self._db.read() as connection:
            return next((found for (found,) in rows(connection, _ADAPTER_ID, {"name": name})), None)

    def ensure_adapter(self, name: str) -> str:
        known = self.adapter_id(name)
        if known is not None:
            return known
        with self._db.write() as connection:
            insert_once(connection, insert(adapter).values(id=str(uuid6.uuid7()), name=name, created_at=Now()))
            return str(connection.execute(select(adapter.c.id).where(adapter.c.name == name)).scalar_one())

    def adapter_names(self) -> list[str]:
        with self._db.read() as connection:
            # a row without a version is left by a merge or registration that failed; it names nothing
            has_versions = select(version.c.id).where(version.c.adapter_id == adapter.c.id).exists()
            query = select(adapter.c.name).where(has_versions).order_by(adapter.c.name)
            return list(connection.execute(query).scalars())

    def rename_adapter(self, adapter_id: str, name: str, *, actor: str, note: str = "") -> StageEvent | None:
        with self._db.write() as connection:
            _lock_stages(connection, adapter_id)
            former = connection.execute(select(adapter.c.name).where(adapter.c.id == adapter_id)).scalar_one_or_none()
            if former is None:
                raise NotFound(f"there is no adapter {adapter_id}", hint="adapterctl ls")
            if former == name:  # another process was first
                return None
            try:
                _free_name(connection, name)
                connection.execute(update(adapter).where(adapter.c.id == adapter_id).values(name=name))
            except IntegrityError as error:
                raise Refused(
                    f"{former} cannot be called {name}: another adapter is", hint="choose another name in MLflow"
                ) from error
            reason = f"{_WAS}{former}{_NOTE}{note}" if note else f"{_WAS}{former}"
            return _append_event(connection, adapter_id, "", "rename", actor=actor, reason=reason)

    def take_back_adapter(self, name: str, adapter_id: str) -> None:
        taken = Refused(f"another adapter is called {name} here", hint="rename the model in MLflow")
        with self._db.write() as connection:
            try:
                _free_name(connection, name)
                insert_once(connection, insert(adapter).values(id=adapter_id, name=name, created_at=Now()))
            except IntegrityError as error:  # an event or a history of what has no version keeps its name
                raise taken from error
            if connection.execute(_ADAPTER_ID, {"name": name}).scalar_one_or_none() != adapter_id:
                raise taken

    def former_names(self) -> dict[str, str]:
        query = (
            select(stage_history.c.reason, adapter.c.name)
            .join(adapter, adapter.c.id == stage_history.c.adapter_id)
            .where(stage_history.c.action == "rename")
            .order_by(stage_history.c.at)
        )
        with self._db.read() as connection:
            return {row.reason.removeprefix(_WAS).partition(_NOTE)[0]: row.name for row in connection.execute(query)}

    def version(self, version_id: str) -> AdapterVersion | None:
        return next(iter(self._versions(_VERSION.where(version.c.id == version_id))), None)

    def detail(self, version_id: str) -> VersionDetail:
        # it never changes, and takes a millisecond to read: a server is asked for the same parents again and again
        known = self._details.get(version_id)
        if known is None:
            known = self._details[version_id] = self._read_detail(version_id)
            if len(self._details) > DETAILS_KEPT:
                self._details.popitem(last=False)
        return known

    def _read_detail(self, version_id: str) -> VersionDetail:
        query = select(version_detail.c.body).where(version_detail.c.version_id == version_id)
        with self._db.read() as connection:
            body = connection.execute(query).scalar_one_or_none()
        if body is None:
            raise NotFound(f"there is no version {version_id}", hint="adapterctl ls")
        return wire.from_json(body, VersionDetail)

    def version_by_number(self, name: str, number: int) -> AdapterVersion | None:
        return next(iter(self._versions(_BY_NUMBER, {"name": name, "number": number})), None)

    def versions(
        self,
        name: str | None = None,
        *,
        include_removed: bool = False,
        only: Selection = EVERY,
        after: tuple[str, int] | None = None,
        limit: int | None = None,
    ) -> list[AdapterVersion]:
        # by its id: of that, a planner knows whether it has many
        adapter_id = None if name is None else self.adapter_id(name) or ""
        query, order = _IN_ORDER, [adapter.c.name, version.c.number]
        if only.ids is not None or only.stage is not None or only.dataset is not None:
            query = _VERSION  # few, which an index finds
        if adapter_id is not None:
            query, order = _VERSION.where(version.c.adapter_id == adapter_id), [version.c.number]
        query = query.where(*_conditions(only, adapter_id))
        if not include_removed:
            query = query.where(version.c.state == "live")
        if after is not None:
            query = query.where(*_beyond(*after, name))
        given = {} if only.ids is None else these(only.ids)
        with self._db.read() as connection:
            found = connection.execute(query.order_by(*order).limit(limit), given)
            return [_read_version(tuple(row)) for row in found]

    def has_versions(self, name: str | None = None) -> bool:
        query = select(version.c.id).limit(1)
        if name is not None:
            query = query.join(adapter, version.c.adapter_id == adapter.c.id).where(adapter.c.name == name)
        with self._db.read() as connection:
            return connection.execute(query).first() is not None

    def count_versions(self) -> int:
        query = select(func.count()).select_from(version).where(version.c.state == "live")
        with self._db.read() as connection:
            return int(connection.execute(query).scalar_one())

    def numbers(self, name: str, *, include_removed: bool = False) -> dict[int, str]:
        query = select(version.c.number, version.c.id).join(adapter, version.c.adapter_id == adapter.c.id)
        query = query.where(adapter.c.name == name).order_by(version.c.number)
        if not include_removed:
            query = query.where(version.c.state == "live")
        with self._db.read() as connection:
            return {row.number: row.id for row in connection.execute(query)}

    def newest_of_each(
        self, name: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[tuple[AdapterVersion, int]]:
        shown = select(adapter.c.id).where(select(_OTHER.c.id).where(_LIVE_OF_ADAPTER).exists())
        if name is not None:
            shown = shown.where(adapter.c.name == name)
        if after is not None:
            shown = shown.where(adapter.c.name > after)
        page = shown.order_by(adapter.c.name).limit(limit).subquery("page")
        query = _NEWEST_OF_EACH.join(page, page.c.id == adapter.c.id).order_by(adapter.c.name)
        with self._db.read() as connection:
            return [(_read_version(tuple(row[:-1])), row[-1]) for row in connection.execute(query)]

    def labels(self, version_ids: Collection[str]) -> dict[str, str]:
        with self._db.read() as connection:
            return labels(connection, version_ids) if version_ids else {}

    def newest(self, names: Sequence[str]) -> dict[str, int]:
        # one look at the end of an index each; a grouped maximum would read every version of an adapter
        with self._db.read() as connection:
            found = {name: connection.execute(_NEWEST, {"name": name}).scalar() for name in names}
        return {name: number for name, number in found.items() if number is not None}

    def versions_by_digest(
        self, digest_prefix: str, name: str | None = None, *, include_removed: bool = False
    ) -> list[AdapterVersion]:
        digest = version.c.content_digest
        # a range uses the index whatever the collation; 'g' follows every hex digit
        query = _VERSION.where(digest >= digest_prefix, digest < f"{digest_prefix}g")
        if not include_removed:
            query = query.where(version.c.state == "live")
        if name is not None:
            query = query.where(adapter.c.name == name)
        return self._versions(query.order_by(adapter.c.name, version.c.number))

    def versions_by_id(self, version_ids: Sequence[str]) -> dict[str, AdapterVersion]:
        return {each.id: each for each in self._versions(_BY_ID, these(version_ids))}

    def live_version(
        self, adapter_id: str, *, content: tuple[str, str] | None = None, recipe: str | None = None
    ) -> AdapterVersion | None:
        if recipe is not None:
            return next(iter(self._versions(_LIVE_MERGE, {"adapter_id": adapter_id, "recipe": recipe})), None)
        query = _VERSION.where(version.c.adapter_id == adapter_id, version.c.state == "live")
        if content is not None:
            digest, base_id = content
            query = query.where(
                version.c.kind != "merge", version.c.content_digest == digest, version.c.base_id == base_id
            )
        return next(iter(self._versions(query)), None)

    def add_version(
        self,
        version_id: str,
        adapter_id: str,
        spec: NewVersion,
        placement: Placement,
        edges: Sequence[Edge],
        *,
        created_by: str,
        job: tuple[str, int] | None = None,
        then: Sequence[NewJob] = (),
    ) -> AdapterVersion:
        with self._db.write() as connection:
            known = connection.execute(select(version.c.id).where(version.c.id == version_id)).first()
            if known is None:
                _check_finite(spec.metrics)
                _insert_version(connection, version_id, adapter_id, spec, placement, created_by)
                _check_parents(connection, edges)
                _insert_edges(connection, edges)
                _insert_metrics(connection, version_id, spec.metrics, REGISTERED)
            queued = [each for each, _ in queue_jobs(connection, then)]
            if job is not None:
                result = {"version_id": version_id, "jobs": [each.id for each in queued]}
                if end_job(connection, held(*job), JobState.SUCCEEDED, result=result) is None:
                    raise Conflict(
                        f"job {job[0]} is no longer running as attempt {job[1]}", hint=f"adapterctl jobs show {job[0]}"
                    )
            if known is None:
                made: EventKind = "merge" if spec.kind == "merge" else "register"
                tell(connection, made, adapter_id=adapter_id, version_id=version_id)
            reached("ledger.writing")
        reached("ledger.committed")
        return self._existing_version(version_id)

    def remove_version(self, version_id: str, *, actor: str, reason: str, lost: bool = False) -> None:
        removed = {"state": "removed", "removed_at": Now(), "removed_by": actor, "removed_reason": reason}
        with self._db.write() as connection:
            label = labels(connection, [version_id]).get(version_id)
            if label is None:
                raise NotFound(f"there is no version {version_id}", hint="adapterctl ls")
            # a child or a stage that is being added refers to this row, and waits for it, or is seen below
            connection.execute(select(version.c.id).where(version.c.id == version_id).with_for_update())
            if not lost:
                _check_childless(connection, version_id, label)
            _check_unheld(connection, version_id, label)
            live = update(version).where(version.c.id == version_id, version.c.state == "live")
            adapter_id = connection.execute(live.values(removed).returning(version.c.adapter_id)).scalar_one_or_none()
            if adapter_id is not None:
                tell(connection, "remove", adapter_id=adapter_id, version_id=version_id)

    def set_metrics(self, version_id: str, metrics: Mapping[str, float], *, source: str) -> None:
        _check_finite(metrics)
        with self._db.write() as connection:
            _insert_metrics(connection, version_id, metrics, source)

    def metrics(self, version_ids: Sequence[str]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        columns = select(metric.c.version_id, metric.c.key, metric.c.value)
        newest_last = columns.where(among(metric.c.version_id)).order_by(metric.c.id)
        with self._db.read() as connection:
            for version_id, key, value in connection.execute(newest_last, these(version_ids)):
                found.setdefault(version_id, {})[key] = value
        return found

    def metric_sources(self, version_id: str) -> dict[str, str]:
        query = select(metric.c.key, metric.c.source).where(metric.c.version_id == version_id).order_by(metric.c.id)
        with self._db.read() as connection:
            return {row.key: row.source for row in connection.execute(query)}

    def _versions(self, query: Select[Any], values: Mapping[str, Any] | None = None) -> list[AdapterVersion]:
        with self._db.read() as connection:
            if values is None:
                return [_version(tuple(row)) for row in connection.execute(query)]
            return [_version(row) for row in rows(connection, query, values)]

    def _existing_version(self, version_id: str) -> AdapterVersion:
        found = self.version(version_id)
        if found is None:
            raise NotFound(f"there is no version {version_id}", hint="adapterctl ls")
        return found

    # lineage

    def parent_edges(self, version_ids: Sequence[str]) -> dict[str, tuple[Edge, ...]]:
        with self._db.read() as connection:
            edges = [each for each in edges_at(connection, edge.c.child_id, version_ids) if each.kind in DESCENT]
        return {child_id: tuple(group) for child_id, group in groupby(edges, key=lambda each: each.child_id)}

    def edges_up(self, version_id: str, depth: int | None = None) -> list[Edge]:
        with self._db.read() as connection:
            return walk(connection, version_id, depth, start=edge.c.child_id, end=edge.c.parent_id)

    def edges_down(self, version_id: str, depth: int | None = None) -> list[Edge]:
        with self._db.read() as connection:
            return walk(connection, version_id, depth, start=edge.c.parent_id, end=edge.c.child_id)

    def recall(
        self, version_id: str, action: RecallAction, *, actor: str, reason: str, then: Sequence[NewJob] = ()
    ) -> tuple[Recall, tuple[Job, ...]]:
        with self._db.write() as connection:
            said, row = add_recall(connection, version_id, action, actor=actor, reason=reason)
            queued = tuple(each for each, _ in queue_jobs(connection, then))
            if row is not None:
                of = select(version.c.adapter_id).where(version.c.id == version_id)
                adapter_id = connection.execute(of).scalar_one()
                tell(connection, RECALLS[action], adapter_id=adapter_id, version_id=version_id, recall_id=row)
            return said, queued

    def recalls(self) -> Recalls:
        with self._db.read() as connection:
            ((last,),) = rows(connection, LAST)
            # a recall and a new version are events: between two of them, what a recall hits is the same
            kept = self._recalls  # once: another thread, whose snapshot is older, may put its own here
            if kept is None or kept[0] != last:
                kept = self._recalls = last, recalled(connection)
            return kept[1]

    def trained_on(self, dataset: str) -> list[str]:
        query = select(version.c.id).where(version.c.dataset == dataset).order_by(version.c.id)
        with self._db.read() as connection:
            return list(connection.execute(query).scalars())

    def descendants(self, version_ids: Sequence[str], *, copies: bool = False) -> dict[str, str]:
        with self._db.read() as connection:
            return descend(connection, version_ids, copies=copies)

    # evaluations

    def reports(self, keys: Sequence[str]) -> dict[str, EvalReport]:
        bodies = select(eval_report.c.body).where(among(eval_report.c.key))
        with self._db.read() as connection:
            reports = [wire.from_json(body, EvalReport) for body in connection.execute(bodies, these(keys)).scalars()]
        return {report.key: report for report in reports}

    def put_report(self, report: EvalReport) -> None:
        row = {
            "key": report.key,
            "subject": report.subject,
            "base_id": report.base_id,
            "suite": report.suite,
            "suite_digest": report.suite_digest,
            "at": Now(),
            "body": wire.to_json(report),
        }
        with self._db.write() as connection:
            insert_once(connection, insert(eval_report).values(row))

    def reports_for(self, subject: str, base_id: str) -> list[EvalReport]:
        """Oldest first; reports of a base that was merged into this one belong to it."""
        same_base = select(base.c.id).where((base.c.id == base_id) | (base.c.merged_into == base_id))
        query = (
            select(eval_report.c.body)
            .where(eval_report.c.subject == subject)
            .where((eval_report.c.base_id == base_id) | eval_report.c.base_id.in_(same_base))
            .order_by(eval_report.c.at, eval_report.c.key)
        )
        with self._db.read() as connection:
            return [wire.from_json(body, EvalReport) for body in connection.execute(query).scalars()]

    def report_times(self, keys: Sequence[str]) -> dict[str, float]:
        query = select(eval_report.c.key, eval_report.c.at).where(among(eval_report.c.key))
        with self._db.read() as connection:
            return {row.key: row.at for row in connection.execute(query, these(keys))}

    def set_suites(self, adapter_id: str, suites: Sequence[tuple[str, str, str]]) -> None:
        with self._db.write() as connection:
            connection.execute(select(adapter.c.id).where(adapter.c.id == adapter_id).with_for_update())
            connection.execute(delete(adapter_suite).where(adapter_suite.c.adapter_id == adapter_id))
            for position, (name, digest, body) in enumerate(suites):
                row = {"adapter_id": adapter_id, "position": position, "name": name, "digest": digest, "body": body}
                connection.execute(insert(adapter_suite).values(row))

    def suites(self, adapter_id: str) -> list[tuple[str, str, str]]:
        columns = select(adapter_suite.c.name, adapter_suite.c.digest, adapter_suite.c.body)
        query = columns.where(adapter_suite.c.adapter_id == adapter_id).order_by(adapter_suite.c.position)
        with self._db.read() as connection:
            return [(row.name, row.digest, row.body) for row in connection.execute(query)]

    def suite_digests(self, adapter_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        with self._db.read() as connection:
            for adapter_id, digest in rows(connection, _SUITE_DIGESTS, these(adapter_ids)):
                found[adapter_id] = (*found.get(adapter_id, ()), digest)
        return found

    def keep_suite(self, digest: str, name: str, body: str) -> None:
        with self._db.read() as connection:
            if _kept_suite(connection, digest) is not None:
                return
        row = {"digest": digest, "name": name, "body": body, "created_at": Now()}
        with self._db.write() as connection:
            insert_once(connection, insert(suite).values(row))

    def kept_suite(self, digest: str) -> str | None:
        judging = select(adapter_suite.c.body).where(adapter_suite.c.digest == digest).limit(1)
        with self._db.read() as connection:
            return _kept_suite(connection, digest) or connection.execute(judging).scalar_one_or_none()

    def kept_suites(self) -> list[tuple[str, str]]:
        query = select(suite.c.name, suite.c.digest).order_by(suite.c.name, suite.c.digest)
        with self._db.read() as connection:
            return [(row.name, row.digest) for row in connection.execute(query)]

    def judging_suites(self) -> list[tuple[str, str, str]]:
        columns = select(adapter_suite.c.name, adapter_suite.c.digest, adapter.c.name.label("adapter"))
        query = columns.join(adapter, adapter.c.id == adapter_suite.c.adapter_id)
        with self._db.read() as connection:
            # sorted here: along the index of names, every adapter would be looked at
            return sorted(((name, digest, of) for name, digest, of in connection.execute(query)), key=itemgetter(2))

    # stages

    def stage_holder(self, adapter_id: str, stage: str) -> str | None:
        with self._db.read() as connection:
            return _holder(connection, adapter_id, stage)

    def stages(self, adapter_ids: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        query, given = select(stage).order_by(stage.c.adapter_id, stage.c.stage), {}
        if adapter_ids is not None:
            query, given = query.where(among(stage.c.adapter_id)), these(adapter_ids)
        with self._db.read() as connection:
            for row in connection.execute(query, given):
                found.setdefault(row.adapter_id, {})[row.stage] = row.version_id
        return found

    def stages_of(self, version_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        held: dict[str, tuple[str, ...]] = {}
        query = select(stage.c.version_id, stage.c.stage).where(among(stage.c.version_id)).order_by(stage.c.stage)
        with self._db.read() as connection:
            for version_id, name in connection.execute(query, these(version_ids)):
                held[version_id] = (*held.get(version_id, ()), name)
        return held

    def is_held(self, stage_name: str) -> bool:
        query = select(stage.c.stage).where(stage.c.stage == stage_name).limit(1)
        with self._db.read() as connection:
            return connection.execute(query).first() is not None

    def move_stage(
        self,
        adapter_id: str,
        stage: str,
        *,
        version_id: str | None,
        expected: str | None,
        action: MoveAction,
        actor: str,
        reason: str,
        decision: str | None = None,
        seen: tuple[int, str | None] | None = None,
    ) -> StageEvent:
        with self._db.write() as connection:
            _lock_stages(connection, adapter_id)
            holder = _holder(connection, adapter_id, stage)
            if holder != expected:
                raise _stage_moved(connection, stage, holder, expected)
            if seen is not None and seen != _now_seen(connection, adapter_id):
                raise DecisionOutdated(
                    f"what {stage} is decided by was changed meanwhile", hint="try again; `adapterctl history` tells"
                )
            if version_id is not None:
                lock_recalls(connection, shared=True)
                _check_may_hold(connection, adapter_id, version_id, stage)
                check_not_recalled(connection, version_id, "promote another version")
            _hold(connection, adapter_id, stage, version_id)
            event = _append_event(
                connection,
                adapter_id,
                stage,
                action,
                version_id=version_id,
                previous_id=holder,
                actor=actor,
                reason=reason,
                evidence=None if decision is None else _keep_decision(connection, decision),
            )
            reached("stage.writing")
            return event

    def record_approval(
        self, adapter_id: str, stage: str, *, version_id: str, action: ApprovalAction, actor: str, reason: str
    ) -> StageEvent:
        with self._db.write() as connection:
            _lock_stages(connection, adapter_id)
            _check_may_hold(connection, adapter_id, version_id, stage)
            return _append_event(
                connection, adapter_id, stage, action, version_id=version_id, actor=actor, reason=reason
            )

    def set_tags(
        self, version_id: str, put: Mapping[str, str], remove: Sequence[str], *, actor: str, reason: str
    ) -> AdapterVersion:
        adapter_id = self._existing_version(version_id).adapter_id
        with self._db.write() as connection:
            _lock_stages(connection, adapter_id)
            query = select(version.c.tags).where(version.c.id == version_id, version.c.state == "live")
            body = connection.execute(query.with_for_update()).scalar_one_or_none()
            if body is None:
                raise Refused("the version was removed meanwhile", hint="choose another version")
            before: dict[str, str] = wire.from_json(body, dict)
            after = {key: value for key, value in {**before, **put}.items() if key not in remove}
            if after != before:
                changed = {"tags": wire.to_json(after)}
                connection.execute(update(version).where(version.c.id == version_id).values(changed))
                words = [f"{_quoted_key(k)}={_quoted_value(v)}" for k, v in put.items() if before.get(k) != v]
                words += [f"{_quoted_key(key)}-" for key in dict.fromkeys(remove) if key in before]
                said = f"{' '.join(words)}: {reason}" if reason else " ".join(words)
                _append_event(connection, adapter_id, "", "tag", version_id=version_id, actor=actor, reason=said)
        return self._existing_version(version_id)

    def add_signature(
        self, version_id: str, key: PublicKey, envelope: Envelope, *, actor: str, asked_for: bool = False
    ) -> Signature:
        version = self._existing_version(version_id)
        with self._db.write() as connection:
            _lock_stages(connection, version.adapter_id)
            _check_may_be_signed(connection, version)
            kept = _signatures(connection, version_id)
            same = [each for each in kept if (each.key, each.envelope) == (key, envelope)]
            if same:
                return same[0]
            if sum(each.key == key or not asked_for for each in kept) >= MAX_SIGNATURES:
                raise Refused(
                    f"{version.label} has {len(kept)} signatures, which is as many as one may have",
                    hint="a key that a gate of this adapter names finds a place all the same: adapterctl gate set FILE",
                )
            row = {"version_id": version_id, "key": str(key), "envelope": wire.to_json(envelope), "actor": actor}
            connection.execute(insert(signature).values(**row, at=Now()))
            _append_event(
                connection,
                version.adapter_id,
                "",
                "sign",
                version_id=version_id,
                actor=actor,
                reason=f"{SIGNED_BY}{key.id}",
            )
            return _signatures(connection, version_id)[-1]

    def signatures(self, version_id: str) -> list[Signature]:
        with self._db.read() as connection:
            return _signatures(connection, version_id)

    def record_note(
        self, adapter_id: str, stage: str, *, version_id: str | None, action: NoteAction, actor: str, reason: str
    ) -> StageEvent:
        with self._db.write() as connection:
            _lock_stages(connection, adapter_id)
            return _append_event(
                connection, adapter_id, stage, action, version_id=version_id, actor=actor, reason=reason
            )

    def stage_history(self, adapter_id: str, stage: str | None = None) -> list[StageEvent]:
        with self._db.read() as connection:
            events = _history(connection, adapter_id)
        return [each for each in events if stage in (None, each.stage)]

    def decisions(self, digests: Sequence[str]) -> dict[str, str]:
        query = select(decision.c.digest, decision.c.body).where(among(decision.c.digest))
        with self._db.read() as connection:
            return {row.digest: row.body for row in connection.execute(query, these(digests))}

    def decisions_like(self, digest_prefix: str) -> dict[str, str]:
        digest = decision.c.digest
        query = select(digest, decision.c.body).where(digest >= digest_prefix, digest < f"{digest_prefix}g").limit(2)
        with self._db.read() as connection:
            return {row.digest: row.body for row in connection.execute(query)}

    # gates

    def gate_file(self) -> GateFile | None:
        with self._db.read() as connection:
            return _gate_file(connection)

    def set_gate_file(self, digest: str, body: str, *, set_by: str) -> GateFile:
        with self._db.write() as connection:
            current = _gate_file(connection)
            if current is not None and current.digest == digest:
                return current
            row = {"digest": digest, "body": body, "set_by": set_by, "at": Now()}
            added = connection.execute(insert(gate_file).values(row).returning(gate_file.c.id)).scalar_one()
            tell(connection, "gates", gate_file_id=added)
            found = _gate_file(connection)
        assert found is not None
        return found


def _quoted_key(key: str) -> str:
    return wire.to_json(key) if " " in key else key


def _quoted_value(value: str) -> str:
    """As a JSON string, so that it ends where it ends; of a long one the beginning and a digest of the whole."""
    if len(value) <= 80:
        return wire.to_json(value)
    return f"{wire.to_json(value[:60])}…sha256:{hashlib.sha256(value.encode()).hexdigest()[:12]}"


# bases

_BASE = [base.c[name] for name in Base.__dataclass_fields__]


def _find_base(connection: Connection, spellings: Sequence[str]) -> Base | None:
    """The base that the first known spelling (or id) means."""
    for spelling in spellings:
        query = select(base_alias.c.base_id).where(base_alias.c.spelling == spelling)
        by_alias = connection.execute(query).scalar_one_or_none()
        query = select(func.coalesce(base.c.merged_into, base.c.id)).where(base.c.id == (by_alias or spelling))
        base_id = connection.execute(query).scalar_one_or_none()
        if base_id is not None:
            return _base(connection, base_id)
    return None


def _base(connection: Connection, base_id: str) -> Base:
    """The base of this id, or the one that it was merged into."""
    own = select(func.coalesce(base.c.merged_into, base.c.id)).where(base.c.id == base_id).scalar_subquery()
    row = connection.execute(select(*_BASE).where(base.c.id == own)).one_or_none()
    if row is None:
        raise NotFound(f"there is no base {base_id}", hint="adapterctl base ls")
    return Base(*row)


def _base_columns(value: Base) -> dict[str, str | None]:
    return {column.name: getattr(value, column.name) for column in _BASE}


# versions

# in the order in which `_read_version` reads them
_FIELDS = [
    *(version.c[name] for name in ("id", "adapter_id", "created_at", "created_by", "state", "kind")),
    *(version.c[name] for name in ("content_digest", "license", "source", "dataset", "recipe_digest")),
    *(version.c[name] for name in ("params", "tags", "summary", "placement")),
    adapter.c.name.label("adapter_name"),
    *(column.label(f"base_{column.name}_") for column in _BASE),
]
_VERSION = (
    select(*_FIELDS)
    .select_from(version)
    .join(adapter, version.c.adapter_id == adapter.c.id)
    .join(base, version.c.base_id == base.c.id)
)
# One adapter after the other, and in each one version after the other, along two indexes: a page ends where it is full.
# Something is added to the id, so that no planner looks the adapter of each version up and sorts them all instead.
_IN_ORDER = (
    select(*_FIELDS)
    .select_from(adapter)
    .join(version, version.c.adapter_id == adapter.c.id.concat(""))
    .join(base, version.c.base_id == base.c.id)
)
_OTHER = version.alias("other")
_LIVE_OF_ADAPTER = (_OTHER.c.adapter_id == adapter.c.id) & (_OTHER.c.state == "live")
_NEWEST_OF_EACH = (
    select(*_FIELDS, select(func.count()).select_from(_OTHER).where(_LIVE_OF_ADAPTER).scalar_subquery())
    .select_from(adapter)
    .join(
        version,
        (version.c.adapter_id == adapter.c.id)
        & (version.c.number == select(func.max(_OTHER.c.number)).where(_LIVE_OF_ADAPTER).scalar_subquery()),
    )
    .join(base, version.c.base_id == base.c.id)
)


def _beyond(last: str, number: int, name: str | None) -> Iterator[ColumnElement[bool]]:
    """True of what comes after a version in the list of all, or of the adapter `name`."""
    if name is None or name == last:
        beyond = version.c.number > number
        yield beyond if name == last else (adapter.c.name > last) | beyond
    if name != last:
        yield adapter.c.name >= last  # said once more, for this leads to a place in an index


def _conditions(only: Selection, adapter_id: str | None) -> Iterator[ColumnElement[bool]]:
    if only.ids is not None:
        yield among(version.c.id)
    if only.base is not None:
        either = (base.c.id == only.base) | (base.c.name == only.base)
        yield version.c.base_id.in_(select(base.c.id).where(either).correlate(None))
    if only.stage is not None:
        held = select(stage.c.version_id).where(stage.c.stage == only.stage)
        yield version.c.id.in_(held if adapter_id is None else held.where(stage.c.adapter_id == adapter_id))
    if only.dataset is not None:
        yield version.c.dataset == only.dataset
    for key, value in only.tags.items():
        yield has_member(version.c.tags, key, value)
    for condition in only.metrics:
        compare = COMPARE[condition.comparison]
        values = select(metric.c.value).where(metric.c.version_id == version.c.id, metric.c.key == condition.metric)
        # whether it ever had such a value is known sooner
        yield values.where(compare(metric.c.value, condition.bound)).exists()
        yield compare(values.order_by(metric.c.id.desc()).limit(1).scalar_subquery(), condition.bound)


# Built once, for they are run with every request for a merge.
_BY_NUMBER = _VERSION.where(adapter.c.name == bindparam("name"), version.c.number == bindparam("number"))
# In the words of its index: with state and kind as values, SQLite would plan it anew each time.
_LIVE_MERGE = _VERSION.where(
    version.c.adapter_id == bindparam("adapter_id"),
    version.c.recipe_digest == bindparam("recipe"),
    version_live_merge,
)
_ADAPTER_ID = select(adapter.c.id).where(adapter.c.name == bindparam("name"))
_NEWEST = select(func.max(version.c.number)).where(
    version.c.adapter_id == _ADAPTER_ID.scalar_subquery(), version.c.state == "live"
)
_SUITE_DIGESTS = (
    select(adapter_suite.c.adapter_id, adapter_suite.c.digest)
    .where(among(adapter_suite.c.adapter_id))
    .order_by(adapter_suite.c.adapter_id, adapter_suite.c.position)
)
_BY_ID = _VERSION.where(among(version.c.id))
_LIVE = select(version.c.id).where(among(version.c.id), version.c.state == "live")


def _read_version(row: tuple[Any, ...]) -> AdapterVersion:
    key, adapter_id, created_at, created_by, state, kind, *of_spec, name = row[: -len(_BASE)]
    content_digest, licensed, source, dataset, recipe_digest, params, tags, summary, placement = of_spec
    return AdapterVersion(
        id=key,
        adapter_id=adapter_id,
        created_at=created_at,
        created_by=created_by,
        state=state,
        spec=VersionSpec(
            adapter=name,
            kind=kind,
            content_digest=content_digest,
            base=Base(*row[-len(_BASE) :]),
            license=licensed,
            source=source,
            dataset=dataset,
            params=wire.from_json(params, dict),
            tags=wire.from_json(tags, dict),
            recipe_digest=recipe_digest,
        ),
        summary=wire.from_json(summary, Summary),
        placement=wire.from_json(placement, Placement),
    )


# Most requests are about the same few, and to read one costs as much as to find it.
_version = lru_cache(maxsize=VERSIONS_KEPT)(_read_version)


def _insert_version(
    connection: Connection, version_id: str, adapter_id: str, spec: NewVersion, placement: Placement, created_by: str
) -> None:
    detail = VersionDetail(spec.facts, spec.norms, spec.recipe, spec.receipt)
    base_id = _base_by_now(connection, spec.base.id)
    row = {
        "id": version_id,
        "adapter_id": adapter_id,
        "number": placement.number,
        "kind": spec.kind,
        "state": "live",
        "content_digest": spec.content_digest,
        "base_id": base_id,
        "recipe_digest": spec.recipe_digest,
        "created_at": Now(),
        "created_by": created_by,
        "license": spec.license,
        "source": spec.source,
        "dataset": spec.dataset,
        "params": wire.to_json(spec.params),
        "tags": wire.to_json(spec.tags),
        "summary": wire.to_json(summarise(spec)),
        "placement": wire.to_json(placement),
    }
    if not insert_once(connection, insert(version).values(row)):
        _check_references(connection, adapter_id, spec)
        raise Conflict(
            f"{spec.adapter}:v{placement.number} exists already, or another live version of {spec.adapter} has the "
            + ("same recipe" if spec.kind == "merge" else "same content on the same base"),
            hint="run the command again: it will find that version",
        )
    connection.execute(insert(version_detail).values(version_id=version_id, body=wire.to_json(detail)))
    assigned = {"version_id": version_id, "base_id": base_id, "at": Now()}
    connection.execute(insert(base_assignment).values(assigned))


def _base_by_now(connection: Connection, base_id: str) -> str:
    """The id of the base that this one was merged into since the version was planned; held until the version is in.

    One that is not there is returned as it is: the foreign key says so.
    """
    merged = select(func.coalesce(base.c.merged_into, base.c.id)).where(base.c.id == base_id)
    return connection.execute(merged.with_for_update(read=True)).scalar_one_or_none() or base_id


def _check_references(connection: Connection, adapter_id: str, spec: NewVersion) -> None:
    if connection.execute(select(adapter.c.id).where(adapter.c.id == adapter_id)).first() is None:
        raise NotFound(f"adapter {spec.adapter} has no row {adapter_id}", hint="adapterctl doctor")
    if connection.execute(select(base.c.id).where(base.c.id == spec.base.id)).first() is None:
        raise NotFound(f"there is no base {spec.base.id}", hint="adapterctl base ls")


def _check_parents(connection: Connection, edges: Iterable[Edge]) -> None:
    """A parent may have been removed since the merge was planned; then its child must not come to life.

    The rows are locked whatever their state: who removes one holds it, and what he writes is seen once he is through.
    """
    query = select(version.c.id, version.c.state).where(among(version.c.id)).with_for_update(read=True)
    parents = connection.execute(query, these(each.parent_id for each in edges)).all()
    gone = [parent_id for parent_id, state in parents if state != "live"]
    if gone:
        named = ", ".join(sorted(labels(connection, gone).values()))
        raise Refused(f"{named} was removed meanwhile", hint="choose other parents, and ask again")


def _insert_edges(connection: Connection, edges: Iterable[Edge]) -> None:
    for each in edges:
        connection.execute(insert(edge).values({column.name: getattr(each, column.name) for column in edge.columns}))


def _insert_metrics(connection: Connection, version_id: str, metrics: Mapping[str, float], source: str) -> None:
    for key, value in metrics.items():
        row = {"version_id": version_id, "key": key, "value": value, "source": source, "at": Now()}
        connection.execute(insert(metric).values(row))


def _check_finite(metrics: Mapping[str, float]) -> None:
    wrong = {key: value for key, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        raise InvalidInput(f"metrics {wrong} are not finite", hint="leave out what was not measured")


def _free_name(connection: Connection, name: str) -> None:
    """Forget an adapter of that name that has no version: one that failed, and that nobody can see."""
    has_versions = select(version.c.id).where(version.c.adapter_id == adapter.c.id).exists()
    empty = connection.execute(select(adapter.c.id).where(adapter.c.name == name, ~has_versions)).scalar_one_or_none()
    if empty is not None:
        connection.execute(delete(adapter_suite).where(adapter_suite.c.adapter_id == empty))
        connection.execute(delete(adapter).where(adapter.c.id == empty))


def _check_childless(connection: Connection, version_id: str, label: str) -> None:
    # what supersedes a version does not need it; between it and a live one there may be some that MLflow has lost
    below = [each for each in descend(connection, [version_id]) if each != version_id]
    live = connection.execute(_LIVE, these(below)).scalars().all()
    named = sorted(labels(connection, live).values())
    if named:
        raise HasDescendants(
            f"{first_few(named)} {'are' if named[1:] else 'is'} made of {label}",
            hint=f"remove what is made of it first, or see adapterctl lineage {label} --down",
        )


def _check_unheld(connection: Connection, version_id: str, label: str) -> None:
    held_stages = connection.execute(select(stage.c.stage).where(stage.c.version_id == version_id)).scalars().all()
    if held_stages:
        raise Refused(
            f"{label} holds {', '.join(sorted(held_stages))}", hint="promote another version or demote it first"
        )


# evaluations


def _kept_suite(connection: Connection, digest: str) -> str | None:
    return connection.execute(select(suite.c.body).where(suite.c.digest == digest)).scalar_one_or_none()


# stages


def _gate_file(connection: Connection) -> GateFile | None:
    columns = [gate_file.c[name] for name in GateFile.__dataclass_fields__]
    row = connection.execute(select(*columns).order_by(gate_file.c.id.desc()).limit(1)).one_or_none()
    return None if row is None else GateFile(*row)


def _lock_stages(connection: Connection, adapter_id: str) -> None:
    """One writer at a time: the row of the adapter stands for all of its stages and their chain."""
    connection.execute(select(adapter.c.id).where(adapter.c.id == adapter_id).with_for_update())


def _keep_decision(connection: Connection, record: str) -> str:
    digest = record_digest(record)
    insert_once(connection, insert(decision).values(digest=digest, body=record, at=Now()))
    return digest


def _append_event(
    connection: Connection,
    adapter_id: str,
    stage_name: str,
    action: StageAction,
    *,
    actor: str,
    reason: str,
    version_id: str | None = None,
    previous_id: str | None = None,
    evidence: str | None = None,
) -> StageEvent:
    """One more link of the adapter's chain, the last thing that a transaction does. The caller holds its lock."""
    last = _history(connection, adapter_id, newest_only=True)
    new = StageEvent(
        seq=last[0].seq + 1 if last else 1,
        adapter_id=adapter_id,
        stage=stage_name,
        action=action,
        version_id=version_id,
        previous_id=previous_id,
        actor=actor,
        reason=reason,
        # read first, as the hash covers it
        at=round(connection.execute(select(Now())).scalar_one(), 3),
        prev_hash=last[0].hash if last else GENESIS,
        evidence=evidence,
    ).sealed()
    row = {column.name: getattr(new, column.name) for column in stage_history.columns}
    connection.execute(insert(stage_history).values(row))
    tell(connection, action, stage=stage_name, adapter_id=adapter_id, version_id=version_id, seq=new.seq)
    return new


def _now_seen(connection: Connection, adapter_id: str) -> tuple[int, str | None]:
    """What a decision about the adapter would stand on now; see `move_stage`."""
    last, gates = _history(connection, adapter_id, newest_only=True), _gate_file(connection)
    return (last[0].seq if last else 0), (gates.digest if gates is not None else None)


def _holder(connection: Connection, adapter_id: str, stage_name: str) -> str | None:
    query = select(stage.c.version_id).where(stage.c.adapter_id == adapter_id, stage.c.stage == stage_name)
    return connection.execute(query).scalar_one_or_none()


def _hold(connection: Connection, adapter_id: str, stage_name: str, version_id: str | None) -> None:
    connection.execute(delete(stage).where(stage.c.adapter_id == adapter_id, stage.c.stage == stage_name))
    if version_id is not None:
        row = {"adapter_id": adapter_id, "stage": stage_name, "version_id": version_id}
        connection.execute(insert(stage).values(row))


def _check_may_hold(connection: Connection, adapter_id: str, version_id: str, stage_name: str) -> None:
    query = select(version.c.state).where(version.c.id == version_id, version.c.adapter_id == adapter_id)
    query = query.with_for_update(read=True)  # else it could be removed before the stage is written
    state = connection.execute(query).scalar_one_or_none()
    if state != "live":
        raise Refused(
            f"version {version_id} is {state or 'not of this adapter'}", hint=f"{stage_name} takes a live version only"
        )


def _check_may_be_signed(connection: Connection, signed: AdapterVersion) -> None:
    query = select(version.c.state).where(version.c.id == signed.id).with_for_update(read=True)
    if connection.execute(query).scalar_one() != "live":
        raise Refused(f"{signed.label} was removed", hint="choose another version")


def _signatures(connection: Connection, version_id: str) -> list[Signature]:
    columns = (signature.c.key, signature.c.envelope, signature.c.actor, signature.c.at)
    query = select(*columns).where(signature.c.version_id == version_id).order_by(signature.c.id)
    try:
        return [
            Signature(read_public_key(key), wire.from_json(envelope, Envelope), actor, at)
            for key, envelope, actor, at in connection.execute(query)
        ]
    except InvalidInput as error:
        raise Corrupt(
            f"the key of a stored signature {error.message}", hint="restore the ledger from a backup"
        ) from error


def _stage_moved(connection: Connection, stage_name: str, holder: str | None, expected: str | None) -> StageMoved:
    known = labels(connection, [each for each in (holder, expected) if each])
    held_by, hoped = (known.get(each, each) if each else "nothing" for each in (holder, expected))
    return StageMoved(
        f"{stage_name} holds {held_by}, expected {hoped}", hint="see `adapterctl history`, then try again"
    )


def _history(connection: Connection, adapter_id: str, *, newest_only: bool = False) -> list[StageEvent]:
    columns = [stage_history.c[name] for name in StageEvent.__dataclass_fields__]
    query = select(*columns).where(stage_history.c.adapter_id == adapter_id)
    query = query.order_by(stage_history.c.seq.desc()).limit(1) if newest_only else query.order_by(stage_history.c.seq)
    return [StageEvent(*row) for row in connection.execute(query)]

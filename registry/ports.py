"""What the registry needs from the world: a ledger of facts, MLflow as the version store, and a doorbell.

Each port has more than one implementation (the real one and the contract-tested fake, or several products). All times
are seconds since the epoch by the ledger's own clock. A method that takes `attempt` is fenced: it changes nothing and
returns False unless the job is running under exactly that attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from .domain.access import Caller, Scope, Token
from .domain.evals import EvalReport
from .domain.event import Event, EventKind
from .domain.job import Job, JobEvent, JobState, LogPiece, NewJob, Progress, QueueDepth
from .domain.recall import Recall, RecallAction, Recalls
from .domain.selection import EVERY, Selection
from .domain.signature import Envelope, PublicKey, Signature
from .domain.stage import ApprovalAction, MoveAction, NoteAction, StageEvent
from .domain.version import AdapterVersion, Base, Edge, EdgeKind, NewVersion, Placement, VersionDetail
from .domain.worker import Queue, Worker


@dataclass(frozen=True, slots=True)
class Parent:
    """A parent as registration needs it: the version, its weight (None where the edge has none), the edge's kind."""

    version: AdapterVersion
    weight: float | None = None
    kind: EdgeKind = "merge"


#: Opens the files of a version in a folder of this machine, for reading, while the context lasts.
Folders = Callable[[AdapterVersion], AbstractContextManager[Path]]


@dataclass(frozen=True, slots=True)
class GateFile:
    """A gate file as it was set; `body` is the canonical JSON that its digest is the SHA-256 of."""

    digest: str
    body: str
    set_by: str
    at: float


@dataclass(frozen=True, slots=True)
class Beside:
    """A child's evaluation beside those of base and parents: answers in columns, and pictures by file name."""

    answers: Sequence[Mapping[str, str]] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)


class Lock(Protocol):
    """A lock that is held."""

    def check(self) -> None:
        """Raise `Unavailable` where the lock was lost, so that another process may hold it by now.

        It is lost when the database drops the connection that holds it, or when its file is deleted.
        """
        ...


class Ledger(Protocol):
    """Our own tables. Every method is one transaction; none is open while tensors move or MLflow is called."""

    @property
    def registry_id(self) -> str: ...

    @property
    def mlflow_uri(self) -> str:
        """The MLflow that the registry belongs to since it was made."""
        ...

    def close(self) -> None:
        """Let go of all connections; new ones are made when they are needed."""
        ...

    def now(self) -> float:
        """The time by the ledger's clock."""
        ...

    def exclusive(self, name: str) -> AbstractContextManager[Lock]:
        """Hold a lock that dies with its process; the same name excludes every other process of this registry."""
        ...

    def try_exclusive(self, name: str) -> AbstractContextManager[bool]:
        """Hold that lock where nobody does; False, without waiting, where somebody does."""
        ...

    def snapshot(self) -> AbstractContextManager[None]:
        """Let all reads of this thread in the block be one transaction: they fit together, and cost less.

        What is written in the block is not seen by its reads; and nothing that takes long belongs into it.
        """
        ...

    # bases
    def bases(self) -> list[Base]: ...
    def base_aliases(self) -> dict[str, str]: ...
    def find_base(self, spelling: str) -> Base | None: ...
    def add_base(self, base: Base, spellings: Sequence[str]) -> Base:
        """Store `base` unless a spelling is known already; then return the known one.

        Pins that it lacked are filled in, once, and none where one of them is contrary to what it is pinned to.
        """
        ...

    def alias_base(self, spelling: str, base_id: str) -> None: ...
    def merge_bases(self, keep_id: str, drop_id: str) -> None:
        """Let every spelling and version of `drop_id` mean `keep_id`; appended as assignments.

        What `keep_id` is not pinned to, it is pinned to as `drop_id` was.
        """
        ...

    # adapters and versions
    def adapter_id(self, name: str) -> str | None: ...
    def ensure_adapter(self, name: str) -> str: ...
    def adapter_names(self) -> list[str]: ...
    def rename_adapter(self, adapter_id: str, name: str, *, actor: str, note: str = "") -> StageEvent | None:
        """Give an adapter another name; its history says so, with `note`. None where it is called that already.

        Raises `Refused` where another adapter has that name.
        """
        ...

    def take_back_adapter(self, name: str, adapter_id: str) -> None:
        """Know an adapter again by the id that MLflow has kept. Raises `Refused` where another one has the name."""
        ...

    def former_names(self) -> dict[str, str]:
        """The names that adapters had before, each with what the last adapter of that name is called now."""
        ...

    def version(self, version_id: str) -> AdapterVersion | None: ...
    def detail(self, version_id: str) -> VersionDetail:
        """Facts, norms, recipe and receipt of one version. Raises `NotFound`."""
        ...

    def version_by_number(self, name: str, number: int) -> AdapterVersion | None: ...
    def has_versions(self, name: str | None = None) -> bool:
        """Whether there ever was one, removed ones included; of that adapter."""
        ...

    def count_versions(self) -> int:
        """How many live ones there are."""
        ...

    def versions(
        self,
        name: str | None = None,
        *,
        include_removed: bool = False,
        only: Selection = EVERY,
        after: tuple[str, int] | None = None,
        limit: int | None = None,
    ) -> list[AdapterVersion]:
        """Ordered by adapter name, by code points, then number; the first `limit` of those `after` a name and number.

        A page costs what the versions on it do, and those that a filter has passed over on the way, wherever it begins.
        """
        ...

    def numbers(self, name: str, *, include_removed: bool = False) -> dict[int, str]:
        """The ids of an adapter's versions by their numbers, in this order."""
        ...

    def newest_of_each(
        self, name: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[tuple[AdapterVersion, int]]:
        """The newest live version of each adapter that has one, and how many it has; by name, as `versions`."""
        ...

    def labels(self, version_ids: Collection[str]) -> dict[str, str]:
        """`NAME:vN` of each version that there is, by its id."""
        ...

    def newest(self, names: Sequence[str]) -> dict[str, int]:
        """The number of the newest live version of each adapter that has one."""
        ...

    def versions_by_digest(
        self, digest_prefix: str, name: str | None = None, *, include_removed: bool = False
    ) -> list[AdapterVersion]:
        """Versions whose content digest starts so, by name and number."""
        ...

    def live_version(
        self, adapter_id: str, *, content: tuple[str, str] | None = None, recipe: str | None = None
    ) -> AdapterVersion | None:
        """The live version with this (content digest, base id) that is no merge, or with this recipe digest."""
        ...

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
        """Version, edges, metrics and the end of its job (id, attempt) in one fenced transaction. Idempotent by id.

        The job ends as succeeded with `version_id` in its result, and `jobs`: the ids of the jobs `then`, which are
        queued in the same transaction, so that no crash can lose them. Raises `Conflict` when the job is no longer
        running under that attempt, or the live-unique key is taken. A base that was merged into another one since is
        that other one.
        """
        ...

    def remove_version(self, version_id: str, *, actor: str, reason: str, lost: bool = False) -> None:
        """Turn a version into a tombstone. Raises `HasDescendants`, or `Refused` when a stage holds it.

        One that is `lost` already may have live descendants: the tombstone keeps their lineage.
        """
        ...

    def set_metrics(self, version_id: str, metrics: Mapping[str, float], *, source: str) -> None: ...
    def metrics(self, version_ids: Sequence[str]) -> dict[str, dict[str, float]]: ...
    def metric_sources(self, version_id: str) -> dict[str, str]:
        """Where the newest value of each metric comes from."""
        ...

    # lineage
    def edges_up(self, version_id: str, depth: int | None = None) -> list[Edge]:
        """Every edge on a path from the version to its ancestors, nearest generation first, in each by child, position.

        Down to the descendants, in each generation by parent, child and position.
        """
        ...

    def edges_down(self, version_id: str, depth: int | None = None) -> list[Edge]: ...
    def parent_edges(self, version_ids: Sequence[str]) -> dict[str, tuple[Edge, ...]]:
        """The edges to what each version was made of, by position; not the one to a version that it supersedes."""
        ...

    def versions_by_id(self, version_ids: Sequence[str]) -> dict[str, AdapterVersion]: ...
    def recall(
        self, version_id: str, action: RecallAction, *, actor: str, reason: str, then: Sequence[NewJob] = ()
    ) -> tuple[Recall, tuple[Job, ...]]:
        """Append that a version is recalled, or no longer; a row that says so already is returned instead.

        The jobs `then` are queued in the same transaction, and returned.
        """
        ...

    def recalls(self) -> Recalls:
        """Every version that a recall hits now: itself, by a copy of its bytes, or by what it is made of."""
        ...

    def trained_on(self, dataset: str) -> list[str]:
        """The ids of the versions, removed ones too, that were trained on this dataset themselves."""
        ...

    def descendants(self, version_ids: Sequence[str], *, copies: bool = False) -> dict[str, str]:
        """These versions and all that is made of them, nearest first, each with the nearest of these versions.

        With `copies`, what has the same bytes counts as made of a version: these are the ones that a recall hits.
        """
        ...

    # jobs
    def submit(self, job: NewJob) -> tuple[Job, bool]:
        """Commit a queued job; or return the live job with the same (kind, key), and False."""
        ...

    def submit_all(self, jobs: Sequence[NewJob]) -> list[tuple[Job, bool]]:
        """`submit` for each of them, in one transaction: all are committed, or an error is raised and none is."""
        ...

    def job(self, job_id: str) -> Job | None: ...
    def jobs(
        self,
        *,
        states: Sequence[JobState] = (),
        kind: str | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> list[Job]:
        """Newest first; `before` is a job's id, for the page that follows it."""
        ...

    def claim(
        self, owner: str, lease_s: float, *, kinds: Sequence[str] = (), queues: Sequence[Queue] = ()
    ) -> Job | None:
        """Take the oldest queued job, of these kinds and queues where any are named; None when there is none.

        One of a kind that is `URGENT` goes before those of other kinds. One conditional UPDATE, which raises `attempt`.
        """
        ...

    def renew(self, job_id: str, attempt: int, lease_s: float, progress: Progress | None = None) -> Job | None:
        """Extend the lease; None when refused (the caller must stop its child)."""
        ...

    def finish(
        self,
        job_id: str,
        attempt: int,
        state: JobState,
        *,
        error: Mapping[str, str] | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> bool: ...
    def give_back(self, job_id: str, attempt: int, *, spent: bool = False) -> bool:
        """Queue a running job again. `spent` counts the attempt: its child crashed, or the like."""
        ...

    def request_cancel(self, job_id: str) -> Job:
        """Cancel a queued job now; flag a running one. Raises `Conflict` when it has ended."""
        ...

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again, with its full number of attempts. Raises `Conflict` otherwise."""
        ...

    def reap(self, *, abandoned: bool = False) -> list[Job]:
        """Queue again every running job whose lease expired; fail it when its attempts are used up.

        `abandoned` says that no worker lives, whatever the leases say: only who knows it may say so.
        """
        ...

    def waiting(self, queues: Sequence[Queue], *, for_s: float, limit: int = 1) -> list[Job]:
        """Jobs that have been queued there, and in no other state, for so long; the oldest first."""
        ...

    def move_queued(self, source: Queue, target: Queue) -> list[Job]:
        """Let every job that waits in one queue wait in another; returns them."""
        ...

    def queue_depths(self) -> list[QueueDepth]:
        """The live jobs, counted by queue and state."""
        ...

    def record(self, job_id: str, kind: str, message: str) -> None: ...
    def events(self, job_id: str, after: int = 0) -> list[JobEvent]: ...

    def append_log(self, job_id: str, text: str) -> None:
        """Add to what the job's attempts wrote."""
        ...

    def log(self, job_id: str, after: int = 0) -> list[LogPiece]: ...
    def old_logs(self, before: float) -> dict[str, int]:
        """The jobs that ended before then and have a log, the oldest first, each with its length."""
        ...

    def drop_log(self, job_id: str) -> None:
        """Forget what the attempts of an ended job wrote; its history stays."""
        ...

    # workers
    def add_worker(self, worker_id: str, *, name: str, host: str, queues: Sequence[Queue], device: str) -> None:
        """Introduce a worker, in place of a dead one of that name."""
        ...

    def see_worker(self, worker_id: str, *, draining: bool = False) -> bool:
        """The worker is there, and from now on takes no more jobs where it is `draining`; False where none is known."""
        ...

    def remove_worker(self, worker_id: str) -> None: ...
    def workers(self) -> list[Worker]:
        """By name; dead ones too, for a day."""
        ...

    # evaluations
    def reports(self, keys: Sequence[str]) -> dict[str, EvalReport]: ...
    def put_report(self, report: EvalReport) -> None:
        """Idempotent by `report.key`."""
        ...

    def reports_for(self, subject: str, base_id: str) -> list[EvalReport]: ...
    def report_times(self, keys: Sequence[str]) -> dict[str, float]:
        """When each report was stored."""
        ...

    def set_suites(self, adapter_id: str, suites: Sequence[tuple[str, str, str]]) -> None:
        """Replace the suites of an adapter, in order: (name, digest, body as JSON)."""
        ...

    def suites(self, adapter_id: str) -> list[tuple[str, str, str]]: ...
    def suite_digests(self, adapter_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The digests of the suites that were set for each adapter that has any, in their order."""
        ...

    def keep_suite(self, digest: str, name: str, body: str) -> None:
        """Store a suite under its digest, where a job finds it whatever became of its file. Idempotent."""
        ...

    def kept_suite(self, digest: str) -> str | None:
        """The body of a suite that is kept, or was set for an adapter."""
        ...

    def kept_suites(self) -> list[tuple[str, str]]:
        """(name, digest) of every kept suite."""
        ...

    def judging_suites(self) -> list[tuple[str, str, str]]:
        """(name, digest, adapter's name) for every suite that was set for an adapter."""
        ...

    # stages
    def stage_holder(self, adapter_id: str, stage: str) -> str | None: ...
    def stages(self, adapter_ids: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
        """Adapter id to {stage: version id}, of these adapters or of all; emptied stages are absent."""
        ...

    def stages_of(self, version_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The stages that each of these versions holds, by name; those that hold none are absent."""
        ...

    def is_held(self, stage_name: str) -> bool:
        """Whether some version holds a stage of this name."""
        ...

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
        """Compare-and-set plus one chained history row.

        `decision` is the record that the move stands on; it is kept, and the row carries its digest. `seen` is what it
        was made from: the number of the last row of the adapter's history, 0 for none, and the digest of the gates.

        Raises `StageMoved` when the holder is not `expected`, `Recalled` where a recall hits the version,
        `DecisionOutdated` where the history or the gates went on from what was `seen`.
        """
        ...

    def record_approval(
        self, adapter_id: str, stage: str, *, version_id: str, action: ApprovalAction, actor: str, reason: str
    ) -> StageEvent:
        """Append an approval to the same chain; no stage moves."""
        ...

    def set_tags(
        self, version_id: str, put: Mapping[str, str], remove: Sequence[str], *, actor: str, reason: str
    ) -> AdapterVersion:
        """Set and remove tags of a live version, with a note in the history where that changes anything."""
        ...

    def add_signature(
        self, version_id: str, key: PublicKey, envelope: Envelope, *, actor: str, asked_for: bool = False
    ) -> Signature:
        """Keep a signature of a live version, with a note in the history. Whether it holds is the caller's to know.

        Raises `Refused` for a version that was removed, and for more than `MAX_SIGNATURES` of one; where the key is
        `asked_for`, those by other keys do not count.
        """
        ...

    def signatures(self, version_id: str) -> list[Signature]:
        """Those of a version, the earliest first; what becomes of the version takes none away."""
        ...

    def record_note(
        self, adapter_id: str, stage: str, *, version_id: str | None, action: NoteAction, actor: str, reason: str
    ) -> StageEvent:
        """Append a note to the same chain; no stage moves."""
        ...

    def stage_history(self, adapter_id: str, stage: str | None = None) -> list[StageEvent]:
        """The chain of an adapter (over all its stages), oldest first; `stage` filters what is returned."""
        ...

    def feed(
        self,
        after: int | None,
        *,
        limit: int,
        kinds: Sequence[EventKind] = (),
        stage: str | None = None,
        names: str | None = None,
    ) -> tuple[list[Event], int]:
        """The first events after that one (None: the last one), and the id of the last one that there is.

        Whoever has seen an event meets none before it later. `names` is a glob of adapters as they are called now.
        Raises `InvalidInput` for an event that is still to come: it was of another ledger, or of one that was restored.
        """
        ...

    def decisions(self, digests: Sequence[str]) -> dict[str, str]:
        """The kept records by their digests; one that is not there is absent."""
        ...

    def decisions_like(self, digest_prefix: str) -> dict[str, str]:
        """The kept records whose digest begins so, two at most."""
        ...

    # gates
    def gate_file(self) -> GateFile | None:
        """The gates that count, as they were last set."""
        ...

    def set_gate_file(self, digest: str, body: str, *, set_by: str) -> GateFile: ...


@dataclass(frozen=True, slots=True)
class SeenVersion:
    """A model version as MLflow has it now.

    `version_id` is ours that it carries; `taken_as` that of the version which was made of it when a person had made
    it; `described` whether its description still leads to our page of it; `parents` the labels that its `tags` name.
    """

    version_id: str | None
    taken_as: str | None
    described: bool
    parents: tuple[str, ...]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SeenModel:
    """A registered model as MLflow has it now, with its versions by number; `adapter_id` is whose it says it is."""

    name: str
    adapter_id: str | None
    described: bool
    versions: Mapping[int, SeenVersion]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A run of MLflow that was begun for a version under `key` and never finished; `started_at` by MLflow's clock."""

    run_id: str
    version_id: str
    key: str
    started_at: float


@dataclass(frozen=True, slots=True)
class Double:
    """Something that MLflow has beside what the ledger names, made under the `key` of the version `of` the ledger.

    Two processes made it at once, because one of them lost its lock. `id` is the number of a model version, or MLflow's
    id of a LoggedModel or a run; what belongs to a doubled run is part of it.
    """

    of: AdapterVersion
    key: str
    kind: Literal["version", "model", "run"]
    id: str
    size_bytes: int = 0

    @property
    def label(self) -> str:
        return f"{self.of.name} version {self.id}" if self.kind == "version" else f"{self.kind} {self.id}"


class VersionStore(Protocol):
    """MLflow: the browsable record of versions, and the place where their bytes live once."""

    @property
    def uri(self) -> str:
        """The address under which its client reaches it; it may hold a password."""
        ...

    def check_identity(self) -> bool:
        """Whether MLflow has the experiment of our ledger. Writes nothing.

        Raises `Misconfigured` where it belongs to another ledger.
        """
        ...

    def ensure_adapter(self, name: str, adapter_id: str, base: Base, *, exists: bool = False) -> None:
        """Create the registered model, or check that it carries our id.

        Raises `Refused` for a stranger's model, and where one that `exists`, for it has live versions, is not there.
        """
        ...

    def place(
        self,
        spec: NewVersion,
        *,
        adapter_id: str,
        version_id: str,
        key: str,
        staged: Path,
        parents: Sequence[Parent],
        check: Callable[[], None],
        used: Mapping[int, str],
    ) -> tuple[str, Placement]:
        """Find by `key`, else create: run, LoggedModel, files, finalize, model version. Safe to run again.

        Returns the version id that MLflow carries (an earlier attempt's, where one got that far) and the placement.
        The files of `staged` are moved into the artifact store. The caller holds the lock of `key`; `check` raises
        where it was lost, and is asked before each step and after the last one that makes something. `used` are the
        numbers that the ledger has given away, with the version ids: MLflow counts from 1 again in a model that was
        deleted and made anew.
        """
        ...

    def doubles(self, versions: Sequence[AdapterVersion], key: str | None = None) -> list[Double]:
        """What MLflow has twice of those of these versions that are live; with `key`, of the one made under it.

        What belongs to another of them is never a double, so give all that the ledger has.
        """
        ...

    def drop_double(self, double: Double) -> None:
        """Delete it, and its files; what is gone already is fine."""
        ...

    def folder(self, version: AdapterVersion) -> AbstractContextManager[Path]:
        """The files of a version in a local folder (the store's own, read-only, where it is local)."""
        ...

    def alias(self, name: str, alias: str) -> int | None: ...
    def has(self, version: AdapterVersion) -> bool:
        """Whether this version is still there: it or its registered model may have been deleted, or made again."""
        ...

    def seen(self, adapter_id: str | None = None) -> list[SeenModel]:
        """Every registered model with its versions, by name, whoever made it; or those that carry an id of ours."""
        ...

    def without_run(self, versions: Sequence[AdapterVersion]) -> list[AdapterVersion]:
        """Those whose source run MLflow does not know, not even as a deleted one."""
        ...

    def project_stage(self, name: str, stage: str, *, number: int | None, legacy: Mapping[int, str]) -> None:
        """Set the legacy stage of each version listed, then make alias `stage` point at `number` (None deletes it).

        The alias comes last, so that a projection that was cut short shows as a difference to the ledger.
        """
        ...

    def other_tags(
        self, version: AdapterVersion, found: SeenVersion, recalled: tuple[str, str] | None
    ) -> tuple[str, ...]:
        """The tags of which MLflow's version does not say what `version` does: its kind, the caller's, its recall."""
        ...

    def project_tags(self, version: AdapterVersion, keys: Sequence[str] | None) -> bool:
        """Let MLflow's version say of these tags what `version` says: their value, or that there is none.

        Without keys all that `version` has, and its kind. False where MLflow has no such version: it was renamed or
        deleted there.
        """
        ...

    def mark_recall(self, version: AdapterVersion, recalled: tuple[str, str] | None) -> None:
        """Let the page of a version say that it is recalled (the recalled version, the reason), or no longer."""
        ...

    def mark_children(self, version: AdapterVersion, children: Sequence[AdapterVersion], count: int) -> None:
        """Let the page of a version lead to what was made of it: its newest children, of `count` in all."""
        ...

    def put_back(self, version: AdapterVersion, spec: NewVersion, staged: Path) -> None:
        """Put each file that the manifest lists and `staged` has back into the folder of this machine where it lay.

        `staged` holds the content of the version, `spec` tells of it; what is whole, or is no such file, stays.
        """
        ...

    def begun_as(self, name: str, number: int) -> tuple[str, str] | None:
        """The key under which a model version was made by us, and the id of ours that it carries; None by others."""
        ...

    def mark_taken(self, name: str, number: int, version: AdapterVersion) -> None:
        """Note on a model version that a person made which version of ours was made of it."""
        ...

    def describe(
        self,
        version: AdapterVersion,
        spec: NewVersion,
        parents: Sequence[Parent],
        recalled: tuple[str, str] | None,
    ) -> bool:
        """Let the page of a version lead to ours and to its parents by the names that they have now.

        Where a person wrote over our description, it goes below what stands there; False where there is no room.
        """
        ...

    def describe_adapter(self, name: str, base: Base) -> bool:
        """The same for a registered model."""
        ...

    def log_report(
        self, version: AdapterVersion, report: EvalReport, *, dataset_digest: str, beside: Beside | None = None
    ) -> None: ...
    def log_search(
        self,
        key: str,
        name: str,
        parents: Sequence[AdapterVersion],
        *,
        params: Mapping[str, str],
        series: Mapping[str, Sequence[tuple[int, float]]],
        files: Mapping[str, str | bytes],
    ) -> None:
        """One run for a search, found again by `key`; each of `series` is a metric with its value at each step."""
        ...

    def remove(self, version: AdapterVersion) -> None:
        """Delete the model version and its files; what is gone already is fine."""
        ...

    def stored_bytes(self, version: AdapterVersion) -> int:
        """How much lies at the place of a version's files; 0 where nothing does."""
        ...

    def attempts(self) -> list[Attempt]:
        """What was begun and is not finished, the oldest first: under way, or left by a kill."""
        ...

    def attempt_bytes(self, attempt: Attempt) -> int | None:
        """How much an attempt has stored; None where a version in MLflow, whoever made it, refers to it."""
        ...

    def drop_attempt(self, attempt: Attempt) -> None:
        """Delete the run of an attempt and its LoggedModels with their files. The caller holds the lock of its key."""
        ...

    def run_metrics(self, run_id: str) -> dict[str, float]:
        """The last value of every metric of a run of any experiment. Raises `NotFound`."""
        ...

    def source_folder(
        self, kind: Literal["run", "model"], location: str, wanted: Collection[str]
    ) -> AbstractContextManager[Path]:
        """The `wanted` files at `runs:/` or `models:/` in a local folder; others, a checkpoint's, as empty files."""
        ...


class Doorbell(Protocol):
    """Wakes whoever executes jobs. Carries a job id and nothing else; losing a ring loses nothing."""

    def ring(self, job_id: str) -> None: ...
    def check(self) -> None:
        """Raises `Unavailable` where a ring would not be heard."""
        ...


@dataclass(frozen=True, slots=True)
class Replay:
    """An answer that was given before, to be given again."""

    status: int
    headers: Mapping[str, str]
    body: str


class Access(Protocol):
    """What only a served registry needs: its tokens, and its answers to requests that may be repeated."""

    def add_token(
        self, secret: str, *, name: str, scope: Scope, names: Sequence[str], created_by: str, valid_s: float | None
    ) -> Token: ...
    def tokens(self) -> list[Token]:
        """Oldest first, revoked and expired ones too."""
        ...

    def has_tokens(self) -> bool:
        """Whether any token is valid now."""
        ...

    def revoke_token(self, token_id: str) -> Token:
        """Make a token invalid for good. Raises `NotFound`."""
        ...

    def caller(self, secret: str) -> Caller | None:
        """Who holds this secret; None where it is unknown, expired or revoked."""
        ...

    def digests(self) -> frozenset[str]:
        """What `secret_digest` makes of every secret that is valid now."""
        ...

    def begin_replay(self, caller: str, key: str, request: str) -> Replay | None:
        """Claim an Idempotency-Key for the digest of a request; or return the answer that it got before.

        Raises `Conflict` while the first request is being answered, `Refused` for another request. Keys are
        forgotten after a day.
        """
        ...

    def keep_replay(self, caller: str, key: str, answer: Replay) -> None: ...
    def drop_replay(self, caller: str, key: str) -> None:
        """Forget a key whose request failed: nothing was changed, and it may be tried again."""
        ...

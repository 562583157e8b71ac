"""What adapterctl offers: every verb, and the shapes it answers with.

The command line, Python callers and a remote client speak this interface; the JSON of `-o json` is the plain rendering
of these views (`registry/wire.py`), so a field added here appears everywhere. Times are ISO 8601 in UTC.
Every verb raises errors of `domain/errors.py` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from .domain.access import EVERY_NAME, Scope, Token
from .domain.base_dtype import FULL
from .domain.conversion import Conversion, Method
from .domain.errors import AdapterctlError
from .domain.evals import EvalReport, Interval
from .domain.event import EventKind
from .domain.job import Job, JobEvent, LogPiece, QueueDepth
from .domain.plan import Forecast, Interference, Pair
from .domain.recall import RecallAction
from .domain.recipe import LayerWeights, MergeRequest, ResizeRequest
from .domain.refs import Ref
from .domain.signature import Envelope
from .domain.suite import Suite
from .domain.tuning import TuneRequest, searched
from .domain.verdict import Decision, Judged, Outcome
from .domain.version import Base, FileRecord
from .domain.worker import Worker

Direction = Literal["up", "down", "both"]


@dataclass(frozen=True, slots=True)
class ParentView:
    ref: str
    weight: float | None
    kind: str


@dataclass(frozen=True, slots=True)
class RecallView:
    """The recall that hits a version: `ref` is the version that was recalled, itself, its bytes or an ancestor."""

    ref: str
    reason: str
    by: str
    at: str


@dataclass(frozen=True, slots=True)
class SignatureView:
    """A signature of a version. `keyid` is the SHA-256 of the public `key`; `by` handed it in.

    `fault` says why it does not count; it is empty where the key signed the version as it is recorded.
    """

    keyid: str
    key: str
    by: str
    at: str
    fault: str
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class VersionView:
    """A version as people see it. `loss` is the relative loss that its receipt measured (merges only).

    `imported` says of metrics that were neither given at registration nor measured by this registry where they are
    from, `converted` from what its own header says that it was converted; listings leave out both, and `signatures`.
    """

    ref: str
    name: str
    number: int
    id: str
    kind: str
    state: str
    base: str
    base_id: str
    rank: int
    dtype: str
    modules: int
    parameters: int
    size_bytes: int
    content_digest: str
    created_at: str
    created_by: str
    stages: tuple[str, ...] = ()
    parents: tuple[ParentView, ...] = ()
    method: str | None = None
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    imported: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None
    dataset: str | None = None
    source: str | None = None
    recipe_digest: str | None = None
    recipe: Mapping[str, Any] | None = None
    receipt: Mapping[str, Any] | None = None
    files: tuple[FileRecord, ...] = ()
    run_id: str = ""
    model_id: str = ""
    location: str = ""
    mlflow_path: str = ""
    recall: RecallView | None = None
    converted: Conversion | None = None
    signatures: tuple[SignatureView, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterView:
    name: str
    versions: int
    latest: str
    base: str
    stages: Mapping[str, str]
    created_at: str


@dataclass(frozen=True, slots=True)
class Registered:
    """`created` is False when the same bytes were registered before: then this is that version."""

    version: VersionView
    created: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tagged:
    """`warnings` says where MLflow has no such version, so that the tags are in the ledger alone."""

    version: VersionView
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConvertedModule:
    """`exact_rank` is what its delta needs; `loss` is ||written - exact|| / ||exact||."""

    module: str
    exact_rank: int
    loss: float


@dataclass(frozen=True, slots=True)
class Converted:
    """A LoHa or LoKr adapter that was written as LoRA into `folder`, which `register` takes.

    `loss` is ||written - exact|| / ||exact|| over all modules, rounding to `dtype` included; `cut_loss` is what the
    rank that was asked for took of it, 0 where it was enough. `weights` and `config` are the SHA-256 of the files that
    were read, `content_digest` is that of the result.
    """

    folder: str
    method: Method
    source_rank: int
    rank: int
    dtype: str
    size_bytes: int
    loss: float
    cut_loss: float
    weights: str
    config: str
    content_digest: str
    modules: tuple[ConvertedModule, ...]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A merge that was queued, or the version that the same recipe made before (`job` is None then)."""

    into: str
    recipe_digest: str
    method: str
    rank: int
    parents: tuple[ParentView, ...]
    job: Job | None
    version: VersionView | None
    deduplicated: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Carried:
    """What became of one folder of an import; in a dry run, what would.

    `found` was here before. `merge` was made again from its recipe and has the bytes of the folder.
    """

    folder: str
    ref: str
    action: Literal["register", "merge", "found"]
    content_digest: str
    parents: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A version that was exported alone: `name` is that of its folder, at `path`; `base` what its config calls it."""

    ref: str
    name: str
    path: str
    base: str
    rank: int


@dataclass(frozen=True, slots=True)
class BakedView:
    """A full model that was written into `folder`: the base with a version in it.

    `dtype` is what all floating tensors were brought into, None where each kept its own. `rounding` is the norm of what
    rounding did to the changed tensors, as a share of the norm of the delta that was added. `untied` names the head
    where the base ties it to its embedding, and the new model does not.
    """

    folder: str
    ref: str
    base: str
    dtype: str | None
    size_bytes: int
    changed: int
    converted: int
    copied: int
    rounding: float
    untied: str | None = None
    files: tuple[FileRecord, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanView:
    into: str
    recipe_digest: str
    method: str
    rank: int
    dtype: str
    size_bytes: int
    base: str
    parents: tuple[ParentView, ...]
    forecasts: tuple[Forecast, ...]
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]
    exists: str | None = None
    interference: tuple[Interference, ...] = ()


@dataclass(frozen=True, slots=True)
class LineageEdgeView:
    child: str
    parent: str
    kind: str
    weight: float | None
    position: int


@dataclass(frozen=True, slots=True)
class LineageView:
    """The graph around `root`: every version reached, and the edges between them.

    `found` answers a question about two versions: their common ancestors, the nearest first, or a shortest path from
    `root` to the other.
    """

    root: str
    direction: Direction
    versions: tuple[VersionView, ...]
    edges: tuple[LineageEdgeView, ...]
    found: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """A metric of one version in a lineage, beside the values of its parents."""

    ref: str
    metric: str
    value: float | None
    parents: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StageHit:
    """A version that serves a stage of the adapter `name` now."""

    name: str
    stage: str
    ref: str


@dataclass(frozen=True, slots=True)
class RecallImpact:
    """A recall and whom it hits; for `undo` whom it sets free: versions that no other recall hits.

    `descendants` are the live versions that have the bytes of `ref` or are made of them, nearest first; `stages` where
    any of them serves now.
    """

    ref: str
    action: RecallAction
    reason: str
    by: str
    at: str
    descendants: tuple[str, ...]
    stages: tuple[StageHit, ...]


@dataclass(frozen=True, slots=True)
class RebuildStep:
    """What becomes of one descendant: merged again from `parents`, or skipped for the reason in `note`."""

    ref: str
    action: Literal["merge", "skip"]
    parents: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class RebuildView:
    """The steps in their order. `job` is the first of them, which queues the next; None in a dry run."""

    old: str
    new: str
    steps: tuple[RebuildStep, ...]
    job: Job | None = None


Both = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class LayerDiff:
    """One module that both versions change; two values are those of the first and of the second.

    From the files: `distance` is ||first - second|| / ||first|| (None where only the second is not zero), `share` the
    part of the squared distance of the whole adapters that lies in this module, the overlaps how far the deltas read
    from and write to the same directions of the base (0..1, of the smaller space). From the receipts: what a merge
    lost and had promised to lose, relative to its own exact sum, and how much of each parent its directions still
    hold; None where a version is no merge, or not of that parent.
    """

    module: str
    distance: float | None
    share: float
    cosine: float
    norm: tuple[float, float]
    row_overlap: float
    column_overlap: float
    loss: Both = (None, None)
    predicted_loss: Both = (None, None)
    retention: Mapping[str, Both] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DiffView:
    """Two versions side by side: fields that differ, and how their deltas relate.

    `cosine` and `distance` (||first - second|| / ||first||) are None where bases differ, the latter also where only
    the second delta is not zero. `layers` is None unless it was asked for; the modules farthest apart come first.
    """

    first: str
    second: str
    same_content: bool
    fields: Mapping[str, tuple[Any, Any]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    cosine: float | None
    distance: float | None
    layers: tuple[LayerDiff, ...] | None = None


@dataclass(frozen=True, slots=True)
class RetentionRow:
    """One task of one suite: the base, the parent that owns the suite, the child, and what the child kept.

    `retention` is child / parent (parent / child where lower is better); `gain_kept` is
    (child - base) / (parent - base), None where the parent does not beat the base beyond its interval. `primary` says
    that the task goes by this metric, `here` that this registry computed all of the figures; `switched` is
    the share of answers that read more like another parent's than like the owner's, where answers are there. `dtype` is
    what the base was computed with for all of them; where that is not float32, it ends the name of the metric.
    """

    suite: str
    task: str
    metric: str
    direction: Literal["higher", "lower"]
    owner: str
    samples: int
    base: float
    parents: Mapping[str, float]
    child: float
    retention: Interval | None
    gain_kept: Interval | None
    note: str = ""
    primary: bool = False
    here: bool = True
    switched: float | None = None
    dtype: str = FULL


@dataclass(frozen=True, slots=True)
class RetentionView:
    """`missing` names what has to be evaluated first, `notes` where figures came from that were not computed here."""

    ref: str
    rows: tuple[RetentionRow, ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrialView:
    """One candidate of a search. `kept` is its retention by task on the `samples` tuning samples that it was shown;
    it was shown all of them where it is `complete`. `layers` are weights of layers where they are not `weights`.
    """

    number: int
    method: str
    rank: int
    weights: tuple[ParentView, ...]
    samples: int
    complete: bool
    kept: Mapping[str, float]
    worst: float
    layers: tuple[LayerWeights, ...] = ()


@dataclass(frozen=True, slots=True)
class HeldOutView:
    """What a finalist of a search kept of one task, on samples that decided nothing."""

    trial: int
    task: str
    metric: str
    base: float
    parent: float
    child: float
    retention: Interval | None
    gain_kept: Interval | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class TuneView:
    """What a search for weights found. `owners` are the parents that the tasks are measured against, in their order.

    `budget` and `used` count full evaluations. `heldout` has the winner first, then the other finalists and the plain
    candidate. `jobs` are the merges that register the finalists, where that was asked for. `layer_groups` are patterns
    of the runs of layers with weights of their own. `less_plain` is the smallest share that the winner keeps less that
    of the plain candidate, held out (-1 to 1; None where every parent scores 0), and `advice` what follows from it.
    All of it is on the base in `base_dtype`.
    """

    job: str
    into: str
    parents: tuple[str, ...]
    tasks: tuple[str, ...]
    owners: tuple[str, ...]
    budget: float
    used: float
    seed: int
    tuning_samples: int
    heldout_samples: int
    winner: int
    plain: int
    front: tuple[int, ...]
    trials: tuple[TrialView, ...]
    heldout: tuple[HeldOutView, ...]
    explanation: tuple[str, ...]
    jobs: tuple[str, ...] = ()
    layer_groups: tuple[str, ...] = ()
    less_plain: Interval | None = None
    advice: tuple[str, ...] = ()
    base_dtype: str = FULL

    @property
    def searched(self) -> tuple[str, ...]:
        """What each weight is of: a parent, in each group of layers."""
        return searched(self.parents, self.layer_groups)

    def weights(self, trial: TrialView) -> tuple[float, ...]:
        """The weights of a trial in the order of `searched`."""
        everywhere = tuple(parent.weight or 0.0 for parent in trial.weights)
        own = {layer.pattern: layer.weights for layer in trial.layers}
        return tuple(weight for group in self.layer_groups or [""] for weight in own.get(group, everywhere))


@dataclass(frozen=True, slots=True)
class StageEventView:
    """`evidence` is the digest of the decision that a move stood on; `warnings` are for the one who moved it."""

    seq: int
    stage: str
    action: str
    ref: str | None
    previous: str | None
    actor: str
    reason: str
    at: str
    hash: str
    evidence: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HistoryView:
    """`findings` is None unless verification was asked for; empty means every link holds.

    `head` is the hash of the last of all `rows`, also where `events` are those of one stage only.
    """

    name: str
    events: tuple[StageEventView, ...]
    head: str
    findings: tuple[str, ...] | None = None
    registry_id: str = ""
    rows: int = 0


@dataclass(frozen=True, slots=True)
class EventView:
    """What happened to the adapter `name`, as it is called now, or to the registry (None); see `domain/event.py`.

    `id` is where to go on after it. `ref` is the version that it is about, which serves `stage` now where a stage
    moved (None: nothing does), and `previous` the one that did before. `link` leads from the server's root to its page.
    """

    id: int
    at: str
    kind: EventKind
    name: str | None
    ref: str | None
    stage: str
    previous: str | None
    actor: str
    reason: str
    evidence: str | None
    link: str


@dataclass(frozen=True, slots=True)
class EventsView:
    """Events in the order in which they became visible. `cursor` is where to go on, and `more` whether at once."""

    events: tuple[EventView, ...]
    cursor: int
    more: bool


@dataclass(frozen=True, slots=True)
class GatesView:
    """The gates that count. `gates` is what the file said; `digest` is None where no file was ever set."""

    digest: str | None
    gates: tuple[Mapping[str, Any], ...] = ()
    set_by: str = ""
    set_at: str = ""


@dataclass(frozen=True, slots=True)
class GateCheck:
    """Whether a version might hold a stage now, condition by condition. `gate` is the digest of the gate file."""

    ref: str
    stage: str
    gate: str | None
    verdict: Outcome
    conditions: tuple[Judged, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """`verdict` of the stored bytes against the manifest, and of the recipe run again (merges).

    `signatures` are held against the manifest; one that does not count does not make a version bad.
    """

    ref: str
    files: Literal["intact", "damaged"]
    recipe: Literal["identical", "equal within bound", "different", "not a merge", "skipped"]
    distance: float | None
    details: tuple[str, ...] = ()
    signatures: tuple[SignatureView, ...] = ()


@dataclass(frozen=True, slots=True)
class Verifications:
    """`verify --all`: how many versions were checked, how many merges were run again, and what is not as registered."""

    checked: int
    rerun: int
    bad: tuple[Verification, ...]


@dataclass(frozen=True, slots=True)
class OptionView:
    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True, slots=True)
class MethodView:
    """A merge method; `breaks` names the laws that it does not keep, `max_parents` is None for any number."""

    name: str
    summary: str
    when: str
    exact: bool
    cost: str
    paper: str
    options: tuple[OptionView, ...]
    breaks: tuple[str, ...] = ()
    max_parents: int | None = None
    equal_ranks: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `doctor`."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing that nobody refers to, how much it holds, and why nobody does."""

    kind: Literal["version", "double", "attempt", "stage", "lock", "work", "log"]
    name: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class GarbageView:
    """What `gc` freed, or with `dry_run` would free."""

    found: tuple[Garbage, ...]
    size_bytes: int
    dry_run: bool


@dataclass(frozen=True, slots=True)
class SuiteView:
    """A suite that the registry keeps; its digest stands for it where a verb takes one. `adapters` are judged by it."""

    name: str
    digest: str
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was just made. The secret is shown here and never again."""

    token: Token
    secret: str


#: How old an attempt or a log is before `gc` takes it, unless the caller says so.
DAY_S = 86_400.0


class RegistryAPI(Protocol):
    """Every verb. `Ref` arguments are resolved by the registry; unknown names raise `NotFound` with a suggestion."""

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
    ) -> Registered: ...
    def adapters(self, *, limit: int | None = None) -> list[AdapterView]:
        """By name; the first `limit` of them."""
        ...

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
        limit: int | None = None,
    ) -> list[VersionView]:
        """By name and number; the first `limit` of those that meet every filter.

        `metric` holds conditions such as `bleu>0.3` (operators < <= > >= != =).

        `dataset` is what a version itself was trained on; `trained_on` what it or any of its ancestors was trained on.
        """
        ...

    def version(self, ref: Ref, *, agreed: bool = False) -> VersionView:
        """With `agreed`, for what goes out under a stage: `StageMoved` where MLflow's alias is not where it is here."""
        ...

    def diff(self, first: Ref, second: Ref, *, layers: bool = False) -> DiffView:
        """With `layers` module by module too, which takes versions of one base: else `IncompatibleParents`."""
        ...

    def pull(self, ref: Ref, folder: Path) -> VersionView: ...
    def bases(self) -> list[tuple[Base, tuple[str, ...]]]: ...
    def add_base(self, name: str, *, folder: Path | None = None, revision: str | None = None) -> Base: ...
    def alias_base(self, spelling: str, base: str) -> Base: ...
    def merge_bases(self, keep: str, drop: str) -> Base: ...

    # merge
    def methods(self) -> list[MethodView]: ...
    def plan(self, request: MergeRequest) -> PlanView: ...
    def merge(self, request: MergeRequest) -> Submitted: ...
    def plan_resize(self, request: ResizeRequest) -> PlanView: ...
    def resize(self, request: ResizeRequest) -> Submitted:
        """Make a version of a smaller rank: a merge of one parent, with all that follows a merge."""
        ...

    def verify(self, ref: Ref, *, rerun: bool = True) -> Verification: ...
    def remove(self, ref: Ref, *, reason: str) -> VersionView: ...

    # lineage
    def lineage(self, ref: Ref, *, direction: Direction = "both", depth: int | None = None) -> LineageView: ...
    def common_ancestors(self, first: Ref, second: Ref) -> LineageView:
        """What two versions are both made of, and the ways there from each of them."""
        ...

    def path(self, first: Ref, second: Ref) -> LineageView:
        """Every way from one version to the other, whichever of them is the ancestor."""
        ...

    def recall(self, ref: Ref, *, reason: str) -> RecallImpact:
        """Say that a version, and with it all that is made of it, should be used no more."""
        ...

    def undo_recall(self, ref: Ref, *, reason: str) -> RecallImpact: ...
    def rebuild(self, old: Ref, new: Ref, *, until: Ref | None = None, dry_run: bool = False) -> RebuildView:
        """Make all that is made of `old` (with `until`: that version, and what lies between) anew from `new`."""
        ...

    # jobs
    def jobs(self, *, state: str | None = None, kind: str | None = None, limit: int = 100) -> list[Job]: ...
    def job(self, job_id: str) -> Job: ...
    def job_events(self, job_id: str, after: int = 0) -> list[JobEvent]: ...
    def job_log(self, job_id: str, after: int = 0) -> list[LogPiece]:
        """What the job's attempts wrote, after that piece."""
        ...

    def follow(
        self, job_id: str, *, timeout_s: float | None = None, tell: Callable[[str], None] | None = None
    ) -> Iterator[Job]:
        """Yield the job whenever it changes, the ended one last. Raises `WaitTimedOut`; stopping cancels nothing.

        Goes on for two minutes where the database or the server is gone, and `tell`s so; then raises `Unavailable`.
        """
        ...

    def cancel(self, job_id: str) -> Job: ...
    def retry(self, job_id: str) -> Job: ...

    # evaluation
    def evaluate(
        self, refs: Sequence[Ref], *, suites: Sequence[str], limit: int | None = None, base_dtype: str | None = None
    ) -> Job:
        """Queue an evaluation. The base is in `base_dtype`: float32, nf4 or nf4-dq; None is the registry's setting."""
        ...

    def tune(self, request: TuneRequest) -> Job:
        """Queue a search for the weights of a merge."""
        ...

    def tuned(self, job_id: str) -> TuneView:
        """What an ended search found. Raises `Conflict` while it runs."""
        ...

    def set_suite(self, name: str, suite: str) -> None: ...
    def suites(self) -> list[SuiteView]: ...
    def suite(self, suite: str) -> Suite:
        """A kept suite with its rows, by its name, its digest or the beginning of that."""
        ...

    def retention(self, ref: Ref) -> RetentionView: ...
    def import_reports(self, folder: Path) -> int:
        """Take in evaluation reports that came as files (`examples/results`); returns how many fit this registry."""
        ...

    def import_results(
        self, ref: Ref, *, source: str, metrics: Mapping[str, float] | None = None, replace: bool = False
    ) -> VersionView:
        """Take in metrics that were measured elsewhere, marked by their source.

        Without `metrics` the source is `runs:/ID`, a run of the registry's own MLflow, whose metrics are read. Raises
        `Refused` where the version has other values of them, unless they are to `replace` those.
        """
        ...

    # stages
    def promote(self, ref: Ref, *, to: str, reason: str = "", force: bool = False) -> StageEventView:
        """Raises `GateRefused` with every condition that is not met, unless forced; what was recalled cannot be."""
        ...

    def rollback(self, name: str, *, stage: str, reason: str = "") -> StageEventView: ...
    def demote(self, name: str, *, stage: str, reason: str = "") -> StageEventView: ...
    def adopt(self, name: str, *, stage: str, reason: str = "", force: bool = False) -> StageEventView:
        """Accept where MLflow's alias points now as a change of the stage, recorded as such; the gate is asked."""
        ...

    def tag(
        self, ref: Ref, *, put: Mapping[str, str] | None = None, remove: Sequence[str] = (), reason: str = ""
    ) -> Tagged:
        """Set and remove tags of a version; the history says who did."""
        ...

    def approve(self, ref: Ref, *, to: str, reason: str = "", withdraw: bool = False) -> StageEventView:
        """Record that the caller approves of a version for a stage, or no longer does."""
        ...

    def sign(self, ref: Ref, *, envelope: Envelope, key: str) -> SignatureView:
        """Keep a signature that the owner of a key made of a version; `key` is the public one, in PEM or base64.

        Signing again adds nothing. Raises `Refused` where it is not by that key, or not of this version as it is.
        """
        ...

    def history(
        self, name: str, *, stage: str | None = None, verify: bool = False, head: str | None = None
    ) -> HistoryView: ...

    def events(
        self,
        *,
        after: int | None = 0,
        name: str | None = None,
        kind: Sequence[str] = (),
        stage: str | None = None,
        limit: int = 100,
    ) -> EventsView:
        """What happened after that event, the earliest first; None asks for nothing but the cursor of now.

        `name` is an adapter or a glob of adapters; `kind` of `domain/event.py`, or `move`. No event ever appears before
        one that was seen. Raises `NotFound` for a name that is no adapter, `InvalidInput` for an event still to come
        and for a stage that is none.
        """
        ...

    def follow_events(
        self,
        *,
        after: int | None = None,
        name: str | None = None,
        kind: Sequence[str] = (),
        stage: str | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Iterator[EventView]:
        """Each event after that one, once, and those to come as they come; ends only where its caller stops.

        Goes on for two minutes where the database or the server is gone, and `tell`s so; then raises `Unavailable`.
        """
        ...

    # gates
    def gates(self) -> GatesView: ...
    def set_gates(self, gates_file: Any) -> GatesView:
        """`gates_file` is what a gate file holds; see docs/gates.md. Raises `InvalidInput` with every problem of it."""
        ...

    def gate_check(self, ref: Ref, *, to: str) -> GateCheck: ...
    def decision(self, digest: str) -> Decision:
        """What a move of a stage stood on, by the `evidence` of its row in the history."""
        ...

    # tokens: who may speak with a served registry
    def tokens(self) -> list[Token]: ...
    def create_token(
        self, name: str, *, scope: Scope, names: Sequence[str] = EVERY_NAME, valid_s: float | None = None
    ) -> NewToken:
        """`names` are globs of the adapters that it may change; reading is not limited by them."""
        ...

    def revoke_token(self, token_id: str) -> Token: ...

    # the registry itself
    def doctor(self, *, adopt: bool = False, force: Sequence[str] = ()) -> list[Check]:
        """What is configured, reachable and out of step.

        With `adopt`, what was done in MLflow past us is accepted first where the rules allow it: one check named
        `adopted` for each thing. For the adapters of `force` also a rename under which other gates or tokens hold, and
        the loss of versions that looks like an older backup of MLflow.
        """
        ...

    def gc(self, *, older_than_s: float = DAY_S, dry_run: bool = False) -> GarbageView:
        """Free what no version, job, decision or report refers to; attempts and logs only once they are so old."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What of a lineage is drawn, and the metric that colours it (None: stages do)."""

    direction: Direction = "both"
    depth: int | None = None
    metric: str | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """A page or a picture as it is sent, in ASCII; `policy` is the Content-Security-Policy under which it works."""

    text: str
    media_type: str
    policy: str


class ServedRegistry(RegistryAPI, Protocol):
    """What a server needs beyond the verbs: callers, files that come over the wire, and work that is not waited for."""

    def acting(self, actor: str) -> ServedRegistry:
        """The same registry for another caller: what it changes is recorded under that name."""
        ...

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
        """As in `RegistryAPI`; `files` is the folder where those of a `source` on another machine were put."""
        ...

    def plan(self, request: MergeRequest, *, most_work: float = math.inf) -> PlanView:
        """As in `RegistryAPI`. Beyond `most_work` multiplications it leaves a loss out, or raises `Refused`."""
        ...

    def plan_resize(self, request: ResizeRequest, *, most_work: float = math.inf) -> PlanView: ...
    def witness(self, deed: str, said: Mapping[str, Any]) -> None:
        """Note in the history what a request to MLflow did past us: its method and the end of its path, its body."""
        ...

    def merge_all(self, asked: Sequence[tuple[str, MergeRequest]]) -> list[Submitted | AdapterctlError]:
        """`merge` for several callers by name, none of whom names a stage: to each an answer, or a refusal.

        Their jobs are committed, and nobody was told: `ring` for them. What hits all callers is raised.
        """
        ...

    def ring(self, job_id: str) -> None:
        """Wake a worker for a queued job."""
        ...

    def stage(self) -> AbstractContextManager[Path]:
        """A new empty folder for files that arrive; removed with what is left in it."""
        ...

    def check(self) -> None:
        """Raise unless the ledger answers."""
        ...

    def files(self, ref: Ref) -> AbstractContextManager[tuple[VersionView, Path]]:
        """A version and a folder with its files, unchecked: whoever takes them compares the digests."""
        ...

    def picture(self, ref: Ref, look: Look, *, whole: bool = False) -> Drawing:
        """A version and its nearest relatives as SVG; with `whole` the adapter that `ref` names."""
        ...

    def page(self, ref: Ref, look: Look, *, whole: bool, root: str) -> Drawing:
        """The page of a version or of an adapter; `root` leads from it to the root of the server."""
        ...

    def adapters(self, *, after: str | None = None, limit: int | None = None) -> list[AdapterView]:
        """As in `RegistryAPI`; those that come `after` a name."""
        ...

    def adapter(self, name: str) -> AdapterView: ...
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
        """As in `RegistryAPI`; those that come `after` a name and number."""
        ...

    def pin_base(self, name: str, *, revision: str | None, pins: Mapping[str, str]) -> Base: ...
    def keep_suite(self, suite: Suite) -> SuiteView: ...
    def take_reports(self, reports: Sequence[EvalReport]) -> int: ...
    def start_verification(self, ref: Ref, *, rerun: bool = True) -> Verification | Job:
        """The verdict, or the job that will find it where the recipe has to be run again."""
        ...

    def verification(self, job_id: str) -> Verification:
        """The verdict of an ended job. Raises `Conflict` while it runs, and what ended it where it failed."""
        ...

    def jobs(
        self, *, state: str | None = None, kind: str | None = None, limit: int = 100, before: str | None = None
    ) -> list[Job]: ...
    def doctor(self, *, adopt: bool = False, force: Sequence[str] = (), abroad: bool = False) -> list[Check]:
        """As in `RegistryAPI`; `abroad` leaves out addresses and folders of the server."""
        ...

    def workers(self) -> list[Worker]: ...
    def queue_depths(self) -> list[QueueDepth]:
        """The live jobs, counted by queue and state."""
        ...

    def wake(self, job_id: str) -> None:
        """Ring for a job once more: its worker, or the first ring, may be lost."""
        ...

    def wake_for_unattended(self) -> None:
        """Wake a worker where a job waits and nobody works: its worker was killed, or nobody was told of it."""
        ...

"""How the answers of the registry read as text: pure functions from views to lines, for tables and for one thing shown.

Every piece of foreign text goes through `printable` here or through `columns`; colour comes from `Output`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..registry.domain.base_dtype import told
from ..registry.domain.conversion import METHOD_NAMES
from ..registry.domain.refs import first_few
from ..registry.services.words import EXACT, loss, number
from .output import Output, printable

if TYPE_CHECKING:
    from ..registry.api import (
        AdapterView,
        BakedView,
        Check,
        Converted,
        EventView,
        GarbageView,
        GateCheck,
        GatesView,
        HistoryView,
        MethodView,
        ParentView,
        PlanView,
        RebuildView,
        RecallImpact,
        RetentionRow,
        RetentionView,
        SignatureView,
        StageEventView,
        Submitted,
        SuiteView,
        TuneView,
        Verification,
        Verifications,
        VersionView,
    )
    from ..registry.domain.access import Token
    from ..registry.domain.conversion import Conversion
    from ..registry.domain.evals import Interval
    from ..registry.domain.job import Job, JobEvent
    from ..registry.domain.plan import Interference
    from ..registry.domain.suite import Suite, SuiteTask
    from ..registry.domain.verdict import Decision, Judged, Outcome
    from ..registry.domain.version import Base

#: Layers of a plan that are shown without being asked for.
SHOWN_PAIRS = 20
SHOWN_LAYERS = 5
_STATE_STYLES = {
    "succeeded": "green", "running": "cyan", "failed": "red", "cancelled": "yellow",
    "ok": "green", "warning": "yellow", "error": "red", "passed": "green", "inconclusive": "yellow",
}  # fmt: skip


def size(size_bytes: int) -> str:
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def when(iso: str) -> str:
    """An ISO 8601 time to the minute, in UTC as stored."""
    return iso[:16].replace("T", " ")


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def metrics(values: Mapping[str, float], *, most: int | None = None) -> str:
    shown = [f"{key} {number(value)}" for key, value in values.items()]
    if most is not None and len(shown) > most:
        shown = [*shown[:most], f"+{len(shown) - most}"]
    return ", ".join(shown)


def weighted(parent: ParentView) -> str:
    if parent.weight is not None:
        return f"{parent.ref} × {number(parent.weight)}"
    return f"{parent.ref} ({parent.kind.replace('_', ' ')})"


def adapters_table(views: Sequence[AdapterView], out: Output) -> str:
    if not views:
        return "no adapters yet"
    rows = [
        [v.name, v.latest, str(v.versions), v.base, ", ".join(f"{s} {ref}" for s, ref in v.stages.items()) or "-"]
        for v in views
    ]
    return out.table(["NAME", "LATEST", "VERSIONS", "BASE", "STAGES"], rows, right={2})


def versions_table(views: Sequence[VersionView], out: Output) -> str:
    if not views:
        return "no versions"
    rows = [
        [
            v.ref + (" (removed)" if v.state == "removed" else " (recalled)" if v.recall else ""),
            ", ".join(v.stages) or "-",
            v.method or v.kind,
            str(v.rank),
            size(v.size_bytes),
            loss(v.loss),
            when(v.created_at),
            metrics(v.metrics, most=3),
        ]
        for v in views
    ]
    header = ["VERSION", "STAGES", "MADE BY", "RANK", "SIZE", "LOSS", "CREATED (UTC)", "METRICS"]
    red = {row for row, v in enumerate(views) if v.recall}
    return out.table(header, rows, right={3, 4, 5}, red=red)


def version_text(view: VersionView, out: Output) -> str:
    """Everything about one version, the empty fields left out."""
    title = out.paint(printable(view.ref), "bold")
    if view.stages:
        title += "  " + out.paint(printable(", ".join(view.stages)), "green")
    if view.state == "removed":
        title += "  " + out.paint("removed", "red")
    if view.recall:
        title += "  " + out.paint("recalled", "red")
    shape = f"rank {view.rank}, {view.dtype}, {view.modules} modules, {view.parameters:,} parameters"
    fields: list[tuple[str, Iterable[str]]] = [
        ("recalled", [_recall_text(view)]),
        ("made by", [_made_by(view)]),
        ("converted", [_conversion_text(view.converted)]),
        ("parents", map(weighted, view.parents)),
        ("loss", [_loss_text(view.loss)]),
        ("receipt", [_receipt_text(view.receipt)]),
        ("shape", [f"{shape}, {size(view.size_bytes)}"]),
        ("base", [view.base]),
        ("metrics", [_metric_text(key, value, view.imported) for key, value in view.metrics.items()]),
        ("params", [f"{key} = {value}" for key, value in view.params.items()]),
        ("tags", [f"{key} = {value}" for key, value in view.tags.items()]),
        ("dataset", [view.dataset or ""]),
        ("license", [view.license or ""]),
        ("source", [view.source or ""]),
        ("created", [f"{when(view.created_at)} UTC by {view.created_by}"]),
        ("content", [f"sha256:{view.content_digest}"]),
        ("signatures", map(_signature_text, view.signatures)),
        ("recipe", [f"sha256:{view.recipe_digest}" if view.recipe_digest else ""]),
        ("files", [f"{f.path}  {size(f.size_bytes)}  sha256:{f.sha256[:16]}" for f in view.files]),
        ("location", [view.location]),
        ("mlflow", [view.mlflow_path]),
    ]
    return "\n".join([title, *_fields(fields, out)])


def version_line(view: VersionView, out: Output) -> str:
    """What came out, in one line: a merge by what it lost, another version by what it is."""
    shape = f"rank {view.rank}, {size(view.size_bytes)}, {view.modules} modules of {view.base}"
    passed = (view.receipt or {}).get("passed")
    about = f"loss {loss(view.loss)}, receipt {'passed' if passed else 'failed'}" if view.method else shape
    return f"{out.paint(printable(view.ref), 'bold')}  {printable(about)}"


def baked_text(view: BakedView, out: Output) -> str:
    """A full model that was written: what became of the base's tensors, and what rounding took of the delta."""
    kinds = ((view.changed, "changed"), (view.converted, f"converted to {view.dtype}"), (view.copied, "copied"))
    fields: list[tuple[str, Iterable[str]]] = [
        ("made of", [f"{view.base} + {view.ref}"]),
        ("tensors", [", ".join(f"{count} {kind}" for count, kind in kinds if count)]),
        ("rounding", [f"{loss(view.rounding)} of the delta"]),
        ("untied", [f"{view.untied}, which was tied to the embedding" if view.untied else ""]),
        ("files", [f"{file.path}  {size(file.size_bytes)}  sha256:{file.sha256[:16]}" for file in view.files]),
    ]
    return "\n".join([f"{out.paint(printable(view.folder), 'bold')}  {size(view.size_bytes)}", *_fields(fields, out)])


def converted_text(view: Converted, out: Output) -> str:
    """What a conversion gave, in one line; with each module where it was cut."""
    lost = f"loss {loss(view.loss) if view.loss >= EXACT else f'{view.loss:.1e}'}"
    if not view.loss:
        lost = "loss 0: no value is rounded"
    elif not view.cut_loss:
        lost += f", from rounding to {view.dtype}"
    title = out.paint(printable(view.folder), "bold")
    shape = f"rank {view.rank}, {view.dtype}, {len(view.modules)} modules, {size(view.size_bytes)}"
    line = f"{title}  {METHOD_NAMES[view.method]} of rank {view.source_rank} as LoRA: {shape}; {lost}"
    if not view.cut_loss:
        return line
    rows = [[each.module, str(each.exact_rank), loss(each.loss)] for each in view.modules]
    return f"{line}\n\n" + out.table(["MODULE", "EXACT RANK", "LOSS"], rows, right={1, 2})


def submitted_text(view: Submitted) -> str:
    """What a merge was understood as, before it runs."""
    parents = " + ".join(weighted(parent) for parent in view.parents)
    return printable(f"{parents} → {view.into}, {view.method}, rank {view.rank}")


def plan_text(view: PlanView, out: Output) -> str:
    made = "resized" if view.method == "resize" else f"merged by {printable(view.method)}"
    title = f"{out.paint(printable(view.into), 'bold')} would be {made}"
    fields: list[tuple[str, Iterable[str]]] = [
        ("parents", map(weighted, view.parents)),
        ("base", [view.base]),
        ("shape", [f"rank {view.rank}, {view.dtype}, {size(view.size_bytes)}"]),
        ("recipe", [f"sha256:{view.recipe_digest}"]),
        ("exists as", [view.exists or ""]),
        ("warnings", view.warnings),
    ]
    lines = [title, *_fields(fields, out)]
    if view.forecasts:
        rows = [
            [f.method, str(f.rank), size(f.size_bytes), loss(f.loss), _cpu(f.cpu_s), size(f.memory_bytes), f.note]
            for f in view.forecasts
        ]
        lines += ["", out.table(["METHOD", "RANK", "SIZE", "LOSS", "CPU", "MEMORY", "NOTE"], rows, right=range(1, 6))]
    if view.pairs:
        conflicts = {(each.first, each.second): each.sign_conflict for each in view.interference if each.layer == "all"}
        pairs = [
            [f"{p.first} / {p.second}", str(p.shared_modules)]
            + [f"{x:.3f}" for x in (p.cosine, p.row_overlap, p.column_overlap, p.norm_ratio)]
            + [f"{conflicts[p.first, p.second]:.3f}" if (p.first, p.second) in conflicts else "-"]
            for p in sorted(view.pairs, key=lambda pair: -abs(pair.cosine))[:SHOWN_PAIRS]
        ]
        header = ["PARENTS", "SHARED MODULES", "COSINE", "ROW OVERLAP", "COLUMN OVERLAP", "NORM RATIO", "SIGN CONFLICT"]
        lines += ["", out.table(header, pairs, right=range(1, 7))]
        if len(view.pairs) > SHOWN_PAIRS:
            lines.append(f"{len(view.pairs) - SHOWN_PAIRS:,} more pairs with -o json")
    layers = [each for each in view.interference if each.layer != "all"]
    if layers:
        lines += ["", _layers_text(layers, out)]
    return "\n".join(lines)


def _cpu(seconds: float) -> str:
    if seconds < 0.1:
        return "< 0.1 s"
    return f"{seconds:.2g} s" if seconds < 99 else f"{seconds / 60:.0f} min"


def _layers_text(layers: Sequence[Interference], out: Output) -> str:
    """The layers in which parents disturb each other most: those where their deltas point against each other."""
    worst = sorted(layers, key=lambda each: each.cosine)[:SHOWN_LAYERS]
    rows = [
        [each.layer, f"{each.first} / {each.second}"]
        + [f"{x:.3f}" for x in (each.cosine, each.row_overlap, each.column_overlap, each.sign_conflict)]
        for each in worst
    ]
    header = ["LAYER", "PARENTS", "COSINE", "ROW OVERLAP", "COLUMN OVERLAP", "SIGN CONFLICT"]
    more = f"\n{len(layers) - len(worst)} more layers with -o json" if len(layers) > len(worst) else ""
    return out.table(header, rows, right=range(2, 6)) + more


def retention_text(view: RetentionView, out: Output, alone: VersionView | None = None) -> str:
    """One line a task: base, parents, the version, and what it kept of the parent that owns the task (marked *).

    `alone` is the version just evaluated: its own figures are told of tasks that nothing can be held against.
    """
    lines = [out.paint(printable(view.ref), "bold")]
    if view.rows:
        header, rows = _retention_table(view)
        lines.append(out.table(header, rows, right=range(2, len(header) - 2)))
    notes = {f"{row.task}{told(row.dtype)}: {row.note}" for row in view.rows if row.note}
    lines += [out.paint(f"  {printable(note)}", "dim") for note in sorted(notes)]
    lines += [out.paint(f"  {printable(note)}", "dim") for note in view.notes]
    compared = {row.task for row in view.rows}
    own = [] if alone is None else [(alone.imported, key, value) for key, value in alone.metrics.items() if "/" in key]
    figures = [
        _metric_text(key, value, imported) for imported, key, value in own if key.partition("/")[0] not in compared
    ]
    why = "not compared, its parents are not evaluated on it" if figures else "not evaluated"
    lines += [printable(f"  {why}: {name}") for name in view.missing]
    if view.missing or not view.rows:
        lines += [printable(f"  {figure}") for figure in figures]
    if not (view.rows or view.missing or figures):
        lines.append("  not evaluated yet")
    return "\n".join(lines)


def tune_text(view: TuneView, out: Output, *, explain: bool) -> str:
    """The winner with what it keeps held out, beside the plain sum; and the trials that saw every sample."""
    winner = view.trials[view.winner]
    weights = " ".join(f"{parent.ref}={parent.weight:g}" for parent in winner.weights)
    weights += "".join(f" --layer-weights {layer}" for layer in winner.layers)
    lines = [out.paint(printable(f"trial {winner.number}: {winner.method} r{winner.rank}, {weights}"), "bold")]
    plain = {row.task: row for row in view.heldout if row.trial == view.plain}
    rows = [
        [
            row.task, row.metric, owner, number(row.base), number(row.parent), number(row.child),
            _interval(row.retention), _interval(row.gain_kept), _interval(plain[row.task].retention),
        ]
        for row, owner in zip([row for row in view.heldout if row.trial == view.winner], view.owners, strict=True)
    ]  # fmt: skip
    header = ["TASK", "METRIC", "PARENT", "BASE", "ITS", "THIS", "RETENTION", "GAIN KEPT", "PLAIN SUM"]
    lines.append(out.table(header, rows, right={3, 4, 5}))
    samples = f"{view.heldout_samples} held-out samples; {view.tuning_samples} others decided{told(view.base_dtype)}"
    lines.append(out.paint(f"  on {samples}; {view.used:.1f} of {view.budget:g} full evaluations used", "dim"))
    lines += [out.paint(f"  {line}", "dim") for line in view.advice]
    best = sorted((trial for trial in view.trials if trial.complete), key=lambda trial: -trial.worst)[:10]
    cells = [
        [
            str(t.number), f"{t.method} r{t.rank}", *(f"{weight:g}" for weight in view.weights(t)),
            *(f"{t.kept[task]:.1%}" for task in view.tasks), f"{t.worst:.1%}", "*" if t.number in view.front else "",
        ]
        for t in best
    ]  # fmt: skip
    columns = ["TRIAL", "METHOD", *view.searched, *(f"KEPT {task}" for task in view.tasks), "LEAST", "FRONT"]
    lines += ["", out.table(columns, cells, right={0, *range(2, len(columns) - 1)})]
    if explain:
        lines += ["", *(printable(f"* {line}") for line in view.explanation)]
    if not view.jobs:
        command = f"adapterctl merge {weights} --method {winner.method} --rank {winner.rank}"
        lines += ["", out.paint(printable(f"make it: {command} --into {view.into}"), "cyan")]
    return "\n".join(lines)


def history_text(view: HistoryView, out: Output) -> str:
    notes = ("rename", "mlflow", "tag", "sign")  # no stage is emptied by them
    rows = [
        [
            str(e.seq), when(e.at), e.stage or "-", e.action, e.ref or ("-" if e.action in notes else "(empty)"),
            e.previous or "-", e.actor,
            e.hash[:12], (e.evidence or "-")[:12], e.reason,
        ]
        for e in view.events
    ]  # fmt: skip
    if not rows:
        return f"{view.name}: no stage has changed yet"
    header = ["#", "WHEN (UTC)", "STAGE", "ACTION", "VERSION", "BEFORE", "WHO", "HASH", "EVIDENCE", "REASON"]
    return out.table(header, rows, right={0})


def events_table(events: Sequence[EventView], out: Output) -> str:
    if not events:
        return "nothing happened"
    rows = [
        [str(e.id), when(e.at), e.kind, _about(e), e.stage or "-", e.previous or "-", e.actor, e.reason] for e in events
    ]
    return out.table(["#", "WHEN (UTC)", "WHAT", "OF", "STAGE", "BEFORE", "WHO", "REASON"], rows, right={0})


def feed_text(event: EventView) -> str:
    """An event in one line, for those who watch."""
    at = event.at.replace("T", " ").removesuffix("Z")
    stage = f"  {event.stage}" if event.stage else ""
    before = f" (was {event.previous})" if event.previous else ""
    reason = f": {event.reason}" if event.reason else ""
    return printable(f"{event.id}  {at}  {event.kind:<8} {_about(event)}{stage}{before}, by {event.actor}{reason}")


def _about(event: EventView) -> str:
    """The version; the adapter where there is none, as when a stage was emptied."""
    return event.ref or event.name or "-"


def stage_event_text(event: StageEventView) -> str:
    now = printable(event.ref or "no version")
    before = f", before: {printable(event.previous)}" if event.previous else ""
    return f"{printable(event.stage)} is {now}{before}"


def approval_text(event: StageEventView) -> str:
    word = "approves" if event.action == "approve" else "no longer approves"
    return printable(f"{event.actor} {word} of {event.ref} for {event.stage}")


def signed_text(version: VersionView, signature: SignatureView, out: Output) -> str:
    """What was signed, for the one who did."""
    fields: list[tuple[str, Iterable[str]]] = [
        ("key", [signature.keyid]),
        ("content", [f"sha256:{version.content_digest}"]),
        ("files", [f"{file.path}  sha256:{file.sha256}" for file in version.files]),
    ]
    return "\n".join([f"{out.paint(printable(version.ref), 'bold')} is signed", *_fields(fields, out)])


def _signature_text(signature: SignatureView) -> str:
    state = f"does not count: {signature.fault}" if signature.fault else "verified"
    return f"key {signature.keyid[:16]}  {when(signature.at)} UTC by {signature.by}, {state}"


def gates_text(view: GatesView, out: Output) -> str:
    """The gates as they are written, with who set them."""
    from .output import as_yaml  # deferred: help prints no YAML

    if view.digest is None:
        return "no gates were set: every version may hold every stage"
    title = f"{out.paint(view.digest[:12], 'bold')}  set by {printable(view.set_by)}, {when(view.set_at)} UTC"
    return f"{title}\n{as_yaml({'gates': view.gates}).rstrip()}"


def gate_check_text(view: GateCheck, out: Output) -> str:
    title = _judged_title(view.ref, view.stage, view.verdict, view.gate, out)
    return "\n".join([title, *_judged_lines(view.conditions, out)])


def decision_text(view: Decision, out: Output) -> str:
    title = _judged_title(view.evidence.ref, view.stage, view.verdict.outcome, view.gate, out)
    fields: list[tuple[str, Iterable[str]]] = [
        ("content", [f"sha256:{view.evidence.content_digest}"]),
        ("approvals", [", ".join(view.evidence.approvals)]),
        ("signatures", [f"by the key {each.key}" for each in view.evidence.signatures if not each.fault]),
    ]
    return "\n".join([title, *_fields(fields, out), *_judged_lines(view.verdict.conditions, out)])


def _judged_title(ref: str, stage: str, outcome: Outcome, gate: str | None, out: Output) -> str:
    by = f"gate {gate[:12]}" if gate else "no gates were set"
    return f"{out.paint(printable(ref), 'bold')} for {printable(stage)}: {_state(outcome, out)}, {by}"


def _judged_lines(conditions: Sequence[Judged], out: Output) -> list[str]:
    """A table of every condition, then why those that are not met are not."""
    rows = [[_VERDICTS[j.verdict], j.condition, _found(j), _signed(j.distance)] for j in conditions]
    head, *body = out.table(["VERDICT", "CONDITION", "FOUND", "DISTANCE"], rows, right={3}).split("\n")
    lines = [head, *(out.paint(line, _STATE_STYLES[j.verdict]) for line, j in zip(body, conditions, strict=True))]
    reasons = [f"  {j.verdict}: {j.reason}" for j in conditions if j.reason and j.verdict != "passed"]
    return lines + [printable(reason) for reason in reasons]


_VERDICTS = {"passed": "passed", "failed": "FAILED", "inconclusive": "INCONCLUSIVE"}


def _found(judged: Judged) -> str:
    if judged.value is None or judged.found:
        return judged.found
    shown = number(judged.value)
    if judged.low is not None and judged.high is not None and judged.low != judged.high:
        shown += f" [{number(judged.low)}, {number(judged.high)}]"
    return shown


def _signed(distance: float | None) -> str:
    return "" if distance is None else f"{distance:+.4g}"


def suites_table(views: Sequence[SuiteView], out: Output) -> str:
    if not views:
        return "no suites yet"
    rows = [[view.name, view.digest[:12], ", ".join(view.adapters) or "-"] for view in views]
    return out.table(["SUITE", "DIGEST", "JUDGES"], rows)


def suite_text(suite: Suite, out: Output) -> str:
    title = f"{out.paint(printable(suite.name), 'bold')}  sha256:{suite.digest}"
    rows = [
        [t.name, f"{len(t.samples())} of {len(t.rows)}", ", ".join(_primary_first(t)), _generated(t), str(t.seed)]
        for t in suite.tasks
    ]
    lines = [title, out.table(["TASK", "SAMPLES", "METRICS", "NEW TOKENS", "SEED"], rows, right={3, 4})]
    for task in suite.tasks:
        lines += [printable(f"  {row.id}: {row.prompt!r} → {row.target!r}") for row in task.rows[:2]]
    return "\n".join(lines)


def _primary_first(task: SuiteTask) -> list[str]:
    return sorted(task.metrics, key=lambda metric: metric != task.primary)


def _generated(task: SuiteTask) -> str:
    return str(task.max_new_tokens) if task.generates else "-"


def verification_text(view: Verification, out: Output) -> str:
    distance = f", relative distance {view.distance:.1e}" if view.distance else ""
    fields: list[tuple[str, Iterable[str]]] = [
        ("files", [view.files]),
        ("recipe", [view.recipe + distance]),
        ("details", view.details),
        ("signatures", map(_signature_text, view.signatures)),
    ]
    return "\n".join([out.paint(printable(view.ref), "bold"), *_fields(fields, out)])


def verifications_text(found: Verifications, out: Output) -> str:
    """One line for all, and below it each version that is bad."""
    again = f", {found.rerun} merges were made again" if found.rerun else ""
    total = f"{found.checked - len(found.bad)} of {found.checked} versions are as registered{again}"
    return "\n\n".join([total, *(verification_text(each, out) for each in found.bad)])


def jobs_table(jobs: Sequence[Job], out: Output) -> str:
    if not jobs:
        return "no jobs"
    rows = [[j.id, _job_state(j), clock(j.created_at)[:16], j.title or j.kind] for j in jobs]
    return out.table(["ID", "STATE", "CREATED (UTC)", "WHAT"], rows)


def tokens_table(tokens: Sequence[Token], out: Output) -> str:
    if not tokens:
        return "no tokens"
    header = ["ID", "NAME", "SCOPE", "ADAPTERS", "CREATED (UTC)", "LAST USED", "STATE"]
    return out.table(header, [_token_row(token) for token in tokens])


def _token_row(token: Token) -> list[str]:
    state = f"valid until {clock(token.expires_at)}" if token.expires_at else "valid"
    if token.revoked_at:
        state = f"revoked {clock(token.revoked_at)}"
    elif token.expires_at and token.expires_at < time.time():
        state = f"expired {clock(token.expires_at)}"
    used = clock(token.last_used_at) if token.last_used_at else "never"
    return [token.id, token.name, token.scope, ", ".join(token.names), clock(token.created_at), used, state]


def job_text(job: Job, out: Output) -> str:
    error = job.error or {}
    fields: list[tuple[str, Iterable[str]]] = [
        ("state", [_job_state(job)]),
        ("attempt", [f"{job.attempt} of {job.max_attempts}"]),
        ("created", [f"{clock(job.created_at)} UTC by {job.created_by}"]),
        ("started", [f"{clock(job.started_at)} UTC" if job.started_at else ""]),
        ("ended", [f"{clock(job.ended_at)} UTC" if job.ended_at else ""]),
        # what a search found is a page of its own
        ("result", [f"{key} = {brief(value)}" for key, value in job.result.items() if key != "finding"]),
        ("error", [error.get("message", "")]),
        ("hint", [error.get("hint", "")]),
    ]
    title = f"{out.paint(printable(job.title or job.kind), 'bold')}  {job.id}"
    return "\n".join([title, *_fields(fields, out)])


def event_text(event: JobEvent) -> str:
    return printable(f"{clock(event.at)}  {event.kind:<10} {event.message}")


def methods_text(views: Sequence[MethodView], out: Output) -> str:
    rows = [[v.name, "yes" if v.exact else "no", v.cost, v.summary] for v in views]
    return out.table(["METHOD", "EXACT", "COST", "WHAT IT DOES"], rows)


def method_text(view: MethodView, out: Output) -> str:
    fields: list[tuple[str, Iterable[str]]] = [
        ("what", [view.summary]),
        ("when", [view.when]),
        ("exact", ["yes" if view.exact else "no"]),
        ("laws", [f"keeps all but {', '.join(view.breaks).replace('_', ' ')}" if view.breaks else "keeps all"]),
        ("parents", [_parents_taken(view)]),
        ("cost", [view.cost]),
        ("paper", [view.paper]),
        ("options", [f"{o.name} ({o.type}, default {o.default}): {o.help}" for o in view.options]),
    ]
    return "\n".join([out.paint(printable(view.name), "bold"), *_fields(fields, out)])


def _parents_taken(view: MethodView) -> str:
    if view.max_parents == 1:
        return "one"
    count = "two or more" if view.max_parents is None else f"{view.max_parents} at most"
    return f"{count}, of one rank in each module" if view.equal_ranks else f"{count}, of any ranks"


def bases_table(bases: Sequence[tuple[Base, tuple[str, ...]]], out: Output) -> str:
    if not bases:
        return "no bases yet"
    rows = [
        [
            b.name,
            b.revision or "-",
            (b.config_digest or "-")[:12],
            ", ".join(s for s in spellings if s != b.name) or "-",
        ]
        for b, spellings in bases
    ]
    return out.table(["BASE", "REVISION", "CONFIG", "ALSO WRITTEN"], rows)


def checks_text(checks: Sequence[Check], out: Output) -> str:
    width = max(len(c.name) for c in checks)
    lines = []
    for c in checks:
        lines.append(f"{_state(c.status.ljust(7), out)}  {printable(c.name).ljust(width)}  {printable(c.detail)}")
        if c.hint:
            lines.append(f"{'':9}{'':{width}}  {out.paint('→ ' + printable(c.hint), 'cyan')}")
    return "\n".join(lines)


def garbage_text(garbage: GarbageView, out: Output) -> str:
    """What nobody refers to, a line each, and how much that is."""
    if not garbage.found:
        return "nothing to free"
    rows = [[each.kind, each.name, size(each.size_bytes), each.reason] for each in garbage.found]
    total = f"{size(garbage.size_bytes)} {'can be' if garbage.dry_run else 'are'} freed"
    return f"{out.table(['KIND', 'NAME', 'SIZE', 'REASON'], rows)}\n{total}"


def rebuild_text(plan: RebuildView, out: Output) -> str:
    """What would be made of what, in the order of the steps, and what cannot be."""
    rows = [[step.ref, step.action, " + ".join(step.parents) or "-", step.note] for step in plan.steps]
    title = out.paint(printable(f"{plan.new} in place of {plan.old}"), "bold")
    return f"{title}\n{out.table(['VERSION', 'STEP', 'FROM', 'NOTE'], rows)}"


def recall_text(impact: RecallImpact, out: Output) -> str:
    """Whom a recall hits and where they serve now, or whom it sets free."""
    recalled = impact.action == "recall"
    count = len(impact.descendants)
    whom = f"{count} descendant{'' if count == 1 else 's'}"
    title = f"{printable(impact.ref)} {'is recalled' if recalled else 'is no longer recalled'}"
    fields: list[tuple[str, Iterable[str]]] = [
        ("reason", [impact.reason]),
        (
            "hits" if recalled else "sets free",
            [f"{whom}: {first_few(impact.descendants)}" if count else "nothing else"],
        ),
        ("serving", [f"{hit.name}@{hit.stage} is {hit.ref}" for hit in impact.stages]),
    ]
    return "\n".join([out.paint(title, "red" if recalled else "green"), *_fields(fields, out)])


def _recall_text(view: VersionView) -> str:
    hit = view.recall
    if hit is None:
        return ""
    through = "" if hit.ref == view.ref else f"made of {hit.ref}: "
    return f"{through}{hit.reason} ({when(hit.at)} UTC by {hit.by})"


def _metric_text(key: str, value: float, imported: Mapping[str, str]) -> str:
    """One that this registry did not measure says where it is from."""
    source = imported.get(key)
    return f"{key} = {number(value)}" + (f"  ({source})" if source else "")


def _made_by(view: VersionView) -> str:
    return f"merge ({view.method})" if view.method else view.kind


def _loss_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{loss(value)} of the exact sum" if value >= EXACT else "none: the exact sum, rounded once"


def _conversion_text(conversion: Conversion | None) -> str:
    if conversion is None:
        return ""
    how = "exactly" if conversion.rank is None else f"to rank {conversion.rank}"
    name = METHOD_NAMES[conversion.method]
    return f"{how} from {name}, weights sha256:{conversion.weights}, revision {conversion.rev}, its header says"


def _receipt_text(receipt: Mapping[str, Any] | None) -> str:
    if not receipt:
        return ""
    verdict = "passed" if receipt.get("passed") else "failed"
    return f"{verdict} {len(receipt.get('checks', ()))} checks of the written files, all with -o json"


def brief(value: Any) -> str:
    """Whatever a field holds, in at most 40 characters."""
    from ..registry.api import ParentView  # deferred: help draws no views

    if value is None or value == () or value == []:
        return "-"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):  # a parent that came from a server
        value = ParentView(**value)
    if isinstance(value, ParentView):
        return weighted(value)
    text = ", ".join(map(brief, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _job_state(job: Job) -> str:
    if job.ended:
        return job.state.value
    if job.cancel_requested:
        return f"{job.state.value}, cancel requested"
    return f"{job.progress.stage} {job.progress.done}/{job.progress.total}" if job.progress else job.state.value


def _state(text: str, out: Output) -> str:
    return out.paint(text, _STATE_STYLES.get(text.strip(), "bold"))


def _retention_table(view: RetentionView) -> tuple[list[str], list[list[str]]]:
    parents = list(dict.fromkeys(ref for row in view.rows for ref in row.parents))
    header = ["TASK", "METRIC", "N", "BASE", *parents, "THIS", "RETENTION", "GAIN KEPT"]
    return header, [_retention_row(row, parents) for row in view.rows]


def _retention_row(row: RetentionRow, parents: Sequence[str]) -> list[str]:
    arrow = "↑" if row.direction == "higher" else "↓"
    cells = [
        number(row.parents[ref]) + ("*" if ref == row.owner else "") if ref in row.parents else "-" for ref in parents
    ]
    return [
        row.task, f"{row.metric} {arrow}", str(row.samples), number(row.base), *cells, number(row.child),
        _interval(row.retention), _interval(row.gain_kept),
    ]  # fmt: skip


def _interval(value: Interval | None) -> str:
    if value is None:
        return "n/a"
    return f"{value.value:.0%} [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def _fields(fields: Iterable[tuple[str, Iterable[str]]], out: Output) -> list[str]:
    """`name  value` lines, a field with several values going on below; empty values are left out."""
    lines = []
    for name, values in fields:
        for position, value in enumerate(value for value in values if value):
            label = (name if position == 0 else "").ljust(10)
            lines.append(f"  {out.paint(label, 'dim')}  {printable(value)}")
    return lines

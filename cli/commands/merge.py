"""For those who merge: what a merge would give, the merge itself, its methods, one adapter at a smaller rank, the proof
that a recipe repeats; and the recipes of a family run again with another parent.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...registry.domain.errors import InvalidInput, JobCancelled, JobFailed, NotFound, Refused
from ...registry.domain.refs import Ref, parse_ref
from .. import parse, views
from ..complete import complete_names, complete_refs
from ..connect import Session, add_verbs, confirm
from ..follow import follow, version_of
from ..output import printable, write_new
from ..signing import signature_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...registry.api import PlanView, RegistryAPI, Submitted, VersionView
    from ...registry.domain.recipe import MergeRequest, OptionValue

GROUP = "Merging"

Parents = Annotated[
    list[str],
    typer.Argument(metavar="REF[=WEIGHT]", help="Two parents or more; weights are 1.", autocompletion=complete_refs),
]
Into = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The adapter it becomes.  [default: parents, joined]", autocompletion=complete_names
    ),
]
#: What `register` calls it.
Name = Annotated[str | None, typer.Option("--name", hidden=True)]
Weights = Annotated[str | None, typer.Option(metavar="W,W,...", help="Weights of all parents, in order.")]
LayerWeights = Annotated[
    list[str] | None,
    typer.Option(metavar="P=W,W", help="Weights in modules P, as in layers.0-15=1,0.2; may be repeated."),
]
Method = Annotated[str, typer.Option(metavar="NAME", help="See `adapterctl methods`.")]
Rank = Annotated[
    int | None, typer.Option(min=1, metavar="R", help="Rank of the result, where the method has a choice.")
]
Density = Annotated[float | None, typer.Option(metavar="D", help="Share of entries kept; as --option density=D.")]
MethodOption = Annotated[
    list[str] | None, typer.Option("--option", metavar="K=V", help="An option of the method; may be repeated.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of methods that draw at random.")]
Dtype = Annotated[
    str | None, typer.Option(metavar="TYPE", help="bf16, f16, f32 or f64.  [default: the widest parent's]")
]
Suites = Annotated[
    list[str] | None, typer.Option("--suite", metavar="FILE", help="Evaluate the result on it; may be repeated.")
]
MaxLoss = Annotated[float | None, typer.Option(metavar="L", help="Refuse a result that loses more, e.g. 0.02.")]


def add_to(app: typer.Typer) -> None:
    add_verbs(
        app,
        {"merge": merge, "plan": plan, "resize": resize, "methods": methods, "verify": verify, "rebuild": rebuild},
        group=GROUP,
    )


def merge(
    session: Session,
    parents: Parents,
    into: Into = None,
    method: Method = "sum",
    rank: Rank = None,
    weights: Weights = None,
    layer_weights: LayerWeights = None,
    density: Density = None,
    option: MethodOption = None,
    seed: Seed = None,
    dtype: Dtype = None,
    suite: Suites = None,
    max_loss: MaxLoss = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A tag; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan only.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the result, or print the job's id.")] = True,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wait no longer, e.g. 90s, 5m, 1.5h.")] = None,
    name: Name = None,
) -> None:
    """Merge adapters into a new version.

    Parents are checked first, the result is proved afterwards, and its lineage is kept. Ctrl-C stops the
    waiting, not the merge.

    Example: adapterctl merge translate:v3 chat:v5=0.6 --into assistant
    """
    timeout_s = parse.duration_s(timeout)
    into = parse.into(into, name)
    request = _request(
        parents, into, method, rank, weights, layer_weights, density, option, seed, dtype, suite, max_loss
    )
    request = replace(request, tags=parse.pairs(tag or (), option="--tag"))
    if dry_run:
        _tell_plan(session, session.registry(readonly=True).plan(request))
        return
    registry = session.registry()
    submitted = registry.merge(request)
    _tell(session, [parent.ref for parent in request.parents], submitted)
    _finish(session, registry, submitted, wait=wait, timeout_s=timeout_s)


def resize(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="The version.", autocompletion=complete_refs)],
    rank: Annotated[int | None, typer.Option(min=1, metavar="R", help="Rank of the result.")] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="E", help="The smallest rank that keeps this share, e.g. 0.99.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The largest rank whose file fits, e.g. 20MB.")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The adapter it becomes.  [default: its own]", autocompletion=complete_names),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="bf16, f16, f32 or f64.  [default: its own]")
    ] = None,
    suite: Suites = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan only.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the result, or print the job's id.")] = True,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Wait no longer, e.g. 90s, 5m, 1.5h.")] = None,
    name: Name = None,
) -> None:
    """Make a version of a smaller rank.

    Cuts each module exactly, from the file alone: nothing of that rank is closer. The result is a new
    version of the same adapter, proved, evaluated and kept in the lineage as a merge is.

    Example: adapterctl resize translate:v3 --energy 0.99
    """
    from ...registry.domain.recipe import ResizeRequest  # deferred: help needs no recipes

    timeout_s = parse.duration_s(timeout)
    request = ResizeRequest(
        ref=parse_ref(ref),
        rank=rank,
        energy=energy,
        size_bytes=parse.size_bytes(size),
        into=parse.into(into, name),
        dtype=parse.dtype(dtype),
        suites=tuple(suite or ()),
    )
    request.check()
    if dry_run:
        _tell_plan(session, session.registry(readonly=True).plan_resize(request))
        return
    registry = session.registry()
    submitted = registry.resize(request)
    _tell(session, [request.ref], submitted)
    _finish(session, registry, submitted, wait=wait, timeout_s=timeout_s)


def plan(
    session: Session,
    parents: Parents,
    into: Into = None,
    method: Method = "sum",
    rank: Rank = None,
    weights: Weights = None,
    layer_weights: LayerWeights = None,
    density: Density = None,
    option: MethodOption = None,
    seed: Seed = None,
    dtype: Dtype = None,
    name: Name = None,
) -> None:
    """Tell what a merge would give, and change nothing.

    Whether these parents fit, rank and size of the result, what each method would lose.

    Example: adapterctl plan translate:v3 chat:v5
    """
    into = parse.into(into, name)
    request = _request(parents, into, method, rank, weights, layer_weights, density, option, seed, dtype, None, None)
    _tell_plan(session, session.registry(readonly=True).plan(request))


def methods(
    session: Session, name: Annotated[str | None, typer.Argument(metavar="METHOD", help="One method in full.")] = None
) -> None:
    """List the merge methods, or explain one.

    Example: adapterctl methods svd
    """
    known = session.registry(readonly=True).methods()
    if name is None:
        session.out.data(known, text=lambda: views.methods_text(known, session.out), names=[m.name for m in known])
        return
    method = next((m for m in known if m.name == name), None)
    if method is None:
        raise NotFound(f"there is no merge method {name!r}", hint=f"known: {', '.join(m.name for m in known)}")
    session.out.data(method, text=lambda: views.method_text(method, session.out), names=[method.name])


def verify(
    session: Session,
    ref: Annotated[str | None, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version; -q names those that are bad.")] = False,
    rerun: Annotated[
        bool | None,
        typer.Option(
            "--rerun/--no-rerun", help="Run the recipe of a merge again.  [default: rerun; with --all no-rerun]"
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The public key that has to have signed it, Ed25519 in PEM.")
    ] = None,
    envelope: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --key: write what it signed, for tools that read DSSE.")
    ] = None,
) -> None:
    """Check stored bytes, and that a merge repeats.

    Compares the files with their digests and runs the recipe of a merge again. With --all the files of every
    version, and its merges only with --rerun. Exits with 1 when bytes are damaged or a recipe gives something else,
    and with 5 when the key did not sign the version.

    Example: adapterctl verify translate-chat:v1
    """
    if every == (ref is not None):
        raise InvalidInput("verify takes one version, or --all", hint="adapterctl verify --all")
    if envelope is not None and key is None:
        raise InvalidInput("--envelope is for --key", hint=f"adapterctl verify REF --key FILE --envelope {envelope}")
    if ref is None:
        if key is not None:
            raise InvalidInput("--key is for one version", hint=f"adapterctl verify REF --key {key}")
        _verify_all(session, rerun=bool(rerun))
        return
    asked = parse_ref(ref)
    version = session.registry(readonly=True).version(asked)
    signed = signature_of(asked, version, key) if key is not None else None
    asked = Ref(version.name, number=version.number)  # what a stage means may change in between
    # only a recipe that is run again needs a home that can be written
    again = rerun is not False and version.recipe_digest is not None
    found = session.registry(readonly=not again).verify(asked, rerun=again)
    session.out.data(found, text=lambda: views.verification_text(found, session.out), names=[found.ref])
    if signed is not None:
        session.out.say(f"signed by {printable(str(key))}")
        if envelope is not None:
            from ...registry.wire import to_json  # deferred: help writes no JSON

            write_new(envelope, to_json(signed) + "\n")
    if found.files == "damaged" or found.recipe == "different":
        raise typer.Exit(1)


def _verify_all(session: Session, *, rerun: bool) -> None:
    from ...registry.services.verify import verify_all  # deferred: help verifies nothing

    found = verify_all(session.registry(readonly=not rerun), rerun=rerun)
    session.out.data(
        found, text=lambda: views.verifications_text(found, session.out), names=[each.ref for each in found.bad]
    )
    if found.bad:
        raise typer.Exit(1)


def rebuild(
    session: Session,
    replaced: Annotated[
        str, typer.Option("--replace", metavar="OLD=NEW", help="The version to replace, and the one in its place.")
    ],
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="REF", help="This descendant only, and what lies between.", autocompletion=complete_refs
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be made, and make nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for all of it, or print the job's id.")] = True,
) -> None:
    """Make all that is made of a version anew from another one.

    Runs the recipes of its descendants again, parents before children, as new versions that supersede
    the old ones. What was trained on from it cannot be run again, and is named.

    Example: adapterctl rebuild --replace translate:v3=translate:v4 --dry-run
    """
    old, equals, new = replaced.partition("=")
    if not equals:
        raise InvalidInput(f"--replace {replaced!r} names no new version", hint="--replace translate:v3=translate:v4")
    asked = (parse_ref(old), parse_ref(new))
    until = parse_ref(ref) if ref else None
    registry = session.registry(readonly=dry_run)
    planned = registry.rebuild(*asked, until=until, dry_run=True)
    if dry_run:
        names = [step.ref for step in planned.steps if step.action == "merge"]
        session.out.data(planned, text=lambda: views.rebuild_text(planned, session.out), names=names)
        return
    if not yes:
        session.out.say(views.rebuild_text(planned, session.out))
        confirm("make these versions?", f"adapterctl rebuild --replace {replaced} --yes")
    job = registry.rebuild(*asked, until=until).job
    assert job is not None
    if not wait:
        session.out.say(f"queued; the first step is: adapterctl jobs wait {job.id}")
        session.out.data(job, text=lambda: job.id, names=[job.id])
        return
    made: list[str] = []
    evaluations: list[str] = []
    waiting = [job.id]
    while waiting:
        ended = follow(session, registry, waiting.pop(0))
        made.append(ended.result["version_id"])
        then = [registry.job(each) for each in ended.result.get("jobs", ())]
        waiting += [each.id for each in then if each.kind == "rebuild"]
        evaluations += [each.id for each in then if each.kind == "eval"]
    if evaluations:
        session.out.say(f"{len(evaluations)} evaluations go on: adapterctl jobs ls --kind eval")
    adapters = sorted({parse_ref(step.ref).name for step in planned.steps})
    by_id = {version.id: version for name in adapters for version in registry.versions(name)}
    found = [by_id[version_id] for version_id in made]
    session.out.data(
        found, text=lambda: views.versions_table(found, session.out), names=[version.ref for version in found]
    )


def _request(
    parents: list[str],
    into: str | None,
    method: str,
    rank: int | None,
    weights: str | None,
    layer_weights: list[str] | None,
    density: float | None,
    option: list[str] | None,
    seed: int | None,
    dtype: str | None,
    suite: list[str] | None,
    max_loss: float | None,
) -> MergeRequest:
    from ...registry.domain.recipe import MergeRequest, parse_layer_weights  # deferred: help needs no recipes

    options: dict[str, OptionValue] = parse.options(option or ())
    if density is not None:
        if "density" in options:
            raise InvalidInput("density is given twice, by --density and by --option", hint="use one of the two")
        options["density"] = density
    return MergeRequest(
        parents=parse.parents(parents, weights),
        into=into,
        method=method,
        rank=rank,
        dtype=parse.dtype(dtype),
        seed=seed,
        options=options,
        suites=tuple(suite or ()),
        max_loss=max_loss,
        layers=tuple(map(parse_layer_weights, layer_weights or ())),
    )


def _tell_plan(session: Session, found: PlanView) -> None:
    session.out.data(found, text=lambda: views.plan_text(found, session.out), names=[found.into])


def _tell(session: Session, asked: Sequence[Ref], submitted: Submitted) -> None:
    """Echo how the request was understood: what its references mean now, the method and the rank that follow."""
    for ref, pinned in zip(asked, submitted.parents, strict=True):
        if str(ref) != pinned.ref:
            session.out.say(f"{ref} → {pinned.ref}")
    session.out.say(views.submitted_text(submitted))
    for warning in submitted.warnings:
        session.out.warn(warning)
    if submitted.version is not None:
        session.out.say(f"the same recipe made {submitted.version.ref} before; nothing is new")
    elif submitted.deduplicated:
        session.out.say("the same merge is under way already; joining it")


def _finish(
    session: Session, registry: RegistryAPI, submitted: Submitted, *, wait: bool, timeout_s: float | None
) -> None:
    """Wait for the version, and print it with what it kept of its parents; or print the job's id."""
    if not wait and submitted.job is not None:
        job_id = submitted.job.id
        session.out.say(f"queued; wait for it with: adapterctl jobs wait {job_id}")
        session.out.data(submitted, text=lambda: job_id, names=[job_id])
        return
    version, evaluated = _made(session, registry, submitted, timeout_s)
    parts = [views.version_line(version, session.out)]
    if evaluated:
        parts.append(views.retention_text(registry.retention(parse_ref(version.ref)), session.out))
    session.out.data(version, text=lambda: "\n\n".join(parts), names=[version.ref])


def _made(
    session: Session, registry: RegistryAPI, submitted: Submitted, timeout_s: float | None
) -> tuple[VersionView, bool]:
    """The version that this recipe made, before or in the job that is waited for; and whether it was evaluated now."""
    if submitted.version is not None:
        return submitted.version, False
    assert submitted.job is not None
    job = follow(session, registry, submitted.job.id, timeout_s=timeout_s)
    version = version_of(registry, submitted.into, job)
    evaluations = job.result.get("jobs", ())
    try:
        for job_id in evaluations:
            follow(session, registry, job_id, timeout_s=timeout_s)
    except (JobFailed, JobCancelled, Refused) as error:
        session.out.warn(f"{version.ref} is registered, but not evaluated: {error.message}")
        return version, False
    return version, bool(evaluations)

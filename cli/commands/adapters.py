"""For those who bring adapters, look at them, and take them away: register, convert, ls, show, diff, pull, rm."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...registry.domain.errors import InvalidInput
from ...registry.domain.refs import Ref, parse_ref
from .. import parse, views
from ..complete import complete_names, complete_refs, complete_stages
from ..connect import Session, add_verbs, confirm
from ..diff_text import diff_text
from ..output import printable
from ..signing import pull_signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...registry.api import Registered

GROUP = "Adapters"
#: How many lines a table has where nobody says.
ROWS = 1000
RefArgument = Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)]


class Kind(StrEnum):
    imported = "import"
    train = "train"


def add_to(app: typer.Typer) -> None:
    verbs = (register, convert, ls, show, diff, pull, rm)
    add_verbs(app, {verb.__name__: verb for verb in verbs}, group=GROUP)


def register(
    session: Session,
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="A folder, hf://ORG/REPO@REVISION, runs:/RUN_ID/PATH or models:/NAME/V."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The adapter it becomes a version of.", autocompletion=complete_names),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model it applies to, where its config does not say.")
    ] = None,
    trained_from: Annotated[
        str | None,
        typer.Option("--from", metavar="REF", help="The version it was trained on from.", autocompletion=complete_refs),
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="How it came to be.  [default: train with --from]")] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A metric; may be repeated.")] = None,
    param: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A parameter; may be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="K=V", help="A tag; may be repeated.")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="TEXT", help="What it was trained on.")] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="Its licence, as an SPDX id.")] = None,
    suite: Annotated[str | None, typer.Option(metavar="FILE", help="The suite that judges this adapter.")] = None,
    assume_converted: Annotated[
        bool, typer.Option("--assume-converted", help="Accept a PiSSA, OLoRA or similar start as already converted.")
    ] = False,
    batch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Register every entry of a YAML list instead.")
    ] = None,
) -> None:
    """Register an adapter as a new version.

    It is checked, digested, pinned to its base and stored. Registering the same bytes again
    returns the version that exists.

    Example: adapterctl register ./out/checkpoint-300 --name translate --metric bleu=0.31
    """
    if batch is not None:
        given = (source, name, base, trained_from, kind, metric, param, tag, dataset, license, suite)
        if any(given) or assume_converted:
            raise InvalidInput("--batch takes everything from its file", hint="drop the other arguments")
        _register_batch(session, batch)
        return
    if source is None or name is None:
        missing = "SOURCE" if source is None else "--name"
        raise InvalidInput(f"{missing} is missing", hint="write adapterctl register ./adapter --name translate")
    registered = session.registry().register(
        source,
        name=name,
        base=base,
        kind=(kind or (Kind.train if trained_from else Kind.imported)).value,
        trained_from=parse_ref(trained_from) if trained_from else None,
        metrics=parse.metrics(metric or ()),
        params=parse.pairs(param or (), option="--param"),
        tags=parse.pairs(tag or (), option="--tag"),
        dataset=dataset,
        license=license,
        suite=suite,
        assume_converted=assume_converted,
    )
    _tell(session, registered)
    session.out.data(
        registered,
        text=lambda: views.version_line(registered.version, session.out),
        names=[registered.version.ref],
    )


def convert(
    session: Session,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A LoHa or LoKr adapter, as PEFT saves it.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that is new or empty.")],
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cut to this rank.  [default: the exact one]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="bf16, f16, f32 or f64.  [default: f32, f64 of f64]")
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=K", help="Of convolutions whose names end so, as in conv=3x3; may be repeated."),
    ] = None,
) -> None:
    """Write a LoHa or LoKr adapter as LoRA; needs no registry.

    Exactly and from its files alone, or cut to a rank, as close as that rank can be. Tells what each module lost.
    The result is an ordinary adapter folder; register it.

    Example: adapterctl convert ./loha --out ./lora
    """
    from ...registry.services.convert import convert as write  # deferred: help reads no files

    kernels = {name: parse.kernel(name, text) for name, text in parse.pairs(kernel or (), option="--kernel").items()}
    made = write(folder, out, rank=rank, dtype=parse.dtype(dtype), kernels=kernels)
    session.out.say(f"register it: adapterctl register {printable(out)} --name NAME --tag converted_from={made.method}")
    session.out.data(made, text=lambda: views.converted_text(made, session.out), names=[made.folder])


def ls(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="List its versions.", autocompletion=complete_names)
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="Versions on this base only.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="K=V", help="Versions with this tag only.")] = None,
    stage: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Versions that hold this stage only.", autocompletion=complete_stages),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="'K>N'", help="Versions that meet this condition only.")
    ] = None,
    descends_from: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Versions that are made of this one only.", autocompletion=complete_refs),
    ] = None,
    dataset: Annotated[str | None, typer.Option(metavar="TEXT", help="Versions trained on it themselves only.")] = None,
    trained_on: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Versions trained on it, or made of one that was.")
    ] = None,
    removed: Annotated[bool, typer.Option("--removed", help="Removed versions too.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help=f"Rows at most.  [default: {ROWS} of a table, else all]"),
    ] = None,
) -> None:
    """List adapters, or the versions of one.

    Example: adapterctl ls --trained-on wmt14 --stage production
    """
    registry = session.registry(readonly=True)
    # a table is read by a person, who wants no minute's worth of it; programs mean all
    most = ROWS if limit is None and session.out.format == "table" else None
    asked_for = most + 1 if most is not None else limit and min(limit, parse.EVERY)
    asked = (name, base, stage, descends_from, dataset, trained_on)
    if all(each is None for each in asked) and not (tag or metric or removed):
        adapters = registry.adapters(limit=asked_for)
        session.out.data(
            adapters, text=lambda: views.adapters_table(adapters[:most], session.out), names=[a.name for a in adapters]
        )
        _tell_more(session, adapters, most)
        return
    found = registry.versions(
        name,
        base=base,
        tag=parse.pairs(tag or (), option="--tag"),
        stage=stage,
        metric=metric or (),
        removed=removed,
        dataset=dataset,
        trained_on=trained_on,
        descends_from=parse_ref(descends_from) if descends_from else None,
        limit=asked_for,
    )
    session.out.data(found, text=lambda: views.versions_table(found[:most], session.out), names=[v.ref for v in found])
    _tell_more(session, found, most)


def _tell_more(session: Session, found: Sequence[object], most: int | None) -> None:
    if most is not None and len(found) > most:
        session.out.say(f"the first {most}; --limit N for more")


def show(session: Session, ref: RefArgument) -> None:
    """Show all that is known about a version.

    Example: adapterctl show translate:v3
    """
    registry = session.registry(readonly=True)
    version = registry.version(parse_ref(ref))

    def text() -> str:
        parts = [views.version_text(version, session.out)]
        if version.method and version.state == "live":
            retention = registry.retention(Ref(version.name, number=version.number))
            parts += [views.retention_text(retention, session.out)] if retention.rows else []
        return "\n\n".join(parts)

    session.out.data(version, text=text, names=[version.ref])


def diff(
    session: Session,
    first: RefArgument,
    second: Annotated[str, typer.Argument(metavar="REF", help="Another.", autocompletion=complete_refs)],
    layers: Annotated[
        bool, typer.Option("--layers", help="Module by module too, those that are farthest apart first.")
    ] = False,
    top: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --layers: modules at most.  [default: 10, all as JSON]")
    ] = None,
) -> None:
    """Compare two versions.

    Tells what differs in their records, and how their deltas relate. Of merges, --layers tells what each lost, too.

    Example: adapterctl diff translate:v2 translate:v3 --layers
    """
    if top and not layers:
        raise InvalidInput("--top is how many modules of --layers to show", hint="add --layers")
    found = session.registry(readonly=True).diff(parse_ref(first), parse_ref(second), layers=layers)
    shown = replace(found, layers=found.layers[:top]) if found.layers and top else found
    session.out.data(shown, text=lambda: diff_text(found, session.out, top=top), names=[found.first, found.second])


def pull(
    session: Session,
    ref: RefArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is new or empty.")],
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only what this public key has signed, Ed25519 in PEM.")
    ] = None,
) -> None:
    """Copy the files of a version into a folder.

    They are in PEFT's layout and checked against the digests. With --key the digests are those that were signed,
    whatever the registry says; exits with 5 and copies nothing where that key did not sign them.

    Example: adapterctl pull translate@production ./translate
    """
    registry, asked = session.registry(readonly=True), parse_ref(ref)
    version = registry.pull(asked, folder) if key is None else pull_signed(registry, asked, folder, key)
    session.out.say(f"{version.ref} is in {printable(folder)}")
    if version.recall:
        session.out.warn(f"{version.ref} is recalled: {version.recall.reason}")
    session.out.data(version, text=lambda: str(folder), names=[version.ref])


def rm(
    session: Session,
    ref: RefArgument,
    reason: Annotated[str, typer.Option(metavar="TEXT", callback=parse.in_utf8, help="Why; it is kept.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a version that nothing descends from.

    Its files are deleted; its number is never used again.

    Example: adapterctl rm translate:v1 --reason 'trained on leaked data' --yes
    """
    asked = parse.stated_version(ref)
    registry = session.registry()
    version = registry.version(asked)
    if version.state == "removed":
        session.out.say(f"{version.ref} was removed before; nothing is new")
    elif not yes:
        confirm(
            f"remove {version.ref} ({views.size(version.size_bytes)}) for good?", f"adapterctl rm {version.ref} --yes"
        )
    removed = registry.remove(Ref(version.name, number=version.number), reason=reason)
    if version.state == "live":
        session.out.say(f"{removed.ref} is removed")
    session.out.data(removed, text=lambda: removed.ref, names=[removed.ref])


def _register_batch(session: Session, path: Path) -> None:
    from ..batch import read_batch  # deferred: reads YAML

    entries = read_batch(path)
    registry = session.registry()
    done = []
    for entry in entries:
        done.append(entry.register(registry))
        _tell(session, done[-1])
    versions = [registered.version for registered in done]
    session.out.data(
        done, text=lambda: views.versions_table(versions, session.out), names=[version.ref for version in versions]
    )


def _tell(session: Session, registered: Registered) -> None:
    ref = registered.version.ref
    session.out.say(f"registered {ref}" if registered.created else f"{ref} holds these bytes already; nothing is new")
    for warning in registered.warnings:
        session.out.warn(warning)

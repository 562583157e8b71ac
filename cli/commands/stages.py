"""For those who decide which version serves: tag, approve, sign, promote, rollback, demote, adopt, recall, history."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...registry.domain.errors import InvalidInput, NotFound, Refused
from ...registry.domain.refs import Ref, check_alias, check_name, is_glob, parse_ref
from ...registry.domain.stage import Head
from .. import parse, views
from ..complete import complete_names, complete_refs, complete_stages
from ..connect import Session, add_verbs
from ..feed import show_events
from ..output import printable, write_new
from ..signing import sign as sign_head
from ..signing import sign_version, signature_findings

if TYPE_CHECKING:
    from ...registry.api import HistoryView, StageEventView, VersionView

GROUP = "Evaluation and stages"

Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter.", autocompletion=complete_names)]
Stage = Annotated[str, typer.Option(metavar="STAGE", help="The stage.", autocompletion=complete_stages)]
Reason = Annotated[str, typer.Option(metavar="TEXT", callback=parse.in_utf8, help="Why; it is kept in the history.")]
Force = Annotated[bool, typer.Option("--force", help="Though the gate refuses; needs a reason.")]


def add_to(app: typer.Typer) -> None:
    verbs = (tag, approve, sign, promote, rollback, demote, adopt, history, recall)
    add_verbs(app, {verb.__name__: verb for verb in verbs}, group=GROUP)


def promote(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    to: Annotated[str, typer.Option(metavar="STAGE", help="The stage.", autocompletion=complete_stages)],
    reason: Reason = "",
    force: Force = False,
) -> None:
    """Promote a version to a stage.

    The gate of the stage is asked first; exits with 5 and every condition that is not met. MLflow's alias of that name
    follows, and its legacy stage for Staging and Production.

    Example: adapterctl promote translate-chat:v1 --to production --reason 'keeps both tasks'
    """
    _show(session, session.registry().promote(parse_ref(ref), to=check_alias(to), reason=reason, force=force))


def tag(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    words: Annotated[list[str], typer.Argument(metavar="KEY=VALUE|KEY- ...", help="Tags to set, or to remove.")],
    reason: Reason = "",
) -> None:
    """Set tags of a version, or remove them.

    A gate may ask for tags. The history says who set them; MLflow's tags of the version follow.

    Example: adapterctl tag translate-chat:v1 owner=ada reviewed=yes draft-
    """
    bare = [word for word in words if "=" not in word]
    for word in bare:
        if not word.endswith("-"):
            raise InvalidInput(f"{word!r} is no tag", hint="KEY=VALUE sets one, KEY- removes it")
    put = parse.pairs([word for word in words if "=" in word], option="tag")
    tagged = session.registry().tag(
        parse_ref(ref), put=put, remove=[word.removesuffix("-") for word in bare], reason=reason
    )
    for warning in tagged.warnings:
        session.out.warn(warning)
    version = tagged.version
    tags = " ".join(f"{key}={value}" for key, value in version.tags.items()) or "no tags"
    session.out.data(tagged, text=lambda: printable(f"{version.ref}: {tags}"), names=[version.ref])


def approve(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    to: Annotated[str, typer.Option(metavar="STAGE", help="The stage.", autocompletion=complete_stages)],
    reason: Reason = "",
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take the approval back.")] = False,
) -> None:
    """Approve of a version for a stage.

    A gate may ask for a number of approvals, each by another person. Nothing is promoted.

    Example: adapterctl approve translate-chat:v1 --to production --reason 'read 40 answers'
    """
    event = session.registry().approve(parse_ref(ref), to=check_alias(to), reason=reason, withdraw=withdraw)
    session.out.data(event, text=lambda: views.approval_text(event), names=[event.ref or ""])


def sign(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    key: Annotated[Path, typer.Option(metavar="FILE", help="Your private key, Ed25519 in PEM; it goes nowhere.")],
    files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only if the files in this folder are those of the version.")
    ] = None,
) -> None:
    """Sign a version with a key of yours.

    Says that these files, by their digests, are this version. A gate may ask for signatures by the keys that it
    names. Without --files the digests are those that the registry tells. Nothing is promoted.

    Example: adapterctl sign translate-chat:v1 --key my.key --files ./pulled
    """
    asked = parse_ref(ref)
    registry = session.registry()
    version = registry.version(asked)
    if version.recall:
        session.out.warn(f"{version.ref} is recalled: {version.recall.reason}")
    if files is not None:
        _check_same(version, files)
    envelope, public = sign_version(asked, version, key)
    signature = registry.sign(Ref(version.name, number=version.number), envelope=envelope, key=str(public))
    session.out.data(
        signature, text=lambda: views.signed_text(version, signature, session.out), names=[signature.keyid]
    )


def rollback(session: Session, name: Name, stage: Stage, reason: Reason = "") -> None:
    """Give a stage back to the version that held it before.

    The gate is asked again; what it objects to is told, and the stage moves all the same.

    Example: adapterctl rollback translate-chat --stage production --reason 'worse in chat'
    """
    _show(session, session.registry().rollback(check_name(name), stage=check_alias(stage), reason=reason))


def demote(session: Session, name: Name, stage: Stage, reason: Reason = "") -> None:
    """Empty a stage.

    Example: adapterctl demote translate-chat --stage staging
    """
    _show(session, session.registry().demote(check_name(name), stage=check_alias(stage), reason=reason))


def adopt(session: Session, name: Name, stage: Stage, reason: Reason = "", force: Force = False) -> None:
    """Accept a stage that was moved in MLflow.

    Where the alias points now is recorded as a change of the stage; the gate is asked as for a promotion.

    Example: adapterctl adopt translate-chat --stage production --reason 'moved in the MLflow UI'
    """
    _show(session, session.registry().adopt(check_name(name), stage=check_alias(stage), reason=reason, force=force))


def history(
    session: Session,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="An adapter.  [default: all]", autocompletion=complete_names),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Changes of this stage only.", autocompletion=complete_stages)
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Events of this kind only, e.g. merge, recall; move is any of a stage."),
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="Events after that one; 'now' waits for those to come.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check that no row was edited, removed or added.")] = False,
    head: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A head kept elsewhere: finds a cut or rewritten history.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --head: the public key that has to have signed it.")
    ] = None,
    export_head: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the head, to be kept elsewhere.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --export-head: a private key to sign it with, Ed25519.")
    ] = None,
) -> None:
    """Show every change of an adapter's stages, or all that happened.

    Who, what, when and why; also what a server saw being done to it in MLflow. Exits with 1 when --verify
    finds something. Without NAME, or with --follow, --after or --kind, the events of the registry: what was
    registered, merged, recalled and removed as well. NAME may be a glob then.

    Example: adapterctl history translate-chat --verify
    """
    checks = {"--verify": verify, "--head": head, "--key": key, "--export-head": export_head, "--sign": sign}
    if name is None or kind or after is not None or follow or is_glob(name):
        given = [option for option, value in checks.items() if value]
        if given:
            raise InvalidInput(
                f"{given[0]} is for the whole history of one adapter", hint=f"adapterctl history NAME {given[0]}"
            )
        show_events(session, after, follow, name=name, kind=kind or (), stage=stage)
        return
    if head is not None and not verify:
        raise InvalidInput("--head is for --verify", hint=f"adapterctl history {name} --verify --head {head}")
    if key is not None and head is None:
        raise InvalidInput("--key is for a head", hint=f"adapterctl history {name} --verify --head FILE --key {key}")
    if sign is not None and export_head is None:
        raise InvalidInput("--sign is for a head", hint=f"adapterctl history {name} --export-head FILE --sign {sign}")
    kept = _read_head(head) if head is not None else None
    # first, for a key that cannot be used is a mistake of the caller
    unsigned = signature_findings(kept, key) if kept is not None and key is not None else []
    found = session.registry(readonly=True).history(check_name(name), stage=stage, verify=verify, head=kept)
    if found.findings is not None:
        found = replace(found, findings=(*unsigned, *found.findings))
    session.out.data(
        found, text=lambda: views.history_text(found, session.out), names=[event.hash for event in found.events]
    )
    if found.findings is not None:
        _tell(session, found, compared=kept is not None)
    if export_head is not None:
        _write_head(found, export_head, sign)
        how = f"signed with {printable(sign)}" if sign else "it is not signed"
        session.out.say(f"the head of {found.rows} rows is in {printable(export_head)}; {how}")


def _tell(session: Session, found: HistoryView, *, compared: bool) -> None:
    assert found.findings is not None
    for finding in found.findings:
        session.out.warn(finding)
    if found.findings:
        raise typer.Exit(1)
    session.out.say(f"every link holds; head {found.head}")
    if not compared:
        session.out.say("a cut or rewritten history shows only against a head kept elsewhere: --head FILE")


def recall(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    reason: Annotated[
        str, typer.Option(metavar="TEXT", callback=parse.in_utf8, help="Why; everyone who meets the version reads it.")
    ],
    undo: Annotated[bool, typer.Option("--undo", help="Take the recall back.")] = False,
) -> None:
    """Recall a version and all that is made of it.

    Names every descendant and the stages that serve them now. None of them is promoted or merged
    until the recall is taken back; what serves now goes on until you roll it back or demote it.

    Example: adapterctl recall translate:v3 --reason 'trained on leaked data'
    """
    asked = parse.stated_version(ref)
    registry = session.registry()
    impact = (registry.undo_recall if undo else registry.recall)(asked, reason=reason)
    session.out.data(
        impact,
        text=lambda: views.recall_text(impact, session.out),
        names=[impact.ref, *impact.descendants],
    )


def _check_same(version: VersionView, folder: Path) -> None:
    from ...registry.services.pull import damage  # deferred: help reads no files

    other = damage(folder, version.files)
    if other:
        raise Refused(
            f"the files in {folder} are not those of {version.ref}: {'; '.join(other)}",
            hint=f"look at what you would sign: adapterctl pull {version.ref} DIR",
        )


def _show(session: Session, event: StageEventView) -> None:
    for warning in event.warnings:
        session.out.warn(warning)
    session.out.data(event, text=lambda: views.stage_event_text(event), names=[event.ref] if event.ref else [])


def _read_head(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}", hint="adapterctl history NAME --export-head FILE") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{path} cannot be read as a head: {error}", hint="adapterctl history NAME --export-head FILE"
        ) from error


def _write_head(found: HistoryView, path: Path, key: Path | None) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    head = Head(registry=found.registry_id, name=found.name, seq=found.rows, hash=found.head, time=now)
    if key is not None:
        head = sign_head(head, key)
    write_new(path, json.dumps(head.to_json()) + "\n")

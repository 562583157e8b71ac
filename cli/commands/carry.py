"""For those who take adapters elsewhere: export, import and push with their lineage, bake into a full model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...registry.domain.errors import InvalidInput
from ...registry.domain.refs import parse_ref
from .. import parse, views
from ..complete import complete_refs
from ..connect import Session, add_verbs
from ..follow import progress_line
from ..output import printable

if TYPE_CHECKING:
    from ...registry.api import RegistryAPI
    from ...registry.services.carry import Family


def add_to(app: typer.Typer) -> None:
    add_verbs(app, {"export": export, "import": import_, "push": push, "bake": bake}, group="Adapters")


def export(
    session: Session,
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="Versions.", autocompletion=complete_refs)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where a folder is written for each of them.")],
    layout: Annotated[
        Literal["family", "peft", "vllm", "hub"],
        typer.Option(metavar="LAYOUT", help="family, with all they are made of; or alone: peft, vllm, hub."),
    ] = "family",
    max_lora_rank: Annotated[
        int | None, typer.Option(metavar="R", min=1, help="Of the vLLM that serves them.  [default: 16, as vLLM's]")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="What that vLLM calls the base.")] = None,
) -> None:
    """Write versions and all that they are made of to folders.

    `adapterctl import` makes the same versions and edges of them in another registry. --layout
    vllm gives folders to serve from, with names that never mean other bytes; hub a repository.

    Example: adapterctl export translate-chat@production ./family
    """
    if layout != "vllm" and (max_lora_rank or base):
        raise InvalidInput("--max-lora-rank and --base go with --layout vllm", hint="leave them out, or add it")
    registry, asked = session.registry(readonly=True), [parse_ref(ref) for ref in refs]
    if layout == "family":
        from ...registry.services.carry import export as export_family  # deferred: help needs no service

        versions = export_family(registry, asked, folder)
        session.out.say(f"{len(versions)} versions are in {folder}")
        session.out.data(
            versions,
            text=lambda: views.versions_table(versions, session.out),
            names=[version.ref for version in versions],
        )
        return
    from ...registry.services.layouts import VLLM_RANK, lay_out, next_steps  # deferred, too

    written = lay_out(registry, asked, folder, layout, max_lora_rank=max_lora_rank or VLLM_RANK, served_base=base)
    for step in next_steps(written, layout):
        session.out.say(step)

    def text() -> str:
        rows = [[each.ref, each.name, each.base, str(each.rank)] for each in written]
        return session.out.table(["version", "folder", "base", "rank"], rows, right=[3])

    session.out.data(written, text=text, names=[each.name for each in written])


def import_(
    session: Session,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Every adapter folder below it is read.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="For adapters that no listing names.  [default: their folder's]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")] = False,
    assume_converted: Annotated[
        bool, typer.Option("--assume-converted", help="Accept a PiSSA, OLoRA or similar start as already converted.")
    ] = False,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Take in as a plain import a merge that its recipe does not make here.")
    ] = False,
) -> None:
    """Register a family of adapters with its lineage.

    Merges are made again from the recipes in their headers, and must come out as the same bytes.

    Example: adapterctl import ./family --dry-run
    """
    from ...registry.services.carry import read_family  # deferred: help needs no service

    # before a registry is opened, which would make one: what is refused leaves none behind
    family = read_family(folder, name=name, assume_converted=assume_converted)
    _take_in(session, session.registry(readonly=dry_run), family, dry_run=dry_run, unproven=unproven)


def push(
    session: Session,
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="Versions.", autocompletion=complete_refs)],
    to: Annotated[str, typer.Option(metavar="SERVER", help="Its address; ADAPTERCTL_TOKEN is a token of it.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")] = False,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Take in as a plain import a merge that its recipe does not make there.")
    ] = False,
) -> None:
    """Send versions and all that they are made of to a server.

    From the registry of this machine, parents first; what is there is found. Merges are made again there, and
    must come out as the same bytes. It is `export` and `import` in one.

    Example: adapterctl push translate-chat@production --to https://registry.example.org
    """
    # deferred: help needs none of them
    from tempfile import TemporaryDirectory

    from ...bootstrap import remote
    from ...registry.services.carry import export as export_family
    from ...registry.services.carry import read_family
    from ...registry.settings import load_settings

    known = load_settings()
    if known.server not in (None, to):
        raise InvalidInput(
            f"commands go to {known.server}, whose token is not for {to}",
            hint=f"ADAPTERCTL_SERVER={to} ADAPTERCTL_TOKEN=… adapterctl push …",
        )
    here = Session(session.home or known.home, session.out) if known.server else session
    with TemporaryDirectory(prefix="adapterctl-push-") as folder:
        export_family(here.registry(readonly=True), [parse_ref(ref) for ref in refs], Path(folder))
        _take_in(session, remote(to, known.token), read_family(Path(folder)), dry_run=dry_run, unproven=unproven)


def _take_in(session: Session, registry: RegistryAPI, family: Family, *, dry_run: bool, unproven: bool) -> None:
    from ...registry.services.carry import take_in  # deferred: help needs no service

    done = []
    for each in take_in(registry, family, dry_run=dry_run, unproven=unproven):
        done.append(each)
        for warning in each.warnings:
            session.out.warn(f"{each.folder}: {warning}")
    new = sum(each.action != "found" for each in done)
    session.out.say(f"{new} {'would be' if dry_run else 'are'} new, {len(done) - new} were here before")

    def text() -> str:
        rows = [[each.ref, each.action, ", ".join(each.parents) or "-", each.folder] for each in done]
        return session.out.table(["version", "action", "made of", "folder"], rows)

    session.out.data(done, text=text, names=[each.ref for each in done])


def bake(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A version.", autocompletion=complete_refs)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A folder that is new or empty.")],
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of the base model.  [default: where evaluations find it]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="bf16, f16, f32 or f64.  [default: the base's]")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Weights files are no larger.  [default: 5GB]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take a base that is not the one it is pinned to.")] = False,
) -> None:
    """Write the full model of a base and a version.

    It is computed on this machine from the files alone, in little memory, and needs no torch.

    Example: adapterctl bake translate@production --base ./llama-2-7b --out ./llama-translate
    """
    from ...registry.services.bake import SHARD_BYTES  # deferred: help needs no service
    from ...registry.services.bake import bake as bake_model

    kind, shard_bytes = parse.dtype(dtype), parse.size_bytes(max_shard_size)
    with progress_line(session.out) as update:
        baked = bake_model(
            session.registry(readonly=True),
            parse_ref(ref),
            out,
            settings=session.settings(),
            base=base,
            dtype=kind,
            shard_bytes=shard_bytes or SHARD_BYTES,
            force=force,
            on_progress=lambda done, total: update("baking", done, total, f"{views.size(done)} of {views.size(total)}"),
        )
    for warning in baked.warnings:
        session.out.warn(warning)
    session.out.say(f"{baked.ref} in {baked.base} is in {printable(out)}")
    session.out.data(baked, text=lambda: views.baked_text(baked, session.out), names=[str(out)])

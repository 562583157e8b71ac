"""Carry a family from one registry to another, as folders of files: export writes them, import reads them.

The edges of merges travel inside the weights: the header of a merged file holds its recipe, which names the parents by
content digest. A header is only a claim, so no merge is believed: it is made again from its parents, and has to come
out as the bytes that the folder holds. The version then has a receipt of this registry, and the same recipe digest.
What no header can say (names, training, metrics) is in a listing beside the folders; import does without it too.

Both are written over `RegistryAPI`, so they work with the registry of this machine and with a server alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Literal

from ..api import Carried, RegistryAPI, VersionView
from ..domain.errors import (
    AdapterctlError,
    Corrupt,
    InvalidAdapter,
    InvalidInput,
    NotFound,
    Problem,
    Recalled,
    Refused,
    Unavailable,
    raise_all,
)
from ..domain.recipe import Recipe, request_again
from ..domain.refs import Ref, check_name, parse_ref
from ..domain.version import VersionKind
from ..wire import from_builtins, to_builtins
from .origins import recipe_in
from .pull import damage
from .read_yaml import parse_yaml, read_limited
from .register import CONFIG_FILE, WEIGHTS_FILE, check_folder, inspect
from .schedule import raise_for

LISTING = "family.yaml"
_LISTING_BYTES = 1 << 24
_HINT = f"`adapterctl export` writes {LISTING}; without it, versions get the names of their folders"
_NUMBERED = re.compile(r"v([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class Listed:
    """What the listing says of one folder, beyond what its files say. `parents` are folders of the listing."""

    folder: str
    name: str
    kind: VersionKind = "import"
    base: str | None = None
    parents: tuple[str, ...] = ()
    license: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """Every adapter folder below one, read and checked. `assume_converted` is said again where they are registered."""

    folders: Sequence[_Folder]
    assume_converted: bool


@dataclass(frozen=True, slots=True)
class _Folder:
    """One adapter folder as it was read, before anything of it is registered."""

    path: Path
    listed: Listed
    number: int
    digest: str
    recipe: Recipe | None


def export(registry: RegistryAPI, refs: Sequence[Ref], folder: Path) -> list[VersionView]:
    """Write the verified files of these versions and all that they are made of to `folder/NAME/vN`, and the listing.

    A folder of an earlier export is left as it is where its version is the same. Raises `Conflict` for another one.
    """
    versions: dict[str, VersionView] = {}
    for ref in refs:
        named = registry.version(ref, agreed=True)
        for version in _made_of(registry, Ref(named.name, number=named.number)):
            versions[version.ref] = registry.version(Ref(version.name, number=version.number))
    ordered = sorted(versions.values(), key=lambda version: (version.name, version.number))
    for version in ordered:
        target = folder / _place(version.ref)
        if not target.is_dir() or damage(target, version.files):
            registry.pull(Ref(version.name, number=version.number), target)
    _write_listing(folder, {**_read_listing(folder), **{_place(v.ref): _listed(v) for v in ordered}})
    return ordered


def read_family(folder: Path, *, name: str | None = None, assume_converted: bool = False) -> Family:
    """Read every adapter folder below `folder`; no registry is needed yet.

    `name` is for folders that the listing does not name. Raises `InvalidAdapter` with every folder that is refused.
    """
    return Family(_read_all(folder, name, assume_converted), assume_converted)


def take_in(
    registry: RegistryAPI, family: Family, *, dry_run: bool = False, unproven: bool = False
) -> Iterator[Carried]:
    """Register every adapter of the family, parents first; yields each when it is done.

    With `unproven`, a merge that its recipe does not make here is taken in as a plain import. With `dry_run` there may
    be no registry yet: then all is new. Raises `Refused` for a merge that its recipe does not make.
    """
    folders = family.folders
    parents = {each.listed.folder: _parents(each, folders) for each in folders}
    here: dict[str, str] = {}
    versions = _live(registry, dry_run)
    digests = {version.content_digest: version.ref for version in reversed(versions)}
    for each in _ordered(folders, parents):
        above = [here[parent] if parent else None for parent in parents[each.listed.folder]]
        if each.recipe is not None:
            above = [ref or digests.get(parent.digest) for ref, parent in zip(above, each.recipe.parents, strict=True)]
        known = _known(versions, each, as_merge=each.recipe is not None and None not in above)
        carried = _plan(each, above, known)
        if not dry_run:
            carried = _carry(registry, each, carried, family.assume_converted, unproven)
        here[each.listed.folder] = carried.ref
        yield carried


def _live(registry: RegistryAPI, dry_run: bool) -> list[VersionView]:
    try:
        return [version for version in registry.versions() if version.state == "live"]
    except NotFound:
        if not dry_run:
            raise
        return []


def _made_of(registry: RegistryAPI, ref: Ref) -> list[VersionView]:
    """The version and its ancestors, without what it superseded: nothing of that is in it."""
    lineage = registry.lineage(ref, direction="up")
    wanted, waiting = set(), [lineage.root]
    while waiting:
        child = waiting.pop()
        if child not in wanted:
            wanted.add(child)
            waiting += [edge.parent for edge in lineage.edges if edge.child == child and edge.kind != "supersedes"]
    return [version for version in lineage.versions if version.ref in wanted]


def _place(ref: str) -> str:
    """NAME/vN; read, so that a server's answer leads nowhere else."""
    read = parse_ref(ref)
    return f"{read.name}/v{read.number}"


def _listed(version: VersionView) -> Listed:
    return Listed(
        folder=_place(version.ref),
        name=version.name,
        kind="merge" if version.kind == "merge" else "train" if version.kind == "train" else "import",
        base=version.base,
        parents=tuple(_place(parent.ref) for parent in version.parents if parent.kind in ("merge", "trained_from")),
        license=version.license,
        dataset=version.dataset,
        metrics=version.metrics,
        params=version.params,
        tags=version.tags,
    )


def _read_all(folder: Path, name: str | None, assume_converted: bool) -> list[_Folder]:
    """Every adapter folder below, by name and number. Raises `InvalidAdapter` with what is wrong in any of them."""
    if not folder.is_dir():
        raise NotFound(f"{folder} is no folder", hint="give the folder that `adapterctl export` wrote")
    listing = _read_listing(folder)
    found, problems = [], []
    for path in sorted(config.parent for config in folder.rglob(CONFIG_FILE)):
        shown = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # what a killed export left behind
        try:
            found.append(_read(path, shown, listing.get(shown), name, assume_converted))
        except AdapterctlError as error:
            problems.append(Problem(error.code, f"{shown}: {error.message}", error.hint))
    raise_all(InvalidAdapter, f"{folder} has folders that are refused; nothing was registered:", problems)
    if not found:
        raise NotFound(f"there is no adapter below {folder}", hint=f"an adapter is a folder with {CONFIG_FILE}")
    return sorted(found, key=lambda each: (each.listed.name, each.number, each.listed.folder))


def _read_listing(folder: Path) -> dict[str, Listed]:
    path = folder / LISTING
    if not path.exists():
        return {}
    try:
        entries = from_builtins(
            parse_yaml(read_limited(path, _LISTING_BYTES, hint=_HINT), path, hint=_HINT), list[Listed]
        )
    except Corrupt as error:
        raise InvalidInput(f"{path} is no listing: {error.message}", hint=_HINT) from error
    return {entry.folder: entry for entry in entries}


def _write_listing(folder: Path, listing: Mapping[str, Listed]) -> None:
    import yaml  # deferred: as `parse_yaml` does

    text = yaml.safe_dump([to_builtins(each) for each in listing.values()], sort_keys=False, allow_unicode=True)
    try:
        (folder / LISTING).write_text(text, encoding="utf-8")
    except OSError as error:
        raise Unavailable(f"{folder / LISTING} cannot be written: {error.strerror}", hint="free space there") from error


def _read(path: Path, shown: str, listed: Listed | None, name: str | None, assume_converted: bool) -> _Folder:
    from ..merging.tensors import measure  # deferred: numpy is for those who read tensors

    check_folder(path)
    facts = inspect(path, assume_converted=assume_converted)
    numbered = _NUMBERED.fullmatch(path.name)
    if listed is None:
        own = path.resolve()
        listed = Listed(shown, name or (own.parent.name if numbered else own.name))
    check_name(listed.name)
    digest = measure(path / WEIGHTS_FILE, facts).content_digest
    return _Folder(path, listed, int(numbered[1]) if numbered else 0, digest, recipe_in(facts))


def _parents(each: _Folder, folders: Sequence[_Folder]) -> tuple[str | None, ...]:
    """The folder of each parent: None for one that is not here.

    Where several folders hold the bytes of a parent, the listing chooses; the header decides what the bytes are.
    """
    told = each.listed.parents
    if each.recipe is None:
        names = {other.listed.folder for other in folders}
        return tuple(parent if parent in names else None for parent in told[:1]) if each.listed.kind != "merge" else ()
    chosen: list[str | None] = []
    for position, parent in enumerate(each.recipe.parents):
        same = [other.listed.folder for other in folders if other.digest == parent.digest and other is not each]
        named = told[position] if position < len(told) else None
        chosen.append(named if named in same else same[0] if same else None)
    return tuple(chosen)


def _ordered(folders: Sequence[_Folder], parents: Mapping[str, Sequence[str | None]]) -> list[_Folder]:
    """Parents before children, and the versions of a name by their number where that is possible."""
    by_folder = {each.listed.folder: each for each in folders}
    made_of = {folder: [parent for parent in above if parent] for folder, above in parents.items()}
    numbered = {folder: list(above) for folder, above in made_of.items()}
    for one, two in pairwise(folders):
        if one.listed.name == two.listed.name:
            numbered[two.listed.folder].append(one.listed.folder)
    for graph in (numbered, made_of):
        try:
            return [by_folder[folder] for folder in TopologicalSorter(graph).static_order()]
        except CycleError as error:
            cycle = error.args[1]
    raise InvalidAdapter(
        f"these folders are made of each other: {', '.join(cycle)}", hint="a header or the listing was changed"
    )


def _known(versions: Sequence[VersionView], each: _Folder, *, as_merge: bool) -> str | None:
    """The version that this folder would be found to be."""
    recipe = each.recipe.digest if as_merge and each.recipe else None
    return next(
        (
            version.ref
            for version in versions
            if (version.name, version.content_digest, version.recipe_digest) == (each.listed.name, each.digest, recipe)
        ),
        None,
    )


def _plan(each: _Folder, above: Sequence[str | None], known: str | None) -> Carried:
    """What is to be done with a folder, as far as reading tells. An unknown parent makes a merge a plain import."""
    warnings = []
    if each.recipe is None:
        action: Literal["register", "merge"] = "register"
        if None in above:
            warnings.append(f"it was trained from {each.listed.parents[0]}, which is not here")
    elif None in above:
        action = "register"
        missing = [p.digest for p, ref in zip(each.recipe.parents, above, strict=True) if ref is None]
        told = ", ".join(f"sha256:{digest}" for digest in missing)
        warnings.append(f"it was merged of {told}, which is nowhere: taken in as a plain import")
        above = ()
    else:
        action = "merge"
    return Carried(
        folder=each.listed.folder,
        ref=known or each.listed.name,
        action="found" if known else action,
        content_digest=each.digest,
        parents=tuple(ref for ref in above if ref),
        warnings=tuple(warnings),
    )


def _carry(registry: RegistryAPI, each: _Folder, planned: Carried, assume_converted: bool, unproven: bool) -> Carried:
    """Do what was planned; the registry has the last word on what was here before."""
    if planned.action == "found":
        return planned
    if planned.action == "merge" and each.recipe is not None:
        try:
            done = replace(planned, ref=_merge_again(registry, each.recipe, each, planned.parents))
        except (Refused, NotFound) as error:
            if not unproven or isinstance(error, Recalled):
                hint = "--unproven takes such a merge in as a plain import"
                raise type(error)(f"{planned.folder}: {error.message}", hint=hint) from error
            warning = f"taken in as a plain import: {error.message}"
            plain = replace(planned, action="register", parents=(), warnings=(*planned.warnings, warning))
            done = _register(registry, each, plain, assume_converted)
    else:
        done = _register(registry, each, planned, assume_converted)
    if each.listed.metrics and done.action != "found":
        # measured elsewhere, and shown as such; what is known here already stays
        here = registry.version(parse_ref(done.ref)).metrics
        told = {key: value for key, value in each.listed.metrics.items() if key not in here}
        if told:
            registry.import_results(parse_ref(done.ref), source=LISTING, metrics=told)
    return done


def _register(registry: RegistryAPI, each: _Folder, planned: Carried, assume_converted: bool) -> Carried:
    listed = each.listed
    trained_from = parse_ref(planned.parents[0]) if planned.parents else None
    registered = registry.register(
        str(each.path),
        name=listed.name,
        base=listed.base,
        kind="train" if listed.kind == "train" else "import",
        trained_from=trained_from,
        params=listed.params,
        tags=listed.tags,
        dataset=listed.dataset,
        license=listed.license,
        assume_converted=assume_converted,
    )
    return replace(
        planned,
        ref=registered.version.ref,
        action="register" if registered.created else "found",
        warnings=(*planned.warnings, *registered.warnings),
    )


def _merge_again(registry: RegistryAPI, recipe: Recipe, each: _Folder, parents: Sequence[str]) -> str:
    """The version that this recipe makes of these parents; it must come out as the bytes of the folder."""
    refs = [parse_ref(ref) for ref in parents]
    request = request_again(recipe, refs, into=each.listed.name, expect=(recipe.digest, each.digest))
    submitted = registry.merge(request)
    if submitted.job is not None:
        for job in registry.follow(submitted.job.id):
            ended = job
        raise_for(ended)
        submitted = registry.merge(request)
    if submitted.version is None:
        raise Refused(f"the merge into {each.listed.name} was removed while it was made", hint="import again")
    return submitted.version.ref

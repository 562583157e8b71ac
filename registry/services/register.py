"""Find or create one version: the only way into the registry, for adapters that people bring and for merges.

Files of strangers are copied into a stage folder first and judged there, so what was checked is what is stored: two
named files and a README, no links, no archives, no pickles. `publish` then runs under a lock on the version's key and
is safe to run again after a kill at any point: MLflow is searched by the key before anything is made in it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from uuid6 import uuid7

from ..api import Registered
from ..crashpoints import reached
from ..domain.adapter import AdapterFacts, carried_name, read_facts
from ..domain.digest import json_digest
from ..domain.errors import Corrupt, InvalidAdapter, InvalidInput, NotAllowed, NotFound, Problem, Unavailable
from ..domain.header import open_plain_file, read_header, strict_json_object
from ..domain.job import NewJob
from ..domain.recipe import Recipe
from ..domain.refs import Source, check_name, parse_source
from ..domain.version import AdapterVersion, Base, Edge, NewVersion, local_folder
from ..ports import Ledger, Parent, VersionStore
from . import bases
from .doubles import clear_doubles
from .origins import check_bytes, origins, recipe_in
from .pull import damage
from .recall import mark
from .staging import stage_folder
from .views import version_view

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
MAX_BYTES: Mapping[str, int] = {CONFIG_FILE: 2**20, WEIGHTS_FILE: 2**35, README_FILE: 2**20}

#: As many children as a page in MLflow may name, and some more, for of those removed it names none.
NEWEST_CHILDREN = 40
_COPY_BYTES = 2**20
#: As `save_pretrained` of Transformers names them, where an adapter was added to a model without PEFT's wrapper.
_SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./ -]{0,199}")
_MAX_VALUE = 5000
#: An SPDX identifier or expression, or an identifier of the hub's.
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*( (AND|OR|WITH) [A-Za-z0-9][A-Za-z0-9.+-]*)*")
_RESERVED = ("adapterctl.", "mlflow.")
_log = logging.getLogger("adapterctl")

#: Opens a source of one kind, given the files that are wanted and the bytes that each may have: a folder of them, and
#: the source as it is recorded (a revision becomes a commit).
SourceFolder = Callable[[Source, Mapping[str, int]], AbstractContextManager[tuple[Path, Source]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What the caller says about a new version; the rest is read from its files.

    `files` is where those of a `source` on another machine were put.
    """

    source: str
    name: str
    base: str | None = None
    kind: Literal["import", "train"] = "import"
    trained_from: AdapterVersion | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: str | None = None
    license: str | None = None
    assume_converted: bool = False
    files: Path | None = None


def register(
    ledger: Ledger,
    registration: Registration,
    *,
    open_versions: Callable[[], VersionStore],
    open_hub: SourceFolder,
    home: Path,
    created_by: str,
) -> Registered:
    """Take in one adapter; or return the live version of this adapter with the same content on the same base.

    MLflow is opened only for what passed every check and is new. Raises `InvalidAdapter` with every problem found.
    """
    # deferred: numpy is for those who read tensors
    from ..merging.tensors import measure

    _check_words(registration)
    source = parse_source(registration.source)
    opened: AbstractContextManager[tuple[Path, Source]] = (
        _source_folder(source, open_versions, open_hub)
        if registration.files is None
        else nullcontext((registration.files, source))
    )
    with opened as (folder, source), stage_folder(home) as staged:
        facts = _take_in(folder, staged, assume_converted=registration.assume_converted)
        measured = measure(staged / WEIGHTS_FILE, facts)
        base, known = bases.base_of(ledger, facts, registration.base)
        base = ledger.add_base(base, [base.name])
        parent = registration.trained_from
        recalled = parent is not None and parent.id in ledger.recalls()
        warnings = _warnings(registration, facts, base, known=known, recalled=recalled)
        parents, told = _parents(ledger, registration, facts, measured.content_digest)
        spec = NewVersion(
            adapter=registration.name,
            kind=registration.kind,
            content_digest=measured.content_digest,
            base=base,
            facts=facts,
            norms=measured.norms,
            license=registration.license,
            source=str(source),
            dataset=registration.dataset,
            metrics=dict(registration.metrics),
            params=dict(registration.params),
            tags=dict(registration.tags),
        )
        key = _key_in_mlflow(ledger, open_versions, source, registration.name)
        key = key or _register_key(ledger.ensure_adapter(registration.name), spec)
        version, created = _find_or_create(
            ledger, open_versions, spec, staged, parents=parents, key=key, created_by=created_by
        )
        if not created:
            with ledger.exclusive(key):
                warnings += _mend_files(version, spec, staged, open_versions)
    if created:
        warnings += told
    elif registration.metrics or registration.params or registration.tags or parent is not None:
        warnings.append(f"{version.label} was registered before: what was said about it now is not added")
    return Registered(version_view(ledger, version), created, tuple(warnings))


def publish(
    ledger: Ledger,
    versions: VersionStore,
    spec: NewVersion,
    staged: Path,
    *,
    parents: Sequence[Parent],
    key: str,
    created_by: str,
    supersedes: str | None = None,
    job: tuple[str, int] | None = None,
    then: Callable[[str], Sequence[NewJob]] = lambda version_id: (),
) -> AdapterVersion:
    """Make a version of the files in `staged`, with its edges and the end of `job` (id, attempt) in one fenced write.

    The live version of the same identity is returned where there is one; `job` ends with it all the same. `key` names
    that identity, so two processes with one key wait for each other, and a killed attempt is continued. The jobs that
    `then` gives for the version's id are queued in the write that ends `job`. `supersedes` is the id of the version
    whose place a new one takes.
    """
    version, _ = _find_or_create(
        ledger,
        lambda: versions,
        spec,
        staged,
        parents=parents,
        key=key,
        created_by=created_by,
        supersedes=supersedes,
        job=job,
        then=then,
    )
    return version


def inspect(folder: Path, *, assume_converted: bool = False) -> AdapterFacts:
    """Facts of the adapter in `folder`. Raises `InvalidAdapter`; reads the config and the header, no tensor."""
    config = strict_json_object(read_small(folder / CONFIG_FILE), what=CONFIG_FILE)
    return read_facts(config, read_header(folder / WEIGHTS_FILE), assume_converted=assume_converted)


def _find_or_create(
    ledger: Ledger,
    open_versions: Callable[[], VersionStore],
    spec: NewVersion,
    staged: Path,
    *,
    parents: Sequence[Parent],
    key: str,
    created_by: str,
    supersedes: str | None = None,
    job: tuple[str, int] | None = None,
    then: Callable[[str], Sequence[NewJob]] = lambda version_id: (),
) -> tuple[AdapterVersion, bool]:
    with ledger.exclusive(key) as lock:
        reached("register.locked")
        adapter_id = ledger.ensure_adapter(spec.adapter)
        existing = _live_version(ledger, adapter_id, spec)
        if job is None:
            check_bytes(ledger, spec.content_digest, _recipe(spec.facts)[0])
            if existing is not None:
                return existing, False
        known = ledger.versions(spec.adapter, include_removed=True)
        versions, generation = open_versions(), _generation(known, spec, key)
        try:
            if existing is not None:  # the write is idempotent by id: what is left of it is the end of the job
                placed = (existing.id, existing.placement)
            else:
                live = any(version.state == "live" for version in known)
                versions.ensure_adapter(spec.adapter, adapter_id, spec.base, exists=live)
                placed = versions.place(
                    spec,
                    adapter_id=adapter_id,
                    version_id=str(uuid7()),
                    key=generation,
                    staged=staged,
                    parents=parents,
                    check=lock.check,
                    used={version.number: version.id for version in known},
                )
            version_id, placement = placed
            version = ledger.add_version(
                version_id,
                adapter_id,
                spec,
                placement,
                _edges(version_id, spec, parents, supersedes),
                created_by=created_by,
                job=job,
                then=then(version_id) if job else (),
            )
        finally:  # also where it failed: perhaps because the lock was lost, and another process was first
            clear_doubles(ledger, versions, generation, lambda: _live_version(ledger, adapter_id, spec))
        mark(ledger, versions, version)
        tell_parents(ledger, versions, [parent.version for parent in parents])
        return version, existing is None


def _mend_files(
    version: AdapterVersion, spec: NewVersion, staged: Path, open_versions: Callable[[], VersionStore]
) -> list[str]:
    """Put files of the version that were lost or changed in a folder of this machine back, and tell of it.

    Elsewhere nobody looks, for all that is registered again would be fetched. Raises `Corrupt` with what is left.
    """
    folder = local_folder(version.placement.location)
    found = damage(folder, version.placement.files) if folder is not None else []
    if folder is None or not found:
        return []
    open_versions().put_back(version, spec, staged)
    # such as a README of then, or an MLmodel of an older adapterctl
    if left := damage(folder, version.placement.files):
        raise Corrupt(
            f"the stored files of {version.label} are damaged; this does not bring back all: {'; '.join(left)}",
            hint=f"restore them from a backup; where there is none, `adapterctl rm {version.label}` and register again",
        )
    return [f"the stored files of {version.label} were damaged ({'; '.join(found)}) and are mended"]


def _edges(version_id: str, spec: NewVersion, parents: Sequence[Parent], supersedes: str | None) -> list[Edge]:
    edges = [
        Edge(version_id, position, parent.version.id, parent.kind, parent.weight, spec.recipe_digest)
        for position, parent in enumerate(parents)
    ]
    return edges if supersedes is None else [*edges, Edge(version_id, len(edges), supersedes, "supersedes")]


def tell_parents(ledger: Ledger, versions: VersionStore, parents: Sequence[AdapterVersion]) -> None:
    """Let the pages of these versions lead to what is made of them now.

    The ledger has it already, so a page that cannot be written is no failure: the next child writes it.
    """
    for parent in parents:
        told = None
        try:
            # Another child may come while the page is written. Whoever writes last looks once more.
            while (now := _children(ledger, parent)) != told:
                versions.mark_children(parent, *now)
                told = now
        except Unavailable as error:
            _log.warning("the page of %s in MLflow misses a child: %s", parent.label, error.message)


def _children(ledger: Ledger, version: AdapterVersion) -> tuple[list[AdapterVersion], int]:
    """The newest live children, and how many there are in all. Ids of versions sort by time."""
    ids = sorted({edge.child_id for edge in ledger.edges_down(version.id, 1)}, reverse=True)
    found = ledger.versions_by_id(ids[:NEWEST_CHILDREN])
    live = [found[each] for each in ids[:NEWEST_CHILDREN] if found[each].state == "live"]
    return live, len(ids) - (len(ids[:NEWEST_CHILDREN]) - len(live))


def _register_key(adapter_id: str, spec: NewVersion) -> str:
    # digested, for the base's name is free text and the key goes into search filters
    return "register:" + json_digest([adapter_id, spec.content_digest, spec.base.id])


def _key_in_mlflow(ledger: Ledger, open_versions: Callable[[], VersionStore], source: Source, name: str) -> str | None:
    """The key of a version that MLflow has of this adapter and the ledger lost: it gets its number and id back."""
    number = re.fullmatch(rf"{re.escape(name)}/v?([0-9]{{1,9}})", source.location)
    begun = open_versions().begun_as(name, int(number[1])) if source.kind == "model" and number else None
    return lock_of(begun[0]) if begun is not None and ledger.version(begun[1]) is None else None


def _live_version(ledger: Ledger, adapter_id: str, spec: NewVersion) -> AdapterVersion | None:
    if spec.kind == "merge":
        return ledger.live_version(adapter_id, recipe=spec.recipe_digest)
    return ledger.live_version(adapter_id, content=(spec.content_digest, spec.base.id))


def _parents(
    ledger: Ledger, registration: Registration, facts: AdapterFacts, content_digest: str
) -> tuple[list[Parent], list[str]]:
    """What the caller says that it was trained from, what its files tell beside that, and what is to be said of it."""
    recipe, problem = _recipe(facts)
    told = origins(ledger, content_digest, recipe)
    stated = [Parent(registration.trained_from, kind="trained_from")] if registration.trained_from is not None else []
    others = [each for each in told.parents if each.version.id not in {parent.version.id for parent in stated}]
    words = [f"{problem}: nothing is taken from it"] if problem else []
    if others:
        names = ", ".join(dict.fromkeys(parent.version.label for parent in others))
        words.append(f"made of {names}, {told.told_by}: gates and recalls go by them as by those of a merge")
    return [*stated, *others], words


def _recipe(facts: AdapterFacts) -> tuple[Recipe | None, str]:
    """The recipe that the header holds, or what is wrong with it: the tensors are no worse for it."""
    try:
        return recipe_in(facts), ""
    except InvalidAdapter as error:
        return None, error.message


def _generation(known: Sequence[AdapterVersion], spec: NewVersion, key: str) -> str:
    """The key in MLflow. A removed version keeps its own: what is made anew must not be found to be the old one."""

    def is_same(version: AdapterVersion) -> bool:
        if version.state != "removed" or (version.spec.kind == "merge") != (spec.kind == "merge"):
            return False
        if spec.kind == "merge":
            return version.spec.recipe_digest == spec.recipe_digest
        return version.spec.content_digest == spec.content_digest and version.spec.base.id == spec.base.id

    removed = sum(is_same(version) for version in known)
    return f"{key}:{removed}" if removed else key


def lock_of(key: str) -> str:
    """The lock that is held while anything is written to MLflow under this key: the key without its generation."""
    return re.sub(r":\d{1,9}$", "", key)


@contextmanager
def _source_folder(
    source: Source, open_versions: Callable[[], VersionStore], open_hub: SourceFolder
) -> Iterator[tuple[Path, Source]]:
    if source.kind == "folder":
        yield Path(source.location).expanduser(), source
    elif source.kind == "hub":
        with open_hub(source, MAX_BYTES) as found:
            yield found
    else:
        with open_versions().source_folder(source.kind, source.location, MAX_BYTES) as folder:
            yield folder, source


def _take_in(folder: Path, staged: Path, *, assume_converted: bool) -> AdapterFacts:
    """Copy the adapter's files into `staged` and judge the copy; a bad one is refused before its weights are copied."""
    check_folder(folder)
    inspect(folder, assume_converted=assume_converted)
    _copy(folder / CONFIG_FILE, staged / CONFIG_FILE)
    _copy(folder / WEIGHTS_FILE, staged / WEIGHTS_FILE)
    if (folder / README_FILE).exists():
        _copy(folder / README_FILE, staged / README_FILE)
    return inspect(staged, assume_converted=assume_converted)


def check_folder(folder: Path) -> None:
    """Raise where the folder does not even look like an adapter; reads its listing only."""
    if not folder.exists():
        raise NotFound(f"{folder} is not there", hint="give the folder that PEFT's save_pretrained wrote")
    if not folder.is_dir():
        _refuse("not_a_folder", f"{folder} is not a folder", "give the folder that PEFT's save_pretrained wrote")
    names = {entry.name for entry in os.scandir(folder)}
    if WEIGHTS_FILE not in names and "adapter_model.bin" in names:
        _refuse(
            "pickle",
            f"{folder} holds adapter_model.bin, a Python pickle, which can run code when it is loaded",
            "where you trust it: load it with PEFT and save_pretrained(..., safe_serialization=True)",
        )
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names]
    if WEIGHTS_FILE in missing and (shards := sum(_SHARD.fullmatch(name) is not None for name in names)):
        _refuse(
            "sharded",
            f"{folder} holds the weights in {shards} shards, which PEFT does not load",
            "save again with a max_shard_size that is larger than the adapter",
        )
    if missing:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))[:4]
        hint = f"it is in {' or '.join(inside)}" if inside else "give the folder that PEFT's save_pretrained wrote"
        _refuse("missing_file", f"{folder} holds no {' and no '.join(missing)}", hint)


def read_small(path: Path) -> bytes:
    """All of one of an adapter's small files."""
    with os.fdopen(open_plain_file(path), "rb") as file:
        _check_size(path, os.fstat(file.fileno()).st_size)
        return file.read(MAX_BYTES[path.name])


def _copy(source: Path, target: Path) -> None:
    """Copy a plain file. Raises `Unavailable` when the disk of the home is full."""
    with os.fdopen(open_plain_file(source), "rb") as reader:
        _check_size(source, os.fstat(reader.fileno()).st_size)
        try:
            with target.open("xb") as writer:
                left = MAX_BYTES[source.name]
                while left and (block := reader.read(min(left, _COPY_BYTES))):
                    writer.write(block)
                    left -= len(block)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise NotAllowed(f"{target.parent} cannot be written", hint="use a home of your own: --home") from error
            raise Unavailable(f"{source.name} cannot be stored: {error.strerror}", hint="free space there") from error


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES[path.name]:
        _refuse("too_large", f"{path.name} has {size:,} bytes, at most {MAX_BYTES[path.name]:,} are accepted")


def _check_words(registration: Registration) -> None:
    """The caller's own words, before anything is read: MLflow would refuse some of them half-way."""
    check_name(registration.name)
    for what, words in (("parameter", registration.params), ("tag", registration.tags)):
        for key, value in words.items():
            check_word(what, key, value)
    for what, text in (("dataset", registration.dataset), ("license", registration.license)):
        if text is not None:
            _check_text(f"the {what}", text)
    for key, number in registration.metrics.items():
        check_key("metric", key)
        if not math.isfinite(number):
            raise InvalidInput(f"metric {key!r} is {number}", hint="give a finite number")


def check_word(what: str, key: str, value: str) -> None:
    """Raise `InvalidInput` for a tag or a parameter that MLflow would not take, or that is ours."""
    check_key(what, key)
    _check_text(f"{what} {key!r}", value)


def check_key(what: str, key: str) -> None:
    """As `check_word`; a key that MLflow would shorten is refused too: two of them could become one there."""
    if not _KEY.fullmatch(key) or key.startswith(_RESERVED):
        raise InvalidInput(
            f"{what} {key[:80]!r} is not allowed",
            hint="use letters, digits and ' _ . / -', at most 200; adapterctl. and mlflow. are reserved",
        )
    parts = key.split("/")
    kept = [part for part in parts if part.strip(". ")]
    if kept != parts:
        raise InvalidInput(
            f"{what} {key!r} has an empty part beside a slash, which MLflow leaves out",
            hint=f"write {'/'.join(kept)!r}",
        )


def _check_text(what: str, text: str) -> None:
    if len(text) > _MAX_VALUE:
        raise InvalidInput(f"{what} has {len(text):,} characters", hint=f"at most {_MAX_VALUE:,}")
    for place, char in enumerate(text, start=1):
        kind = unicodedata.category(char)
        if kind == "Cs":  # half a character, or what Python makes of a byte that is not UTF-8
            raise InvalidInput(f"{what} is not UTF-8 at its character {place}", hint="write it in UTF-8")
        if kind == "Cc":
            raise InvalidInput(
                f"{what} has the control character {char!a} at its character {place}",
                hint="write it in one line, without tabs",
            )


def _warnings(registration: Registration, facts: AdapterFacts, base: Base, *, known: bool, recalled: bool) -> list[str]:
    found: list[str] = []
    if not known:
        found.append(
            f"the base {base.name} is new here and not pinned: "
            f"adapterctl base add {base.name!r} --folder FOLDER, or base alias if it has another name"
        )
    parent = registration.trained_from
    if parent is not None and recalled:
        found.append(f"{parent.label}, which it was trained from, is recalled, and so is this version from its start")
    if parent is not None and parent.spec.base.id != base.id:
        found.append(f"{parent.label}, which it was trained from, applies to another base: {parent.spec.base.name}")
    if registration.base and facts.base_name and registration.base != facts.base_name:
        found.append(f"registered for the base {registration.base}, the config says {facts.base_name}")
    if registration.license and not _LICENSE.fullmatch(registration.license):
        found.append(f"the licence {registration.license[:80]!r} is no identifier such as apache-2.0: gates compare it")
    if isinstance(facts.config.get("target_modules"), str) and facts.config["target_modules"] != "all-linear":
        found.append(
            "target_modules is a pattern, which PEFT runs when the adapter is loaded; a list of names is safer"
        )
    if carried := carried_name(facts.modules[0].a.key):
        found.append(
            f"tensor names carry the adapter name {carried!r}: PEFT by itself loads them under that name alone; "
            f"`adapterctl resize {registration.name} --rank {facts.max_rank}` makes a version with PEFT's names"
        )
    return found


def _refuse(code: str, message: str, hint: str = "") -> None:
    raise InvalidAdapter(message, hint=hint, problems=[Problem(code, message, hint)])

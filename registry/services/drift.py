"""What was done in MLflow behind the ledger's back: versions and models made, renamed or deleted, aliases moved, texts
and tags overwritten.

Reads only. MLflow cannot keep anybody from it; each difference says what happened and the verb that mends it, or that
`doctor --adopt` accepts it (`reconcile.py`). Nothing counts as gone that a second look finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..api import Check, RecallView
from ..domain.errors import Misconfigured
from ..domain.job import LIVE
from ..domain.refs import first_few
from ..domain.version import AdapterVersion
from ..ports import Double, Ledger, SeenModel, SeenVersion, VersionStore
from .views import cause, iso_time, recall_views

_ADOPT = "adapterctl doctor --adopt"
#: What is other for an adapter under another name, in words: former name, new name.
Rules = Callable[[str, str], Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is told of a difference, and what there is to accept of it.

    `model` is the registered model as MLflow has it, None where it is gone. `versions` are those that are gone or lack
    their description, or of a renamed adapter all; of an alias, the one that was made of the version it points to.
    `number` is that of an unknown version, `rules` is what a rename changes beside the name. `models` are those of
    adapters that the ledger does not know any more.
    """

    check: Check
    model: SeenModel | None = None
    versions: tuple[AdapterVersion, ...] = ()
    number: int | None = None
    stage: str = ""
    rules: tuple[str, ...] = ()
    models: tuple[SeenModel, ...] = ()


def check_not_emptied(ledger: Ledger, store: VersionStore) -> None:
    """Raise `Misconfigured` where MLflow has nothing of ours and the ledger has versions, or where it is another's.

    Else all would count as deleted, and the next registration would make an empty MLflow look like ours.
    """
    if store.check_identity():
        return
    count = ledger.count_versions()
    if count:
        said = f"has no experiment 'adapters', the ledger has {count} versions: it is another store, or was emptied"
        raise Misconfigured(
            f"the MLflow at {ledger.mlflow_uri} {said}",
            abroad=f"the MLflow of this registry {said}",
            hint="restore MLflow's database from a backup, or correct its address",
        )


def differences(ledger: Ledger, store: VersionStore, stages: Sequence[str], rules: Rules) -> Iterator[Difference]:
    """By adapter; none where MLflow says what the ledger says. `stages` are the settings'."""
    # in this order: a version is in MLflow before it is in the ledger
    everything = ledger.versions(include_removed=True)
    recalls, marking = recall_views(ledger), ledger.jobs(states=sorted(LIVE), kind="recall", limit=1)
    seen = store.seen()
    known = {version.id: version for version in everything}
    live = [version for version in everything if version.state == "live"]
    doubles = store.doubles(everything)
    names = {version.adapter_id: version.name for version in everything}
    ours = _by_adapter(seen, names)
    by_adapter = grouped(live)
    missing = list(_look_again(store, ours, by_adapter, names))
    lost = store.without_run(missing)
    if lost:
        yield _lost(lost, live)
    explained = {version.id for version in lost}
    parents = _parents(ledger, live, known)
    held = ledger.stages()
    for adapter_id, versions in by_adapter.items():
        model = ours.pop(adapter_id, None)
        holds = held.get(adapter_id, {})
        if model is None:
            gone = [version for version in versions if version.id not in explained]
            if gone:
                yield _gone(gone, holds)
            continue
        if model.name != versions[0].name:
            yield _renamed(model, versions, rules)
            continue
        doubled = [each for each in doubles if each.of.adapter_id == adapter_id]
        yield from _versions(model, versions, known, doubled, holds, explained)
        yield from _stages(store, model, versions, known, holds, stages)
        yield from _descriptions(model, versions, parents)
        if not marking:  # else a recall is on its way to MLflow
            yield from _tags(store, model, versions, recalls)
    for adapter_id, tombstones in grouped(everything).items():
        model = ours.get(adapter_id)
        if model is not None and model.name != names[adapter_id]:
            yield _renamed(model, tombstones, rules)
        elif model is not None:
            yield from _versions(model, (), known, (), {}, set())
    yield from _versionless(ledger, [model for model in ours.values() if model.adapter_id not in names])
    yield from _strangers(seen)


def grouped(versions: Sequence[AdapterVersion]) -> dict[str, list[AdapterVersion]]:
    """By the id of their adapter."""
    found: dict[str, list[AdapterVersion]] = {}
    for version in versions:
        found.setdefault(version.adapter_id, []).append(version)
    return found


def _by_adapter(seen: Sequence[SeenModel], names: Mapping[str, str]) -> dict[str, SeenModel]:
    """The models that carry an id of ours. Where several carry one, that with the name of the adapter is it."""
    found: dict[str, SeenModel] = {}
    for model in seen:
        if model.adapter_id is not None and (
            model.adapter_id not in found or model.name == names.get(model.adapter_id)
        ):
            found[model.adapter_id] = model
    return found


def _look_again(
    store: VersionStore,
    ours: dict[str, SeenModel],
    by_adapter: Mapping[str, Sequence[AdapterVersion]],
    names: Mapping[str, str],
) -> Iterator[AdapterVersion]:
    """The versions that MLflow does not have. Sets right in `ours` what the first look missed.

    MLflow's pages are offsets: whatever is renamed or deleted between two of them hides itself, or somebody else.
    """
    for adapter_id, versions in by_adapter.items():
        if not _absent(ours.get(adapter_id), versions):
            continue
        found = _by_adapter(store.seen(adapter_id), names).get(adapter_id)
        if found is None:
            ours.pop(adapter_id, None)
        else:
            ours[adapter_id] = found
        yield from _absent(found, versions)


def _absent(model: SeenModel | None, versions: Sequence[AdapterVersion]) -> list[AdapterVersion]:
    return [version for version in versions if model is None or version.number not in model.versions]


def _parents(
    ledger: Ledger, live: Sequence[AdapterVersion], known: Mapping[str, AdapterVersion]
) -> dict[str, tuple[str, ...]]:
    """What each version is made of, by its present label."""
    edges = ledger.parent_edges([version.id for version in live])
    return {child: tuple(known[edge.parent_id].label for edge in each) for child, each in edges.items()}


def _lost(lost: Sequence[AdapterVersion], live: Sequence[AdapterVersion]) -> Difference:
    """Whoever deletes a version in MLflow leaves its run, at least among the deleted ones."""
    ids = {version.id for version in lost}
    ordered = sorted(lost, key=lambda version: version.created_at)
    first, last = (iso_time(version.created_at) for version in (ordered[0], ordered[-1]))
    restored = all(version.created_at < ordered[0].created_at for version in live if version.id not in ids)
    count = f"{len(lost)} version{'s' if len(lost) > 1 else ''} of {first}" + (f" to {last}" if last != first else "")
    looks = "an older backup of it was restored" if restored else "runs were erased, or an older backup was restored"
    said = f"MLflow knows neither {count} ({first_few([version.label for version in ordered])}) nor their runs: {looks}"
    names = "".join(f" --force {name}" for name in sorted({version.name for version in lost}))
    hint = f"restore MLflow's newest backup; where they are really gone, {_ADOPT}{names} removes them here, too"
    return Difference(check=Check("lost", "error", said, hint), versions=tuple(lost))


def _gone(versions: Sequence[AdapterVersion], holds: Mapping[str, str]) -> Difference:
    name = versions[0].name
    said = f"the registered model {name} is gone from MLflow, {len(versions)} versions are in the ledger"
    hint = f"restore MLflow from a backup; or {_way_out(name, sorted(holds))}"
    return Difference(check=Check("deleted", "error", said, hint), versions=tuple(versions))


def _way_out(name: str, stages: Sequence[str]) -> str:
    demote = "".join(f"adapterctl demote {name} --stage {stage}, then " for stage in stages)
    return f"{demote}{_ADOPT} removes it here, too"


def _renamed(model: SeenModel, versions: Sequence[AdapterVersion], rules: Rules) -> Difference:
    name = versions[0].name
    changed = tuple(rules(name, model.name))
    said = f"the registered model {name} is called {model.name} in MLflow"
    said += f", where other rules hold: {'; '.join(changed)}" if changed else ""
    adopt = f"{_ADOPT} --force {name}" if changed else _ADOPT
    hint = (
        f"rename it back in MLflow, for references, stages and links go by that name; or {adopt} renames it here, too"
    )
    return Difference(check=Check("renamed", "error", said, hint), model=model, versions=tuple(versions), rules=changed)


def _versions(
    model: SeenModel,
    versions: Sequence[AdapterVersion],
    known: Mapping[str, AdapterVersion],
    doubles: Sequence[Double],
    holds: Mapping[str, str],
    explained: set[str],
) -> Iterator[Difference]:
    unknown = model.versions.keys() - {int(each.id) for each in doubles if each.kind == "version"}
    for version in versions:
        if version.id in explained:
            continue
        if version.number not in model.versions:
            stages = sorted(stage for stage, held in holds.items() if held == version.id)
            hint = f"adapterctl verify {version.label} --no-rerun tells whether its files are left; " + _way_out(
                version.name, stages
            )
            check = Check("deleted", "error", f"{version.label} is gone from MLflow", hint)
            yield Difference(check=check, model=model, versions=(version,))
        elif model.versions[version.number].version_id != version.id:
            said = f"MLflow's {version.label} is another version: the registered model was deleted and made again"
            yield Difference(check=Check("replaced", "error", said, "restore MLflow from a backup"))
        unknown.discard(version.number)
    for number in sorted(unknown):
        found = model.versions[number]
        own = known.get(found.version_id or "")
        if own is not None and (own.state, own.name, own.number) == ("removed", model.name, number):
            said = f"MLflow still has {own.label}, which was removed here"
            yield Difference(check=Check("removed", "warning", said, "adapterctl gc"))
        elif found.version_id is not None and own is None and found.taken_as not in known:
            said = f"MLflow has {model.name} version {number}, whose registration is not finished"
            hint = "its job, or the same register or merge again, finishes it; if an older ledger was restored: "
            hint += f"adapterctl register models:/{model.name}/{number} --name {model.name}, as an import"
            yield Difference(check=Check("unfinished", "warning", said, hint), model=model, number=number)
        elif found.taken_as not in known:
            said = f"MLflow has {model.name} version {number}, which the ledger does not know"
            hint = f"{_ADOPT} registers it as a version of ours; or delete it in MLflow"
            yield Difference(check=Check("unknown", "warning", said, hint), model=model, number=number)
    for double in doubles:
        said = f"MLflow has {double.label} beside {double.of.label}: it was made twice, and the ledger names the other"
        yield Difference(check=Check("doubled", "warning", said, "adapterctl gc"))


def _stages(
    store: VersionStore,
    model: SeenModel,
    versions: Sequence[AdapterVersion],
    known: Mapping[str, AdapterVersion],
    holds: Mapping[str, str],
    stages: Sequence[str],
) -> Iterator[Difference]:
    name = versions[0].name
    numbers = {version.id: version.number for version in versions}
    for stage in dict.fromkeys([*holds, *stages]):
        number, found = numbers.get(holds.get(stage, "")), store.alias(name, stage)
        if found == number or (found is None and number not in model.versions):  # the version is gone, and its alias
            continue
        here, there = (f"v{each}" if each is not None else "nothing" for each in (number, found))
        mend = f"promote {name}:{here} --to {stage}" if number is not None else f"demote {name} --stage {stage}"
        hint = f"`adapterctl {mend}` sets MLflow right, `adapterctl adopt {name} --stage {stage}` accepts its alias"
        pointed = model.versions.get(found) if found is not None else None
        taken = known.get(pointed.taken_as or "") if pointed is not None else None
        if taken is not None:
            hint = f"MLflow's version {found} is {taken.label} here: adapterctl promote {taken.label} --to {stage}"
        said = f"{name}@{stage} is {here} here, MLflow's alias points to {there}"
        yield Difference(
            check=Check("stage", "error", said, hint),
            model=model,
            versions=(taken,) if taken is not None else (),
            stage=stage,
        )


def _descriptions(
    model: SeenModel, versions: Sequence[AdapterVersion], parents: Mapping[str, tuple[str, ...]]
) -> Iterator[Difference]:
    """What does not lead to our pages, or names parents otherwise than the ledger, as a rename cut short leaves it."""
    bare = [
        version
        for version, found in _found(model, versions)
        if not (found.described and found.parents == parents.get(version.id, ()))
    ]
    if not bare and model.described:
        return
    names = [*([] if model.described else [model.name]), *(version.label for version in bare)]
    check = Check(
        "description",
        "warning",
        f"in MLflow, the descriptions of {first_few(names)} do not lead to their lineage any more",
        f"{_ADOPT} puts ours below what is written there",
    )
    yield Difference(check=check, model=model, versions=tuple(bare))


def _tags(
    store: VersionStore, model: SeenModel, versions: Sequence[AdapterVersion], recalls: Mapping[str, RecallView]
) -> Iterator[Difference]:
    other = [
        (version, names)
        for version, found in _found(model, versions)
        if (names := store.other_tags(version, found, cause(recalls.get(version.id))))
    ]
    if not other:
        return
    told = first_few([f"{version.label} ({', '.join(names)})" for version, names in other])
    check = Check(
        "tags",
        "warning",
        f"MLflow's tags are not what the ledger says: {told}",
        f"{_ADOPT} writes ours again; `adapterctl tag` changes your own",
    )
    yield Difference(check=check, model=model, versions=tuple(version for version, _ in other))


def _found(model: SeenModel, versions: Sequence[AdapterVersion]) -> Iterator[tuple[AdapterVersion, SeenVersion]]:
    """The versions that MLflow has, with what it says of them."""
    for version in versions:
        found = model.versions.get(version.number)
        if found is not None and found.version_id == version.id:
            yield version, found


def _versionless(ledger: Ledger, left: Sequence[SeenModel]) -> Iterator[Difference]:
    """Adapters of which the ledger has no version. Each is in the ledger before it is in MLflow, or it was there."""
    older = []
    for model in left:
        if ledger.adapter_id(model.name) == model.adapter_id:  # the first version is on its way, or was cut short
            yield from _versions(model, (), {}, (), {}, set())
        elif model.versions:
            older.append(model)
    if older:
        names = first_few(sorted(model.name for model in older))
        said = (
            f"MLflow has versions of {names} from later on, which the ledger does not know: an older one was restored"
        )
        hint = f"restore the ledger's newest backup; where there is none, {_ADOPT} takes them in again, as imports"
        yield Difference(check=Check("older", "error", said, hint), models=tuple(older))


def _strangers(seen: Sequence[SeenModel]) -> Iterator[Difference]:
    strangers = sorted(model.name for model in seen if model.adapter_id is None)
    if strangers:
        said = f"registered models that are not ours: {first_few(strangers)}"
        hint = "to take a version in: adapterctl register models:/NAME/V --name NAME"
        yield Difference(check=Check("strangers", "ok", said, hint))

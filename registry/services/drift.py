"""What was done in MLflow behind the ledger's back: versions and models made, renamed or deleted, aliases moved, texts
overwritten.

Reads only. MLflow cannot keep anybody from it; each difference says what happened and the verb that mends it, or that
`doctor --adopt` accepts it (`reconcile.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..api import Check
from ..domain.errors import Misconfigured
from ..domain.refs import first_few
from ..domain.version import AdapterVersion
from ..ports import Double, Ledger, SeenModel, VersionStore

_ADOPT = "adapterctl doctor --adopt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is told of a difference, and what there is to accept of it.

    `model` is the registered model as MLflow has it, None where it is gone. `versions` are those that are gone or lack
    their description, or of a renamed adapter all; of an alias, the one that was made of the version it points to.
    `number` is that of an unknown version.
    """

    check: Check
    model: SeenModel | None = None
    versions: tuple[AdapterVersion, ...] = ()
    number: int | None = None
    stage: str = ""


def check_not_emptied(ledger: Ledger, store: VersionStore) -> None:
    """Raise `Misconfigured` where MLflow has nothing of ours and the ledger has versions, or where it is another's.

    Else all would count as deleted, and the next registration would make an empty MLflow look like ours.
    """
    if store.check_identity():
        return
    count = len(ledger.versions())
    if count:
        raise Misconfigured(
            f"the MLflow at {ledger.mlflow_uri} has no experiment 'adapters', the ledger has {count} versions:"
            " it is another store, or was emptied",
            hint="restore MLflow's database from a backup, or correct its address",
        )


def differences(ledger: Ledger, store: VersionStore, stages: Sequence[str]) -> Iterator[Difference]:
    """By adapter; none where MLflow says what the ledger says. `stages` are the settings'."""
    # in this order: a version is in MLflow before it is in the ledger
    everything = ledger.versions(include_removed=True)
    seen = store.seen()
    known = {version.id: version for version in everything}
    live = [version for version in everything if version.state == "live"]
    doubles = store.doubles(everything)
    ours = {model.adapter_id: model for model in seen if model.adapter_id is not None}
    by_adapter: dict[str, list[AdapterVersion]] = {}
    for version in live:
        by_adapter.setdefault(version.adapter_id, []).append(version)
    held = ledger.stages()
    for adapter_id, versions in by_adapter.items():
        model = ours.pop(adapter_id, None)
        holds = held.get(adapter_id, {})
        if model is None:
            yield _gone(versions, holds)
            continue
        if model.name != versions[0].name:
            yield _renamed(model, versions)
            continue
        doubled = [each for each in doubles if each.of.adapter_id == adapter_id]
        yield from _versions(model, versions, known, doubled, holds)
        yield from _stages(store, model, versions, known, holds, stages)
        yield from _descriptions(model, versions)
    names = {version.adapter_id: version.name for version in everything}
    for adapter_id, model in ours.items():
        if names.get(adapter_id) == model.name:  # all its versions here are tombstones
            yield from _versions(model, (), known, (), {})
    yield from _strangers(seen, ours, {version.adapter_id for version in everything})


def _gone(versions: Sequence[AdapterVersion], holds: Mapping[str, str]) -> Difference:
    name = versions[0].name
    said = f"the registered model {name} is gone from MLflow, {len(versions)} versions are in the ledger"
    hint = f"restore MLflow from a backup; or {_way_out(name, sorted(holds))}"
    return Difference(check=Check("deleted", "error", said, hint), versions=tuple(versions))


def _way_out(name: str, stages: Sequence[str]) -> str:
    demote = "".join(f"adapterctl demote {name} --stage {stage}, then " for stage in stages)
    return f"{demote}{_ADOPT} removes it here, too"


def _renamed(model: SeenModel, versions: Sequence[AdapterVersion]) -> Difference:
    name = versions[0].name
    check = Check(
        "renamed",
        "error",
        f"the registered model {name} is called {model.name} in MLflow",
        f"rename it back in MLflow, for references, stages and links go by that name; or {_ADOPT} renames it here, too",
    )
    return Difference(check=check, model=model, versions=tuple(versions))


def _versions(
    model: SeenModel,
    versions: Sequence[AdapterVersion],
    known: Mapping[str, AdapterVersion],
    doubles: Sequence[Double],
    holds: Mapping[str, str],
) -> Iterator[Difference]:
    unknown = model.versions.keys() - {int(each.id) for each in doubles if each.kind == "version"}
    for version in versions:
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
        elif found.version_id is not None and own is None:
            said = f"MLflow has {model.name} version {number}, whose registration is not finished"
            hint = "its job, or the same register or merge again, finishes it; if an older ledger was restored: "
            hint += f"adapterctl register models:/{model.name}/{number} --name {model.name}"
            yield Difference(check=Check("unfinished", "warning", said, hint))
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


def _descriptions(model: SeenModel, versions: Sequence[AdapterVersion]) -> Iterator[Difference]:
    bare = [
        version for version in versions if (v := model.versions.get(version.number)) is not None and not v.described
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


def _strangers(seen: Sequence[SeenModel], left: Mapping[str, SeenModel], adapters: set[str]) -> Iterator[Difference]:
    """`left` are the models that carry an id of ours, without those of adapters with live versions."""
    strangers = [model.name for model in seen if model.adapter_id is None]
    strangers += [model.name for model in left.values() if model.adapter_id not in adapters and model.versions]
    if strangers:
        said = f"registered models that are not ours: {first_few(sorted(strangers))}"
        hint = "to take a version in: adapterctl register models:/NAME/V --name NAME"
        yield Difference(check=Check("strangers", "ok", said, hint))

"""What was done in MLflow behind the ledger's back: versions and models made, renamed or deleted, aliases moved.

Reads only. MLflow cannot keep anybody from it; each finding says what happened and the verb that accepts or mends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..api import Check
from ..domain.version import AdapterVersion
from ..ports import Double, Ledger, SeenModel, VersionStore


def drift(ledger: Ledger, store: VersionStore, stages: Sequence[str]) -> Iterator[Check]:
    """One check a difference, by adapter; none where MLflow says what the ledger says. `stages` are the settings'."""
    seen = store.seen()
    live = ledger.versions()
    doubles = store.doubles(live)
    ours = {model.adapter_id: model for model in seen if model.adapter_id is not None}
    by_adapter: dict[str, list[AdapterVersion]] = {}
    for version in live:
        by_adapter.setdefault(version.adapter_id, []).append(version)
    held = ledger.stages()
    for adapter_id, versions in by_adapter.items():
        model = ours.pop(adapter_id, None)
        if model is None:
            yield _gone(versions[0].name, len(versions))
            continue
        if model.name != versions[0].name:
            yield _renamed(versions[0].name, model.name)
            continue
        yield from _versions(model, versions, [each for each in doubles if each.of.adapter_id == adapter_id])
        yield from _stages(store, versions, held.get(adapter_id, {}), stages)
    known = {ledger.adapter_id(name) for name in ledger.adapter_names()}
    strangers = [model.name for model in seen if model.adapter_id is None]
    strangers += [model.name for model in ours.values() if model.adapter_id not in known and model.versions]
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        yield Check(
            "strangers",
            "ok",
            f"registered models that are not ours: {', '.join(sorted(strangers)[:5])}{more}",
            "to take a version in: adapterctl register models:/NAME/V --name NAME",
        )


def _gone(name: str, count: int) -> Check:
    return Check(
        "deleted",
        "error",
        f"the registered model {name} is gone from MLflow, {count} versions are in the ledger",
        "restore MLflow from a backup; or adapterctl demote the stages that are held, then adapterctl rm each of them",
    )


def _renamed(name: str, now: str) -> Check:
    return Check(
        "renamed",
        "error",
        f"the registered model {name} is called {now} in MLflow",
        f"rename it back to {name} in MLflow: references, stages and links go by that name",
    )


def _versions(model: SeenModel, versions: Sequence[AdapterVersion], doubles: Sequence[Double]) -> Iterator[Check]:
    doubled = {int(each.id) for each in doubles if each.kind == "version"}
    unknown = model.versions.keys() - doubled
    for version in versions:
        if version.number not in model.versions:
            yield Check(
                "deleted",
                "error",
                f"{version.label} is gone from MLflow",
                f"adapterctl verify {version.label} --no-rerun tells whether its files are left; then "
                "adapterctl demote the stages that it holds, and adapterctl rm",
            )
        elif model.versions[version.number] != version.id:
            yield Check(
                "replaced",
                "error",
                f"MLflow's {version.label} is another version: the registered model was deleted and made again",
                "restore MLflow from a backup",
            )
        unknown.discard(version.number)
    for number in sorted(unknown):
        yield Check(
            "unknown",
            "warning",
            f"MLflow has {model.name} version {number}, which the ledger does not know",
            f"adapterctl register models:/{model.name}/{number} --name {model.name}; or delete it in MLflow",
        )
    for double in doubles:
        yield Check(
            "doubled",
            "warning",
            f"MLflow has {double.label} beside {double.of.label}: it was made twice, and the ledger names the other",
            "adapterctl gc",
        )


def _stages(
    store: VersionStore, versions: Sequence[AdapterVersion], held: Mapping[str, str], stages: Sequence[str]
) -> Iterator[Check]:
    name = versions[0].name
    numbers = {version.id: version.number for version in versions}
    for stage in dict.fromkeys([*held, *stages]):
        number, found = numbers.get(held.get(stage, "")), store.alias(name, stage)
        if found == number:
            continue
        here, there = (f"v{each}" if each is not None else "nothing" for each in (number, found))
        mend = f"promote {name}:{here} --to {stage}" if number is not None else f"demote {name} --stage {stage}"
        yield Check(
            "stage",
            "error",
            f"{name}@{stage} is {here} here, MLflow's alias points to {there}",
            f"`adapterctl {mend}` or `adapterctl adopt {name} --stage {stage}`",
        )

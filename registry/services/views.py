"""Facts as people see them: rows of the ledger joined into the views of `api.py`. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from ..api import AdapterView, ParentView, RecallView, SignatureView, VersionView
from ..domain.conversion import CONVERTED, Conversion
from ..domain.digest import is_digest
from ..domain.errors import Corrupt, InvalidAdapter
from ..domain.evals import HERE, REGISTERED
from ..domain.header import strict_json_object
from ..domain.signature import Signature
from ..domain.version import AdapterVersion
from ..ports import Ledger
from ..wire import from_builtins
from .signatures import signed


def iso_time(seconds: float) -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def mlflow_path(name: str, number: int) -> str:
    """Where MLflow's pages show a version."""
    return f"/#/models/{name}/versions/{number}"


def version_views(ledger: Ledger, versions: Sequence[AdapterVersion]) -> list[VersionView]:
    """Views in the order given, without recipes and receipts; what they need is read for all of them at once."""
    ids = [version.id for version in versions]
    metrics = ledger.metrics(ids)
    stages = ledger.stages_of(ids)
    edges = ledger.parent_edges(ids)
    labels = {version.id: version.label for version in versions}
    labels |= ledger.labels({edge.parent_id for of_child in edges.values() for edge in of_child} - labels.keys())
    recalls = recall_views(ledger)
    return [
        _view(
            version,
            stages.get(version.id, ()),
            metrics.get(version.id, {}),
            tuple(ParentView(labels[each.parent_id], each.weight, each.kind) for each in edges.get(version.id, ())),
            recalls.get(version.id),
        )
        for version in versions
    ]


def version_view(ledger: Ledger, version: AdapterVersion) -> VersionView:
    """One version whole, with its recipe and receipt."""
    detail = ledger.detail(version.id)
    sources = ledger.metric_sources(version.id)
    own = (HERE, REGISTERED)
    return replace(
        version_views(ledger, [version])[0],
        recipe=detail.recipe,
        receipt=detail.receipt,
        imported={key: source for key, source in sources.items() if not source.startswith(own)},
        converted=_conversion(detail.facts.metadata),
        signatures=signature_views(ledger, version),
    )


def signature_views(ledger: Ledger, version: AdapterVersion) -> tuple[SignatureView, ...]:
    return tuple(signature_view(signature, wrong) for signature, wrong in signed(ledger, version))


def signature_view(signature: Signature, fault: str) -> SignatureView:
    return SignatureView(
        keyid=signature.key.id,
        key=str(signature.key),
        by=signature.actor,
        at=iso_time(signature.at),
        fault=fault,
        envelope=signature.envelope,
    )


def _conversion(metadata: Mapping[str, str]) -> Conversion | None:
    """What the header of a converted adapter says; None where it says nothing, or nothing that can be read."""
    with suppress(Corrupt, InvalidAdapter, KeyError):
        said = from_builtins(strict_json_object(metadata[CONVERTED].encode(), what=CONVERTED), Conversion)
        return said if is_digest(said.weights) and is_digest(said.config) else None
    return None


def adapter_views(
    ledger: Ledger, name: str | None = None, *, after: str | None = None, limit: int | None = None
) -> list[AdapterView]:
    """One row an adapter that has a live version, by name; the first `limit` of those `after` a name."""
    found = ledger.newest_of_each(name, after=after, limit=limit)
    stages = ledger.stages([newest.adapter_id for newest, _ in found])
    numbers = ledger.labels({held for of_adapter in stages.values() for held in of_adapter.values()})
    return [
        AdapterView(
            name=newest.name,
            versions=versions,
            latest=f"v{newest.number}",
            base=newest.spec.base.name,
            stages={
                stage: numbers[held].removeprefix(f"{newest.name}:")
                for stage, held in stages.get(newest.adapter_id, {}).items()
            },
            created_at=iso_time(newest.created_at),
        )
        for newest, versions in found
    ]


def recall_views(ledger: Ledger) -> dict[str, RecallView]:
    """The recall that hits a version, by the version's id."""
    recalls = ledger.recalls()
    labels = ledger.labels({hit.version_id for hit in recalls.values()})
    return {
        version_id: RecallView(labels[hit.version_id], hit.reason, hit.actor, iso_time(hit.at))
        for version_id, hit in recalls.items()
    }


def cause(recall: RecallView | None) -> tuple[str, str] | None:
    """The recalled version and the reason, as MLflow's pages have them."""
    return None if recall is None else (recall.ref, recall.reason)


def _view(
    version: AdapterVersion,
    stages: Sequence[str],
    metrics: Mapping[str, float],
    parents: tuple[ParentView, ...],
    recall: RecallView | None,
) -> VersionView:
    spec, summary, placement = version.spec, version.summary, version.placement
    return VersionView(
        ref=version.label,
        name=version.name,
        number=version.number,
        id=version.id,
        kind=spec.kind,
        state=version.state,
        base=spec.base.name,
        base_id=spec.base.id,
        rank=summary.rank,
        dtype=summary.dtype,
        modules=summary.modules,
        parameters=summary.parameters,
        size_bytes=sum(file.size_bytes for file in placement.files),
        content_digest=spec.content_digest,
        created_at=iso_time(version.created_at),
        created_by=version.created_by,
        stages=tuple(stages),
        parents=parents,
        method=summary.method,
        loss=summary.loss,
        metrics=metrics,
        params=spec.params,
        tags=spec.tags,
        license=spec.license,
        dataset=spec.dataset,
        source=spec.source,
        recipe_digest=spec.recipe_digest,
        files=placement.files,
        run_id=placement.run_id,
        model_id=placement.model_id,
        location=placement.location,
        mlflow_path=mlflow_path(version.name, version.number),
        recall=recall,
    )

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
from ..domain.version import AdapterVersion, Edge
from ..ports import Ledger
from ..wire import from_builtins
from .signatures import signed


def iso_time(seconds: float) -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def version_views(ledger: Ledger, versions: Sequence[AdapterVersion]) -> list[VersionView]:
    """Views in the order given, without recipes and receipts; what they need is read for all of them at once."""
    ids = [version.id for version in versions]
    metrics = ledger.metrics(ids)
    stages = stages_by_version(ledger)
    edges = ledger.parent_edges(ids)
    known = {version.id: version for version in versions}
    others = {edge.parent_id for of_child in edges.values() for edge in of_child} - known.keys()
    parents = known | ledger.versions_by_id(sorted(others))
    recalls = recall_views(ledger)
    return [
        _view(
            version,
            stages.get(version.id, ()),
            metrics.get(version.id, {}),
            edges.get(version.id, ()),
            parents,
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


def adapter_views(ledger: Ledger) -> list[AdapterView]:
    """One row an adapter that has a live version, by name."""
    stages = ledger.stages()
    by_name: dict[str, list[AdapterVersion]] = {}
    for version in ledger.versions():
        by_name.setdefault(version.name, []).append(version)
    labels = {version.id: f"v{version.number}" for versions in by_name.values() for version in versions}
    return [
        AdapterView(
            name=name,
            versions=len(versions),
            latest=f"v{versions[-1].number}",
            base=versions[-1].spec.base.name,
            stages={stage: labels[held] for stage, held in stages.get(versions[-1].adapter_id, {}).items()},
            created_at=iso_time(versions[-1].created_at),
        )
        for name, versions in sorted(by_name.items())
    ]


def stages_by_version(ledger: Ledger) -> dict[str, tuple[str, ...]]:
    held: dict[str, list[str]] = {}
    for stages in ledger.stages().values():
        for stage, version_id in stages.items():
            held.setdefault(version_id, []).append(stage)
    return {version_id: tuple(sorted(stages)) for version_id, stages in held.items()}


def recall_views(ledger: Ledger) -> dict[str, RecallView]:
    """The recall that hits a version, by the version's id."""
    recalls = ledger.recalls()
    recalled = ledger.versions_by_id(sorted({hit.version_id for hit in recalls.values()})) if recalls else {}
    return {
        version_id: RecallView(recalled[hit.version_id].label, hit.reason, hit.actor, iso_time(hit.at))
        for version_id, hit in recalls.items()
    }


def cause(recall: RecallView | None) -> tuple[str, str] | None:
    """The recalled version and the reason, as MLflow's pages have them."""
    return None if recall is None else (recall.ref, recall.reason)


def parent_views(edges: Sequence[Edge], parents: Mapping[str, AdapterVersion]) -> tuple[ParentView, ...]:
    return tuple(ParentView(parents[edge.parent_id].label, edge.weight, edge.kind) for edge in edges)


def _view(
    version: AdapterVersion,
    stages: Sequence[str],
    metrics: Mapping[str, float],
    edges: Sequence[Edge],
    parents: Mapping[str, AdapterVersion],
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
        parents=parent_views(edges, parents),
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
        mlflow_path=f"/#/models/{version.name}/versions/{version.number}",
        recall=recall,
    )

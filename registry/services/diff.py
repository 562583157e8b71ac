"""Two versions side by side: the fields that differ, the modules only one has, and how far their deltas are apart.

In all, or module by module, beside what the receipts of merges say of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..api import Both, DiffView, LayerDiff, VersionView
from ..domain.errors import IncompatibleParents
from ..domain.version import AdapterVersion
from ..ports import Folders, Ledger
from .register import WEIGHTS_FILE
from .views import version_view

if TYPE_CHECKING:
    from ..merging.distance import ModuleDistance

_COMPARED = (
    "base",
    "kind",
    "method",
    "rank",
    "dtype",
    "modules",
    "parameters",
    "size_bytes",
    "loss",
    "license",
    "dataset",
    "stages",
    "parents",
    "params",
    "tags",
    "metrics",
)


def diff(
    ledger: Ledger, folders: Folders, first: AdapterVersion, second: AdapterVersion, *, layers: bool = False
) -> DiffView:
    """Compare facts, and the deltas themselves where both apply to one base and share modules.

    With `layers` raises `IncompatibleParents` where their deltas cannot be compared.
    """
    facts = [ledger.detail(version.id).facts for version in (first, second)]
    names = [{module.name for module in of_one.modules} for of_one in facts]
    if layers and first.spec.base.id != second.spec.base.id:
        raise IncompatibleParents(
            f"{first.label} applies to {first.spec.base.name}, {second.label} to {second.spec.base.name}: "
            "their layers cannot be compared",
            hint="if both names mean one model, run `adapterctl base merge`; without --layers the records are compared",
        )
    cosine = distance = None
    apart: list[ModuleDistance] = []
    if first.spec.base.id == second.spec.base.id and names[0] & names[1]:
        # deferred: numpy is only needed when factors are read
        from ..merging.distance import distances, in_all

        with ExitStack() as opened:
            files = [opened.enter_context(folders(version)) / WEIGHTS_FILE for version in (first, second)]
            try:
                apart = list(distances(facts[0], files[0], facts[1], files[1], spaces=layers))
                cosine, distance = in_all(apart)
            except IncompatibleParents:  # a base without pins may stand for two models
                if layers:
                    raise
    views = version_view(ledger, first), version_view(ledger, second)
    return DiffView(
        first=first.label,
        second=second.label,
        same_content=first.spec.content_digest == second.spec.content_digest,
        fields=_differing(*views),
        only_first=tuple(sorted(names[0] - names[1])),
        only_second=tuple(sorted(names[1] - names[0])),
        cosine=cosine,
        distance=distance,
        layers=_layers(apart, [_receipt(ledger, view) for view in views]) if layers else None,
    )


def _differing(first: VersionView, second: VersionView) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in _COMPARED}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True, slots=True)
class _Receipt:
    """The columns of a receipt by module; `kept` by content digest of a parent first. Empty for what is no merge."""

    loss: Mapping[str, float]
    predicted_loss: Mapping[str, float]
    kept: Mapping[str, Mapping[str, float | None]]
    labels: Mapping[str, str]


def _receipt(ledger: Ledger, view: VersionView) -> _Receipt:
    receipt = view.receipt or {}
    layers = receipt.get("layers")
    if not layers:
        return _Receipt({}, {}, {}, {})
    modules, digests = layers["module"], [parent["digest"] for parent in receipt["parents"]]
    parents = ledger.versions_by_id([edge.parent_id for edge in ledger.parent_edges([view.id]).get(view.id, ())])
    # receipts of older engines have fewer columns
    predicted, retention = layers.get("predicted_loss"), layers.get("retention")
    return _Receipt(
        loss=dict(zip(modules, layers["loss"], strict=True)),
        predicted_loss=dict(zip(modules, predicted, strict=True)) if predicted else {},
        kept={
            digest: dict(zip(modules, kept, strict=True))
            for digest, kept in zip(digests if retention else (), retention or (), strict=True)
        },
        labels={parent.spec.content_digest: parent.label for parent in parents.values()},
    )


def _layers(apart: Sequence[ModuleDistance], receipts: Sequence[_Receipt]) -> tuple[LayerDiff, ...]:
    """The modules of both, the farthest apart first."""
    whole = math.fsum(each.difference for each in apart)
    one, other = receipts
    rows = [
        LayerDiff(
            module=each.module,
            distance=each.distance,
            share=each.difference / whole if whole > 0 else 0.0,
            cosine=each.cosine,
            norm=each.norms,
            row_overlap=each.row_overlap,
            column_overlap=each.column_overlap,
            loss=(one.loss.get(each.module), other.loss.get(each.module)),
            predicted_loss=(one.predicted_loss.get(each.module), other.predicted_loss.get(each.module)),
            retention=_retention(each.module, one, other),
        )
        for each in apart
        if each.shared
    ]
    return tuple(sorted(rows, key=lambda row: (-(math.inf if row.distance is None else row.distance), row.module)))


def _retention(module: str, one: _Receipt, other: _Receipt) -> dict[str, Both]:
    labels = {**other.labels, **one.labels}
    found: dict[str, Both] = {}
    for digest in dict.fromkeys([*one.kept, *other.kept]):
        pair = one.kept.get(digest, {}).get(module), other.kept.get(digest, {}).get(module)
        if pair != (None, None):
            found[labels.get(digest, digest[:12])] = pair
    return found

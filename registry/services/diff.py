"""Two versions side by side: the fields that differ, the modules only one has, and how far their deltas are apart."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from ..api import DiffView, VersionView
from ..domain.errors import IncompatibleParents
from ..domain.version import AdapterVersion
from ..ports import Folders, Ledger
from .register import WEIGHTS_FILE
from .views import version_view

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


def diff(ledger: Ledger, folders: Folders, first: AdapterVersion, second: AdapterVersion) -> DiffView:
    """Compare facts, and the deltas themselves where both apply to one base and share modules."""
    facts = [ledger.detail(version.id).facts for version in (first, second)]
    names = [{module.name for module in of_one.modules} for of_one in facts]
    cosine = distance = None
    if first.spec.base.id == second.spec.base.id and names[0] & names[1]:
        # deferred: numpy is only needed when factors are read
        from ..merging.forecast import compare

        with ExitStack() as opened:
            files = [opened.enter_context(folders(version)) / WEIGHTS_FILE for version in (first, second)]
            with suppress(IncompatibleParents):  # a base without pins may stand for two models
                cosine, distance = compare(facts[0], files[0], facts[1], files[1])
    return DiffView(
        first=first.label,
        second=second.label,
        same_content=first.spec.content_digest == second.spec.content_digest,
        fields=_differing(version_view(ledger, first), version_view(ledger, second)),
        only_first=tuple(sorted(names[0] - names[1])),
        only_second=tuple(sorted(names[1] - names[0])),
        cosine=cosine,
        distance=distance,
    )


def _differing(first: VersionView, second: VersionView) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in _COMPARED}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

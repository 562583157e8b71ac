"""What MLflow shows of a merge's evaluation beside that of its parents: their answers in columns, and what was kept."""

from __future__ import annotations

from ..domain.suite import Suite
from ..domain.version import AdapterVersion
from ..ports import Beside, Ledger
from .pictures import retention_picture
from .retain import retention_view, side_by_side


def beside(ledger: Ledger, version: AdapterVersion, suite: Suite, dtype: str) -> Beside:
    """Nothing for a version without parents, or whose parents are not evaluated on the base in this dtype."""
    view = retention_view(ledger, version, dtype=dtype)
    if not view.rows:
        return Beside()
    return Beside(side_by_side(ledger, version, suite, dtype), {"retention.png": retention_picture(view)})

"""How facts are worded wherever people read them: in the terminal, in a drawing, on a page. Pure functions to one line.

Foreign text is made harmless for a line of text only; HTML, XML, Mermaid and DOT escape on top of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..api import LineageEdgeView, ParentView, VersionView

#: A relative loss below this is rounding.
EXACT = 1e-6
#: C0, DEL, C1, line separators, the marks that turn the direction of what follows, and what UTF-8 or XML may not hold.
HOSTILE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def printable(text: object) -> str:
    """One line of text that cannot move the cursor, hide, or reverse what stands beside it."""
    return HOSTILE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def number(value: float) -> str:
    """Four digits that matter; 0 and whole numbers as they are."""
    return f"{value:.4g}"


def loss(value: float | None) -> str:
    """A relative loss as people read it; what stays below rounding is nothing lost."""
    if value is None:
        return "-"
    if value < EXACT:
        return "0"
    return f"{value:.2%}" if value >= 1e-4 else f"{value:.1e}"


def made(version: VersionView) -> str:
    """`svd, rank 4, loss 3.21%`; empty for what is no merge."""
    if not version.method:
        return ""
    lost = f", loss {loss(version.loss)}" if version.loss is not None else ""
    return f"{version.method}, rank {version.rank}{lost}"


def headline(version: VersionView, most: int = 2) -> Mapping[str, float]:
    """One metric a suite (`SUITE/METRIC`), its first, the one of the adapter's own suite before the others."""
    firsts: dict[str, str] = {}
    for key in version.metrics:
        firsts.setdefault(key.partition("/")[0], key)
    ordered = sorted(firsts, key=lambda suite: suite != version.name)
    return {firsts[suite]: version.metrics[firsts[suite]] for suite in ordered[:most]}


def edge_label(edge: LineageEdgeView | ParentView) -> str:
    return f"× {number(edge.weight)}" if edge.weight is not None else edge.kind.replace("_", " ")

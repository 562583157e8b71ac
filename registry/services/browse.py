"""Lineage as a server shows it: the page of a version or of an adapter, and the small picture for MLflow's own pages.

Drawn anew for every request, so nothing that is linked from a description becomes stale.
"""

from __future__ import annotations

from ..api import Drawing, LineageView, Look
from ..domain.refs import Ref
from ..ports import Ledger
from . import draw
from .trace import family, lineage

#: A picture inside a page of MLflow has room for so many versions, for so many of one adapter, and for so many abreast.
PICTURE_MOST, PICTURE_VERSIONS, PICTURE_ABREAST = 18, 12, 3
PICTURE_DEPTH = 2


def picture(ledger: Ledger, ref: Ref, look: Look, *, whole: bool) -> Drawing:
    """The nearest relatives as one SVG; with `whole` those of the newest versions of the adapter that `ref` names."""
    if whole:
        view = family(ledger, ref.name, most=PICTURE_VERSIONS)
    else:
        view = lineage(ledger, ref, direction=look.direction, depth=look.depth or PICTURE_DEPTH)
    text = draw.lineage_svg(view, most=PICTURE_MOST, shades=_shades(ledger, view, look), abreast=PICTURE_ABREAST)
    return Drawing(text, "image/svg+xml", draw.picture_policy())


def page(ledger: Ledger, ref: Ref, look: Look, *, whole: bool, root: str, mlflow: str) -> Drawing:
    """The page to look around in. `root` and `mlflow` lead from it to our pages and to MLflow's."""
    if whole:
        view = family(ledger, ref.name, most=draw.MOST)
    else:
        view = lineage(ledger, ref, direction=look.direction, depth=look.depth)
    site = draw.Site(root=root, mlflow=mlflow, depth=look.depth)
    text = draw.lineage_html(view, shades=_shades(ledger, view, look), site=site)
    return Drawing(text, "text/html; charset=utf-8", draw.policy(served=True))


def _shades(ledger: Ledger, view: LineageView, look: Look) -> draw.Shades:
    return draw.Shades(metric=look.metric, behind=_behind(ledger, view))


def _behind(ledger: Ledger, view: LineageView) -> dict[str, str]:
    """Versions made of another adapter that has a newer version by now, each with one such version.

    A checkpoint that follows another one of its own adapter is not behind: that is how an adapter grows.
    """
    made_of = [
        (version.ref, *_parts(parent.ref))
        for version in view.versions
        if version.state != "removed"
        for parent in version.parents
        if _parts(parent.ref)[0] != version.name
    ]
    newest = ledger.newest(sorted({name for _, name, _ in made_of}))
    return {ref: f"{name}:v{newest[name]}" for ref, name, number in made_of if newest.get(name, 0) > number}


def _parts(label: str) -> tuple[str, int]:
    name, _, number = label.rpartition(":v")
    return name, int(number)

"""The layers of a merge as a picture: what each module lost, and how much there was of it, read from the receipt.

SVG, which MLflow shows beside the receipt. Pure text; module names come from files of strangers and are escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..domain.plan import place_of

_CELL_WIDTH, _CELL_HEIGHT, _GAP = 30, 15, 2
_LEFT, _TOP, _HEAD, _BETWEEN, _FOOT = 64, 66, 118, 70, 56
#: More would be a picture that nobody can read.
_MOST_ROWS, _MOST_COLUMNS = 200, 24
_PALE, _LOST, _HELD = (245, 246, 248), (176, 32, 48), (33, 82, 165)
_STYLE = "text{font:11px sans-serif;fill:#3a424b}.h{font-size:15px;font-weight:600;fill:#1f2328}.t{font-weight:600}"
#: Relative losses below this are rounding, and drawn as none.
_ROUNDING = 1e-6

_Cells = Mapping[tuple[int, str], float]


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    cells: _Cells
    names: Mapping[tuple[int, str], str]
    colour: tuple[int, int, int]
    high: float
    words: str


def layers_picture(receipt: Mapping[str, Any] | None) -> str | None:
    """Two grids, layers downwards and kinds of modules across; None where there is nothing to show."""
    layers = (receipt or {}).get("layers")
    if not layers or not layers["module"]:
        return None
    places = [_place(name) for name in layers["module"]]
    rows = sorted({row for row, _ in places})[:_MOST_ROWS]
    columns = sorted({column for _, column in places})[:_MOST_COLUMNS]
    names = dict(zip(places, layers["module"], strict=True))
    loss, norm = (dict(zip(places, layers[key], strict=True)) for key in ("loss", "norm"))
    worst, largest = max(loss.values()), max(norm.values())
    panels = (
        _Panel(
            "relative loss",
            loss,
            names,
            _LOST,
            max(worst, _ROUNDING),
            f"0 to {worst:.3g}" if worst > _ROUNDING else "nothing lost",
        ),
        _Panel("size of the exact sum", norm, names, _HELD, largest or 1.0, f"0 to {largest:.3g}"),
    )
    across = len(columns) * _CELL_WIDTH
    width = _LEFT + 2 * max(across, 150) + _BETWEEN + 30
    height = _TOP + _HEAD + len(rows) * _CELL_HEIGHT + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-labelledby="t">',
        '<title id="t">What was lost in each layer of the merge</title>',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        '<text class="h" x="20" y="28">What was lost in each layer</text>',
        f'<text x="20" y="46">{_summary(receipt or {})}</text>',
    ]
    for place, panel in enumerate(panels):
        left = _LEFT + place * (max(across, 150) + _BETWEEN)
        parts += _panel(panel, rows, columns, left)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: _Panel, rows: Sequence[int], columns: Sequence[str], left: int) -> list[str]:
    top = _TOP + _HEAD
    parts = [f'<text class="t" x="{left}" y="{_TOP + 8}">{panel.title}</text>']
    for x, column in enumerate(columns):
        at = left + x * _CELL_WIDTH + _CELL_WIDTH / 2 + 4
        parts.append(f'<text transform="translate({at:g} {top - 8}) rotate(-60)">{_text(column[-22:])}</text>')
    for y, row in enumerate(rows):
        if y % max(1, len(rows) // 15) == 0:
            label = "" if row < 0 else str(row)
            parts.append(f'<text x="{left - 8}" y="{top + y * _CELL_HEIGHT + 11}" text-anchor="end">{label}</text>')
        for x, column in enumerate(columns):
            value = panel.cells.get((row, column))
            if value is None:
                continue
            parts.append(
                f'<rect x="{left + x * _CELL_WIDTH}" y="{top + y * _CELL_HEIGHT}" width="{_CELL_WIDTH - _GAP}"'
                f' height="{_CELL_HEIGHT - _GAP}" rx="2" fill="{_mixed(panel.colour, value / panel.high)}">'
                f"<title>{_text(panel.names[row, column])}: {value:.4g}</title></rect>"
            )
    foot = top + len(rows) * _CELL_HEIGHT + 14
    steps = range(8)
    parts += [
        f'<rect x="{left + step * 12}" y="{foot}" width="12" height="10" fill="{_mixed(panel.colour, step / 7)}"/>'
        for step in steps
    ]
    return [*parts, f'<text x="{left + 8 * 12 + 8}" y="{foot + 9}">{panel.words}</text>']


def _place(module: str) -> tuple[int, str]:
    """Its row and its column; what belongs to no layer stands above them."""
    layer, kind = place_of(module)
    return (-1 if layer is None else layer), kind


def _summary(receipt: Mapping[str, Any]) -> str:
    facts = [
        ("loss", receipt.get("loss"), ".3%"),
        ("rank", receipt.get("rank"), "d"),
        ("modules", receipt.get("modules"), "d"),
    ]
    return ", ".join(f"{name} {value:{form}}" for name, value, form in facts if isinstance(value, int | float))


def _mixed(colour: tuple[int, int, int], share: float) -> str:
    share = min(1.0, max(0.0, share))
    mixed = (round(pale + (full - pale) * share) for pale, full in zip(_PALE, colour, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _text(text: str) -> str:
    return html.escape("".join(c if c.isprintable() else " " for c in text), quote=True)

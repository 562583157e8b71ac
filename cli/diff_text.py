"""Two versions beside each other, as text: what differs in their records, and module by module how far apart they are.

Pure functions over the view, as in `views`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..registry.services.words import loss, number
from .output import Output, printable
from .views import brief

if TYPE_CHECKING:
    from ..registry.api import Both, DiffView, LayerDiff

#: Modules that `diff --layers` shows without being asked for more.
SHOWN_MODULES = 10


def diff_text(view: DiffView, out: Output, *, top: int | None = None) -> str:
    lines = [f"{out.paint(printable(view.first), 'bold')} and {out.paint(printable(view.second), 'bold')}"]
    lines.append("  the same content" if view.same_content else "  different content")
    if view.cosine is not None and view.distance is not None:
        lines.append(f"  cosine of the deltas {view.cosine:.4f}, distance {_share(view.distance)}")
    elif view.cosine is not None:
        lines.append(printable(f"  the delta of {view.first} is zero"))
    for label, modules in ((view.first, view.only_first), (view.second, view.only_second)):
        if modules:
            names = ", ".join(modules[:3]) + (", …" if len(modules) > 3 else "")
            lines.append(printable(f"  {len(modules)} modules only in {label}: {names}"))
    if view.fields:
        rows = [[name, brief(first), brief(second)] for name, first, second in _differences(view.fields)]
        lines += ["", out.table(["FIELD", view.first, view.second], rows)]
    if view.layers is not None:
        lines += ["", *_layers_apart(view, view.layers, out, top or SHOWN_MODULES)]
    return "\n".join(lines)


def _layers_apart(view: DiffView, layers: Sequence[LayerDiff], out: Output, top: int) -> Iterator[str]:
    """Module by module, A the first and B the second version: how far apart they are, then what their receipts say."""
    if not layers:
        yield "no module is in both"
        return
    yield printable(f"A is {view.first}, B is {view.second}; {len(layers)} modules in both")
    if all(row.distance == 0 for row in layers):
        yield "  the deltas of these modules are equal"
        return
    yield from (f"  {line}" for line in _apart_in_words(view, layers))
    shown = layers[:top]
    rows = [
        [
            row.module, _share(row.distance), _share(row.share), f"{row.cosine:.3f}", *map(number, row.norm),
            f"{row.row_overlap:.3f}", f"{row.column_overlap:.3f}",
        ]
        for row in shown
    ]  # fmt: skip
    header = ["MODULE", "DISTANCE", "SHARE", "COSINE", "NORM A", "NORM B", "ROW OVERLAP", "COLUMN OVERLAP"]
    yield ""
    yield out.table(header, rows, right=range(1, 8))
    if any(row.loss != (None, None) for row in layers):
        rows = [[row.module, *map(loss, row.loss), _change(row.loss), *map(loss, row.predicted_loss)] for row in shown]
        yield from _told(["MODULE", "LOSS A", "LOSS B", "B - A (pp)", "PROMISED A", "PROMISED B"], rows, out)
        parents = list(dict.fromkeys(parent for row in layers for parent in row.retention))
        kept = [[_kept_by_both(row.retention.get(parent, (None, None))) for parent in parents] for row in shown]
        rows = [[row.module, *chain.from_iterable(cells)] for row, cells in zip(shown, kept, strict=True)]
        header = [name for parent in parents for name in (f"KEPT {parent} A", "B", "B - A (pp)")]
        yield from _told(["MODULE", *header], rows, out)
    if len(layers) > len(shown):
        yield f"{len(layers) - len(shown)} more modules with --top {len(layers)} or -o json"


def _told(header: Sequence[str], rows: Sequence[Sequence[str]], out: Output) -> Iterator[str]:
    """A table without the columns that tell nothing, below an empty line."""
    told = [column for column in zip(header, *rows, strict=True) if set(column[1:]) != {"-"}]
    if len(told) > 1:
        head, *body = zip(*told, strict=True)
        yield ""
        yield out.table(head, body, right=range(1, len(head)))


def _apart_in_words(view: DiffView, layers: Sequence[LayerDiff]) -> Iterator[str]:
    found = sorted(row.distance for row in layers if row.distance is not None)
    if found:
        middle = found[len(found) // 2]
        yield f"distance of a module: {_share(found[0])} to {_share(found[-1])}, median {_share(middle)}"
    if view.only_first or view.only_second:
        held = _share(sum(row.share for row in layers))
        yield f"they hold {held} of the squared distance, the modules that one alone has the rest"
    both = [(a, b) for a, b in (row.loss for row in layers) if a is not None and b is not None]
    if both:
        more = sum(b > a for a, b in both), sum(a > b for a, b in both)
        yield f"B lost more of its exact sum than A in {more[0]} modules, less in {more[1]}"
    for parent in dict.fromkeys(parent for row in layers for parent in row.retention):
        kept = [row.retention.get(parent, (None, None)) for row in layers]
        less = sum(a is not None and b is not None and b < a for a, b in kept)
        more_kept = sum(a is not None and b is not None and b > a for a, b in kept)
        if any(a is not None and b is not None for a, b in kept):
            yield printable(f"B holds less of {parent} than A in {less} modules, more in {more_kept}")


def _kept_by_both(pair: Both) -> list[str]:
    return [*map(_share, pair), _change(pair)]


def _change(pair: Both) -> str:
    """In percentage points."""
    first, second = pair
    return "-" if first is None or second is None else f"{100 * (second - first):+.2f}"


def _share(value: float | None) -> str:
    if value is None or value == 0:
        return "-" if value is None else "0"
    return f"{value:.2%}" if value >= 5e-5 else "<0.01%"


def _differences(fields: Mapping[str, tuple[Any, Any]]) -> Iterator[tuple[str, Any, Any]]:
    """Field by field, and key by key where both sides are mappings."""
    for name, (first, second) in fields.items():
        if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
            yield name, first, second
            continue
        for key in dict.fromkeys([*first, *second]):
            if first.get(key) != second.get(key):
                yield f"{name} {key}", first.get(key), second.get(key)

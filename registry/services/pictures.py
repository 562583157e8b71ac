"""Pictures of figures: what a merge kept, and what a search tried. PNG, drawn with matplotlib without its global state.

Colour says good or bad in the same way everywhere: green keeps what its parent could, red does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ..api import RetentionRow, RetentionView, TrialView, TuneView
from ..domain.evals import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
#: Shares below this are as red as it gets.
FLOOR = 0.5
COLOURS = "RdYlGn"
#: The same for lines, whose middle must be seen on white.
LINES = ("#b02030", "#c98a00", "#1a7f37")
INK, FAINT, STRONG = "#24292f", "#8c959f", "#0b57d0"
_WIDE = 60


def retention_picture(view: RetentionView) -> bytes:
    """Every task by base, parents and child: each figure, coloured by its share of the owning parent's.

    The child's share has its interval: on few samples it is the wider half of the story.
    """
    parents = list(dict.fromkeys(ref for row in view.rows for ref in row.parents))
    columns = ["base", *parents, view.ref]
    names = [f"{row.task}\n{row.metric} {'↑' if row.direction == 'higher' else '↓'}" for row in view.rows]
    figure = _figure(2.2 + 1.5 * len(columns), 1.7 + 0.62 * len(names))
    axes = figure.subplots()
    shares = [[_share(row, value) for value in _values(row, parents)] for row in view.rows]
    image = axes.imshow(shares, cmap=COLOURS, vmin=FLOOR, vmax=1.0, aspect="auto")
    for y, row in enumerate(view.rows):
        for x, value in enumerate(_values(row, parents)):
            mark = " *" if columns[x] == row.owner else ""
            among = _bounds(row.retention) if columns[x] == view.ref else ""
            text = f"{shares[y][x]:.0%}{among}\n{_figures(value)}{mark}"
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=ink(shares[y][x]))
    axes.set_xticks(range(len(columns)), [_short(text) for text in columns], fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_title("Share of the owning parent's figure (*); [90 % interval]", fontsize=10, loc="left")
    # pointed ends: there are shares beyond both
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, extend="both")
    bar.ax.yaxis.set_major_formatter(_percent())
    return _png(figure)


def pareto_picture(view: TuneView) -> bytes:
    """What each candidate kept of two tasks: the front, the winner, the plain sum; and the same held out."""
    x, y = _two_tasks(view)
    figure = _figure(6.4, 5.2)
    axes = figure.subplots()
    complete = [trial for trial in view.trials if trial.complete]
    dropped = [trial for trial in view.trials if not trial.complete]
    for trials, style in (
        (dropped, {"s": 14, "color": FAINT, "alpha": 0.5, "label": "dropped early"}),
        (complete, {"s": 30, "color": STRONG, "alpha": 0.7, "label": "seen in full"}),
    ):
        axes.scatter([t.kept[x] for t in trials], [t.kept[y] for t in trials], **style)
    front = sorted((t.kept[x], t.kept[y]) for t in complete if t.number in view.front)
    axes.plot([a for a, _ in front], [b for _, b in front], color=STRONG, linewidth=1, label="front")
    shown = [(trial.kept[x], trial.kept[y]) for trial in complete]
    marked = {view.plain: ("s", "plain sum"), view.winner: ("*", "winner")}
    if view.winner == view.plain:
        marked = {view.winner: ("*", "winner: the plain sum")}
    for number, (marker, name) in marked.items():
        kept = view.trials[number].kept
        axes.scatter([kept[x]], [kept[y]], marker=marker, s=170, color="none", edgecolor=INK, linewidth=1.4, label=name)
        held = {row.task: row.retention.value for row in view.heldout if row.trial == number and row.retention}
        if x in held and y in held:
            axes.plot([kept[x], held[x]], [kept[y], held[y]], color=FAINT, linewidth=0.8, linestyle=":")
            axes.scatter([held[x]], [held[y]], marker=marker, s=70, color=FAINT, label=f"{name}, held out")
            shown.append((held[x], held[y]))
    # those dropped early lie anywhere; the picture is about the others
    for place, zoom in enumerate((axes.set_xlim, axes.set_ylim)):
        zoom(min(point[place] for point in shown) - 0.02, max(point[place] for point in shown) + 0.02)
    for axis, task in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_formatter(_percent())
        axis.set_label_text(f"kept of {task}")
    axes.legend(fontsize=8, loc="best", frameon=False)
    axes.set_title(_title(view), fontsize=10, loc="left")
    return _png(figure)


def weights_picture(view: TuneView) -> bytes:
    """The smallest share over the weight of each parent, one panel a parent; a row of them for each group of layers."""
    rows = max(1, len(view.layer_groups))
    figure = _figure(1.2 + 3.4 * len(view.parents), 0.4 + 3.2 * rows)
    panels: Any = figure.subplots(rows, len(view.parents), sharey=True, squeeze=False)
    complete = [trial for trial in view.trials if trial.complete]
    dropped = [trial for trial in view.trials if not trial.complete]
    for place, (axes, parent) in enumerate(zip(panels.flat, view.searched, strict=True)):
        axes.scatter(
            [view.weights(t)[place] for t in dropped], [t.worst for t in dropped], s=14, color=FAINT, alpha=0.5,
            label="dropped early",
        )  # fmt: skip
        for kind, colour in zip(_kinds(complete), (STRONG, "#d9730d", "#1a7f37", "#8250df"), strict=False):
            these = [trial for trial in complete if _kind(trial) == kind]
            axes.scatter(
                [view.weights(t)[place] for t in these], [t.worst for t in these], s=26, color=colour, label=kind
            )
        winner = view.trials[view.winner]
        axes.scatter(
            [view.weights(winner)[place]],
            [winner.worst],
            marker="*",
            s=180,
            color="none",
            edgecolor=INK,
            linewidth=1.4,
            label="winner",
        )
        axes.set_xlabel(f"weight of {_short(parent)}", fontsize=9)
        axes.yaxis.set_major_formatter(_percent())
    for row in panels:
        row[0].set_ylabel("smallest share kept", fontsize=9)
    panels[0][0].legend(fontsize=8, frameon=False)
    panels[0][0].set_title(_title(view), fontsize=10, loc="left")
    return _png(figure)


def trials_picture(view: TuneView) -> bytes:
    """Parallel coordinates: one line a candidate, over its weights, what it kept, and its smallest share."""
    names = [
        *("\n".join(["weight", *(_short(part, 18) for part in name.split(" "))]) for name in view.searched),
        *(f"kept\n{t}" for t in view.tasks),
        "smallest\nshare",
    ]
    rows = {t.number: [*view.weights(t), *t.kept.values(), t.worst] for t in view.trials}
    spans = [(min(column), max(column)) for column in zip(*rows.values(), strict=True)]
    figure = _figure(1.5 + 1.5 * len(names), 4.2)
    axes = figure.subplots()
    colours = _colours()
    low, high = spans[-1]
    for trial in sorted(view.trials, key=lambda trial: trial.worst):
        heights = [(v - a) / (b - a) if b > a else 0.5 for v, (a, b) in zip(rows[trial.number], spans, strict=True)]
        won = trial.number == view.winner
        axes.plot(
            range(len(names)),
            heights,
            color=INK if won else colours((trial.worst - low) / (high - low) if high > low else 1.0),
            linewidth=2.2 if won else 1.0,
            alpha=1.0 if trial.complete else 0.55,
        )
    for place, (a, b) in enumerate(spans):
        axes.axvline(place, color=FAINT, linewidth=0.6)
        unit = "{:.2f}" if place < len(view.searched) else "{:.1%}"
        axes.text(place, -0.03, unit.format(a), ha="center", va="top", fontsize=8, color=FAINT)
        axes.text(place, 1.03, unit.format(b), ha="center", va="bottom", fontsize=8, color=FAINT)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.tick_params(axis="x", pad=16, length=0)
    axes.set_yticks([])
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(_title(view) + "; the winner in black, those dropped early pale", fontsize=10, loc="left", pad=18)
    for side in axes.spines.values():
        side.set_visible(False)
    return _png(figure)


def ink(share: float) -> str:
    """What can be read on the colour of this share."""
    return "white" if share < FLOOR + 0.08 or share > 0.96 else INK


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # deferred: half a second, and only pictures need it

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap  # deferred: see _figure

    return LinearSegmentedColormap.from_list("lines", LINES)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter  # deferred: see _figure

    return PercentFormatter(1.0)  # with as many decimals as the ticks need: 87.5% is not 88%


def _values(row: RetentionRow, parents: Sequence[str]) -> list[float]:
    return [row.base, *(row.parents[parent] for parent in parents), row.child]


def _share(row: RetentionRow, value: float) -> float:
    over, under = value, row.parents[row.owner]
    if row.direction == "lower":
        over, under = under, over
    return over / under if under else 0.0


def _bounds(interval: Interval | None) -> str:
    return f" [{100 * interval.low:.0f}, {100 * interval.high:.0f}]" if interval else ""


def _figures(value: float) -> str:
    """Three of them, zeros at the end too."""
    return f"{value:#.3g}".rstrip(".")


def _two_tasks(view: TuneView) -> tuple[str, str]:
    """The two tasks that the winner keeps least of; a single task stands on both axes."""
    kept = view.trials[view.winner].kept
    tasks = sorted(view.tasks, key=lambda task: kept[task])[:2]
    first, last = sorted((tasks[0], tasks[-1]), key=view.tasks.index)
    return first, last


def _kind(trial: TrialView) -> str:
    return f"{trial.method} r{trial.rank}"


def _kinds(trials: Sequence[TrialView]) -> list[str]:
    return list(dict.fromkeys(map(_kind, trials)))


def _title(view: TuneView) -> str:
    return f"{len(view.trials)} candidates for {view.used:.0f} full evaluations"


def _short(text: str, limit: int = _WIDE) -> str:
    # a dollar would begin a formula
    text = text.replace("$", r"\$")
    return text if len(text) <= limit else text[: limit - 1] + "…"

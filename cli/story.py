"""The demo: register, merge, evaluate, promote and look back, on shipped adapters, told step by step.

It uses the registry as every caller does, through `RegistryAPI`; each step names the command that does the same.
Running it again finds what is there: the same bytes, the same recipes and the same evaluations are never made twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..registry.api import Registered, RegistryAPI, RetentionView, VersionView
from ..registry.domain.errors import JobFailed, Unavailable
from ..registry.domain.job import Job
from ..registry.domain.recipe import MergeRequest
from ..registry.domain.refs import parse_parent, parse_ref
from ..registry.services import words
from . import lineage_text, views
from .batch import read_batch
from .follow import version_of
from .output import Output, columns

PARENTS = ("translate:v3", "chat:v5")
INTO = "translate-chat"
SVD_RANK = 4
SAMPLES = 20
LEGEND = """\
nll: loss per token of the answer, lower is better; chrf: character overlap, higher is better
* owns the task; gain kept: the share of its gain over the base; [90 % interval, paired]"""

Wait = Callable[[Job], Job]


@dataclass(slots=True)
class Story:
    """What the demo made; `left_out` says which part could not be told here and why."""

    home: str
    registered: list[str] = field(default_factory=list)
    merged: list[VersionView] = field(default_factory=list)
    retention: list[RetentionView] = field(default_factory=list)
    promoted: str = ""
    left_out: str = ""
    seconds: float = 0.0


def tell(
    registry: RegistryAPI, home: Path, examples: Path, out: Output, *, write: Callable[[str], None], wait: Wait
) -> Story:
    """Carry out the demo and write about it as it goes. `wait` follows a job to its end."""
    started = time.monotonic()
    story = Story(str(home))
    chapter = _Chapters(out, write)
    with chapter("Register", "two LoRA families on one small base, each version trained from the one before"):
        _register(registry, examples, story, chapter)
    with chapter("Merge", "one adapter out of two, exactly and then at half the rank"):
        _merge(registry, story, chapter, wait)
    with chapter(
        "Evaluate", f"base, parents and both merges, on {SAMPLES} samples a task (a real run takes 100 and more)"
    ):
        _evaluate(registry, examples, story, chapter, wait, out)
    with chapter("Promote", "the better one; MLflow's alias follows"):
        _promote(registry, story, chapter, out)
    with chapter("Look back", "where it comes from"):
        chapter.command(f"lineage {story.promoted} --up")
        chapter.text(lineage_text.tree(registry.lineage(parse_ref(story.promoted), direction="up"), out))
    story.seconds = round(time.monotonic() - started, 1)
    return story


def look_next(story: Story, home: Path) -> str:
    """The commands to try now."""
    lines = [
        ("serve", "the same in MLflow's pages"),
        (f"show {story.promoted}", "all about it; its receipt with -o json"),
        (f"diff {story.merged[0].ref} {story.merged[-1].ref}", "what the lower rank changed"),
        (f"verify {story.promoted}", "run the recipe again, compare the bytes"),
        (f"history {INTO} --verify", "who promoted what, when and why"),
    ]
    width = max(len(command) for command, _ in lines)
    shown = "\n".join(f"   adapterctl {command.ljust(width)}  {about}" for command, about in lines)
    return f"Done in {story.seconds:.0f} s. Look around:\n   export ADAPTERCTL_HOME={home}\n{shown}"


def _register(registry: RegistryAPI, examples: Path, story: Story, chapter: _Chapters) -> None:
    chapter.command("register --batch examples/adapters/batch.yaml")
    entries = read_batch(examples / "adapters" / "batch.yaml")
    done: list[Registered] = [entry.register(registry) for entry in entries]
    story.registered = [registered.version.ref for registered in done]
    by_name: dict[str, list[VersionView]] = {}
    for registered in done:
        by_name.setdefault(registered.version.name, []).append(registered.version)
    rows = [
        [name, f"v{family[0].number} … v{family[-1].number}", _shape(family[-1]), family[-1].dataset or ""]
        for name, family in by_name.items()
    ]
    chapter.table(rows)
    if not any(registered.created for registered in done):
        chapter.text("all of them are here since an earlier demo")


def _merge(registry: RegistryAPI, story: Story, chapter: _Chapters, wait: Wait) -> None:
    for method, rank in (("cat", None), ("svd", SVD_RANK)):
        chapter.command(f"merge {' '.join(PARENTS)} --method {method}" + (f" --rank {rank}" if rank else ""))
        request = MergeRequest(parents=tuple(map(parse_parent, PARENTS)), into=INTO, method=method, rank=rank)
        version = _merged(registry, request, wait)
        story.merged.append(version)
        lost = words.loss(version.loss) if version.loss else "nothing"
        proof = len((version.receipt or {}).get("checks", ()))
        chapter.table([[version.ref, _shape(version), f"loses {lost} of the exact sum", f"{proof} checks passed"]])


def _merged(registry: RegistryAPI, request: MergeRequest, wait: Wait) -> VersionView:
    submitted = registry.merge(request)
    if submitted.version is not None:
        return submitted.version
    assert submitted.job is not None
    return version_of(registry, submitted.into, wait(submitted.job))


def _evaluate(registry: RegistryAPI, examples: Path, story: Story, chapter: _Chapters, wait: Wait, out: Output) -> None:
    refs = [version.ref for version in story.merged]
    # Only now: a merge whose parents have suites is evaluated at once, on all samples, which takes minutes.
    for name in ("translate", "chat"):
        chapter.command(f"suite set {name} examples/suites/{name}.yaml")
        registry.set_suite(name, str(examples / "suites" / f"{name}.yaml"))
    chapter.command(f"eval {' '.join(refs)} --limit {SAMPLES}")
    wanted = [parse_ref(ref) for ref in refs]
    registry.import_reports(examples / "results")  # base and parents, so that only the merges are computed here
    try:
        wait(registry.evaluate(wanted, suites=(), limit=SAMPLES))
    except (Unavailable, JobFailed) as error:
        story.left_out = f"evaluation: {error.message}"
        chapter.text(f"left out: {error.message}" + (f"\n→ {error.hint}" if error.hint else ""))
        return
    story.retention = [registry.retention(ref) for ref in wanted]
    for table in story.retention:
        chapter.text(views.retention_text(table, out))
        chapter.text("")
    chapter.text(LEGEND)


def _promote(registry: RegistryAPI, story: Story, chapter: _Chapters, out: Output) -> None:
    best, reason = _better(story)
    chapter.command(f"promote {best} --to production --reason '{reason}'")
    version = registry.version(parse_ref(best))
    if "production" in version.stages:
        chapter.text(f"production is {best} since an earlier demo")
    else:
        chapter.text(views.stage_event_text(registry.promote(parse_ref(best), to="production", reason=reason)))
    story.promoted = best


def _better(story: Story) -> tuple[str, str]:
    """By what was kept of the parents' gains, on average; without an evaluation by what the merge lost."""
    kept = {view.ref: _mean([row.gain_kept.value for row in view.rows if row.gain_kept]) for view in story.retention}
    if all(value is not None for value in kept.values()) and kept:
        best = max(story.merged, key=lambda version: kept[version.ref] or 0.0)
        return best.ref, f"keeps {kept[best.ref]:.0%} of the gain"
    best = min(story.merged, key=lambda version: version.loss or 0.0)
    return best.ref, "loses the least of its parents"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shape(version: VersionView) -> str:
    return f"rank {version.rank}, {views.size(version.size_bytes)}"


class _Chapters:
    """Numbered headings, commands and what they answered, indented below them."""

    def __init__(self, out: Output, write: Callable[[str], None]) -> None:
        self._out = out
        self._write = write
        self._number = 0

    @contextmanager
    def __call__(self, title: str, about: str) -> Iterator[None]:
        self._number += 1
        self._write(f"{self._out.paint(f'{self._number}  {title}', 'bold')}  {about}")
        self._write("")
        yield
        self._write("")

    def command(self, words: str) -> None:
        self._write(self._out.paint(f"   $ adapterctl {words}", "cyan"))

    def text(self, text: str) -> None:
        for line in text.splitlines() or [""]:
            self._write(f"   {line}".rstrip())

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        self.text("\n".join(columns(rows)))

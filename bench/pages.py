"""How long a person waits for lineage in a browser: the picture of a version, and the page of a family of 2,000."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from lineage import _fill_lineage, _registry
from measure import Figure, bench
from playwright.sync_api import sync_playwright

from adapterctl.registry.api import Look
from adapterctl.registry.domain.refs import Ref
from adapterctl.registry.services import browse
from adapterctl.registry.stores.sql.engine import Database
from adapterctl.registry.stores.sql.ledger import SqlLedger

PICTURES, VISITS = 200, 5


@bench(
    "picture_ms",
    "the SVG of one of 100,000 versions and its neighbours, 95th percentile (SQLite)",
    unit=" ms",
    at_most=50,
)
def picture_ms(room: Path) -> Figure:
    ledger, refs = _large(room)
    asked = random.Random(3).sample(refs, PICTURES + 1)
    draw: Callable[[Ref], int] = lambda ref: len(browse.picture(ledger, ref, Look(depth=1), whole=False).text)  # noqa: E731
    draw(asked.pop())  # the first one loads what draws
    gc.freeze()  # else the ids and rows of this script are searched for garbage again and again, in our time
    times_ms = sorted(_seconds(lambda ref=ref: draw(ref)) * 1000 for ref in asked)
    gc.unfreeze()
    ledger.close()
    return Figure(
        times_ms[int(len(times_ms) * 0.95)], f"median {statistics.median(times_ms):.0f} ms, {PICTURES} versions"
    )


@bench(
    "page_s",
    "the page of a lineage of 2,000 versions, from the request to a page that answers (Chromium)",
    unit=" s",
    at_most=2,
)
def page_s(room: Path) -> Figure:
    ledger, refs = _large(room)
    file = room / "page.html"
    made, seen = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page()
        for _ in range(VISITS):
            made.append(_seconds(lambda: file.write_text(_page(ledger, refs[-1]), encoding="ascii")))
            page.goto(file.as_uri())
            seen.append(page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd") / 1000)
        browser.close()
    ledger.close()
    drawn, shown = statistics.median(made), statistics.median(seen)
    return Figure(drawn + shown, f"{drawn:.2f} s to draw the nearest 300, {shown:.2f} s in the browser")


def _page(ledger: SqlLedger, ref: Ref) -> str:
    return browse.page(ledger, ref, Look(direction="up"), whole=False, root="../../", mlflow="../../").text


def _large(room: Path) -> tuple[SqlLedger, list[Ref]]:
    """50 families of 2,000 versions, all of one adapter; the last ones descend from nearly their whole family."""
    database: Database = _registry(room)
    _fill_lineage(database)
    return SqlLedger(database), [Ref("family", number=number) for number in range(1, 100_801)]


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun

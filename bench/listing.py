"""How long a client waits for a page of a list in a registry of 100,000 versions, and what the server takes for it.

5,000 adapters have ten versions each, and one has 50,000.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

from measure import Figure, bench
from service import _resident_mb, _serving, two_adapters

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "plugins"))
from many import fill

ADAPTERS, EACH = 5_000, 10
PAGE, MOST, VISITS = 100, 1_000, 21


@bench(
    "page_ms",
    "a page of 100 over REST in a registry of 100,000 versions: the slowest of the first and the last one of versions"
    " and of adapters, each in the median",
    unit=" ms",
    at_most=50,
)
def page_ms(room: Path) -> Figure:
    registry = two_adapters(room)
    fill(registry.ledger._db, adapters=ADAPTERS, each=EACH)
    registry.ledger.close()
    with _serving(room) as (process, port):
        root = f"http://127.0.0.1:{port}/v1"
        times: dict[str, float] = {}
        for what in ("versions", "adapters"):
            times[f"{what}, first"] = _median_ms(f"{root}/{what}?max_results={PAGE}")
        before_mb = _resident_mb(process.pid)
        for what in ("versions", "adapters"):
            *_, place = _places(f"{root}/{what}?max_results={MOST}")
            times[f"{what}, last"] = _median_ms(f"{root}/{what}?max_results={PAGE}&{place}")
        grown_mb = _resident_mb(process.pid) - before_mb
    told = ", ".join(f"{which} {ms:.0f} ms" for which, ms in times.items())
    return Figure(max(times.values()), f"{told}; the server grew by {grown_mb:.0f} MB as both lists were walked")


def _places(address: str) -> Iterator[str]:
    """What leads to each page of a list but the first."""
    token: str | None = ""
    while token is not None:
        token = _ask(f"{address}&page_token={token}" if token else address)["next_page_token"]
        if token is not None:
            yield f"page_token={quote(token)}"


def _median_ms(address: str) -> float:
    times = []
    for _ in range(VISITS):
        begun = time.perf_counter()
        _ask(address)
        times.append((time.perf_counter() - begun) * 1000)
    return statistics.median(times)


def _ask(address: str) -> Any:
    with urlopen(address, timeout=60) as answer:
        return json.load(answer)

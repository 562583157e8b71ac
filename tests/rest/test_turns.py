"""What the server computes itself is bounded: in one answer, and in how many it works on at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from tiny import write_tiny_adapter

from adapterctl.registry.domain.errors import Unavailable
from adapterctl.registry.rest import routes
from adapterctl.registry.rest.turns import AT_ONCE, WAITING, Turns


def test_a_plan_that_takes_long_to_compute_is_answered_without_its_loss_or_refused(
    served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for seed, name in enumerate(("long", "short")):
        folder = write_tiny_adapter(tmp_path / name, seed=seed, linear={"q_proj": (64, 64)})
        served.registry.register(str(folder), name=name)
    monkeypatch.setattr(routes, "MOST_WORK", 5e5)

    def plan(parents: list[str]) -> Any:
        body = {"parents": parents, "method": "ties_svd", "rank": 3}
        return served.client.post("/v1/plans", json=body, headers=served.auth("read"))

    answered, refused = plan(["long", "short"]), plan(["long", "short"] * 32)
    monkeypatch.setattr(routes, "MOST_WORK", 1)
    resized = served.client.post("/v1/resize-plans", json={"ref": "long", "energy": 0.9}, headers=served.auth("read"))

    (row,) = (row for row in answered.json()["forecasts"] if row["method"] == "ties_svd")
    assert (answered.status_code, row["loss"], "--max-loss" in row["note"]) == (200, None, True)
    assert [(each.status_code, each.json()["code"]) for each in (refused, resized)] == [(422, "refused")] * 2


def test_so_many_are_served_at_once_so_many_wait_and_all_others_are_sent_away():
    begun: list[int] = []
    go_on = Event()

    def work(number: int) -> int:
        begun.append(number)
        assert go_on.wait(60)
        return number

    async def ask() -> list[int | BaseException]:
        turns, count = Turns(), AT_ONCE + WAITING + 3
        asked = [asyncio.create_task(turns.take(lambda number=number: work(number))) for number in range(count)]
        await asyncio.wait(asked[-3:])
        while len(begun) < AT_ONCE:
            await asyncio.sleep(0)
        assert len(begun) == AT_ONCE
        go_on.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [*answers, await turns.take(lambda: -1)]

    *served, first, second, third, after = asyncio.run(ask())

    assert served == list(range(AT_ONCE + WAITING))
    assert {type(each) for each in (first, second, third)} == {Unavailable}
    assert after == -1


def test_who_is_sent_away_is_told_when_to_come_back(served: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adapterctl.registry.rest.turns.WAITING", -AT_ONCE)

    answer = served.client.post("/v1/plans", json={"parents": ["a", "b"]}, headers=served.auth("read"))

    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1

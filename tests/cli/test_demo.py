"""The demo on the shipped adapters, without what evaluates: it says so and tells the rest. And its home is its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterctl.registry.services import evaluate


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where not all of `adapterctl[eval]` is installed."""
    monkeypatch.setattr(evaluate, "ENGINE_PACKAGES", (*evaluate.ENGINE_PACKAGES, "surely_not_installed"))


def test_demo_tells_the_story_and_what_it_leaves_out_and_again_finds_all(
    run: Callable[..., Any], no_extra: None, tmp_path: Path
):
    home = str(tmp_path / "demo")

    first = run("demo", "--home", home)
    again = run("demo", "--home", home, "-o", "json").data

    for chapter in ("1  Register", "2  Merge", "3  Evaluate", "4  Promote", "5  Look back"):
        assert f"{chapter}  " in first.stdout
    assert "left out: evaluation needs surely_not_installed" in first.stdout
    assert "└── translate:v1  trained from" in first.stdout
    assert all(len(line) <= 100 for line in first.stdout.splitlines() if home not in line)
    assert "\x1b" not in first.stdout
    assert again["registered"] == [*(f"translate:v{n}" for n in range(1, 4)), *(f"chat:v{n}" for n in range(1, 6))]
    assert [version["ref"] for version in again["merged"]] == ["translate-chat:v1", "translate-chat:v2"]
    assert (again["merged"][0]["method"], again["merged"][1]["method"]) == ("cat", "svd")
    assert again["merged"][0]["loss"] < 1e-6 < again["merged"][1]["loss"]
    assert again["promoted"] == "translate-chat:v1"
    history = run("history", "translate-chat", "--home", home, "-o", "json").data
    assert [event["action"] for event in history["events"]] == ["promote"]


def test_demo_does_not_touch_a_folder_that_holds_something_else(run: Callable[..., Any], tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")

    ran = run("demo", "--home", str(tmp_path), code=5)

    assert "adapterctl demo --home DIR" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

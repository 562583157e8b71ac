"""The proof in small, as `make chaos` runs it at length: nothing is lost or doubled, and the judge would notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # a busy machine makes every kill dearer
ROOT = Path(__file__).resolve().parents[2]


def chaos(*arguments: str, room: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "chaos" / "run.py"), "--no-record", "--room", str(room), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / ".dev"), str(ROOT / "tests" / "plugins")))},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("database", ["sqlite", "celery"])
def test_merges_under_faults_are_neither_lost_nor_doubled(database: str, tmp_path: Path):
    small = ("--jobs", "8", "--faults", "4", "--clients", "2", "--not-served")

    done = chaos("--seeds", "1", "--database", database, *small, room=tmp_path)

    assert (done.returncode, "8 versions" in done.stdout) == (0, True), done.stdout + done.stderr
    assert "4 faults" in done.stdout


def test_one_promoter_wins_each_round_and_one_executor_each_race_and_a_missing_safety_is_noticed(tmp_path: Path):
    small = ("--promoters", "8", "--rounds", "3", "--races", "8")

    done = chaos("--only", "promote,race,teeth", "--database", "sqlite", *small, room=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "moves 3, refused 21" in done.stdout
    assert "races 8, registered by the rightful one 8, by the one that lost its lease 0, versions 8" in done.stdout
    assert done.stdout.count("without ") == 6

"""Pulling: what a server lists is not believed before it was looked at."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterctl.registry.domain.errors import Conflict, Corrupt
from adapterctl.registry.domain.version import FileRecord
from adapterctl.registry.services.pull import pull


def test_a_new_folder_is_as_open_as_any_other_and_no_thread_meets_another_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "plain").mkdir()
    asked: list[int] = []
    monkeypatch.setattr(os, "umask", asked.append)

    pull("translate:v1", [], tmp_path / "target", lambda record, to: None)

    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert not asked, "reading it means to change it for all threads"


def test_a_link_is_followed_to_the_folder_that_it_leads_to(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "target").symlink_to("real")
    files = [FileRecord("a", 2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")]

    pull("translate:v1", files, tmp_path / "target", lambda record, to: to.write_bytes(b"{}"))

    assert (tmp_path / "real" / "a").read_bytes() == b"{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "target"]


PULL = """
import sys
from pathlib import Path
from adapterctl.registry.domain.version import FileRecord
from adapterctl.registry.services.pull import pull

def fetch(record, to):
    to.write_bytes(b"{")
    print("half", flush=True)
    sys.stdin.read()

pull("translate:v1", [FileRecord("a", 2, "0" * 64)], Path(sys.argv[1]), fetch)
"""


@pytest.fixture
def half_way(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A pull to `tmp_path / "target"` of a process of its own, which has half a file."""
    words = [sys.executable, "-c", PULL, str(tmp_path / "target")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        yield process
        process.kill()


def test_the_next_to_the_same_place_removes_what_a_killed_one_left_and_nothing_else(
    half_way: subprocess.Popen[str], tmp_path: Path
):
    others = {".target.lock", ".target.swp.lock", ".targets.0123456789ab.lock", ".target.0123456789ab"}
    for name in others:
        (tmp_path / name).touch()
    half_way.kill()
    half_way.wait()
    left = {path.name for path in tmp_path.iterdir()} - others

    pull("translate:v1", [], tmp_path / "target", lambda record, to: None)

    assert len(left) == 2, "the folder and its lock"
    assert {path.name for path in tmp_path.iterdir()} == {"target"} | others


def test_what_another_one_is_writing_there_stays(half_way: subprocess.Popen[str], tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(Conflict, match="another command is writing to"):
        pull("translate:v1", [], tmp_path / "target", lambda record, to: None)

    assert sorted(tmp_path.rglob("*")) == before
    assert any(path.name == "a" for path in before)


def test_two_that_began_at_once_do_not_write_over_each_other(tmp_path: Path):
    files = [FileRecord("a", 2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")]

    def while_another_ends(record: FileRecord, to: Path) -> None:
        to.write_bytes(b"{}")
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "theirs").touch()

    with pytest.raises(Conflict, match="exists and is not an empty folder"):
        pull("translate:v1", files, tmp_path / "target", while_another_ends)

    assert sorted(path.name for path in tmp_path.rglob("*")) == ["target", "theirs"]


def test_a_filesystem_without_locks_is_pulled_to_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("adapterctl.registry.locks.flock", no_locks)

    pull("translate:v1", [], tmp_path / "target", lambda record, to: None)

    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("path", ["../escaped", "/escaped", "a/../../escaped", "a//b", "", "."])
def test_a_file_outside_the_folder_is_refused_before_anything_is_written(path: str, tmp_path: Path):
    files = [FileRecord("adapter_config.json", 2, "0" * 64), FileRecord(path, 2, "0" * 64)]

    with pytest.raises(Corrupt, match="no file below its folder"):
        pull("translate:v1", files, tmp_path / "target", lambda record, to: to.write_bytes(b"{}"))

    assert list(tmp_path.iterdir()) == []
